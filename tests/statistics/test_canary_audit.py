"""A canary audit (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846): an attacker's lower bound on epsilon against the claim.

A coin says of each canary, a patient whom the attacker made, whether it is in the cohort. The attacker sees every release, gives each
canary a score, and guesses the surest. A bound above the claim proves a fault. It is one-sided: it misses half the noise and a repeated
seed, which is why test_planted_faults.py checks those directly.

    | audit | one coordinate each | real objectives |
    | --- | --- | --- |
    | objective | linear, made so that no canary hides another | MAE, DINO |
    | engines | serial, book-keeping | serial, book-keeping |
    | number types | float32 | float32, bfloat16 |
    | what runs | whole rounds, with the real sampling | private steps over all who are in |
    | no noise, tile as the unit | refuted | refuted (float32) |
    | clipping to 20 C | refuted | refuted (both types) |
    | everybody drawn | refuted | - |

The real objectives' canaries are eight patients in each of many independent steps. Their gradients are not orthogonal, so the attacker
solves for them (least squares), once for the contributions of an honest step and once for those of a step whose unit is the tile.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from objectives import dino_settings, joined, unlike_its_start
from scipy.stats import binom
from torch import Tensor, nn

from pathfed_client.cohort.cohort import Cohort, Patient, Pseudonym, SlideId, SlideTiles, TileRef
from pathfed_client.training import local_round
from pathfed_client.training.compute import Compute, Precision
from pathfed_client.training.engines.book_keeping import BookKeepingEngine
from pathfed_client.training.engines.choice import make_engine
from pathfed_client.training.engines.engine import PatientTiles, trainable
from pathfed_client.training.engines.serial import SerialEngine
from pathfed_client.training.private_step import private_step
from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.objectives.dino import SelfDistillation
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.objectives.objective import Draws, ObjectiveModule, Uniforms
from pathfed_common.privacy.accounting import epsilon
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

DELTA = 1e-5
ENGINES = {
    "serial": Compute(engine="serial"),
    "book_keeping": Compute(engine="book_keeping", patients_at_once=8),
}


# The attacker's bound.


def epsilon_lower_bound(scores: NDArray[np.float64], included: NDArray[np.bool_], confidence: float = 0.95) -> float:
    """The largest epsilon that the attacker's right guesses refute, over several numbers of guesses (Bonferroni)."""
    order = np.argsort(-scores)
    guesses = [k for k in (10, 20, 40, 80, 120) if 2 * k <= len(scores)] + [len(scores) // 2]
    alpha, best = (1 - confidence) / len(guesses), 0.0
    for k in guesses:
        right = int(included[order[:k]].sum() + (~included[order[-k:]]).sum())
        low, high = 0.0, 12.0
        if p_value(2 * k, right, 0.0, len(scores)) > alpha:
            continue
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if p_value(2 * k, right, middle, len(scores)) <= alpha else (low, middle)
        best = max(best, low)
    return best


def p_value(guesses: int, right: int, eps: float, coins: int) -> float:
    """Chance of so many right guesses under (eps, DELTA)-privacy: theorem 5.2 of the paper."""
    q = 1 / (1 + math.exp(-eps))
    beta = float(binom.sf(right - 1, guesses, q))
    i = np.arange(1, right + 1)
    alpha = float(np.max((binom.sf(right - i - 1, guesses, q) - beta) / i, initial=0))
    return min(beta + alpha * DELTA * 2 * coins, 1.0)


def coins(count: int) -> NDArray[np.bool_]:
    return KeyedRandom(bytes(32), {"purpose": "audit"}).child("coin").bernoulli(count, 0.5)


# Faults, each planted at a place that every engine passes.


def no_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PatientMechanism, "noise_std", property(lambda self: 1e-9))


def loose_clipping(patch: pytest.MonkeyPatch) -> None:
    # Not without any bound: a coordinate beyond 2 C leaves the range in which the sum's lattice rounds, and what comes out is noise.
    patch.setattr(PatientMechanism, "clip_target", property(lambda self: 20 * self.clip_norm))


def tile_as_the_unit(patch: pytest.MonkeyPatch) -> None:
    for kind in (SerialEngine, BookKeepingEngine):

        def add(self, patients, total, whole=kind.add):
            whole(self, [patient.part(tile, tile + 1) for patient in patients for tile in range(len(patient.tiles))], total)
            return [None] * len(patients)

        patch.setattr(kind, "add", add)


def everybody_drawn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(local_round, "draw_patients", lambda cohort, rate, random: cohort.patients)


# One coordinate each, through whole rounds.

SIDE, TILES, ROUNDS = 20, 6, 20
CANARIES = SIDE * SIDE
SAMPLED = PatientMechanism(
    sampling_rate=0.25, noise_multiplier=2.5, clip_norm=1.0, expected_patients=100.0, figure_share=0.1, loss_bound=2.0
)


class Coordinates(nn.Module):
    """Loss = 20 * w[the tile's white pixel]: a canary's gradient has norm 20, all on one coordinate of a linear layer."""

    separable = True

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(CANARIES, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def draw(self, tiles: int, random: Uniforms) -> Draws:
        return {}

    def loss(self, tiles_NCHW: Tensor, draws: Draws) -> Tensor:
        return self.patient_losses(tiles_NCHW, draws, (len(tiles_NCHW),))[0]

    def patient_losses(self, tiles_NCHW: Tensor, draws: Draws, counts: Sequence[int]) -> Tensor:
        white = (tiles_NCHW[:, 0].flatten(1) > 0).to(tiles_NCHW.dtype)
        return torch.stack([part.mean() for part in (20 * self.layer(white)[:, 0]).split(list(counts))])


class WhitePixels:
    """Canary i's tiles are black but for pixel i."""

    def expect(self, batches: Sequence[Sequence[TileRef]], /) -> None:
        pass

    def read(self, refs: Sequence[TileRef], /) -> NDArray[np.uint8]:
        tiles = np.zeros((len(refs), CANARIES, 3), np.uint8)
        tiles[np.arange(len(refs)), [ref.slide for ref in refs]] = 255
        return tiles.reshape(len(refs), SIDE, SIDE, 3)


def audit_of_rounds(compute: Compute) -> float:
    """Lower bound on epsilon, 95% confidence, from ROUNDS rounds over the canaries whose coins say so."""
    included, model, scores = coins(CANARIES), Coordinates(), np.zeros(CANARIES)
    cohort = Cohort.of(
        [Patient(Pseudonym(f"{i:032x}"), (SlideTiles(SlideId(i), TILES, f"{i:032x}"),)) for i in np.flatnonzero(included).tolist()]
    )
    engine = make_engine(model, trainable(model), compute, tiles_per_patient=TILES, tile_px=SIDE)
    base_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number in range(ROUNDS):
        outcome = local_round.run_round(
            objective=model,
            base_state=base_state,
            cohort=cohort,
            tiles=WhitePixels(),
            mechanism=SAMPLED,
            tiles_per_patient=TILES,
            steps=1,
            local_learning_rate=0.1,
            random=KeyedRandom(bytes(range(32)), {"round": number}),
            engine=engine,
        )
        scores += outcome.update["layer.weight"].flatten().double().numpy()
    return epsilon_lower_bound(scores, included)


@pytest.fixture(scope="module")
def claim_of_rounds() -> float:
    return epsilon(sampling_rate=SAMPLED.sampling_rate, noise_multiplier=SAMPLED.noise_multiplier, steps=ROUNDS, delta=DELTA)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_attackers_bound_on_rounds_stays_below_the_claim(engine: str, claim_of_rounds: float) -> None:
    assert audit_of_rounds(ENGINES[engine]) <= claim_of_rounds


@pytest.mark.parametrize("plant", [no_noise, loose_clipping, tile_as_the_unit, everybody_drawn], ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_attacker_refutes_broken_rounds(
    engine: str, plant: Callable[[pytest.MonkeyPatch], None], claim_of_rounds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert audit_of_rounds(ENGINES[engine]) > claim_of_rounds


# Real objectives, through private steps.

TOGETHER, STEPS, SHOWN = 8, 32, 5
WHOLE = PatientMechanism(sampling_rate=1.0, noise_multiplier=3.0, clip_norm=0.05, expected_patients=4.0, figure_share=0.1, loss_bound=2.0)
SPEC = EncoderSpec(name="audited", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2)


def mae() -> ObjectiveModule:
    return MaskedAutoencoder(SPEC, mask_ratio=0.5, decoder_dim=8, decoder_depth=1, decoder_heads=2, normalise_target=False)


def dino() -> ObjectiveModule:
    small = dino_settings(local_crops=0, mask_ratio=(0.2, 0.5), head_dim=16, bottleneck_dim=8, prototypes=16)
    return SelfDistillation(SPEC, small)


OBJECTIVES: dict[str, Callable[[], ObjectiveModule]] = {"mae": mae, "dino": dino}


@dataclass
class Canaries:
    """Patients whom the attacker made, and what the attacker expects each to add to the sum, in units of C."""

    model: ObjectiveModule
    patients: list[PatientTiles]
    decoders: list[NDArray[np.float64]]

    @classmethod
    def of(cls, objective: str) -> "Canaries":
        model = unlike_its_start(OBJECTIVES[objective]())
        patients = []
        for number in range(TOGETHER):
            random = KeyedRandom(bytes(32), {"canary": number})
            pixels = torch.from_numpy(random.normals(3 * 16 * 16)).float().reshape(1, 3, 16, 16)
            one = PatientTiles(2 * pixels, model.draw(1, random))
            # One tile several times over, so that all tiles pull in one direction.
            patients.append(PatientTiles(torch.cat([one.tiles] * SHOWN), joined([one.draws] * SHOWN)))
        whole = np.stack([cls._clipped(model, patient) for patient in patients])
        by_tile = np.stack([sum(cls._clipped(model, one.part(tile, tile + 1)) for tile in range(SHOWN)) for one in patients])
        return cls(model, patients, [np.linalg.pinv(added.T) for added in (whole, by_tile)])

    @staticmethod
    def _clipped(model: ObjectiveModule, patient: PatientTiles) -> NDArray[np.float64]:
        parameters = list(trainable(model).values())
        gradients = torch.autograd.grad(model.loss(patient.tiles, patient.draws), parameters, materialize_grads=True)
        flat: NDArray[np.float64] = torch.cat([gradient.flatten() for gradient in gradients]).double().numpy()
        return flat / max(float(np.linalg.norm(flat)), WHOLE.clip_norm)


@pytest.fixture(scope="module", params=OBJECTIVES)
def canaries(request: pytest.FixtureRequest) -> Canaries:
    return Canaries.of(request.param)


@pytest.fixture(scope="module")
def claim_of_a_step() -> float:
    return epsilon(sampling_rate=WHOLE.sampling_rate, noise_multiplier=WHOLE.noise_multiplier, steps=1, delta=DELTA)


def audit_of_steps(made: Canaries, compute: Compute) -> float:
    """Lower bound on a step's epsilon, 95% confidence, from STEPS steps with coins of their own: the better of the two decoders'."""
    included = coins(STEPS * TOGETHER).reshape(STEPS, TOGETHER)
    parameters = trainable(made.model)
    engine = make_engine(made.model, parameters, compute, tiles_per_patient=SHOWN, tile_px=16)
    released = []
    for number, chosen in enumerate(included):
        loaders = [lambda patient=made.patients[i]: patient for i in np.flatnonzero(chosen)]
        random = KeyedRandom(bytes(range(32)), {"step": number})
        release = private_step(made.model, parameters, loaders, WHOLE, random, engine=engine)
        released.append(torch.cat([release.gradients[name].flatten() for name in parameters]).double().numpy())
    flat = np.stack(released) * WHOLE.expected_patients / WHOLE.clip_norm
    confidence = 1 - 0.05 / len(made.decoders)
    return max(epsilon_lower_bound((flat @ decoder.T).ravel(), included.ravel(), confidence) for decoder in made.decoders)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_attackers_bound_on_real_objectives_stays_below_the_claim(
    engine: str, precision: Precision, canaries: Canaries, claim_of_a_step: float
) -> None:
    assert audit_of_steps(canaries, replace(ENGINES[engine], precision=precision)) <= claim_of_a_step


@pytest.mark.parametrize(
    ("plant", "precision"),
    [
        (no_noise, "float32"),
        (loose_clipping, "float32"),
        (loose_clipping, "bfloat16"),
        (tile_as_the_unit, "float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_attacker_refutes_a_broken_step_of_real_objectives(
    engine: str,
    plant: Callable[[pytest.MonkeyPatch], None],
    precision: Precision,
    canaries: Canaries,
    claim_of_a_step: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    assert audit_of_steps(canaries, replace(ENGINES[engine], precision=precision)) > claim_of_a_step
