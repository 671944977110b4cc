"""Who takes part in a round: enrolled sites of the run that approved its plan and declare enough patients. The others are named."""

from collections.abc import Iterable
from dataclasses import dataclass

from pathfed_common.errors import ErrorCode
from pathfed_common.ids import SiteName
from pathfed_common.plan import Plan
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.provenance.keys import VerifyKey
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


def choose(plan: Plan, candidates: Iterable[Candidate]) -> Choice:
    """Choose a round's participants among the sites listed in a run.

    | candidate | outcome |
    | --- | --- |
    | revoked | excluded, PF518 |
    | has revoked its approval of the plan | excluded, PF530 |
    | has not approved the plan | excluded, PF407 |
    | declares fewer patients than the plan expects in a step | excluded, PF303 |
    | any other | takes part |
    """
    participants, excluded = [], []
    for candidate in sorted(candidates, key=lambda each: each.site):
        refused = no_consent(candidate)
        if refused is not None:
            excluded.append(_excluded(candidate, refused))
        elif candidate.approval is None or candidate.declared_patients is None:
            excluded.append(_excluded(candidate, ErrorCode.PLAN_NOT_APPROVED))
        elif plan.privacy.expected_patients > candidate.declared_patients:
            excluded.append(_excluded(candidate, ErrorCode.COHORT_TOO_SMALL))
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
    return Choice(tuple(participants), tuple(excluded))


def no_consent(candidate: Candidate) -> ErrorCode | None:
    """Why nothing may be sent to a site for the run's plan, or None: it is enrolled, and its approval stands.

    Asked when a round's participants are chosen, and again for each at the moment of sending: a word may come in between.
    """
    if candidate.state is not SiteState.ENROLLED:
        return ErrorCode.SITE_REVOKED
    if candidate.revoked:
        return ErrorCode.APPROVAL_REVOKED
    return ErrorCode.PLAN_NOT_APPROVED if candidate.approval is None else None


def _excluded(candidate: Candidate, code: ErrorCode) -> Participation:
    return Participation(site=candidate.site, state=ParticipationState.EXCLUDED, code=code.value)
