import pytest
from pydantic import ValidationError

from pathfed_client.gate.site_policy import SitePolicy, check_plan
from pathfed_common.errors import HostError, PlanError, PrivacyError
from pathfed_common.plan import load_plan
from pathfed_common.settings import checked

PLAN = load_plan(
    """
name = "p"
[privacy]
expected_patients = 4
noise_multiplier = 1.0
clip_norm = 1.0
epsilon_limit = 8.0
[rounds]
count = 3
""",
    where="p",
)


@pytest.mark.parametrize(("epsilon", "allowed"), [(1.0, True), (5.0, True), (5.001, False), (float("inf"), False), (float("nan"), False)])
def test_a_plan_may_cost_what_the_policy_allows_and_no_more(epsilon, allowed):
    policy = SitePolicy(max_epsilon=5.0, delta=1e-6)
    if allowed:
        check_plan(policy, PLAN, 10, epsilon)
    else:
        with pytest.raises(PrivacyError, match=r"PF307.*max_epsilon"):
            check_plan(policy, PLAN, 10, epsilon)


def test_a_plan_that_expects_more_patients_than_declared_is_refused():
    with pytest.raises(PlanError, match="PF105"):
        check_plan(SitePolicy(max_epsilon=5.0, delta=1e-6), PLAN, 3, 1.0)


@pytest.mark.parametrize(
    "change", [{"max_epsilon": 0.0}, {"max_epsilon": 1e9}, {"delta": 0.0}, {"delta": 0.1}, {"threads": 0}, {"reply_slots": 1}, {"more": 1}]
)
def test_a_policy_out_of_bounds_is_refused(change):
    with pytest.raises(HostError, match="PF905"):
        checked(SitePolicy, {"max_epsilon": 5.0, "delta": 1e-6, **change})


def devices_policy(**given: object) -> SitePolicy:
    return SitePolicy.model_validate({"max_epsilon": 8.0, "delta": 1e-6, **given})


@pytest.mark.parametrize(
    ("given", "names_gpus"),
    [
        ({}, False),
        ({"device": "cpu", "devices": 4}, False),
        ({"device": "cuda"}, True),
        ({"device": "cuda:12"}, True),
        ({"devices": 2}, True),
    ],
)
def test_devices_that_may_be_missing_are_known_by_the_policy_alone(given, names_gpus) -> None:
    assert devices_policy(**given).names_gpus is names_gpus


@pytest.mark.parametrize(
    "given",
    [
        *({"device": word} for word in ("", "gpu", "CUDA", "cuda:", "cuda:01", "cuda:1000", "cuda:0\n", "cpu:0", " cpu", 0)),
        *({"devices": count} for count in (0, 65, 1.5, "2")),
        *({"device_memory_gb": size} for size in (0, -1.0, float("nan"), float("inf"))),
        {"sharding": "fsdp"},
    ],
)
def test_other_words_are_refused(given) -> None:
    with pytest.raises(ValidationError):
        devices_policy(**given)
