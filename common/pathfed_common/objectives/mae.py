"""Masked autoencoding (He et al. 2022, arXiv:2111.06377): hide most patches of a tile and predict their pixels.

Guarantee: **a tile's loss depends on that tile, its mask and the weights alone.** There is no term over the batch and no layer that mixes
tiles, so the gradient of a patient's mean loss is the patient's own, and clipping it bounds the patient's influence.

Masks come from the random source that the caller passes; torch's global generator is never used.

Legend of shape suffixes: N tiles, C channels, H and W pixels, L patches, K visible patches, T tokens, D width, V pixel values of a patch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathfed_common.encoder.spec import PIXEL_MEAN, PIXEL_STD, EncoderSpec, Shape
from pathfed_common.encoder.vit import LAYER_NORM_EPS, Block, VisionTransformer, initialise_layers, linear, sine_positions, take_tokens
from pathfed_common.objectives.objective import Draws, ObjectiveModule, Uniforms

#: Added to a patch's variance before dividing, as in the paper's code.
_TARGET_EPS = 1e-6
#: Hidden patches in pictures.
_HIDDEN_GREY = 200


def normalise(tiles_NHWC: NDArray[np.uint8] | Tensor) -> Tensor:
    """Tiles as the encoder takes them: uint8 RGB (N, H, W, 3) to float32 (N, 3, H, W), with the public constants of `encoder.spec`.

    Raises:
        ValueError: not uint8, or not of that shape.
    """
    tiles = torch.from_numpy(np.ascontiguousarray(tiles_NHWC)) if isinstance(tiles_NHWC, np.ndarray) else tiles_NHWC
    if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[-1] != 3:
        raise ValueError(f"tiles must be uint8 (N, H, W, 3), got {tiles.dtype} {tuple(tiles.shape)}")
    mean, std = _pixel_constants(tiles.device)
    return (tiles.permute(0, 3, 1, 2).to(torch.float32) / 255 - mean) / std


def to_pixels(tiles_NCHW: Tensor) -> NDArray[np.uint8]:
    """The inverse of `normalise`, for pictures: float (N, 3, H, W) to uint8 RGB (N, H, W, 3), clipped to [0, 255] and rounded."""
    mean, std = _pixel_constants(tiles_NCHW.device)
    pixels = ((tiles_NCHW.detach().to(torch.float32) * std + mean) * 255).round().clamp(0, 255)
    array: NDArray[np.uint8] = pixels.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
    return array


def _pixel_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return mean, std


class MaeHead(nn.Module):
    """The small decoder: sees the visible tokens in their places, a learned mask token elsewhere, and predicts each patch's pixels."""

    positions: Tensor

    def __init__(self, spec: EncoderSpec, *, dim: int, depth: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        block = _decoder_spec(spec, dim=dim, depth=depth, heads=heads)
        self.class_token = spec.class_token
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.embed = linear(spec.embed_dim, dim)
        self.blocks = nn.Sequential(*(Block(block) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.predict = linear(dim, 3 * spec.patch_size**2)
        # Fixed, so neither trained nor stored: fewer numbers that carry noise.
        self.register_buffer("positions", sine_positions(spec.grid, dim).unsqueeze(0), persistent=False)
        initialise_layers(self, generator)
        with torch.no_grad():
            self.mask_token.normal_(std=0.02, generator=generator)

    def forward(self, class_NTD: Tensor, visible_NKD: Tensor, keep_NK: Tensor) -> Tensor:
        """Predicted pixel values of every patch, (N, L, V); `class_NTD` is the class token or nothing (T of 1 or 0)."""
        visible, first = self.embed(visible_NKD), self.embed(class_NTD)
        patches_NLD = self.mask_token.to(visible.dtype).expand(len(visible), self.positions.shape[1], -1)
        patches_NLD = patches_NLD.scatter(1, keep_NK.unsqueeze(-1).expand(-1, -1, visible.shape[-1]), visible) + self.positions
        tokens_NTD = self.norm(self.blocks(torch.cat([first, patches_NLD], dim=1)))
        predicted: Tensor = self.predict(tokens_NTD[:, first.shape[1] :])
        return predicted


class MaskedAutoencoder(ObjectiveModule):
    """Encoder and head, trained together. State dict: ``encoder.<timm name>`` and ``head.<name>``, see `state_shapes`."""

    #: A tile's loss is its own, and a patient's the mean over its tiles.
    separable: ClassVar[bool] = True

    def __init__(
        self,
        spec: EncoderSpec,
        *,
        mask_ratio: float,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        normalise_target: bool,
        seed: int = 0,
    ) -> None:
        """Build with first weights drawn from a generator of its own.

        Args:
            spec: the encoder.
            mask_ratio: share of a tile's patches that the encoder does not see; rounded down to whole patches.
            decoder_dim: width of the head's tokens; a multiple of `decoder_heads` and of 4.
            decoder_depth: blocks of the head.
            decoder_heads: attention heads of the head's blocks.
            normalise_target: normalise each patch's target pixels by their own mean and standard deviation.
            seed: of the first weights.

        Raises:
            ValueError: a combination that hides no patch or all of them, or widths that do not divide.
        """
        super().__init__()
        self.spec = spec
        self.normalise_target = normalise_target
        self.visible = spec.patches - int(spec.patches * mask_ratio)
        if not 1 <= self.visible < spec.patches:
            raise ValueError(f"mask_ratio {mask_ratio} must hide some but not all of {spec.patches} patches")
        generator = torch.Generator().manual_seed(seed)
        self.encoder = VisionTransformer(spec, generator=generator)
        self.head = MaeHead(spec, dim=decoder_dim, depth=decoder_depth, heads=decoder_heads, generator=generator)

    def draw(self, tiles: int, random: Uniforms) -> Draws:
        """Random masks for that many tiles: "keep", the indices of the visible patches, int64 (N, K), each row ascending, on the CPU.

        Takes exactly ``tiles * patches`` numbers from `random`; the K smallest of a row's numbers are the visible patches.
        """
        numbers_NL = np.asarray(random.uniforms(tiles * self.spec.patches), dtype=np.float64).reshape(tiles, self.spec.patches)
        order_NL = np.argsort(numbers_NL, axis=1, kind="stable")
        return {"keep": torch.from_numpy(np.sort(order_NL[:, : self.visible], axis=1).astype(np.int64))}

    def loss(self, tiles_NCHW: Tensor, draws: Draws) -> Tensor:
        """Mean over the tiles of each tile's own loss: a scalar, float32.

        Raises:
            ValueError: no tile.
        """
        if len(tiles_NCHW) == 0:
            raise ValueError("a loss needs at least one tile")
        return self.tile_losses(tiles_NCHW, draws).mean()

    def patient_losses(self, tiles_NCHW: Tensor, draws: Draws, counts: Sequence[int]) -> Tensor:
        """The mean of each patient's own tile losses, float32 (P,); `counts` tiles of each, one patient after the other."""
        return torch.stack([losses.mean() for losses in self.tile_losses(tiles_NCHW, draws).split(list(counts))])

    def tile_losses(self, tiles_NCHW: Tensor, draws: Draws) -> Tensor:
        """Each tile's loss, float32 (N,): mean squared error over the hidden patches' pixels (normalised as `normalise_target` says)."""
        keep_NK = draws["keep"].to(tiles_NCHW.device)
        predicted_NLV = self._predict(tiles_NCHW, keep_NK).float()
        target_NLV, _, _ = self._target(tiles_NCHW)
        hidden_NL = torch.ones(target_NLV.shape[:2], device=tiles_NCHW.device).scatter(1, keep_NK, 0.0)
        errors_NL = (predicted_NLV - target_NLV).square().mean(-1)
        return (errors_NL * hidden_NL).sum(1) / hidden_NL.sum(1)

    def pictures(self, tiles_NCHW: Tensor, draws: Draws) -> Mapping[str, NDArray[np.uint8]]:
        """The patches that the encoder sees, the others grey, and the tiles with the others predicted."""
        pixels, side = to_pixels(tiles_NCHW), self.spec.patch_size
        seen_NL = torch.zeros(len(pixels), self.spec.patches, dtype=torch.bool).scatter(1, draws["keep"].cpu(), value=True)
        seen_NHW = seen_NL.view(-1, self.spec.grid, self.spec.grid).numpy().repeat(side, axis=1).repeat(side, axis=2)
        hidden = np.where(seen_NHW[..., None], pixels, np.uint8(_HIDDEN_GREY))
        return {"what the encoder sees": hidden, "predicted from it": to_pixels(self.reconstruct(tiles_NCHW, draws))}

    @torch.no_grad()
    def reconstruct(self, tiles_NCHW: Tensor, draws: Draws) -> Tensor:
        """The tiles with their hidden patches replaced by predictions, float32 (N, 3, H, W), in `normalise`'s units.

        With `normalise_target` the prediction is scaled back by each patch's true mean and standard deviation, as in the paper's figures.
        """
        keep_NK = draws["keep"].to(tiles_NCHW.device)
        predicted_NLV = self._predict(tiles_NCHW, keep_NK).float()
        target_NLV, mean_NLV, std_NLV = self._target(tiles_NCHW)
        index_NKV = keep_NK.unsqueeze(-1).expand(-1, -1, target_NLV.shape[-1])
        mixed_NLV = predicted_NLV.scatter(1, index_NKV, take_tokens(target_NLV, keep_NK))
        return self._image(mixed_NLV * std_NLV + mean_NLV)

    def _predict(self, tiles_NCHW: Tensor, keep_NK: Tensor) -> Tensor:
        tokens_NTD = self.encoder(tiles_NCHW, keep_NK)
        classes, prefix = int(self.spec.class_token), self.spec.prefix_tokens
        predicted: Tensor = self.head(tokens_NTD[:, :classes], tokens_NTD[:, prefix:], keep_NK)
        return predicted

    def _target(self, tiles_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Target pixels of every patch (N, L, V), and the mean and std (N, L, 1) they were normalised by."""
        n, grid, side = len(tiles_NCHW), self.spec.grid, self.spec.patch_size
        pixels = tiles_NCHW.float().reshape(n, 3, grid, side, grid, side).permute(0, 2, 4, 3, 5, 1)
        pixels_NLV = pixels.reshape(n, grid * grid, 3 * side * side)
        if not self.normalise_target:
            return pixels_NLV, torch.zeros_like(pixels_NLV[..., :1]), torch.ones_like(pixels_NLV[..., :1])
        mean, variance = pixels_NLV.mean(-1, keepdim=True), pixels_NLV.var(-1, keepdim=True)
        std = (variance + _TARGET_EPS).sqrt()
        return (pixels_NLV - mean) / std, mean, std

    def _image(self, pixels_NLV: Tensor) -> Tensor:
        n, grid, side = len(pixels_NLV), self.spec.grid, self.spec.patch_size
        pixels = pixels_NLV.reshape(n, grid, grid, side, side, 3).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(n, 3, grid * side, grid * side)


def state_shapes(spec: EncoderSpec, *, decoder_dim: int, decoder_depth: int, decoder_heads: int, **_: object) -> dict[str, Shape]:
    """Shape of every tensor of a `MaskedAutoencoder`, all of them trained, by its name in the state dict, without building it.

    The other settings shape nothing.
    """
    block = _decoder_spec(spec, dim=decoder_dim, depth=decoder_depth, heads=decoder_heads)
    values = 3 * spec.patch_size**2
    head: dict[str, Shape] = {
        "mask_token": (1, 1, decoder_dim),
        "embed.weight": (decoder_dim, spec.embed_dim),
        "embed.bias": (decoder_dim,),
    }
    for index in range(decoder_depth):
        head |= {f"blocks.{index}.{name}": shape for name, shape in block.block_shapes().items()}
    head |= {"norm.weight": (decoder_dim,), "norm.bias": (decoder_dim,), "predict.weight": (values, decoder_dim), "predict.bias": (values,)}
    shapes = {f"encoder.{name}": shape for name, shape in spec.shapes().items()}
    return shapes | {f"head.{name}": shape for name, shape in head.items()}


def _decoder_spec(spec: EncoderSpec, *, dim: int, depth: int, heads: int) -> EncoderSpec:
    plain = EncoderSpec(name="mae_head", img_size=spec.img_size, patch_size=spec.patch_size, embed_dim=dim, depth=depth, num_heads=heads)
    return replace(plain, class_token=spec.class_token)
