"""Who takes part in a round: enrolled sites of the run that approved its plan and declare enough patients. The others are named."""

from collections.abc import Iterable
from dataclasses import dataclass

from pathfed_common.errors import ErrorCode
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import Plan
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.turns import whose_turn
from pathfed_server.rounds.state import Candidate, Participation, ParticipationState, SiteState


@dataclass(frozen=True, kw_only=True)
class Participant:
    """A site that is asked for a round's update.

    Attributes:
        site: the site.
        key: its public evidence key.
        mechanism: the plan's mechanism for the patients it declares.
        approval: its signed approval of the plan (DSSE bytes).
        weight: its public weight in the mean, from the plan.
    """

    site: SiteName
    key: VerifyKey
    mechanism: PatientMechanism
    approval: bytes
    weight: float


@dataclass(frozen=True)
class Choice:
    """The sites asked, and those left out with the reason's code, both in site order."""

    participants: tuple[Participant, ...]
    excluded: tuple[Participation, ...]


def choose(plan: Plan, candidates: Iterable[Candidate], *, run: RunName, round_index: int) -> Choice:
    """Choose a round's participants among the sites listed in a run.

    | candidate | outcome |
    | --- | --- |
    | taken out of the run | excluded, PF564 |
    | revoked | excluded, PF518 |
    | suspended | excluded, PF565 |
    | has revoked its approval of the plan | excluded, PF530 |
    | has not approved the plan | excluded, PF407 |
    | declares fewer patients than the plan expects in a step | excluded, PF303 |
    | it is not its turn (`turns`) | excluded, PF562 |
    | any other | takes part |
    """
    participants, excluded = [], []
    for candidate in sorted(candidates, key=lambda each: each.site):
        refused = ErrorCode.SITE_LEFT_RUN if candidate.left else no_consent(candidate)
        if refused is not None:
            excluded.append(_left_out(candidate.site, refused))
        elif candidate.approval is None or candidate.declared_patients is None:
            excluded.append(_left_out(candidate.site, ErrorCode.PLAN_NOT_APPROVED))
        elif plan.privacy.expected_patients > candidate.declared_patients:
            excluded.append(_left_out(candidate.site, ErrorCode.COHORT_TOO_SMALL))
        else:
            participants.append(
                Participant(
                    site=candidate.site,
                    key=VerifyKey.from_text(candidate.evidence_key),
                    mechanism=plan.mechanism(candidate.declared_patients),
                    approval=candidate.approval,
                    weight=plan.site_weights.get(candidate.site, 1.0),
                )
            )
    asked = whose_turn(plan.digest, run, round_index, (each.site for each in participants), plan.rounds.ask_at_most)
    excluded += [_left_out(each.site, ErrorCode.SITE_NOT_ASKED) for each in participants if each.site not in asked]
    return Choice(tuple(each for each in participants if each.site in asked), tuple(sorted(excluded, key=lambda each: each.site)))


def no_consent(candidate: Candidate) -> ErrorCode | None:
    """Why nothing may be sent to a site for the run's plan, or None: it is enrolled and not suspended, and its approval stands.

    Asked when a round's participants are chosen, and again for each at the moment of sending: a word may come in between.
    """
    if candidate.state is not SiteState.ENROLLED:
        return ErrorCode.SITE_REVOKED
    if candidate.suspended:
        return ErrorCode.SITE_SUSPENDED
    if candidate.revoked:
        return ErrorCode.APPROVAL_REVOKED
    return ErrorCode.PLAN_NOT_APPROVED if candidate.approval is None else None


def _left_out(site: SiteName, code: ErrorCode) -> Participation:
    return Participation(site=site, state=ParticipationState.EXCLUDED, code=code.value)
