"""The vision transformer in timm's parameter names and semantics.

Guarantees:
    - **A tile's tokens depend on that tile alone**, on its row of the arguments, and on the weights; per-patient clipping rests on it.
      There is no BatchNorm and no dropout, and nothing here draws a random number: hidden and masked patches and dropped branches are
      arguments, drawn by the objective from the patient's own source.
    - **Every parameter belongs to a plain layer**: `nn.Linear`, `nn.Conv2d` (the patch projection), `nn.LayerNorm`, `LayerScale`, or to
      `VisionTransformer` itself (its tokens and position embedding). Engines that compute gradients layer by layer have a rule for each.
    - **No decision depends on the numbers in a tensor**, so that a forward compiles to one graph.

Every layer that draws random weights is built without drawing (`skip_init`) and then filled from a generator of its own, so that building
an encoder never touches torch's global generator.

Legend of shape suffixes: N tiles, C channels, H and W pixels, L patches, K visible patches, T tokens, D token width, h heads, d head width.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from pathfed_common.encoder.positions import resample_positions
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

    def forward(self, tokens_NTD: Tensor, drop_N2: Tensor | None = None) -> Tensor:
        """Tokens of the same shape; `drop_N2` holds each tile's factor on the attention branch and on the MLP branch, None: both are 1."""
        attended_NTD = self.ls1(self.attn(self.norm1(tokens_NTD)))
        tokens_NTD = tokens_NTD + (attended_NTD if drop_N2 is None else attended_NTD * drop_N2[:, 0, None, None])
        mixed_NTD = self.ls2(self.mlp(self.norm2(tokens_NTD)))
        out: Tensor = tokens_NTD + (mixed_NTD if drop_N2 is None else mixed_NTD * drop_N2[:, 1, None, None])
        return out


class VisionTransformer(nn.Module):
    """The encoder. Its state dict has timm's names and shapes: `EncoderSpec.shapes`.

    The tokens and the position embedding may be given one to a tile, (N, tokens, D) in place of (1, tokens, D), by
    `torch.func.functional_call`: an engine reads the gradient of each tile off them.
    """

    def __init__(self, spec: EncoderSpec, *, generator: torch.Generator | None = None, activation_checkpointing: bool = False) -> None:
        """Build the encoder.

        Args:
            spec: its shape.
            generator: draws the first weights; default: a new generator with seed 0.
            activation_checkpointing: see `checkpoint_blocks`.
        """
        super().__init__()
        self.spec = spec
        self.activation_checkpointing = activation_checkpointing
        prefix = 0 if spec.no_embed_class else spec.prefix_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.embed_dim)) if spec.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, spec.reg_tokens, spec.embed_dim)) if spec.reg_tokens else None
        self.pos_embed = nn.Parameter(torch.zeros(1, prefix + spec.patches, spec.embed_dim))
        self.patch_embed = PatchEmbed(spec)
        self.blocks = nn.Sequential(*(Block(spec) for _ in range(spec.depth)))
        self.norm = nn.LayerNorm(spec.embed_dim, eps=LAYER_NORM_EPS)
        self._initialise(torch.Generator().manual_seed(0) if generator is None else generator)

    def checkpoint_blocks(self, on: bool = True) -> None:
        """Keep only the tokens between blocks for the backward and compute each block again there. Values and gradients keep every bit."""
        self.activation_checkpointing = on

    def forward(
        self,
        images_NCHW: Tensor,
        keep_NK: Tensor | None = None,
        *,
        masked_NL: Tensor | None = None,
        mask_token_D: Tensor | None = None,
        drop_ND: Tensor | None = None,
    ) -> Tensor:
        """Normed tokens (N, T, D): class token, register tokens, then the patches, row by row.

        Args:
            images_NCHW: normalised images, (N, 3, H, W); H and W any multiples of the patch size. Where they are not the spec's image
                size, the position embedding is resampled (`resample_positions`).
            keep_NK: indices of the visible patches of each image, int64 in [0, L); the others are dropped after the position embedding
                is added. None: all patches are visible.
            masked_NL: bool; where true, `mask_token_D` stands in the place of the projected patch, and gets that place's position.
            mask_token_D: the mask token, (D,), or one for each image, (N, 1, D). It is the caller's: timm's encoders have none.
            drop_ND: stochastic depth: each tile's factor on each residual branch, float (N, 2 * depth), a block's attention branch before
                its MLP branch, as `stochastic_depth.drop_path_factors` makes it. None: no branch is dropped. Here alone the last
                axis is not the token width. A branch with factor 0 for every tile gets gradients that are zero, not absent ones.

        Raises:
            ValueError: an argument of another shape, or a mask without a mask token.
        """
        self._check(images_NCHW, masked_NL, mask_token_D, drop_ND)
        rows, columns = (side // self.spec.patch_size for side in images_NCHW.shape[2:])
        prefix_TD, position_LD = self._prefix(rows, columns)
        patches_NLD = self.patch_embed(images_NCHW)
        if masked_NL is not None and mask_token_D is not None:
            patches_NLD = torch.where(masked_NL.unsqueeze(-1), mask_token_D.to(patches_NLD.dtype), patches_NLD)
        patches_NLD = patches_NLD + position_LD
        if keep_NK is not None:
            patches_NLD = take_tokens(patches_NLD, keep_NK)
        tokens_NTD = torch.cat([prefix_TD.expand(len(images_NCHW), -1, -1), patches_NLD], dim=1)
        # In the tokens' own type, so that a factor never changes it.
        factors_ND = None if drop_ND is None else drop_ND.to(tokens_NTD)
        normed: Tensor = self.norm(self._through_blocks(tokens_NTD, factors_ND))
        return normed

    def _through_blocks(self, tokens_NTD: Tensor, factors_ND: Tensor | None) -> Tensor:
        for index, block in enumerate(self.blocks):
            factors_N2 = None if factors_ND is None else factors_ND[:, 2 * index : 2 * index + 2]
            if self.activation_checkpointing:
                # Nothing in a block draws, so there is no generator's state to keep.
                tokens_NTD = checkpoint(block, tokens_NTD, factors_N2, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens_NTD = block(tokens_NTD, factors_N2)
        return tokens_NTD

    def _check(self, images_NCHW: Tensor, masked_NL: Tensor | None, mask_token_D: Tensor | None, drop_ND: Tensor | None) -> None:
        side, shape = self.spec.patch_size, tuple(images_NCHW.shape)
        if len(shape) != 4 or shape[1] != 3 or any(pixels < side or pixels % side for pixels in shape[2:]):
            raise ValueError(f"images must be (N, 3, H, W) with H and W multiples of the patch size {side}, got {shape}")
        if (masked_NL is None) != (mask_token_D is None):
            raise ValueError("masked_NL and mask_token_D go together: one is given, the other is not")
        expected = {
            "masked_NL": (masked_NL, (shape[0], (shape[2] // side) * (shape[3] // side))),
            "mask_token_D": (mask_token_D, self._mask_shape(mask_token_D, shape[0])),
            "drop_ND": (drop_ND, (shape[0], 2 * self.spec.depth)),
        }
        for name, (tensor, wanted) in expected.items():
            if tensor is not None and tuple(tensor.shape) != wanted:
                raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")

    def _mask_shape(self, mask_token_D: Tensor | None, images: int) -> tuple[int, ...]:
        one = mask_token_D is None or mask_token_D.ndim < 3
        return (self.spec.embed_dim,) if one else (images, 1, self.spec.embed_dim)

    def _prefix(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Class and register tokens, and the position embedding of that many patches, each (1, tokens, D)."""
        parts: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(parts, dim=1) if parts else self.pos_embed[:, :0]
        count = 0 if self.spec.no_embed_class else self.spec.prefix_tokens
        position = resample_positions(self.pos_embed[:, count:], (self.spec.grid, self.spec.grid), (rows, columns))
        return (prefix if self.spec.no_embed_class else prefix + self.pos_embed[:, :count]), position

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
