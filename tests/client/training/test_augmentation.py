import numpy as np
import pytest
import torch

from pathfed_client.training.augmentation import NO_AUGMENTATION, STAINS, Augmentation, training_tensors
from pathfed_common.objectives.mae import normalise, to_pixels
from pathfed_common.privacy.randomness import KeyedRandom


def random(**context: str | int) -> KeyedRandom:
    return KeyedRandom(bytes(32), context)


@pytest.fixture
def tiles() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)


def pixels(tensors: torch.Tensor) -> np.ndarray:
    return to_pixels(tensors)


def test_without_augmentation_tiles_are_normalised_and_nothing_else(tiles):
    found = training_tensors(tiles, NO_AUGMENTATION, random())
    assert torch.equal(found, normalise(tiles).contiguous())
    assert found.is_contiguous()


def positions(tile: np.ndarray) -> list[bytes]:
    return [np.rot90(flipped, turns).tobytes() for flipped in (tile, tile[:, ::-1]) for turns in range(4)]


@pytest.mark.parametrize(
    ("augmentation", "reached"),
    [
        (Augmentation(flips=True, quarter_turns=False), {0, 2, 4, 6}),
        (Augmentation(flips=False, quarter_turns=True), {0, 1, 2, 3}),
        (Augmentation(), set(range(8))),
    ],
)
def test_positions_are_those_asked_for_and_equally_likely(tiles, augmentation, reached):
    counts = np.zeros(8, int)
    for draw in range(60):
        for tile, found in zip(tiles, pixels(training_tensors(tiles, augmentation, random(draw=draw))), strict=True):
            counts[positions(tile).index(found.tobytes())] += 1
    assert {position for position, count in enumerate(counts) if count} == reached
    expected = 60 * len(tiles) / len(reached)
    assert all(abs(counts[position] - expected) < 6 * np.sqrt(expected) for position in reached)


def test_equal_draws_give_equal_tensors_and_a_tile_keeps_its_draws_in_a_shorter_batch(tiles):
    one = training_tensors(tiles, Augmentation(hed_jitter=0.05), random(step=1))
    assert torch.equal(one, training_tensors(tiles, Augmentation(hed_jitter=0.05), random(step=1)))
    assert torch.equal(one[:7], training_tensors(tiles[:7], Augmentation(hed_jitter=0.05), random(step=1)))
    assert not torch.equal(one, training_tensors(tiles, Augmentation(hed_jitter=0.05), random(step=2)))


def test_one_tiles_tensor_does_not_depend_on_the_others(tiles):
    """What keeps patients apart: no statistic over the batch."""
    others = tiles.copy()
    others[1:] = 255 - others[1:]
    augmentation = Augmentation(hed_jitter=0.1)
    assert torch.equal(training_tensors(tiles, augmentation, random())[0], training_tensors(others, augmentation, random())[0])


def test_colour_moves_along_the_stains_within_its_bounds_and_both_ways():
    """A tile of pure haematoxylin of natural density 1 stays on its line, at a factor of 0.9 to 1.1, plus offsets."""
    stain = np.array(STAINS[0]) / np.linalg.norm(STAINS[0])
    tile = np.broadcast_to(255 * np.exp(-stain), (64, 4, 4, 3)).round().astype(np.uint8)
    found = pixels(training_tensors(tile, Augmentation(flips=False, quarter_turns=False, hed_jitter=0.1), random()))
    densities = -np.log(found[:, 0, 0].astype(float) / 255)
    stains = np.array(STAINS) / np.linalg.norm(STAINS, axis=1, keepdims=True)
    amounts = densities @ np.linalg.inv(stains)
    assert np.all(np.abs(amounts[:, 0] - 1) < 0.2 + 0.03)
    assert np.all(np.abs(amounts[:, 1:]) < 0.1 + 0.04)
    assert amounts[:, 0].min() < 0.93
    assert amounts[:, 0].max() > 1.07


def test_a_little_jitter_moves_little_and_more_moves_more(tiles):
    plain = training_tensors(tiles, NO_AUGMENTATION, random())
    moved = [
        (training_tensors(tiles, Augmentation(flips=False, quarter_turns=False, hed_jitter=jitter), random()) - plain).abs().mean().item()
        for jitter in (1e-4, 0.01, 0.1)
    ]
    assert 0 < moved[0] < 0.02
    assert moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize("jitter", [-0.1, 1.0, float("nan")])
def test_impossible_jitter_is_refused(jitter):
    with pytest.raises(ValueError, match="hed_jitter"):
        Augmentation(hed_jitter=jitter)


def test_tiles_of_another_kind_are_refused(tiles):
    for wrong in (tiles.astype(np.float32), tiles[0], tiles[..., :2]):
        with pytest.raises(ValueError, match="tiles must be uint8"):
            training_tensors(wrong, NO_AUGMENTATION, random())
    with pytest.raises(ValueError, match="must be square"):
        training_tensors(tiles[:, :4], Augmentation(), random())
    assert len(training_tensors(tiles[:0], Augmentation(hed_jitter=0.1), random())) == 0
