"""What a site's own people have decided about a plan, asked anew at each step of a round.

| asked | when | refuses with |
| --- | --- | --- |
| the stop switch | at the offer, before the charge, before the seal, before an answer leaves | PF440 |
| whether the approval stands | the same | PF407 |
| the policy as it is now, hours and second person included | before a round begins | PF106, PF307, PF441, PF442 |

An answer that was sealed before is sent again as long as the site is not stopped and the approval stands: nothing new is computed or spent
for it, so that hours and limits do not matter.
"""

from collections.abc import Callable
from functools import cache

from pathfed_client.gate import second_person
from pathfed_client.gate.site_policy import SitePolicy, check_hours, check_operators, check_plan
from pathfed_client.home import SiteHome
from pathfed_client.io.site_records import ApprovalState, StoredApproval
from pathfed_client.io.site_store import SiteStore
from pathfed_common.digest import Digest, short
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.plan import Plan
from pathfed_common.privacy.accounting import epsilon


class SiteGate:
    """Asks a site's home and database."""

    def __init__(self, home: SiteHome, store: SiteStore, now: Callable[[], float]) -> None:
        """`now` gives UTC seconds."""
        self._home = home
        self._store = store
        self._now = now

    def standing(self, plan: Digest) -> StoredApproval:
        """The approval of a plan that a round may go on under.

        Raises:
            TransportError: PF440, the site is stopped; PF407, it has not approved this very plan, or does so no more.
        """
        self._home.stop_switch.check()
        word = self._store.approval(plan)
        if word is None or word.state is not ApprovalState.APPROVED:
            said = "has not approved" if word is None else f"has {word.state.value}"
            raise TransportError(ErrorCode.PLAN_NOT_APPROVED, f"this site {said} the plan", value=short(plan))
        return word

    def check_begin(self, policy: SitePolicy, plan: Plan, approval: StoredApproval) -> None:
        """Whether a round of an approved plan may begin now, by the policy as it is now.

        Raises:
            PlanError: PF106, operators' signatures are missing; PF105, the plan expects more patients than were declared.
            PrivacyError: PF307, the policy forbids the plan.
            TransportError: PF441, not at this hour; PF442, a second person must sign.
        """
        check_hours(policy, self._now())
        # Operators may have signed after the approval.
        received = self._store.received_plan(approval.plan)
        check_operators(policy, approval.signed_plan if received is None else received.signed_plan)
        rate = plan.sampling_rate(approval.declared_patients)
        check_plan(policy, plan, approval.declared_patients, _epsilon(rate, plan.privacy.noise_multiplier, plan.total_steps, policy.delta))
        if policy.second_person:
            second_person.check(signed_by(self._home, self._store, approval.plan, approval.declared_patients))


def signed_by(home: SiteHome, store: SiteStore, plan: Digest, declared_patients: int) -> frozenset[str]:
    """Approvers whose signature stands under these figures now."""
    return second_person.signers(
        [one.envelope for one in store.signatures(plan)],
        {one.name: one.key for one in store.approvers()},
        site=home.name,
        plan=plan,
        declared_patients=declared_patients,
    )


@cache
def _epsilon(rate: float, noise: float, steps: int, delta: float) -> float:
    """Asked at every offer, for the same plan."""
    return epsilon(sampling_rate=rate, noise_multiplier=noise, steps=steps, delta=delta)
