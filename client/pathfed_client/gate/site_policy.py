"""The hospital's own limits, applied at the site to every plan and offer. A plan may ask for less, never for more."""

from pydantic import Field

from pathfed_common.errors import ErrorCode, PrivacyError
from pathfed_common.plan import Plan
from pathfed_common.settings import Settings


class SitePolicy(Settings):
    """`policy.toml` of a site."""

    #: Largest epsilon a patient of this site may ever spend, over all plans and runs.
    max_epsilon: float = Field(gt=0, le=1000)
    #: The delta at which this site's ledger states epsilon. Fixed for the ledger's whole life.
    delta: float = Field(gt=0, le=1e-3)
    #: Reply at the plan's public time slots. Off: the time of a reply may tell how many patients were drawn; for demos and benchmarks only.
    reply_slots: bool = True
    #: CPU threads training may use.
    threads: int = Field(default=1, ge=1, le=1024)
    #: Processes that read slides ahead of training. 0: training reads for itself, and a slide that crashes its decoder ends the client.
    tile_workers: int = Field(default=1, ge=0, le=256)


def check_plan(policy: SitePolicy, plan: Plan, declared_patients: int, epsilon_of_plan: float) -> None:
    """Refuse a plan this site's policy does not allow.

    Args:
        policy: the site's policy.
        plan: the plan to approve.
        declared_patients: the site's public lower bound of its cohort size.
        epsilon_of_plan: epsilon of all the plan's steps at the policy's delta.

    Raises:
        PlanError: the plan expects more patients a step than the site declares.
        PrivacyError: PF307, a whole run would cost more than the policy's largest epsilon.
    """
    plan.sampling_rate(declared_patients)
    # Written so that a NaN, which compares false with everything, refuses.
    if not epsilon_of_plan <= policy.max_epsilon:
        raise PrivacyError(
            ErrorCode.POLICY_FORBIDS,
            "a whole run of this plan would cost a patient more than this site's policy allows",
            where="policy.toml, key max_epsilon",
            value=f"{epsilon_of_plan:.4g} > {policy.max_epsilon:g} at delta {policy.delta:g}",
            remedy="ask the operator for more noise, fewer rounds or fewer patients a step; or raise max_epsilon",
        )
