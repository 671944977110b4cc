import pytest

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
