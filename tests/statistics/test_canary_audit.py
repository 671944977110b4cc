"""A one-run canary audit (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846): an attacker's lower bound on epsilon against the claim.

Each canary is a patient whose gradient is one coordinate of one weight; a coin says whether the canary is in the cohort. The attacker
sees every release, sums each canary's coordinate over the rounds, and guesses the surest. A bound above the claim proves a fault. It is
one-sided: it misses half the noise and a repeated seed, which is why test_planted_faults.py checks those directly.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor, nn

from pathfed_client.training import private_step as step_module
from pathfed_client.training.engines import serial
from pathfed_client.training.engines.engine import PatientTiles, trainable
from pathfed_common.objectives.objective import Draws
from pathfed_common.privacy.accounting import epsilon
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

CANARIES, ROUNDS, TILES, DELTA = 400, 50, 4, 1e-5
MECHANISM = PatientMechanism(
    sampling_rate=0.25, noise_multiplier=4.0, clip_norm=1.0, expected_patients=100.0, figure_share=0.1, loss_bound=2.0
)


class Canaries(nn.Module):
    """Loss = 20 * w[tile's index]: the gradient has norm 20, all on one coordinate."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(CANARIES))

    def loss(self, tiles: Tensor, draws: Draws) -> Tensor:
        return 20 * self.w[tiles].mean()


def audit() -> float:
    """Lower bound on epsilon, 95% confidence, from ROUNDS releases of the real private step."""
    public = KeyedRandom(bytes(32), {"purpose": "audit"})
    included = public.child("coin").bernoulli(CANARIES, 0.5)
    model, scores = Canaries(), np.zeros(CANARIES)
    loaders = [lambda i=i: PatientTiles(torch.full((TILES,), i), {}) for i in range(CANARIES)]
    for number in range(ROUNDS):
        random = KeyedRandom(bytes(range(32)), {"round": number})
        drawn = random.child("sampling").bernoulli(CANARIES, MECHANISM.sampling_rate) & included
        release = step_module.private_step(model, trainable(model), [loaders[i] for i in np.flatnonzero(drawn)], MECHANISM, random)
        scores += release.gradients["w"].double().numpy()
    return epsilon_lower_bound(scores, included)


def epsilon_lower_bound(scores: NDArray[np.float64], included: NDArray[np.bool_], confidence: float = 0.95) -> float:
    """The largest epsilon that the attacker's right guesses refute, over several numbers of guesses (Bonferroni)."""
    order = np.argsort(-scores)
    guesses = [k for k in (10, 20, 40, 80, 120) if 2 * k <= len(scores)] + [len(scores) // 2]
    alpha, best = (1 - confidence) / len(guesses), 0.0
    for k in guesses:
        right = int(included[order[:k]].sum() + (~included[order[-k:]]).sum())
        low, high = 0.0, 12.0
        if p_value(2 * k, right, 0.0) > alpha:
            continue
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if p_value(2 * k, right, middle) <= alpha else (low, middle)
        best = max(best, low)
    return best


def p_value(guesses: int, right: int, eps: float) -> float:
    """Chance of so many right guesses under (eps, DELTA)-privacy: theorem 5.2 of the paper, with all CANARIES flipped."""
    q = 1 / (1 + math.exp(-eps))
    beta = float(binom.sf(right - 1, guesses, q))
    i = np.arange(1, right + 1)
    alpha = float(np.max((binom.sf(right - i - 1, guesses, q) - beta) / i, initial=0))
    return min(beta + alpha * DELTA * 2 * CANARIES, 1.0)


@pytest.fixture(scope="module")
def claim() -> float:
    return epsilon(sampling_rate=MECHANISM.sampling_rate, noise_multiplier=MECHANISM.noise_multiplier, steps=ROUNDS, delta=DELTA)


def no_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PatientMechanism, "noise_std", property(lambda self: 1e-9))


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PatientMechanism, "clip_factor", lambda self, norm: 1.0)


def tile_as_the_unit(patch: pytest.MonkeyPatch) -> None:
    whole = serial.add_patient

    def add(objective, parameters, patient, mechanism, total, **options) -> None:
        for tile in range(TILES):
            one = patient.part(tile, tile + 1)
            whole(objective, parameters, one, mechanism, total, **options)

    patch.setattr(serial, "add_patient", add)


def test_the_attackers_bound_stays_below_the_claim(claim: float) -> None:
    assert audit() <= claim


@pytest.mark.parametrize("plant", [no_noise, no_clipping, tile_as_the_unit], ids=lambda plant: plant.__name__)
def test_the_attacker_refutes_a_broken_step(
    plant: Callable[[pytest.MonkeyPatch], None], claim: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert audit() > claim
