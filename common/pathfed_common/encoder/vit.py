"""The vision transformer in timm's parameter names and semantics.

No BatchNorm, no dropout, no stochastic depth: a tile's tokens depend on that tile alone, which per-patient clipping rests on. Every layer
that draws random weights is built without drawing (`skip_init`) and then filled from a generator of its own, so that building an encoder
never touches torch's global generator.

Legend of shape suffixes: N tiles, C channels, H and W pixels, L patches, K visible patches, T tokens, D token width, h heads, d head width.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from pathfed_common.encoder.spec import EncoderSpec

#: timm's value; torch's own default is 1e-5.
LAYER_NORM_EPS = 1e-6
_TOKEN_STD = 0.02


def linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer that has drawn nothing: its weights are whatever the memory held until `initialise_layers` fills them."""
    layer: nn.Linear = skip_init(nn.Linear, inputs, outputs, bias=bias)
    return layer


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each to a token."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        proj: nn.Conv2d = skip_init(nn.Conv2d, 3, spec.embed_dim, spec.patch_size, stride=spec.patch_size)
        self.proj = proj

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Tokens (N, L, D), patches row by row."""
        tokens: Tensor = self.proj(images_NCHW).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.heads = spec.num_heads
        self.qkv = linear(spec.embed_dim, 3 * spec.embed_dim, bias=spec.qkv_bias)
        self.proj = linear(spec.embed_dim, spec.embed_dim)

    def forward(self, tokens_NTD: Tensor) -> Tensor:
        """Tokens of the same shape."""
        n, t, width = tokens_NTD.shape
        query_NhTd, key_NhTd, value_NhTd = self.qkv(tokens_NTD).reshape(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed_NhTd = functional.scaled_dot_product_attention(query_NhTd, key_NhTd, value_NhTd)
        mixed: Tensor = self.proj(mixed_NhTd.transpose(1, 2).reshape(n, t, width))
        return mixed


class Mlp(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.fc1 = linear(spec.embed_dim, spec.hidden_dim)
        self.fc2 = linear(spec.hidden_dim, spec.embed_dim)

    def forward(self, tokens_NTD: Tensor) -> Tensor:
        """Tokens of the same shape."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(tokens_NTD)))
        return out


class SwiGluMlp(nn.Module):
    """timm's SwiGLUPacked with SiLU: the first half of the hidden width gates the second."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.fc1 = linear(spec.embed_dim, spec.hidden_dim)
        self.fc2 = linear(spec.hidden_dim // 2, spec.embed_dim)

    def forward(self, tokens_NTD: Tensor) -> Tensor:
        """Tokens of the same shape."""
        gate, value = self.fc1(tokens_NTD).chunk(2, dim=-1)
        out: Tensor = self.fc2(functional.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((spec.embed_dim,), float(spec.init_values or 1.0)))

    def forward(self, tokens_NTD: Tensor) -> Tensor:
        """Tokens of the same shape."""
        return tokens_NTD * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        scaled = spec.init_values is not None
        self.norm1 = nn.LayerNorm(spec.embed_dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(spec)
        self.ls1: nn.Module = LayerScale(spec) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(spec.embed_dim, eps=LAYER_NORM_EPS)
        self.mlp: nn.Module = SwiGluMlp(spec) if spec.mlp == "swiglu" else Mlp(spec)
        self.ls2: nn.Module = LayerScale(spec) if scaled else nn.Identity()

    def forward(self, tokens_NTD: Tensor) -> Tensor:
        """Tokens of the same shape."""
        tokens_NTD = tokens_NTD + self.ls1(self.attn(self.norm1(tokens_NTD)))
        out: Tensor = tokens_NTD + self.ls2(self.mlp(self.norm2(tokens_NTD)))
        return out


class VisionTransformer(nn.Module):
    """The encoder. Its state dict has timm's names and shapes: `EncoderSpec.shapes`."""

    def __init__(self, spec: EncoderSpec, *, generator: torch.Generator | None = None) -> None:
        """Build the encoder with first weights drawn from `generator` (default: a new generator with seed 0)."""
        super().__init__()
        self.spec = spec
        prefix = 0 if spec.no_embed_class else spec.prefix_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.embed_dim)) if spec.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, spec.reg_tokens, spec.embed_dim)) if spec.reg_tokens else None
        self.pos_embed = nn.Parameter(torch.zeros(1, prefix + spec.patches, spec.embed_dim))
        self.patch_embed = PatchEmbed(spec)
        self.blocks = nn.Sequential(*(Block(spec) for _ in range(spec.depth)))
        self.norm = nn.LayerNorm(spec.embed_dim, eps=LAYER_NORM_EPS)
        self._initialise(torch.Generator().manual_seed(0) if generator is None else generator)

    def forward(self, images_NCHW: Tensor, keep_NK: Tensor | None = None) -> Tensor:
        """Normed tokens (N, T, D): class token, register tokens, then the patches.

        Args:
            images_NCHW: normalised images, (N, 3, img_size, img_size).
            keep_NK: indices of the visible patches of each image, int64 in [0, L); the others are dropped after the position embedding
                is added. None: all patches are visible.

        Raises:
            ValueError: images of another shape.
        """
        size = self.spec.img_size
        if images_NCHW.ndim != 4 or images_NCHW.shape[1:] != (3, size, size):
            raise ValueError(f"images must be (N, 3, {size}, {size}), got {tuple(images_NCHW.shape)}")
        prefix_TD, position_TD = self._prefix()
        patches_NLD = self.patch_embed(images_NCHW) + position_TD
        if keep_NK is not None:
            patches_NLD = take_tokens(patches_NLD, keep_NK)
        tokens_NTD = torch.cat([prefix_TD.expand(len(images_NCHW), -1, -1), patches_NLD], dim=1)
        normed: Tensor = self.norm(self.blocks(tokens_NTD))
        return normed

    def _prefix(self) -> tuple[Tensor, Tensor]:
        """Class and register tokens, and the position embedding of the patches, each (1, tokens, D)."""
        count = self.spec.prefix_tokens
        parts: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(parts, dim=1) if parts else self.pos_embed[:, :0]
        if self.spec.no_embed_class:
            return prefix, self.pos_embed
        return prefix + self.pos_embed[:, :count], self.pos_embed[:, count:]

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        initialise_layers(self, generator)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                token.normal_(std=_TOKEN_STD, generator=generator)
        self.pos_embed[:, self.pos_embed.shape[1] - self.spec.patches :] = sine_positions(self.spec.grid, self.spec.embed_dim)


def take_tokens(tokens_NLD: Tensor, keep_NK: Tensor) -> Tensor:
    """The tokens at the given places of each row: (N, K, D)."""
    index_NKD = keep_NK.unsqueeze(-1).expand(-1, -1, tokens_NLD.shape[-1])
    return torch.gather(tokens_NLD, 1, index_NKD)


@torch.no_grad()
def initialise_layers(module: nn.Module, generator: torch.Generator) -> None:
    """Fill every linear and convolution layer: weights Xavier uniform, biases zero, as He et al. (2022) do. Norms are left at 1 and 0."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            # A patch projection is a linear layer on the flattened patch, so its fans are those of the flattened weight.
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1), generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()


def sine_positions(grid: int, width: int) -> Tensor:
    """Fixed two-dimensional sine and cosine position embedding of a square grid: float32 (grid * grid, width), row by row.

    Source: He et al. (2022), arXiv:2111.06377, after Vaswani et al. (2017): half of the channels code x, half y, with frequencies
    10000^(-i / (width / 4)).
    """
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows, columns = np.divmod(np.arange(grid * grid, dtype=np.float64), grid)
    angles = [np.outer(axis, frequencies) for axis in (columns, rows)]
    table = np.concatenate([part(angle) for angle in angles for part in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table.astype(np.float32))
