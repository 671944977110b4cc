"""The packaged plans: each loads, and trains what it says."""

import pytest

from pathfed_common.model import build_model, state_shapes, update_shapes
from pathfed_common.plan import Plan, load_plan
from pathfed_local.plans import demo_plan


def plan_of(objective: str) -> Plan:
    path = demo_plan(objective)
    return load_plan(path.read_text(encoding="utf-8"), where=path)


@pytest.mark.parametrize("objective", ["mae", "dino"])
def test_the_demos_plan_trains_the_objective_it_is_named_for(objective: str) -> None:
    plan = plan_of(objective)
    assert plan.objective.name == objective
    state = build_model(plan).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == state_shapes(plan)


def test_a_teacher_is_in_the_state_and_never_in_an_update() -> None:
    plan = plan_of("dino")
    teacher = {name for name in state_shapes(plan) if name.startswith("teacher.")}
    assert teacher
    assert set(update_shapes(plan)) == set(state_shapes(plan)) - teacher
    assert not any(name.startswith("teacher.") for name in state_shapes(plan_of("mae")))
