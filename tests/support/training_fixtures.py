"""What tests of training, numerics and statistics share: a small real objective, cohorts, a tile source, a fixed test secret."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pathfed_client.cohort.cohort import Cohort, Patient, Pseudonym, SlideId, SlideTiles, TileRef
from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

SIDE = 16


class Colours:
    """A tile source: every tile has pixels of its own, made from its slide and place."""

    def __init__(self) -> None:
        self.asked: list[tuple[TileRef, ...]] = []
        self.expected: list[tuple[TileRef, ...]] = []

    def expect(self, batches: Sequence[Sequence[TileRef]], /) -> None:
        self.expected = [tuple(refs) for refs in batches]

    def read(self, refs: Sequence[TileRef], /) -> NDArray[np.uint8]:
        self.asked.append(tuple(refs))
        tiles = [np.random.default_rng([ref.slide, ref.tile]).integers(0, 256, (SIDE, SIDE, 3), np.uint8) for ref in refs]
        return np.stack(tiles)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiles() -> Colours:
    return Colours()


@pytest.fixture
def objective() -> MaskedAutoencoder:
    """The real objective on a very small encoder: 16 px tiles, 4 patches, 2 of them hidden."""
    spec = EncoderSpec(name="tiny", img_size=SIDE, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    return MaskedAutoencoder(spec, mask_ratio=0.5, decoder_dim=16, decoder_depth=1, decoder_heads=2, normalise_target=False, seed=3)


@pytest.fixture
def base_state(objective: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in objective.state_dict().items()}


@pytest.fixture
def mechanism() -> Callable[..., PatientMechanism]:
    def make(**changes: float) -> PatientMechanism:
        values = {
            "sampling_rate": 1.0,
            "noise_multiplier": 4.0,
            "clip_norm": 1.0,
            "expected_patients": 4.0,
            "figure_share": 0.3,
            "loss_bound": 2.0,
        }
        return PatientMechanism(**{**values, **changes})

    return make


@pytest.fixture
def random() -> Callable[..., KeyedRandom]:
    """A keyed source with a fixed test secret."""

    def make(secret: bytes = bytes(range(32)), **context: str | int) -> KeyedRandom:
        return KeyedRandom(secret, context)

    return make


@pytest.fixture
def cohort() -> Callable[..., Cohort]:
    """A cohort with that many tiles for each patient, over that many slides each."""

    def make(*tile_counts: int, slides: int = 2) -> Cohort:
        patients = []
        for number, count in enumerate(tile_counts):
            shares = [len(part) for part in np.array_split(np.arange(count), slides)]
            parts = [SlideTiles(SlideId(number * slides + index), share, f"{share:032x}") for index, share in enumerate(shares)]
            patients.append(Patient(Pseudonym(f"{number:032x}"), tuple(parts)))
        return Cohort.of(patients)

    return make
