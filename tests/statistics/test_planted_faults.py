"""Planted faults: the checks that the private step passes, shown to fail on each way of breaking it.

Every check looks only at what leaves the site: releases of the real code path, with a real objective. Every fault is planted in that
path by replacing one function or value of it. A check that cannot fail is no check; the table `FAULTS` says which one catches what.

What runs on what. *Both* engines are serial and book-keeping, *both* types float32 and bfloat16, *forms* MAE and DINO with each centring
and each spread term, *MAE, DINO* one form of each.

    | check | engines | types | objectives | and its faults are planted in |
    | --- | --- | --- | --- | --- |
    | noise of an empty step: size, mean, shape | both | both | forms | both engines x both types x MAE, DINO |
    | removal | both | both | forms | the same: no clipping, norms too small, loss not clamped, tile as the unit |
    | coupled patients (`test_objectives`) | both | float32 | forms | both engines x MAE, DINO |
    | not finite | both | both | forms | both engines x both types x MAE, DINO |
    | a failure releases | both | both | forms | both engines x both types x MAE, DINO |
    | rounds independent | both | both | MAE, DINO | both engines x both types x MAE, DINO |
    | sampling law | both | float32 | MAE | both engines |
    | figures' noise; figures inside the ball; divisor | serial | float32 | MAE | serial (what follows the sum is one code for all) |
    | an attacker's bound (`test_canary_audit`) | both | both | MAE, DINO | both engines x both objectives |
    | inversion (`test_inversion`) | both | both | MAE, DINO | both engines x both types x both objectives |
    | several processes (`tests/client/training/ranks`) | serial | float32 | MAE, DINO | there |
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from objectives import FORMS, unlike_its_start
from scipy import stats

from pathfed_client.training import local_round, private_step
from pathfed_client.training.compute import Compute
from pathfed_client.training.engines import book_keeping, serial
from pathfed_client.training.engines.book import Book
from pathfed_client.training.engines.book_keeping import BookKeepingEngine
from pathfed_client.training.engines.choice import make_engine
from pathfed_client.training.engines.engine import Engine, PatientTiles, trainable
from pathfed_client.training.engines.norms import joint_norm
from pathfed_client.training.engines.serial import SerialEngine
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

SIGMA, CLIP, BATCH = 4.0, 1.0, 4.0
#: Noise whose coarse grid is no coarser than the sum's own lattice, so that two releases differ as their sums do.
FINE = 1e-4
PLAIN = Compute()


@dataclass
class Bench:
    """Runs the real code and gives back released numbers in units of the joint sum: noise of std sigma * C everywhere."""

    objective: Any
    base_state: dict[str, torch.Tensor]
    cohort: Callable[..., Any]
    tiles: Any
    mechanism: Callable[..., PatientMechanism]
    compute: Compute = PLAIN
    clip: float = CLIP

    @cached_property
    def engine(self) -> Engine:
        """The engine that `compute` names, made once."""
        side, parameters = self.objective.spec.img_size, trainable(self.objective)
        return make_engine(self.objective, parameters, self.compute, tiles_per_patient=4, tile_px=side)

    def joint(self, gradients: dict[str, torch.Tensor], figures: Any, steps: int = 1) -> np.ndarray:
        """The released vector as it stood in the joint ball: gradients times B, then the two figures at their scale."""
        m = self.mechanism()
        flat = torch.cat([gradients[name].flatten() for name in sorted(gradients)]).double().numpy() * m.expected_patients
        return np.concatenate([flat, [figures.loss_sum / m.loss_bound * m.figure_scale, figures.patients * m.figure_scale]])

    def step(self, patients: list[Callable[[], PatientTiles]], key: int = 0, sigma: float = SIGMA) -> np.ndarray:
        """One private step over exactly these patients."""
        random = KeyedRandom(bytes(32), {"key": key})
        parameters, m = trainable(self.objective), replace(self.mechanism(), noise_multiplier=sigma)
        release = private_step.private_step(self.objective, parameters, patients, m, random, engine=self.engine)
        return self.joint(release.gradients, release.figures)

    def round(self, number: int, *tile_counts: int, rate: float = 1.0, tiles: Any = None) -> tuple[np.ndarray, int]:
        """One round of one step over a cohort; also how many patients were drawn, which a test may look at."""
        mechanism = self.mechanism(sampling_rate=rate)
        outcome = local_round.run_round(
            objective=self.objective,
            base_state=self.base_state,
            cohort=self.cohort(*tile_counts, slides=1),
            tiles=self.tiles if tiles is None else tiles,
            mechanism=mechanism,
            tiles_per_patient=4,
            steps=1,
            local_learning_rate=0.1,
            random=KeyedRandom(bytes(32), {"round": number}),
            engine=self.engine,
        )
        return self.joint(outcome.update, outcome.figures), outcome.notes.patients_drawn

    def patient(self, seed: int, tiles: int = 4, scale: float = 1.0) -> Callable[[], PatientTiles]:
        def load() -> PatientTiles:
            random = KeyedRandom(bytes(32), {"patient": seed})
            side = self.objective.spec.img_size
            pixels = torch.from_numpy(random.normals(tiles * 3 * side**2)).reshape(tiles, 3, side, side) * scale
            return PatientTiles(pixels, self.objective.draw(tiles, random))

        return load


@pytest.fixture
def bench(objective, base_state, cohort, tiles, mechanism) -> Bench:
    return Bench(objective, base_state, cohort, tiles, lambda **changes: mechanism(noise_multiplier=SIGMA, clip_norm=CLIP, **changes))


# The checks. Each raises AssertionError on a broken step.


def check_empty_release(bench: Bench) -> None:
    """An empty step releases N(0, (sigma C)^2) in every coordinate: std within 4 standard errors, shape by Kolmogorov-Smirnov."""
    released = bench.step([])
    n = len(released)
    assert released.std() == pytest.approx(SIGMA * bench.clip, rel=4 / math.sqrt(2 * n))
    assert abs(released.mean()) < 5 * SIGMA * bench.clip / math.sqrt(n)
    assert stats.kstest(released / (SIGMA * bench.clip), "norm").pvalue > 1e-4


def check_figures_noise(bench: Bench) -> None:
    """The two figures carry the same noise: over 120 empty steps their std lies within 4 standard errors."""
    figures = np.concatenate([bench.step([], key)[-2:] for key in range(120)])
    assert figures.std() == pytest.approx(SIGMA * bench.clip, rel=4 / math.sqrt(2 * len(figures)))


def check_removal(bench: Bench) -> None:
    """With the same noise, taking one patient away moves the joint vector by at most C, whoever it is and whoever is left."""
    # Small and large gradients, few and many tiles; the loss of the loud ones is at its bound.
    patients = [
        bench.patient(0, scale=0.3),
        bench.patient(1, scale=5.0),
        bench.patient(2, tiles=1, scale=20.0),
        bench.patient(3, tiles=6, scale=20.0),
    ]
    whole = bench.step(patients, sigma=FINE)
    without = [bench.step(patients[:i] + patients[i + 1 :], sigma=FINE) for i in range(len(patients))]
    shifts = [float(np.linalg.norm(whole - one)) for one in without]
    assert max(shifts) <= bench.clip * (1 + 1e-3)
    assert min(shifts) > 0.2 * bench.clip


def check_rounds_independent(bench: Bench) -> None:
    """Noise of consecutive rounds on one base state is uncorrelated: pooled lag-1 correlation within 5 standard errors."""
    released = np.stack([bench.round(number)[0] for number in range(6)])
    left, right = released[:-1].ravel(), released[1:].ravel()
    assert abs(float(np.corrcoef(left, right)[0, 1])) < 5 / math.sqrt(len(left))


def check_poisson(bench: Bench) -> None:
    """The number of patients drawn has the binomial's mean and variance. Tiles are unreadable here, which keeps it quick.

    Of 120 rounds: a rate that is a fifth off moves the mean by 5 standard errors; the variance, 3, has a relative standard error of 13%,
    and a batch of fixed size or a repeated seed has none.
    """

    class Unreadable:
        def expect(self, batches, /):
            pass

        def read(self, refs, /):
            raise OSError

    drawn = np.array([bench.round(number, *[1] * 16, rate=0.25, tiles=Unreadable())[1] for number in range(120)])
    assert drawn.mean() == pytest.approx(4.0, abs=5 * math.sqrt(3.0 / 120))
    assert drawn.var() == pytest.approx(3.0, rel=0.4)


def check_non_finite(bench: Bench) -> None:
    """A patient whose gradient is not finite leaves no trace in any coordinate, the count included."""
    others = [bench.patient(0), bench.patient(1)]
    for value in (math.nan, math.inf):
        assert np.array_equal(bench.step([others[0], bench.patient(7, scale=value), others[1]]), bench.step(others))


def check_failure_releases(bench: Bench) -> None:
    """A step in which every patient fails releases exactly what an empty one does."""

    def load() -> PatientTiles:
        raise MemoryError

    assert np.array_equal(bench.step([load, load]), bench.step([]))


CHECKS = [
    check_empty_release,
    check_figures_noise,
    check_removal,
    check_rounds_independent,
    check_poisson,
    check_non_finite,
    check_failure_releases,
]


# The faults. Each replaces one piece of the real path.


def noise_times(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(PatientMechanism, "noise_std", property(lambda self: max(factor, 1e-9) * self.noise_multiplier * self.clip_norm))

    return plant


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PatientMechanism, "clip_factor", lambda self, norm: 1.0)


def tile_as_the_unit(patch: pytest.MonkeyPatch) -> None:
    whole = serial.add_patient

    def add(objective, parameters, patient, total, **options) -> None:
        for tile in range(len(patient.tiles)):
            whole(objective, parameters, patient.part(tile, tile + 1), total, **options)

    patch.setattr(serial, "add_patient", add)


def figures_outside_the_ball(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PatientMechanism, "gradient_bound", property(lambda self: self.clip_norm))


def loss_not_clamped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PatientMechanism, "loss_share", lambda self, loss: loss / self.loss_bound)


def figures_without_noise(patch: pytest.MonkeyPatch) -> None:
    original = KeyedRandom.child

    class Silent:
        def add_normals(self, values: torch.Tensor, std: float) -> None:
            pass

    patch.setattr(KeyedRandom, "child", lambda self, *parts: Silent() if parts == ("figure noise",) else original(self, *parts))


def same_seed_each_round(patch: pytest.MonkeyPatch) -> None:
    original = KeyedRandom.__init__
    patch.setattr(
        KeyedRandom, "__init__", lambda self, secret, context: original(self, secret, {k: v for k, v in context.items() if k != "round"})
    )


def batch_of_fixed_size(patch: pytest.MonkeyPatch) -> None:
    def draw(cohort, rate, random):
        chosen = random.choose(len(cohort.patients), round(rate * len(cohort.patients)))
        return tuple(cohort.patients[index] for index in chosen)

    patch.setattr(local_round, "draw_patients", draw)


def dividing_by_the_actual_count(patch: pytest.MonkeyPatch) -> None:
    original = private_step._release

    def release(total, mechanism, random):
        count = total.patients
        out = original(total, mechanism, random)
        for gradient in out.gradients.values():
            gradient.mul_(mechanism.expected_patients / max(count, 1))
        return out

    patch.setattr(private_step, "_release", release)


def no_noise_on_an_empty_step(patch: pytest.MonkeyPatch) -> None:
    original, plain = private_step._release, noise_times(0.0)

    def release(total, mechanism, random):
        if total.patients:
            return original(total, mechanism, random)
        with pytest.MonkeyPatch.context() as inner:
            plain(inner)
            return original(total, mechanism, random)

    patch.setattr(private_step, "_release", release)


def non_finite_patients_let_in(patch: pytest.MonkeyPatch) -> None:
    def gradient(self, patient):
        serial.clear_gradients(self._parameters)
        self._objective.loss(patient.tiles, patient.draws).backward()
        return 1.0, 1.0, {name: parameter.grad for name, parameter in self._parameters.items()}

    patch.setattr(serial.PatientGradients, "__call__", gradient)


def non_finite_patients_counted(patch: pytest.MonkeyPatch) -> None:
    original = serial.add_patient

    def add(objective, parameters, patient, total, **options) -> None:
        total.patients += 1
        original(objective, parameters, patient, total, **options)
        total.patients -= 1

    patch.setattr(serial, "add_patient", add)


def failures_abort(patch: pytest.MonkeyPatch) -> None:
    def contribute(engine, batch, total):
        return [failure for load in batch for failure in engine.add([load()], total) if failure is not None]

    patch.setattr(private_step, "_contribute", contribute)


FAULTS = [
    (noise_times(0.0), "no noise", {check_empty_release, check_figures_noise}),
    (noise_times(0.5), "half the noise", {check_empty_release, check_figures_noise}),
    (noise_times(1.5), "half as much noise again", {check_empty_release, check_figures_noise}),
    (no_clipping, "no clipping", {check_removal}),
    (tile_as_the_unit, "tile as the unit", {check_removal}),
    (figures_outside_the_ball, "figures outside the joint ball", {check_removal}),
    (loss_not_clamped, "loss not clamped", {check_removal}),
    (figures_without_noise, "figures without noise", {check_figures_noise}),
    (same_seed_each_round, "repeated seed", {check_rounds_independent, check_poisson}),
    (batch_of_fixed_size, "batch of fixed size", {check_poisson}),
    (dividing_by_the_actual_count, "division by the actual count", {check_removal, check_empty_release}),
    (no_noise_on_an_empty_step, "no noise on an empty step", {check_empty_release, check_figures_noise}),
    (non_finite_patients_let_in, "non-finite patients let in", {check_non_finite}),
    (non_finite_patients_counted, "non-finite patients counted", {check_non_finite}),
    (failures_abort, "failures abort the step", {check_failure_releases}),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_real_code_passes(check: Callable[[Bench], None], bench: Bench) -> None:
    check(bench)


@pytest.mark.parametrize(("plant", "catchers"), [pytest.param(plant, catchers, id=name) for plant, name, catchers in FAULTS])
def test_a_planted_fault_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None],
    catchers: set[Callable[[Bench], None]],
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    # A step that aborts lets the patient's own failure through: that is the fault. Elsewhere a crash of the check would prove nothing.
    caught = MemoryError if plant is failures_abort else AssertionError
    for check in catchers:
        with pytest.raises(caught):
            check(bench)


# Every engine, number type and objective: what an engine decides is the sensitivity, and what happens when something goes wrong.

COMPUTES = {
    f"{engine}-{precision}": Compute(engine=engine, precision=precision, patients_at_once=3 if engine == "book_keeping" else None)
    for engine in ("serial", "book_keeping")
    for precision in ("float32", "bfloat16")
}
#: Two objectives, of the two kinds, are enough to show that the checks can fail.
FAULTY_FORMS = ("mae", "dino-sinkhorn-kde")
SMALL_CLIP = 0.02
ENGINE_CHECKS = [check_empty_release, check_removal, check_non_finite, check_failure_releases]


@pytest.fixture(params=[(compute, form) for compute in COMPUTES for form in FORMS], ids="-".join)
def any_bench(request, cohort, tiles, mechanism) -> Bench:
    compute, form = request.param
    model = unlike_its_start(FORMS[form]())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def small(**changes: float) -> PatientMechanism:
        # Below every patient's norm and loss, so that a bound that does not hold shows.
        return mechanism(noise_multiplier=SIGMA, clip_norm=SMALL_CLIP, loss_bound=0.2, **changes)

    return Bench(model, state, cohort, tiles, small, COMPUTES[compute], SMALL_CLIP)


def round_bench(compute: str, form: str, cohort: Any, tiles: Any, mechanism: Any) -> Bench:
    model = unlike_its_start(FORMS[form]())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {"noise_multiplier": SIGMA, "clip_norm": CLIP}
    return Bench(model, state, cohort, tiles, lambda **changes: mechanism(**changed, **changes), COMPUTES[compute])


@pytest.mark.parametrize("form", FAULTY_FORMS)
@pytest.mark.parametrize("compute", COMPUTES)
def test_rounds_of_every_engine_are_independent_and_a_repeated_seed_is_caught(
    compute: str, form: str, cohort, tiles, mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = round_bench(compute, form, cohort, tiles, mechanism)
    check_rounds_independent(made)
    same_seed_each_round(monkeypatch)
    with pytest.raises(AssertionError):
        check_rounds_independent(made)


def test_book_keeping_draws_as_poisson_sampling_says_and_another_law_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.compute = COMPUTES["book_keeping-float32"]
    check_poisson(bench)
    batch_of_fixed_size(monkeypatch)
    with pytest.raises(AssertionError):
        check_poisson(bench)


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
def test_every_engine_objective_and_number_type_passes(check: Callable[[Bench], None], any_bench: Bench) -> None:
    check(any_bench)


def tile_as_any_engines_unit(patch: pytest.MonkeyPatch) -> None:
    for kind in (SerialEngine, BookKeepingEngine):

        def add(self, patients, total, whole=kind.add):
            whole(self, [patient.part(tile, tile + 1) for patient in patients for tile in range(len(patient.tiles))], total)
            return [None] * len(patients)

        patch.setattr(kind, "add", add)


def non_finite_let_in_by_any_engine(patch: pytest.MonkeyPatch) -> None:
    for module in (serial, book_keeping):
        patch.setattr(module, "contributes", lambda loss, norm: True)
    patch.setattr(PatientMechanism, "clip_factor", lambda self, norm: 1.0)
    patch.setattr(PatientMechanism, "loss_share", lambda self, loss: 1.0)


def norms_of_half_the_size(patch: pytest.MonkeyPatch) -> None:
    fine = Book.squared_norms
    patch.setattr(Book, "squared_norms", lambda self: fine(self) / 4)
    norm = joint_norm
    patch.setattr(serial, "joint_norm", lambda gradients: norm(gradients) / 2)


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    noise_times(0.5)(patch)


def no_noise(patch: pytest.MonkeyPatch) -> None:
    noise_times(0.0)(patch)


def half_as_much_noise_again(patch: pytest.MonkeyPatch) -> None:
    noise_times(1.5)(patch)


def failures_leave_a_trace(patch: pytest.MonkeyPatch) -> None:
    """A patient who failed has left something in the sum: a blank tile's gradient."""
    fine = private_step._contribute

    def contribute(engine, batch, total):
        def safe(load):
            def loaded():
                try:
                    return load()
                except MemoryError:
                    random = KeyedRandom(bytes(32), {"blank": 0})
                    side = engine._objective.spec.img_size
                    return PatientTiles(torch.zeros(1, 3, side, side), engine._objective.draw(1, random))

            return loaded

        return fine(engine, [safe(load) for load in batch], total)

    patch.setattr(private_step, "_contribute", contribute)


ENGINE_FAULTS = [
    (no_noise, check_empty_release),
    (half_the_noise, check_empty_release),
    (half_as_much_noise_again, check_empty_release),
    (failures_leave_a_trace, check_failure_releases),
    (no_clipping, check_removal),
    (loss_not_clamped, check_removal),
    (tile_as_any_engines_unit, check_removal),
    (norms_of_half_the_size, check_removal),
    (non_finite_let_in_by_any_engine, check_non_finite),
]


@pytest.mark.parametrize("any_bench", [(compute, form) for compute in COMPUTES for form in FAULTY_FORMS], ids="-".join, indirect=True)
@pytest.mark.parametrize(("plant", "check"), [pytest.param(plant, check, id=plant.__name__) for plant, check in ENGINE_FAULTS])
def test_a_fault_planted_in_any_engine_is_caught(plant, check, any_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(any_bench)


def test_every_check_catches_some_fault() -> None:
    assert set().union(*(catchers for _, _, catchers in FAULTS)) == set(CHECKS)
