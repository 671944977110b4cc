"""A record whose first state is not where its plan starts is refused, although everything in it is signed and follows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pathfed_common import digest, model
from pathfed_common.encoder import weights
from pathfed_common.encoder.vit import VisionTransformer
from pathfed_common.errors import ErrorCode
from pathfed_common.plan import DinoPlan, Plan
from pathfed_common.provenance import record
from pathfed_common.provenance.first_state import ROUNDING
from pathfed_common.provenance.verify import Verdict, verify_record

Write = Callable[[dict[str, bytes]], Path]
Change = Callable[[dict[str, Tensor]], object]


def _dino(plan: Plan) -> Plan:
    objective = DinoPlan(head_dim=16, bottleneck_dim=8, prototypes=16, local_crops=1, local_crop_px=16)
    return plan.model_copy(update={"objective": objective})


@pytest.fixture(params=["mae", "dino"])
def seeded(request: pytest.FixtureRequest, scene: Any) -> Any:
    """A run that starts from random weights."""
    return scene if request.param == "mae" else replace(scene, plan=_dino(scene.plan))


@pytest.fixture
def started(seeded: Any) -> Any:
    """A run that starts from an imported encoder."""
    spec = model.encoder_spec(seeded.plan)
    start = {
        name: tensor.detach() for name, tensor in VisionTransformer(spec, generator=torch.Generator().manual_seed(9)).state_dict().items()
    }
    named = digest.of_chunks(weights.encoder_chunks(spec.shapes(), start.__getitem__))
    encoder = seeded.plan.encoder.model_copy(update={"init_from": named})
    return replace(seeded, plan=seeded.plan.model_copy(update={"encoder": encoder}), start=start)


def _verdict(made: Any, write: Write, change: Change = lambda state: None, **options: Any) -> Verdict:
    """Of a record that is honest but for its first state, and signed so."""

    def changed(state: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        if index == 0:
            state = {name: tensor.clone() for name, tensor in state.items()}
            change(state)
        return state

    return verify_record(write(made.files(state=changed)), made.trusted, **options)


def _refused(verdict: Verdict) -> str:
    assert {(found.code, found.where) for found in verdict.findings} == {(ErrorCode.FIRST_STATE, record.state_path(0))}
    assert not verdict.identities_proven
    return "; ".join(str(found) for found in verdict.findings)


def _nudged(name: str, by: float) -> Change:
    return lambda state: state[name].view(-1)[:1].add_(by)


def test_honest_starts_verify_and_nothing_is_noted_of_them(seeded: Any, started: Any, write: Write) -> None:
    for made in (seeded, started):
        verdict = _verdict(made, write)
        verdict.require(identities=True)
        assert not [note for note in verdict.notes if "first state" in note]


@pytest.mark.parametrize("redraw", [True, False])
def test_an_imported_encoder_with_one_bit_changed_is_refused(started: Any, write: Write, redraw: bool) -> None:
    def flip(state: dict[str, Tensor]) -> None:
        state["encoder.norm.bias"].view(torch.int32)[0].bitwise_xor_(1)

    verdict = _verdict(started, write, flip, redraw=redraw)
    assert started.plan.encoder.init_from in _refused(verdict)


def test_a_run_that_starts_from_random_weights_or_another_encoder_than_its_plans_is_refused(started: Any, write: Write) -> None:
    unnamed = started.plan.model_copy(update={"encoder": started.plan.encoder.model_copy(update={"init_from": ""})})
    random = model.initial_state(unnamed)
    _refused(_verdict(started, write, lambda state: state.update(random)))
    _refused(_verdict(started, write, lambda state: [tensor.mul_(2) for name, tensor in state.items() if "encoder." in name]))


def test_a_run_with_an_imported_encoder_that_its_plan_does_not_name_is_refused(seeded: Any, started: Any, write: Write) -> None:
    given = started.start

    def smuggled(state: dict[str, Tensor]) -> None:
        state.update({f"encoder.{name}": tensor for name, tensor in given.items()})

    assert "seed" in _refused(_verdict(seeded, write, smuggled))


@pytest.mark.parametrize("seeded", ["dino"], indirect=True)
def test_a_teacher_that_is_no_copy_of_the_imported_encoder_is_refused(write: Write, started: Any) -> None:
    assert "teacher.encoder" in _refused(_verdict(started, write, _nudged("teacher.encoder.norm.bias", 1.0)))


def test_a_head_other_than_the_seeds_is_refused(seeded: Any, started: Any, write: Write) -> None:
    name = next(name for name in sorted(model.state_shapes(seeded.plan)) if name.startswith("head.") and name.endswith("weight"))
    for made in (seeded, started):
        assert name in _refused(_verdict(made, write, _nudged(name, 0.5)))
        assert name in _refused(_verdict(made, write, _nudged(name, float("nan"))))


def test_another_seed_than_the_plans_is_refused(seeded: Any, write: Write) -> None:
    other = seeded.plan.model_copy(update={"encoder": seeded.plan.encoder.model_copy(update={"init_seed": 12345})})
    _refused(_verdict(seeded, write, lambda state: state.update(model.initial_state(other))))


def test_weights_rounded_by_another_torch_are_told_and_not_refused(seeded: Any, write: Write) -> None:
    name = "encoder.blocks.0.attn.qkv.weight"

    def rounded(share: float) -> Change:
        return lambda state: state[name].add_(state[name].abs().max() * share)

    verdict = _verdict(seeded, write, rounded(ROUNDING / 3))
    verdict.require(identities=True)
    assert "the first state was drawn elsewhere: 1 tensors agree with the seed's but for rounding" in verdict.notes
    assert name in _refused(_verdict(seeded, write, rounded(ROUNDING * 3)))


def test_without_drawing_again_random_weights_are_taken_as_they_are_and_that_is_told(seeded: Any, write: Write) -> None:
    name = "head.mask_token" if "head.mask_token" in model.state_shapes(seeded.plan) else "head.mask.token"
    verdict = _verdict(seeded, write, _nudged(name, 1.0), redraw=False)
    verdict.require(identities=True)
    assert "the first state's random weights were not drawn again" in verdict.notes
