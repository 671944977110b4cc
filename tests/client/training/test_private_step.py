"""The private step: it always releases, and what a failed patient leaves behind is nothing."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from pathfed_client.training import private_step as module
from pathfed_client.training.engines.engine import NotContributed, PatientTiles, trainable
from pathfed_client.training.joint_sum import JointSum
from pathfed_client.training.private_step import ReleasedFigures, SiteNotes, private_step
from pathfed_common.objectives.objective import Draws
from pathfed_common.privacy.gaussian import grid
from pathfed_common.privacy.mechanism import PatientMechanism


class Linear(nn.Module):
    """Loss = mean over tiles of tile . w: the gradient is the mean tile, the loss starts at 0.5 * its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), 0.5))
        self.b = nn.Parameter(torch.zeros(2))

    def loss(self, tiles: torch.Tensor, draws: Draws) -> torch.Tensor:
        return (tiles @ self.w).mean()


def patient(*values: float):
    return lambda: PatientTiles(torch.tensor([values]), {})


def failing(error: BaseException):
    def load() -> PatientTiles:
        raise error

    return load


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that rounds to nothing, so that sums can be read off. The real code path otherwise."""
    monkeypatch.setattr(PatientMechanism, "noise_std", property(lambda self: 1e-9))


def same(left, right) -> bool:
    return left.figures == right.figures and all(torch.equal(left.gradients[name], right.gradients[name]) for name in left.gradients)


@pytest.mark.usefixtures("quiet")
def test_sum_is_of_clipped_gradients_over_the_public_batch(mechanism, random) -> None:
    model = Linear()
    release = private_step(model, trainable(model), [patient(0.1, 0.2, 0.0), patient(30.0, 0.0, 40.0)], mechanism(), random())
    bound = mechanism().gradient_bound
    expected = [(0.1 + 0.6 * bound) / 4, 0.2 / 4, 0.8 * bound / 4]
    assert release.gradients["w"].tolist() == pytest.approx(expected, rel=3e-5)
    assert release.gradients["b"].tolist() == [0.0, 0.0]
    # Losses 0.15 and 35, the latter clamped to 2.
    assert release.figures.loss_sum == pytest.approx(2.15, rel=1e-5)
    assert release.figures.patients == pytest.approx(2.0, rel=1e-5)


def test_stds_are_stated_beside_the_figures(mechanism, random) -> None:
    model = Linear()
    figures = private_step(model, trainable(model), [], mechanism(), random()).figures
    assert figures.patients_std == pytest.approx(4 * math.sqrt(2) / 0.3)
    assert figures.loss_sum_std == pytest.approx(2 * 4 * math.sqrt(2) / 0.3)


def test_an_empty_step_releases_noise_in_every_coordinate(mechanism, random) -> None:
    model = Linear()
    release = private_step(model, trainable(model), [], mechanism(), random())
    numbers = [*release.gradients["w"].tolist(), *release.gradients["b"].tolist(), release.figures.loss_sum, release.figures.patients]
    assert len(set(numbers)) == 7
    assert all(number != 0 and math.isfinite(number) for number in numbers)


@pytest.mark.parametrize(
    "error",
    [
        OSError("decoder"),
        MemoryError(),
        RuntimeError("CUDA out of memory"),
        ValueError("shape"),
        NotContributed("no tile"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failing_patient_contributes_zero_and_the_step_releases(error: Exception, mechanism, random) -> None:
    model, notes = Linear(), SiteNotes()
    others = [patient(1.0, 0.0, 0.0), patient(0.0, 3.0, 0.0)]
    with_failure = private_step(model, trainable(model), [others[0], failing(error), others[1]], mechanism(), random(), notes=notes)
    assert same(with_failure, private_step(model, trainable(model), others, mechanism(), random()))
    assert notes.patients_drawn == 3
    assert notes.failures == [str(error) if isinstance(error, NotContributed) else type(error).__name__]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
def test_a_patient_that_is_not_finite_contributes_zero_to_everything(value: float, mechanism, random) -> None:
    model = Linear()
    poisoned = private_step(model, trainable(model), [patient(value, 1.0, value), patient(1.0, 0.0, 0.0)], mechanism(), random())
    assert same(poisoned, private_step(model, trainable(model), [patient(1.0, 0.0, 0.0)], mechanism(), random()))


@pytest.mark.usefixtures("quiet")
def test_memory_that_runs_out_while_adding_leaves_a_part_within_the_bound(mechanism, random, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(JointSum):
        def add(self, gradients, *, norm: float, loss: float) -> None:
            def some():
                yield from gradients
                raise MemoryError

            super().add(some(), norm=norm, loss=loss)

    model = Linear()
    monkeypatch.setattr(module, "JointSum", Failing)
    release = private_step(model, trainable(model), [patient(1.0, 1.0, 1.0)], mechanism(), random())
    assert release.figures.patients == 0
    assert release.figures.loss_sum == 0


def test_only_the_end_of_the_process_passes(mechanism, random) -> None:
    model = Linear()
    with pytest.raises(KeyboardInterrupt):
        private_step(model, trainable(model), [failing(KeyboardInterrupt())], mechanism(), random())


def test_an_objective_that_couples_patients_is_refused_before_any_is_read(mechanism, random) -> None:
    model = Linear()
    model.norm = nn.BatchNorm1d(3)
    read: list[int] = []

    def load() -> PatientTiles:
        read.append(1)
        return PatientTiles(torch.ones(1, 3), {})

    with pytest.raises(ValueError, match="couples patients"):
        private_step(model, trainable(model), [load], mechanism(), random())
    assert read == []


def test_parameters_are_unchanged_and_hold_no_gradient_afterwards(mechanism, random) -> None:
    model = Linear()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    private_step(model, trainable(model), [patient(1.0, 2.0, 3.0), failing(OSError())], mechanism(), random())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_noise_depends_on_a_parameters_name_and_not_on_data_or_order(mechanism, random) -> None:
    model = Linear()
    parameters = trainable(model)
    empty = private_step(model, parameters, [], mechanism(), random())
    one = private_step(model, dict(reversed(parameters.items())), [patient(0.5, 0.0, 0.0)], mechanism(), random())
    assert torch.equal(empty.gradients["b"], one.gradients["b"])
    # Both lie on the noise's grid.
    cell = grid(mechanism().noise_std) / mechanism().expected_patients
    assert (one.gradients["w"] - empty.gradients["w"]).tolist() == pytest.approx([0.125, 0, 0], abs=cell)
    assert not (torch.stack([one.gradients["w"], empty.gradients["w"]]).double() % cell).any()


@pytest.mark.usefixtures("quiet")
def test_the_order_of_patients_changes_no_bit(mechanism, random) -> None:
    model = Linear()
    patients = [patient(float(i), 1.0, -float(i) / 3) for i in range(50)]
    left = private_step(model, trainable(model), patients, mechanism(), random())
    assert same(left, private_step(model, trainable(model), patients[::-1], mechanism(), random()))


def test_figures_add_up_with_their_variances() -> None:
    a = ReleasedFigures(loss_sum=1.0, loss_sum_std=3.0, patients=2.0, patients_std=6.0)
    b = ReleasedFigures(loss_sum=10.0, loss_sum_std=4.0, patients=20.0, patients_std=8.0)
    assert a + b == ReleasedFigures(loss_sum=11.0, loss_sum_std=5.0, patients=22.0, patients_std=10.0)
    assert [field.name for field in dataclasses.fields(a)] == ["loss_sum", "loss_sum_std", "patients", "patients_std"]
