"""Patient gradients against references, the sensitivity of the sum, and reproducibility of releases."""

import math
import pickle

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pathfed_client.training.engines.engine import PatientTiles, trainable
from pathfed_client.training.engines.serial import add_patient, gradient_norm, patient_gradient
from pathfed_client.training.joint_sum import JointSum
from pathfed_client.training.local_round import run_round
from pathfed_client.training.private_step import private_step
from pathfed_common.objectives.objective import Draws
from pathfed_common.privacy.gaussian import grid
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom


def patients(objective, count: int, tiles: int = 4) -> list[PatientTiles]:
    made = []
    for number in range(count):
        random = KeyedRandom(bytes(32), {"patient": number})
        pixels = torch.from_numpy(random.normals(tiles * 3 * 16 * 16)).reshape(tiles, 3, 16, 16) * 2.0 ** (number - 1)
        made.append(PatientTiles(pixels, objective.draw(tiles, random)))
    return made


def test_serial_gradients_equal_those_of_torch_func(objective) -> None:
    drawn = patients(objective, 4)
    parameters = trainable(objective)
    plain = {name: parameter.detach() for name, parameter in parameters.items()}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = objective

        def forward(self, tiles: Tensor, draws: Draws) -> Tensor:
            return self.inner.loss(tiles, draws)

    def loss(state: dict[str, Tensor], tiles: Tensor, draws: Draws) -> Tensor:
        return functional_call(Loss(), {f"inner.{name}": value for name, value in state.items()}, (tiles, draws))

    # Only the plain attention kernel has a batching rule under vmap.
    with sdpa_kernel(SDPBackend.MATH):
        stacked = vmap(grad(loss), in_dims=(None, 0, 0))(
            plain, torch.stack([p.tiles for p in drawn]), {"keep": torch.stack([p.draws["keep"] for p in drawn])}
        )
    for index, patient in enumerate(drawn):
        _, norm, gradients = patient_gradient(objective, parameters, patient)
        reference = {name: stacked[name][index] for name in stacked}
        scale = gradient_norm(reference)
        assert norm == pytest.approx(scale, rel=1e-5)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, reference[name], atol=2e-6 * scale, rtol=1e-4), name


class Mlp(nn.Module):
    """Layers that opacus has its own rules for; one loss for each tile."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.norm = nn.LayerNorm(32)
        self.first = nn.Linear(32, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, tiles: Tensor) -> Tensor:
        return self.second(torch.nn.functional.gelu(self.first(self.norm(self.conv(tiles).flatten(1)))))

    def loss(self, tiles: Tensor, draws: Draws) -> Tensor:
        return self(tiles).square().sum(1).mean()


def test_the_clipped_sum_equals_that_of_opacus_per_sample_gradients() -> None:
    torch.manual_seed(0)
    model = Mlp()
    tiles = torch.from_numpy(KeyedRandom(bytes(32), {}).normals(6 * 3 * 16 * 16)).reshape(6, 3, 16, 16)
    tiles *= torch.tensor([0.02, 0.1, 0.5, 1.0, 3.0, 20.0]).view(6, 1, 1, 1)
    hooked = GradSampleModule(model, loss_reduction="sum")
    # Opacus' hooks warn where no input asks for a gradient.
    hooked(tiles.clone().requires_grad_()).square().sum().backward()
    samples = {name: vars(parameter)["grad_sample"] for name, parameter in model.named_parameters()}
    hooked.remove_hooks()
    norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples.values()]).norm(dim=0)
    mechanism = PatientMechanism(
        sampling_rate=1.0, noise_multiplier=1.0, clip_norm=8.0, expected_patients=1.0, figure_share=0.3, loss_bound=1.0
    )
    assert norms.min() < mechanism.gradient_bound < norms.max()
    factors = (mechanism.gradient_bound / norms).clamp(max=1)
    total = JointSum(trainable(model), mechanism)
    for tile in tiles:
        add_patient(model, trainable(model), PatientTiles(tile[None], {}), total)
    for name, sample in samples.items():
        assert torch.allclose(total.gradient(name).float(), torch.einsum("n,n...->...", factors, sample), atol=2e-4), name


@pytest.mark.parametrize("leaving", range(5))
def test_removing_a_patient_moves_the_joint_sum_by_at_most_the_clip_norm(leaving: int, objective, mechanism) -> None:
    m, parameters, drawn = mechanism(), trainable(objective), patients(objective, 5)
    with_all, without = JointSum(parameters, m), JointSum(parameters, m)
    for index, patient in enumerate(drawn):
        add_patient(objective, parameters, patient, with_all)
        if index != leaving:
            add_patient(objective, parameters, patient, without)
    gradient = math.sqrt(sum(float((with_all.gradient(n) - without.gradient(n)).square().sum()) for n in parameters))
    loss = (with_all.loss_units - without.loss_units) * with_all.unit
    assert 0 < math.hypot(gradient, loss, m.figure_scale) <= m.clip_norm
    assert gradient <= m.gradient_bound


def bits(tensors: dict[str, Tensor]) -> bytes:
    return b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))


@pytest.fixture
def run(objective, base_state, cohort, tiles, mechanism):
    def call(secret: bytes = bytes(range(32)), **context: str | int):
        return run_round(
            objective=objective,
            base_state=base_state,
            cohort=cohort(5, 3, 4),
            tiles=tiles,
            mechanism=mechanism(sampling_rate=0.7),
            tiles_per_patient=3,
            steps=2,
            local_learning_rate=0.1,
            random=KeyedRandom(secret, {"round": 1, "base": "sha256:aa", "cohort": "sha256:bb", **context}),
        )

    return call


def test_the_same_secret_and_inputs_give_the_same_bytes(run) -> None:
    left, right = run(), run()
    assert bits(left.update) == bits(right.update)
    assert left.figures == right.figures


def numpy_state() -> bytes:
    return pickle.dumps(np.random.get_state())


def test_global_generators_change_nothing_and_are_not_used(run) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    left = bits(run().update)
    before = torch.random.get_rng_state()
    torch.manual_seed(2)
    np.random.seed(2)
    state = numpy_state()
    other = torch.random.get_rng_state()
    assert bits(run().update) == left
    assert torch.equal(torch.random.get_rng_state(), other)
    assert not torch.equal(before, other)
    assert numpy_state() == state


@pytest.mark.parametrize(
    "changes",
    [{"round": 2}, {"base": "sha256:ab"}, {"cohort": "sha256:bc"}, {"code": "sha256:cc"}, {"secret": bytes(32)}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_round_base_cohort_code_or_secret_gives_independent_noise(changes, run) -> None:
    left, right = (np.frombuffer(bits(outcome.update), np.float32) for outcome in (run(), run(**changes)))
    # Noise has std 4 / 4 a step against signals of norm 1, so what is left of a shared noise would show as a correlation near 1.
    assert abs(float(np.corrcoef(left, right)[0, 1])) < 5 / math.sqrt(len(left))


def test_noise_is_independent_between_tensors_of_one_shape(objective, mechanism) -> None:
    release = private_step(objective, trainable(objective), [], mechanism(), KeyedRandom(bytes(32), {}))
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for tensor in release.gradients.values():
        by_shape.setdefault(tuple(tensor.shape), []).append(tensor.flatten())
    same = [group for shape, group in by_shape.items() if len(group) > 1 and math.prod(shape) >= 256]
    assert same
    for group in same:
        correlations = torch.corrcoef(torch.stack(group)) - torch.eye(len(group))
        assert correlations.abs().max() < 5 / math.sqrt(len(group[0]))


def test_noise_of_a_tensor_longer_than_a_chunk_is_that_of_the_whole_stream(mechanism) -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros((1 << 20) + 3))

    model = Long()
    m = mechanism()
    released = private_step(model, trainable(model), [], m, KeyedRandom(bytes(32), {})).gradients["w"]
    expected = torch.cat([part.clone() for part in KeyedRandom(bytes(32), {}).child("noise", "w").normal_range(0, (1 << 20) + 3)])
    # Rounded to the noise's grid; std and B are 4 both.
    assert float((released - expected).abs().max()) <= grid(m.noise_std) / m.expected_patients / 2 + 1e-9
