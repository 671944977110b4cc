"""The serial engine: whose gradient it is, what it refuses, and how norms are taken."""

import math

import pytest
import torch
from torch import Tensor, nn

from pathfed_client.training.engines.engine import NotContributed, PatientTiles, check_objective, trainable
from pathfed_client.training.engines.serial import SerialEngine, add_patient, gradient_norm, patient_gradient
from pathfed_client.training.joint_sum import JointSum
from pathfed_common.objectives.objective import Draws

PATIENT = PatientTiles(torch.ones(2, 3), {})


class Toy(nn.Module):
    """Loss = mean over tiles of (w . x) + 0 * unused."""

    def __init__(self, *extra: nn.Module) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.unused = nn.Parameter(torch.ones(2))
        self.extra = nn.Sequential(*extra)

    def loss(self, tiles: Tensor, draws: Draws) -> Tensor:
        return (self.extra(tiles) @ self.w).mean()


class Counting(nn.Module):
    """Changes a buffer in forward, in place or by replacing it."""

    count: Tensor

    def __init__(self, *, replace: bool) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.replace = replace

    def forward(self, x: Tensor) -> Tensor:
        if self.replace:
            self.count = self.count + x.sum().detach()
        else:
            self.count += x.sum().detach()
        return x


def test_the_gradient_is_that_of_the_mean_loss_over_the_patients_tiles() -> None:
    toy = Toy()
    tiles = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    loss, norm, gradients = patient_gradient(toy, trainable(toy), PatientTiles(tiles, {}))
    assert loss == pytest.approx(2.5)
    assert gradients["w"].tolist() == [0.5, 1.0, 0.0]
    assert norm == pytest.approx(math.sqrt(1.25))


def test_a_parameter_without_a_gradient_counts_as_zero(mechanism) -> None:
    toy = Toy()
    total = JointSum(trainable(toy), mechanism())
    add_patient(toy, trainable(toy), PATIENT, total)
    assert total.integers["unused"].tolist() == [0, 0]
    assert total.patients == 1


def test_no_gradient_of_one_patient_is_left_for_the_next(mechanism) -> None:
    toy = Toy()
    total = JointSum(trainable(toy), mechanism(clip_norm=100.0))
    add_patient(toy, trainable(toy), PATIENT, total)
    first = total.integers["w"].clone()
    add_patient(toy, trainable(toy), PATIENT, total)
    assert first.any()
    assert torch.equal(total.integers["w"], 2 * first)


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.SyncBatchNorm(3), nn.InstanceNorm1d(3, track_running_stats=True)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_with_statistics_over_a_batch_are_refused(layer: nn.Module) -> None:
    toy = Toy(layer)
    with pytest.raises(ValueError, match=r"layer 'extra.0' .* couples patients"):
        check_objective(toy, trainable(toy))


def test_dropout_is_refused_because_of_its_global_generator() -> None:
    toy = Toy(nn.Dropout(0.1))
    with pytest.raises(ValueError, match="global generator"):
        check_objective(toy, trainable(toy))


def test_layers_within_a_tile_are_accepted() -> None:
    toy = Toy(nn.LayerNorm(3), nn.GELU(), nn.Dropout(0.0), nn.InstanceNorm1d(3))
    check_objective(toy, trainable(toy))


@pytest.mark.parametrize("replace", [False, True])
def test_a_buffer_that_changes_is_put_back_and_the_patient_contributes_zero(replace: bool, mechanism) -> None:
    toy = Toy(Counting(replace=replace))
    counting = toy.extra[0]
    assert isinstance(counting, Counting)
    buffer = counting.count
    total = JointSum(trainable(toy), mechanism())
    with pytest.raises(NotContributed, match="a buffer changed"):
        add_patient(toy, trainable(toy), PATIENT, total)
    assert counting.count is buffer
    assert buffer.item() == 0
    assert (total.patients, total.integers["w"].any().item()) == (0, False)


def test_a_patient_during_whose_pass_a_parameter_changes_contributes_zero(mechanism) -> None:
    class Clamping(Toy):
        def loss(self, tiles: Tensor, draws: Draws) -> Tensor:
            with torch.no_grad():
                self.w.clamp_(max=2.0)
            return super().loss(tiles, draws)

    toy = Clamping()
    total = JointSum(trainable(toy), mechanism())
    with pytest.raises(NotContributed, match="a parameter changed"):
        add_patient(toy, trainable(toy), PATIENT, total)
    assert total.patients == 0


def test_tied_parameters_are_refused() -> None:
    toy = Toy()
    toy.unused = toy.w
    with pytest.raises(ValueError, match=r"differ in \['unused'\]"):
        check_objective(toy, trainable(toy))
    toy.unused = nn.Parameter(toy.w.data)
    with pytest.raises(ValueError, match="'unused' and 'w' are tied"):
        check_objective(toy, trainable(toy))


def test_parameters_of_another_model_or_only_some_are_refused() -> None:
    toy = Toy()
    with pytest.raises(ValueError, match="not the objective's own"):
        check_objective(toy, trainable(Toy()))
    with pytest.raises(ValueError, match=r"differ in \['unused'\]"):
        check_objective(toy, {"w": toy.w})
    for parameter in toy.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable ones"):
        check_objective(toy, {})


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_patient_whose_numbers_are_not_finite_adds_nothing(value: float, mechanism) -> None:
    toy = Toy()
    total = JointSum(trainable(toy), mechanism())
    with pytest.raises(NotContributed, match="not finite"):
        add_patient(toy, trainable(toy), PatientTiles(torch.full((1, 3), value), {}), total)
    assert (total.patients, total.loss_units, total.integers["w"].any().item()) == (0, 0, False)


def test_norms_of_large_gradients_are_not_too_small() -> None:
    # torch's own fp32 norm of this tensor on a CPU is 3.6e-4 too small, which would break the bound C by as much.
    gradient = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    true = math.sqrt(float(gradient.double().square().sum()))
    assert gradient_norm({"a": gradient[:7_000_001], "b": gradient[7_000_001:]}) == pytest.approx(true, rel=1e-6)


def test_norm_of_nothing_is_zero_and_of_bf16_is_taken_in_fp32() -> None:
    assert gradient_norm({}) == 0.0
    assert gradient_norm({"a": torch.full((65536,), 0.5, dtype=torch.bfloat16)}) == pytest.approx(128.0, rel=1e-6)


class Separable(nn.Module):
    """Loss = mean over tiles of (w . x)^2: the gradient of a part is not that of the whole."""

    separable = True

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        self.most = 100
        self.sizes: list[int] = []

    def loss(self, tiles: Tensor, draws: Draws) -> Tensor:
        self.sizes.append(len(tiles))
        if len(tiles) > self.most:
            raise torch.OutOfMemoryError
        return ((tiles @ self.w) ** 2).mean()


FIVE = PatientTiles(torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), {})


@pytest.mark.parametrize("most", [5, 4, 2, 1])
def test_a_microbatch_that_does_not_fit_is_taken_in_parts_with_the_same_gradient(most: int) -> None:
    model = Separable()
    value, norm, gradients = patient_gradient(model, trainable(model), FIVE)
    whole = gradients["w"].clone()
    model.most = most
    parted = patient_gradient(model, trainable(model), FIVE)
    assert parted[:2] == pytest.approx((value, norm), rel=1e-12)
    assert torch.allclose(parted[2]["w"], whole, rtol=1e-12)
    assert max(model.sizes[-2:]) <= most


def test_a_patient_that_fits_in_no_part_contributes_zero(mechanism) -> None:
    model = Separable()
    model.most = 0
    total = JointSum(trainable(model), mechanism())
    assert SerialEngine(model, trainable(model)).add([FIVE], total) == ["OutOfMemoryError"]
    assert (total.patients, total.integers["w"].any().item()) == (0, False)


def test_an_error_that_is_no_want_of_memory_is_not_tried_again() -> None:
    class Broken(Separable):
        def loss(self, tiles: Tensor, draws: Draws) -> Tensor:
            self.sizes.append(len(tiles))
            raise ValueError("shape")

    model = Broken()
    with pytest.raises(ValueError, match="shape"):
        patient_gradient(model, trainable(model), FIVE)
    assert model.sizes == [5]


def test_tiles_at_once_are_for_separable_objectives() -> None:
    model = Separable()
    SerialEngine(model, trainable(model), tiles_at_once=2).rehearse([FIVE])
    assert model.sizes == [2, 2, 1]
    with pytest.raises(ValueError, match="not separable"):
        SerialEngine(Toy(), trainable(Toy()), tiles_at_once=2)


def test_a_frozen_parameter_that_changes_is_noticed() -> None:
    class Following(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Parameter(torch.zeros(3), requires_grad=False)

        def loss(self, tiles: Tensor, draws: Draws) -> Tensor:
            with torch.no_grad():
                self.teacher.lerp_(self.w, 0.1)
            return super().loss(tiles, draws)

    model = Following()
    with pytest.raises(NotContributed, match="a parameter changed"):
        patient_gradient(model, trainable(model), PATIENT)
