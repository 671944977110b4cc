"""The exact sum: what one patient adds is that patient's own lattice vector, whoever else is in it, and the release lies on the lattice."""

import math

import pytest
import torch
from torch import Tensor, nn

from pathfed_client.training.joint_sum import UNIT_SHARE, JointSum, release
from pathfed_common.privacy.gaussian import GaussianStream, extended, grid
from pathfed_common.privacy.mechanism import MOST_NOISE

COUNT = 3000


@pytest.fixture
def parameters() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.zeros(COUNT - 7)), "b": nn.Parameter(torch.zeros(7))}


def vectors(n: int, *, scale: float = 1.0, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(n, COUNT, generator=generator) * scale / math.sqrt(COUNT)
    return [{"a": row[:-7].clone(), "b": row[-7:].clone()} for row in flat]


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in gradients.values()))


def summed(parameters, mechanism, patients: list[dict[str, Tensor]], loss: float = 0.7) -> JointSum:
    total = JointSum(parameters, mechanism)
    for gradients in patients:
        total.add(gradients.items(), norm=norm(gradients), loss=loss)
    return total


def units(total: JointSum) -> Tensor:
    return torch.cat([total.integers[name] for name in sorted(total.integers)]).to(torch.int64)


def test_the_sum_has_the_same_bits_in_any_order(parameters, mechanism) -> None:
    patients = vectors(40, scale=3.0)
    forward, backward = (units(summed(parameters, mechanism(), order)) for order in (patients, patients[::-1]))
    assert torch.equal(forward, backward)


@pytest.mark.parametrize("others", [0, 10, 2000])
def test_a_patient_moves_the_sum_by_exactly_its_own_lattice_vector(others: int, parameters, mechanism) -> None:
    # Large like-signed contributions are what makes floating-point sums lose the last bits of one patient's.
    crowd = [{"a": torch.full((COUNT - 7,), 1.0), "b": torch.full((7,), 1.0)}] * others
    one = vectors(1, scale=0.5, seed=9)[0]
    alone = units(summed(parameters, mechanism(), [one]))
    with_it = units(summed(parameters, mechanism(), [*crowd[: others // 2], one, *crowd[others // 2 :]]))
    assert torch.equal(with_it - units(summed(parameters, mechanism(), crowd)), alone)
    rounding = math.sqrt(COUNT) / 2
    assert float(alone.double().norm()) == pytest.approx(0.5 / UNIT_SHARE, rel=0.05, abs=rounding)


def test_a_floating_point_sum_would_not_pass_that_test() -> None:
    crowd, one = torch.full((COUNT,), 1 / math.sqrt(COUNT)), vectors(1, scale=0.5, seed=9)[0]
    vector = torch.cat([one["a"], one["b"]])
    without, with_it = torch.zeros(COUNT), torch.zeros(COUNT)
    for index in range(2000):
        without += crowd
        with_it += crowd
        if index == 1000:
            with_it += vector
    assert float((with_it.double() - without.double() - vector.double()).abs().max()) > 0.0


@pytest.mark.parametrize("scale", [0.01, 0.99, 1.0, 1.5, 300.0])
def test_what_is_added_stays_within_the_bound_after_rounding(scale: float, parameters, mechanism) -> None:
    m = mechanism()
    one = m.figure_scale / (m.clip_norm * UNIT_SHARE)
    for gradients in vectors(5, scale=scale, seed=3):
        total = JointSum(parameters, m)
        total.add(gradients.items(), norm=norm(gradients), loss=99.0)
        gradient = float(units(total).double().norm()) * total.unit
        loss, patients = total.loss_units / one * m.loss_bound, total.patients
        figures = m.figure_scale * math.hypot(loss / m.loss_bound, patients)
        assert gradient <= m.gradient_bound
        assert math.hypot(gradient, figures) <= m.clip_norm


def test_the_worst_vector_for_rounding_stays_within_the_bound(parameters, mechanism) -> None:
    # Every coordinate just above half a unit: each is rounded up, so that the norm doubles.
    m = mechanism(clip_norm=1.0)
    total = JointSum(parameters, m)
    gradients = {name: torch.full(p.shape, 0.5001 * total.unit) for name, p in parameters.items()}
    total.add(gradients.items(), norm=norm(gradients), loss=0.0)
    assert set(units(total).tolist()) == {1}
    at_target = {name: torch.full(p.shape, total.target / math.sqrt(COUNT)) for name, p in parameters.items()}
    full = JointSum(parameters, m)
    full.add(at_target.items(), norm=total.target, loss=0.0)
    assert float(units(full).double().norm()) * full.unit <= m.gradient_bound


def test_a_missing_gradient_counts_as_zero(parameters, mechanism) -> None:
    total = JointSum(parameters, mechanism())
    total.add([("b", torch.full((7,), 0.1))], norm=0.1 * math.sqrt(7), loss=1.0)
    assert not total.integers["a"].any()
    assert total.integers["b"].all()


def test_a_patient_whose_adding_stops_leaves_a_part_of_that_patients_vector(mechanism) -> None:
    parameters = {name: nn.Parameter(torch.zeros(20_000)) for name in ("a", "b")}
    whole = {name: torch.randn(20_000, generator=torch.Generator().manual_seed(1)) for name in parameters}
    broken = JointSum(parameters, mechanism())

    def stops():
        yield "a", whole["a"]
        raise MemoryError

    with pytest.raises(MemoryError):
        broken.add(stops(), norm=norm(whole), loss=1.0)
    assert torch.equal(broken.integers["a"], summed(parameters, mechanism(), [whole]).integers["a"])
    assert broken.integers["a"].any()
    assert not broken.integers["b"].any()
    assert (broken.patients, broken.loss_units) == (0, 0)


@pytest.mark.parametrize("sizes", [[1], [7, 1, 3], [1 << 13] * 40, [(1 << 18) + 5, 3, 1 << 13, 2 << 18, 9000]])
def test_what_is_added_does_not_depend_on_how_tensors_are_put_together(sizes: list[int], mechanism) -> None:
    generator = torch.Generator().manual_seed(2)
    gradients = {f"p{place:02}": torch.randn(size, generator=generator) for place, size in enumerate(sizes)}
    total = summed(gradients, mechanism(), [gradients])
    scale = total.clip_factor(norm(gradients)) / total.unit
    for name, gradient in gradients.items():
        alone = (gradient.double() * scale).round()
        # A float32 scale may turn a tie.
        assert float((total.integers[name] - alone).abs().max()) <= 1
        assert float((total.integers[name] != alone).double().mean()) < 0.02


@pytest.mark.parametrize(("size", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (-1.0, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_refused_and_adds_nothing(size: float, loss: float, parameters, mechanism) -> None:
    total = JointSum(parameters, mechanism())
    with pytest.raises(ValueError, match="finite"):
        total.add(vectors(1)[0].items(), norm=size, loss=loss)
    assert not units(total).any()
    assert total.patients == 0


@pytest.mark.parametrize("sigma", [1e-6, 0.5, 1e4])
def test_the_release_is_the_noised_sum_on_a_coarse_public_grid_over_the_public_batch(sigma: float, parameters, mechanism, random) -> None:
    m = mechanism(noise_multiplier=sigma)
    total = summed(parameters, m, vectors(3))
    exact, std = total.integers["a"].double(), m.noise_std / total.unit
    normals = torch.cat(list(random().normal_range(0, COUNT - 7)))
    cell = max(grid(std), 1.0)
    wrapped = ((exact + normals * std) / cell).round() * cell
    wrapped = (wrapped + 2**31) % 2**32 - 2**31
    released = release(total.integers["a"], m, random())
    assert torch.equal(released, (wrapped * (total.unit / m.expected_patients)).float())
    assert released.shape == parameters["a"].shape


def test_the_figures_are_noised_by_two_normals_of_their_own_on_the_same_grid(parameters, mechanism, random) -> None:
    m = mechanism(loss_bound=3.0)
    total = summed(parameters, m, vectors(4), loss=1.5)
    one, std = m.figure_scale / total.unit, m.noise_std / total.unit
    normals = torch.cat(list(random().normal_range(0, 2)))
    loss, patients = total.release_figures(random())
    assert loss == pytest.approx((4 * 0.5 + float(normals[0]) * std / one) * m.loss_bound, abs=grid(std) / one * m.loss_bound)
    assert patients == pytest.approx(4 + float(normals[1]) * std / one, abs=grid(std) / one)
    assert (patients * one) % grid(std) == pytest.approx(0, abs=1e-6)


def test_a_sum_beyond_the_integers_wraps_and_the_release_with_it(mechanism, random) -> None:
    m = mechanism(noise_multiplier=1e-9)
    total = JointSum({"w": nn.Parameter(torch.zeros(1))}, m)
    total.integers["w"].fill_(2**31 - 1)
    total.add([("w", torch.tensor([3 * total.unit]))], norm=3 * total.unit, loss=0.0)
    assert total.integers["w"].item() == -(2**31) + 2
    released = release(total.integers["w"], m, random())
    assert released.item() == pytest.approx((-(2**31) + 2) * total.unit / m.expected_patients)


@pytest.mark.parametrize(("sigma", "wraps"), [(MOST_NOISE, False), (78.0, True)])
def test_the_largest_normal_wraps_nothing_up_to_a_plans_most_noise(sigma: float, wraps: bool, mechanism, random, monkeypatch) -> None:
    """The largest of all uniforms' radii; 170 patients along the one coordinate at a plan's largest sigma, nobody at the other."""
    largest = math.sqrt(-2 * math.log(extended(0, 0)))
    monkeypatch.setattr(GaussianStream, "chunks", lambda *_, **__: iter([torch.tensor([largest], dtype=torch.float64)]))
    m = mechanism(noise_multiplier=sigma, clip_norm=2.0)
    integers = torch.tensor([0 if wraps else round(170 / UNIT_SHARE)], dtype=torch.int32)
    exact = float(integers) * UNIT_SHARE + sigma * largest
    released = float(release(integers, m, random())) * m.expected_patients / m.clip_norm
    assert released == pytest.approx(exact - 2048 if wraps else exact, abs=sigma / 128)


def test_too_many_parameters_for_the_lattice_are_refused(mechanism) -> None:
    with pytest.raises(ValueError, match="too many for a lattice"):
        JointSum({}, mechanism(), dimension=10**12)
    assert JointSum({}, mechanism(), dimension=1_900_000_000).target > 0.98 * mechanism().gradient_bound


def test_the_sensitive_sum_does_not_print_itself(parameters, mechanism) -> None:
    assert repr(JointSum(parameters, mechanism())) == "JointSum(<sensitive>)"
