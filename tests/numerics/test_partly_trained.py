"""Encoders that are trained in part: every engine gives each patient's gradient of what is trained, and of nothing else."""

from collections.abc import Callable
from typing import cast

import pytest
import torch
from objectives import SIDE, Source, dino_settings, some_tiles, unlike_its_start
from opacus.grad_sample import GradSampleModule
from torch import Tensor

from pathfed_client.training.compute import Compute
from pathfed_client.training.engines.book_keeping import BookKeepingEngine
from pathfed_client.training.engines.engine import Engine, PatientTiles, trainable
from pathfed_client.training.engines.serial import SerialEngine
from pathfed_client.training.joint_sum import JointSum
from pathfed_client.training.local_round import try_base_state
from pathfed_common import model
from pathfed_common.encoder.adapters import Adapters, attach, is_adapter
from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.encoder.vit import VisionTransformer
from pathfed_common.objectives.dino import SelfDistillation
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.objectives.objective import ObjectiveModule
from pathfed_common.plan import AdaptersPlan, EncoderPlan, Plan

SPEC = EncoderSpec(name="tiny", img_size=SIDE, patch_size=8, embed_dim=24, depth=2, num_heads=3, reg_tokens=1)
OBJECTIVES: dict[str, Callable[[], ObjectiveModule]] = {
    "mae": lambda: MaskedAutoencoder(SPEC, mask_ratio=0.5, decoder_dim=16, decoder_depth=1, decoder_heads=2, normalise_target=True),
    "dino": lambda: SelfDistillation(SPEC, dino_settings()),
}
WAYS = {"frozen": EncoderPlan(freeze_blocks=1), "adapters": EncoderPlan(freeze_blocks=1, adapters=AdaptersPlan(rank=2, scale=0.5))}


def made(objective: str, way: str) -> ObjectiveModule:
    """A small objective, of which is trained what a plan with this encoder section trains."""
    built = OBJECTIVES[objective]()
    adapters = WAYS[way].adapters
    if adapters.rank:
        for path in ["encoder", *(["teacher.encoder"] if objective == "dino" else [])]:
            encoder = cast(VisionTransformer, built.get_submodule(path))
            attach(encoder, Adapters(rank=adapters.rank, scale=adapters.scale, first_block=1), torch.Generator().manual_seed(1))
    unlike_its_start(built)  # B is not zero any more
    plan = Plan.model_validate(
        {
            "name": "x",
            "privacy": {"expected_patients": 1.0, "noise_multiplier": 1.0, "clip_norm": 1.0, "epsilon_limit": 1.0},
            "rounds": {"count": 1},
            "objective": {"name": objective},
        }
    ).model_copy(update={"encoder": WAYS[way]})
    is_trained = model.trained(plan)
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(is_trained(name))
    return built


def patients(objective: ObjectiveModule, counts: tuple[int, ...]) -> list[PatientTiles]:
    return [PatientTiles(some_tiles(n, seed=i) * 2.0 ** (i - 1), objective.draw(n, Source(3, i))) for i, n in enumerate(counts)]


def brute(objective: ObjectiveModule, patient: PatientTiles) -> dict[str, Tensor]:
    """The patient's own gradient, by plain autograd over every parameter: what is frozen asks for none."""
    named = dict(objective.named_parameters())
    asked = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    found = torch.autograd.grad(objective.loss(patient.tiles, patient.draws), list(asked.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(asked, found, strict=True) if gradient is not None}


ENGINES: dict[str, Callable[[ObjectiveModule], Engine]] = {
    "serial": lambda objective: SerialEngine(objective, trainable(objective)),
    "book-keeping": lambda objective: BookKeepingEngine(
        objective, trainable(objective), Compute(engine="book_keeping", patients_at_once=2), patients=2, tiles_per_patient=3
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", OBJECTIVES)
def test_the_sum_is_that_of_the_clipped_gradients_of_what_is_trained(form: str, way: str, engine: str, mechanism) -> None:
    objective = made(form, way)
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    drawn = patients(objective, (3, 3, 3, 3))
    references = [brute(objective, patient) for patient in drawn]
    norms = [float(torch.stack([g.double().square().sum() for g in reference.values()]).sum().sqrt()) for reference in references]
    m = mechanism(clip_norm=(min(norms) + max(norms)) / 2 / 0.91**0.5, loss_bound=20.0)
    total = JointSum(trainable(objective), m)
    running = ENGINES[engine](objective)
    for start in range(0, 4, running.patients):
        assert running.add(drawn[start : start + running.patients], total) == [None] * running.patients
    assert set(total.integers) == {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert min(norms) < m.gradient_bound < max(norms), "some are clipped and some are not"
    for name in total.integers:
        expected = sum((r[name].double() * m.clip_factor(norm) for r, norm in zip(references, norms, strict=True)), torch.zeros(()))
        assert float((total.gradient(name) - expected).abs().max()) < 2e-5 * m.clip_norm, name
    for name, parameter in objective.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_frozen_parts_have_no_part_in_the_norm() -> None:
    """The gradient of the whole is longer: a norm that counted it would clip what is trained too much, as the sum above would show."""
    objective = made("mae", "frozen")
    (patient,) = patients(objective, (3,))
    norm = SerialEngine(objective, trainable(objective)).norm(patient)
    objective.requires_grad_(True)
    assert SerialEngine(objective, trainable(objective)).norm(patient) > 1.03 * norm


def test_adapters_gradients_are_those_of_opacus() -> None:
    """One tile a patient, so that a sample is a patient."""
    objective = made("mae", "adapters")
    drawn = patients(objective, (1, 1, 1))
    tiles, keep = torch.cat([patient.tiles for patient in drawn]), torch.cat([patient.draws["keep"] for patient in drawn])

    class Summed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = objective

        def forward(self, tiles: Tensor) -> Tensor:
            return cast(MaskedAutoencoder, self.inner).tile_losses(tiles, {"keep": keep})

    # Opacus has no rule for parameters of the top modules of encoder and head; the adapters' layers are plain ones.
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    hooked = GradSampleModule(Summed(), loss_reduction="sum")
    hooked(tiles.clone().requires_grad_()).sum().backward()
    samples = {name.removeprefix("inner."): vars(p)["grad_sample"] for name, p in hooked._module.named_parameters() if p.requires_grad}
    hooked.remove_hooks()
    assert len(samples) == 2 * 4
    for index, patient in enumerate(drawn):
        for name, gradient in brute(objective, patient).items():
            torch.testing.assert_close(samples[name][index], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_base_state_is_tried_whole(way: str) -> None:
    """Frozen tensors are part of a base state: it is refused without them, and loaded with them."""
    objective = made("dino", way)
    state = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    try_base_state(objective=objective, base_state=state, tile_px=SIDE, tiles_per_patient=2)
    state["encoder.patch_embed.proj.bias"][0] = float("nan")
    with pytest.raises(Exception, match="not finite"):
        try_base_state(objective=objective, base_state=state, tile_px=SIDE, tiles_per_patient=2)
