"""Masked autoencoding: masks from the passed source, a loss that is each tile's own, and a model that learns."""

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.objectives import mae

_SPEC = EncoderSpec(name="x", img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=3, reg_tokens=2)
_HEAD: dict[str, Any] = {"mask_ratio": 0.75, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}


class _Source:
    """A counted random source with a seed of its own."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self.taken = 0

    def uniforms(self, n: int) -> NDArray[np.float64]:
        self.taken += n
        return self._generator.random(n)


def _model(spec: EncoderSpec = _SPEC, **change: Any) -> mae.MaskedAutoencoder:
    return mae.MaskedAutoencoder(spec, **{**_HEAD, "normalise_target": True, **change})


def _tiles(n: int = 3, seed: int = 1) -> Tensor:
    pixels = torch.randint(0, 256, (n, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return mae.normalise(pixels)


def test_masks_come_from_the_passed_source_alone() -> None:
    model, torch_before, numpy_before = _model(), torch.get_rng_state(), repr(np.random.get_state())
    first, again, other = (model.draw(5, _Source(seed)) for seed in (7, 7, 8))
    assert torch.equal(first["keep"], again["keep"])
    assert not torch.equal(first["keep"], other["keep"])
    model.loss(_tiles(5), first)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert repr(np.random.get_state()) == numpy_before


def test_masks_are_distinct_sorted_places_and_take_one_number_a_patch() -> None:
    source = _Source(1)
    keep_NK = _model().draw(50, source)["keep"]
    assert keep_NK.shape == (50, 4)
    assert keep_NK.dtype == torch.int64
    assert source.taken == 50 * 16
    assert (keep_NK[:, 1:] > keep_NK[:, :-1]).all()
    assert 0 <= int(keep_NK.min()) <= int(keep_NK.max()) < 16


def test_every_patch_is_visible_equally_often() -> None:
    draws = 4000
    counts = torch.bincount(_model().draw(draws, _Source(2))["keep"].flatten(), minlength=16).double()
    rate = 4 / 16
    assert (counts - draws * rate).abs().max() < 5 * (draws * rate * (1 - rate)) ** 0.5


def test_drawing_nothing_gives_no_mask_and_a_loss_without_tiles_is_refused() -> None:
    model = _model()
    keep_NK = model.draw(0, _Source(1))["keep"]
    assert keep_NK.shape == (0, 4)
    with pytest.raises(ValueError, match="at least one tile"):
        model.loss(_tiles(1)[:0], {"keep": keep_NK})


def test_a_tiles_loss_does_not_depend_on_other_tiles() -> None:
    model, tiles = _model(), _tiles().requires_grad_()
    masks = model.draw(3, _Source(3))
    losses = model.tile_losses(tiles, masks)
    (gradient,) = torch.autograd.grad(losses[1], tiles, retain_graph=True)
    assert torch.count_nonzero(gradient[[0, 2]]) == 0
    assert torch.count_nonzero(gradient[1]) > 0
    for row in range(3):
        torch.testing.assert_close(model.loss(tiles[row : row + 1], {"keep": masks["keep"][row : row + 1]}), losses[row])
    torch.testing.assert_close(model.loss(tiles, masks), losses.mean())


def test_several_patients_losses_are_each_patients_own() -> None:
    model, tiles = _model(), _tiles(3)
    drawn = model.draw(3, _Source(3))
    both = model.patient_losses(tiles, drawn, (1, 2))
    for part, start, stop in ((0, 0, 1), (1, 1, 3)):
        alone = model.loss(tiles[start:stop], {"keep": drawn["keep"][start:stop]})
        torch.testing.assert_close(both[part], alone)


def test_a_batchs_gradient_is_the_mean_of_its_tiles_gradients() -> None:
    model, tiles = _model(), _tiles()
    masks = model.draw(3, _Source(4))
    parameters = list(model.parameters())
    together = torch.autograd.grad(model.loss(tiles, masks), parameters)
    alone = [torch.autograd.grad(model.loss(tiles[row : row + 1], {"keep": masks["keep"][row : row + 1]}), parameters) for row in range(3)]
    for whole, *parts in zip(together, *alone, strict=True):
        torch.testing.assert_close(whole, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-7)


def test_every_parameter_takes_part() -> None:
    model = _model()
    model.loss(_tiles(), model.draw(3, _Source(5))).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


@pytest.mark.parametrize("normalise_target", [True, False])
def test_loss_counts_hidden_patches_only(normalise_target: bool) -> None:
    model, tiles = _model(normalise_target=normalise_target), _tiles(1)
    masks = torch.tensor([[0, 1, 2, 3]])
    targets = tiles.reshape(1, 3, 4, 16, 4, 16).permute(0, 2, 4, 3, 5, 1).reshape(1, 16, 768)
    if normalise_target:
        targets = (targets - targets.mean(-1, keepdim=True)) / (targets.var(-1, keepdim=True) + 1e-6).sqrt()
    tokens = model.encoder(tiles, masks)
    predicted = model.head(tokens[:, :1], tokens[:, 3:], masks)
    expected = (predicted - targets)[:, 4:].square().mean()
    torch.testing.assert_close(model.loss(tiles, {"keep": masks}), expected)


@pytest.mark.parametrize("normalise_target", [True, False])
def test_reconstruction_shows_visible_patches_as_they_are(normalise_target: bool) -> None:
    model, tiles = _model(normalise_target=normalise_target), _tiles(2)
    picture = model.reconstruct(tiles, {"keep": torch.tensor([[0, 1, 2, 3], [0, 4, 8, 12]])})
    torch.testing.assert_close(picture[0, :, :16], tiles[0, :, :16], rtol=0, atol=1e-5)
    torch.testing.assert_close(picture[1, :, :, :16], tiles[1, :, :, :16], rtol=0, atol=1e-5)
    assert not torch.allclose(picture[0, :, 16:], tiles[0, :, 16:], atol=0.1)
    assert not picture.requires_grad


def test_training_on_one_tile_predicts_its_hidden_patches() -> None:
    rows = torch.arange(64).reshape(1, 64, 1, 1).expand(1, 64, 64, 3)
    tiles = mae.normalise(((rows * 7 + torch.tensor([0, 40, 80])) % 256).to(torch.uint8))
    model = _model(normalise_target=False)
    masks = model.draw(1, _Source(6))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = model.loss(tiles, masks).item()
    for _ in range(150):
        optimiser.zero_grad()
        loss = model.loss(tiles, masks)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1 * first
    errors = (model.reconstruct(tiles, masks) - tiles).abs().mean()
    assert errors < 0.3


@pytest.mark.parametrize(
    "spec", [_SPEC, EncoderSpec(name="y", img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=3, class_token=False)]
)
def test_shapes_are_known_without_building(spec: EncoderSpec) -> None:
    state = _model(spec).state_dict()
    shapes = mae.state_shapes(spec, decoder_dim=32, decoder_depth=1, decoder_heads=4)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert list(state) == list(shapes)
    assert sum(prod(shape) for shape in shapes.values()) == sum(parameter.numel() for parameter in _model(spec).parameters())


def test_mask_ratio_that_hides_nothing_or_everything_is_refused() -> None:
    small = EncoderSpec(name="x", img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=3)
    for ratio in (0.2, 1.0):
        with pytest.raises(ValueError, match="must hide some but not all of 4 patches"):
            _model(small, mask_ratio=ratio)


def test_normalise_uses_the_public_constants_and_goes_back() -> None:
    pixels: NDArray[np.uint8] = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    tiles = mae.normalise(pixels)
    assert tiles.shape == (1, 3, 16, 16)
    assert tiles.dtype == torch.float32
    assert tiles[0, 0, 0, 0].item() == pytest.approx(-0.485 / 0.229)
    assert tiles[0, 2, -1, -1].item() == pytest.approx((1 - 0.406) / 0.225)
    assert np.array_equal(mae.to_pixels(tiles), pixels)


@pytest.mark.parametrize("tiles", [np.zeros((1, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 4), np.uint8)])
def test_tiles_of_another_form_are_refused(tiles: Any) -> None:
    with pytest.raises(ValueError, match="tiles must be uint8"):
        mae.normalise(tiles)
