"""The states of sites, runs, rounds and participations, and the values the loop and its store exchange.

    run and round  their states and what leads from one to another: `machine`
    participation  offered -> admitted | refused | silent ; or excluded, when the site was not asked

Times are UTC seconds (`UtcSeconds`, a double): the unit of the messages and of the clock port, the same on every database, and good to
a microsecond until long after 2100. Durations are seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName


class SiteState(StrEnum):
    """Whether a site may take part at all."""

    ENROLLED = "enrolled"
    REVOKED = "revoked"


class RunState(StrEnum):
    """Where a run stands."""

    PLANNED = "planned"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    DRAINING = "draining"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


class RoundState(StrEnum):
    """Where a round stands."""

    PLANNED = "planned"
    OFFERED = "offered"
    TRAINING = "training"
    COLLECTING = "collecting"
    ADMITTED = "admitted"
    COMMITTED = "committed"
    FAILED = "failed"


class ParticipationState(StrEnum):
    """What became of one site in one round."""

    OFFERED = "offered"
    ADMITTED = "admitted"
    REFUSED = "refused"
    SILENT = "silent"
    EXCLUDED = "excluded"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A site listed in a run, with what decides whether it may take part.

    Attributes:
        site: the site.
        state: enrolled or revoked.
        evidence_key: its public evidence key, as text.
        declared_patients: the lower bound it declared when it approved the run's plan, or None when it has not approved it.
        reply_slots: whether it replies at time slots, or None likewise.
        approval: the signed approval (DSSE bytes), or None likewise.
        revoked: whether it has taken its approval of the plan back, for good.
        suspended: whether it is asked no more, because its updates were refused round after round.
        left: whether the operator has taken it out of the run.
    """

    site: SiteName
    state: SiteState
    evidence_key: str
    declared_patients: int | None
    reply_slots: bool | None
    approval: bytes | None
    revoked: bool = False
    suspended: bool = False
    left: bool = False


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a round left behind: all that the next round starts from.

    Attributes:
        round_index: the round that made it; 0 for the initial state.
        state: digest of the state file.
        state_path: the state file, relative to the server's home.
        state_bytes: its length.
        optimiser: digest of the server optimiser's file.
        optimiser_path: that file, relative to the server's home.
        optimiser_bytes: its length.
    """

    round_index: int
    state: Digest
    state_path: str
    state_bytes: int
    optimiser: Digest
    optimiser_path: str
    optimiser_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """Where a run stands, as the store knows it.

    Attributes:
        run: the run.
        plan: digest of its plan.
        state: its state; another process may have stopped it.
        attempt: counts how often a loop has taken the run up; a loop of an older attempt may write nothing more.
        last: the checkpoint of the last committed round, or None when not even the initial state is committed.
        failures: failed attempts at the round after `last`, since the run was last reopened.
    """

    run: RunName
    plan: Digest
    state: RunState
    attempt: int
    last: Checkpoint | None
    failures: int


@dataclass(frozen=True, kw_only=True)
class Participation:
    """One site in one round.

    Attributes:
        site: the site.
        state: what became of it.
        code: the reason, when it was refused, silent or excluded.
        released: the code for which it was refused before an operator released it, or None.
        update: digest of the update, where one came.
        update_bytes: its length.
        statement: digest of the statement's envelope, when admitted.
        epsilon_plan: epsilon this plan has cost a patient of the site so far, as the site states it.
        epsilon_total: the same over all plans of the site.
        rounding: bound on the L2 norm of what the wire format's rounding added to the update, when admitted.
        figures: the released figures (loss_sum, loss_sum_std, patients, patients_std), as stated.
        reply_slot_s: the time slot the reply waited for, seconds, or None when the site replies at once.
        offered_at: when the offer was made, or None when none was.
        received_at: when the last byte was on our disk, or None.
        transfer_s: seconds from the reply's first byte to its last.
    """

    site: SiteName
    state: ParticipationState
    code: str | None = None
    released: str | None = None
    update: Digest | None = None
    update_bytes: int | None = None
    statement: Digest | None = None
    epsilon_plan: float | None = None
    epsilon_total: float | None = None
    rounding: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    reply_slot_s: float | None = None
    offered_at: float | None = None
    received_at: float | None = None
    transfer_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class RoundTimes:
    """Server-side durations of a round, seconds.

    Attributes:
        exchange_s: from the first offer sent until the last reply or the deadline: the sites' work, waiting and transfer.
        transfer_s: summed over the sites, from a reply's first byte to its last.
        admission_s: checking the replies.
        aggregation_s: the weighted mean.
        step_s: the server optimiser, with its files.
    """

    exchange_s: float = 0.0
    transfer_s: float = 0.0
    admission_s: float = 0.0
    aggregation_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RoundOpening:
    """A round about to be offered.

    Attributes:
        run: the run.
        attempt: the run's attempt that opens it.
        round_index: 1 for the first.
        base_state: digest of the state it starts from.
        participations: a row for each candidate: offered or excluded.
        offered_at: UTC seconds.
        deadline: UTC seconds.
        asks: whether offers go out; not where fewer sites than the quorum may take part.
    """

    run: RunName
    attempt: int
    round_index: int
    base_state: Digest
    participations: tuple[Participation, ...]
    offered_at: float
    deadline: float
    asks: bool = True


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """A round that counts, as it is recorded and committed.

    Attributes:
        run: the run.
        attempt: the run's attempt that made it.
        round_index: 1 for the first.
        plan: digest of the plan.
        base_state: digest of the state it started from.
        checkpoint: what it left behind.
        participations: every candidate, in site order.
        weights: normalised public weight of each admitted site, in site order; they add up to 1.
        factors: what the aggregation rule multiplied these by; a site that is not named has 1.
        average: digest of the running average's encoder file, where the plan releases it.
        offered_at: UTC seconds.
        deadline: UTC seconds.
        committed_at: UTC seconds.
        times: server-side durations.
    """

    run: RunName
    attempt: int
    round_index: int
    plan: Digest
    base_state: Digest
    checkpoint: Checkpoint
    participations: tuple[Participation, ...]
    weights: Mapping[SiteName, float]
    offered_at: float
    deadline: float
    committed_at: float
    times: RoundTimes
    factors: Mapping[SiteName, float] = field(default_factory=dict)
    average: Digest | None = None


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """An update that was refused and set aside.

    Attributes:
        run: the run.
        round_index: the round it answered.
        site: the sender, as the transport authenticated it.
        code: why.
        update: digest of its bytes as they lie on our disk.
        update_bytes: their length.
        path: the file, relative to the server's home.
        at: UTC seconds.
    """

    run: RunName
    round_index: int
    site: SiteName
    code: str
    update: Digest
    update_bytes: int
    path: str
    at: float
