"""What the store hands out: one frozen value a row. Times are UTC seconds."""

from dataclasses import dataclass
from typing import Any

from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import Plan, plan_from_bytes
from pathfed_server.rounds.state import RoundState, RoundTimes, RunState, SiteState


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """An enrolled or revoked site with its public keys."""

    name: SiteName
    evidence_key: str
    flower_key: str
    state: SiteState
    enrolled_at: float
    revoked_at: float | None


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """A published plan: canonical bytes, and the operator's DSSE envelope over them."""

    digest: Digest
    name: str
    canonical: bytes
    signed: bytes
    published_at: float

    def plan(self) -> Plan:
        """The plan itself."""
        return plan_from_bytes(self.canonical, where=f"plan {self.digest}")


@dataclass(frozen=True, kw_only=True)
class ApprovalRow:
    """A site's approval of a plan."""

    site: SiteName
    plan: Digest
    declared_patients: int
    reply_slots: bool
    envelope: bytes
    approved_at: float


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run. `sites` are those listed in it, in name order."""

    name: RunName
    plan: Digest
    state: RunState
    attempt: int
    failures: int
    planned_at: float
    started_at: float | None
    ended_at: float | None
    code: str | None
    sites: tuple[SiteName, ...]


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """A round. `times` is None until it is committed; `code` says why its last attempt failed."""

    run: RunName
    round_index: int
    state: RoundState
    attempt: int
    base_state: Digest
    next_state: Digest | None
    offered_at: float | None
    deadline: float | None
    committed_at: float | None
    code: str | None
    times: RoundTimes | None


@dataclass(frozen=True, kw_only=True)
class StatementRow:
    """An admitted site's signed statement."""

    run: RunName
    round_index: int
    site: SiteName
    digest: Digest
    envelope: bytes


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One event of the audit trail, in order of `seq`. `detail` is a JSON value."""

    seq: int
    at: float
    actor: str
    action: str
    subject: str
    detail: Any
