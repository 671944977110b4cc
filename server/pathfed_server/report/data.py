"""What a run's report shows, as one frozen value that `app` fills from the database and the record.

Everything here is already public inside the consortium: plan values, signed statements, the server's own clocks, and the noised figures
that sites released. Nothing in it was seen by the server without noise.
"""

import math
from dataclasses import dataclass
from typing import Literal

from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import Plan

#: What the demo promises: peak resident memory of one site's processes together, and of the server's, MB (10^6 bytes).
SITE_MEMORY_LIMIT_MB = 2000.0
SERVER_MEMORY_LIMIT_MB = 1500.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A noised number and the standard deviation of the noise in it."""

    value: float
    std: float


@dataclass(frozen=True, kw_only=True)
class SiteFigures:
    """What one admitted statement released beside the update: sums over the patients drawn at that site in that round, noised.

    Attributes:
        loss_sum: noised sum of the drawn patients' clamped losses; its noise has standard deviation `loss_sum_std`.
        patients: noised number of patients drawn; its noise has standard deviation `patients_std`.
    """

    loss_sum: float
    loss_sum_std: float
    patients: float
    patients_std: float


@dataclass(frozen=True, kw_only=True)
class SiteRound:
    """One site in one round.

    Attributes:
        site: the site.
        admitted: its update counted.
        code: why it did not, or None.
        epsilon_plan: epsilon of this plan's releases so far at the plan's delta, as the site signed it; None without a statement.
        figures: the released figures, or None.
        slot: the public time slot in which its reply came, 1 for the first after the offer; None: no reply, or its slots are off. A later
            slot than the first was seen by the server, and tells how long the site's training took.
    """

    site: SiteName
    admitted: bool
    code: str | None = None
    epsilon_plan: float | None = None
    figures: SiteFigures | None = None
    slot: int | None = None


@dataclass(frozen=True, kw_only=True)
class RoundTimes:
    """Where the server's time of one round went, seconds of its own clock.

    Attributes:
        slots_s: from the offers to the last time slot in which a site replied; the sites train inside it. 0 where no site has slots.
        wait_s: other waiting for sites: polling, and the training of sites that have their slots off.
        transfer_s: bytes of replies arriving.
        aggregation_s: admission and averaging.
        step_s: server optimiser, checkpoint, commit.
    """

    slots_s: float
    wait_s: float
    transfer_s: float
    aggregation_s: float
    step_s: float


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One committed round.

    Attributes:
        index: 1 for the first.
        sites: its sites.
        times: where the server's time went.
        rounding_share: bound on what the wire format's rounding added to an update, as a share of the noise in it, both as L2 norms; of
            the update in which it is largest.
    """

    index: int
    sites: tuple[SiteRound, ...]
    times: RoundTimes
    rounding_share: float = 0.0

    @property
    def patients(self) -> Estimate | None:
        """Noised patients over all admitted sites, or None when nobody released figures."""
        figures = self._figures()
        if not figures:
            return None
        return Estimate(value=sum(f.patients for f in figures), std=math.hypot(*(f.patients_std for f in figures)))

    @property
    def loss(self) -> Estimate | None:
        """Mean loss per drawn patient over all admitted sites: L/N of the noised sums.

        The standard deviation is the delta method's, sqrt(sd(L)^2 + (L/N)^2 sd(N)^2) / N. The method needs a denominator well away from
        zero: None while N is below three of its own standard deviations.
        """
        figures, count = self._figures(), self.patients
        if count is None or count.value <= 3 * count.std:
            return None
        mean = sum(f.loss_sum for f in figures) / count.value
        return Estimate(value=mean, std=math.hypot(*(f.loss_sum_std for f in figures), mean * count.std) / count.value)

    def _figures(self) -> list[SiteFigures]:
        return [site.figures for site in self.sites if site.admitted and site.figures is not None]


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """One participant over the whole run.

    Attributes:
        site: the site.
        declared_patients: its public lower bound of its cohort.
        sampling_rate: q, from that bound and the plan.
        rounds_admitted: rounds in which its update counted.
        epsilon_plan: this plan's epsilon in its last statement, at the plan's delta; None without one.
        epsilon_total: epsilon of all its releases ever, at its own policy's delta; None without a statement.
        last_code: the last code it answered or was given, or None.
        reply_slots: it answers at public time slots, as its approval says; without them a reply's time hints at how many were drawn.
    """

    site: SiteName
    declared_patients: int
    sampling_rate: float
    rounds_admitted: int
    epsilon_plan: float | None
    epsilon_total: float | None
    last_code: str | None = None
    reply_slots: bool = True


@dataclass(frozen=True, kw_only=True)
class MemoryPeak:
    """Peak resident memory of one side's processes, MB (10^6 bytes).

    Attributes:
        owner: the site's name, or "server".
        role: which limit applies.
        processes: name and peak of each process.
        together_mb: the largest sum over all of them at one instant.
    """

    owner: str
    role: Literal["site", "server"]
    processes: tuple[tuple[str, float], ...]
    together_mb: float

    @property
    def limit_mb(self) -> float:
        """The limit for this role."""
        return SITE_MEMORY_LIMIT_MB if self.role == "site" else SERVER_MEMORY_LIMIT_MB


@dataclass(frozen=True, kw_only=True)
class ContactRow:
    """One synthetic tile, and what the model makes of it.

    Attributes:
        original: the tile, a PNG file.
        made: captions, the same in every row, and PNG files.
    """

    original: bytes
    made: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What verification said of the run's record.

    Attributes:
        state: verified: signatures, digests and chains hold and the keys are trusted; consistent: they hold, identities unproven; failed;
            or unchecked.
        text: one sentence for people.
        code: the code of a failure, or None.
    """

    state: Literal["verified", "consistent", "failed", "unchecked"]
    text: str
    code: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The whole report.

    Attributes:
        run: the run's name.
        state: how the run stands.
        state_text: one sentence for people, such as why it stopped.
        plan: the plan it ran.
        started_at: UTC seconds.
        ended_at: UTC seconds, or None while it runs.
        made_at: UTC seconds when this page was made.
        encoder: digest of the exported encoder file, or None.
        encoder_parameters: numbers in the encoder.
        verdict: what verification said.
        rounds: committed rounds in order.
        sites: participants in order of their names.
        memory: peaks by side; empty where nobody measured.
        contact_sheet: synthetic tiles through the last encoder; empty without one.
        files: what, and where it is.
        verify_command: the command that checks the record.
        next_commands: what to try next, as (what it does, command).
        version: of pathfed.
    """

    run: RunName
    state: Literal["finished", "running", "stopped", "failed"]
    state_text: str
    plan: Plan
    started_at: float
    ended_at: float | None
    made_at: float
    encoder: Digest | None
    encoder_parameters: int
    verdict: Verdict
    rounds: tuple[RoundReport, ...]
    sites: tuple[SiteReport, ...]
    memory: tuple[MemoryPeak, ...] = ()
    contact_sheet: tuple[ContactRow, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    verify_command: str = ""
    next_commands: tuple[tuple[str, str], ...] = ()
    version: str = ""
