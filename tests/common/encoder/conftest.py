"""A small plan."""

import pytest
import torch

from pathfed_common.plan import Plan, PrivacyPlan, RoundsPlan


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def plan() -> Plan:
    base = Plan(
        name="tiny",
        privacy=PrivacyPlan(expected_patients=4, noise_multiplier=1.0, clip_norm=1.0, epsilon_limit=8.0),
        rounds=RoundsPlan(count=2),
    )
    return base.model_copy(update={"cohort": base.cohort.model_copy(update={"tile_px": 64})})
