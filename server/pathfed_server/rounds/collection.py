"""One attempt at a round: who is asked, and what becomes of each reply as it arrives."""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pathfed_common import digest
from pathfed_common.errors import ErrorCode
from pathfed_common.ids import SiteName
from pathfed_common.part_file import file_digest
from pathfed_server.rounds.admission import Admitted, Refused, RoundTerms, admit
from pathfed_server.rounds.files import RunFiles
from pathfed_server.rounds.participants import Choice, Participant
from pathfed_server.rounds.ports import Consent, Reply, RoundStore
from pathfed_server.rounds.state import Participation, ParticipationState, Quarantined

_CODE = re.compile(r"PF[0-9]{3}")

#: Told of each site whose outcome is decided.
Told = Callable[[Participation], None]


@dataclass(kw_only=True)
class Collection:
    """Gathers one attempt's replies.

    Attributes:
        terms: what the round's updates must fit.
        choice: who is asked, and who is not.
        attempt: the run's attempt.
        offered_at: UTC seconds.
        deadline: UTC seconds.
        files: the run's files.
        store: the truth about rounds.
        now: UTC seconds.
        consent: why an update of a site may not count now, or None; a word may have come since it was asked.
        told: called after each site's outcome is noted.
        admitted: each admitted site's update file and what it states.
        transfer_s: summed over the replies.
        admission_s: seconds spent on checking them.
    """

    terms: RoundTerms
    choice: Choice
    attempt: int
    offered_at: float
    deadline: float
    files: RunFiles
    store: RoundStore
    now: Callable[[], float]
    consent: Consent
    told: Told
    admitted: dict[SiteName, tuple[Path, Admitted]] = field(default_factory=dict)
    transfer_s: float = 0.0
    admission_s: float = 0.0
    _outcomes: dict[SiteName, Participation] = field(default_factory=dict)

    @property
    def participations(self) -> tuple[Participation, ...]:
        """Every candidate's row as things stand, in site order."""
        asked = (self._outcomes.get(each.site, self._offered(each.site)) for each in self.choice.participants)
        return tuple(sorted((*asked, *self.choice.excluded), key=lambda each: each.site))

    @property
    def open(self) -> tuple[Participant, ...]:
        """Those asked whose outcome is not decided."""
        return tuple(each for each in self.choice.participants if each.site not in self._outcomes)

    @property
    def decided(self) -> bool:
        """Whether any site's outcome is decided."""
        return bool(self._outcomes)

    def recall(self) -> None:
        """Take up the replies that an earlier attempt at this round admitted, with all checks again."""
        for participant in self.open:
            reply = self.files.kept(self.terms.round_index, participant.site)
            if reply is None or reply.statement is None or reply.update is None:
                continue
            verdict = self._admit(participant, reply.statement, reply.update)
            if isinstance(verdict, Admitted):
                self._count(reply, verdict)
            else:
                # Admitted before, so it is our copy that changed; the site is asked again and sends the same bytes.
                self.files.discard(self.terms.round_index, participant.site)
        self.take_released()

    def take_released(self) -> None:
        """Count what an operator has released from quarantine, with all checks again but the one it was refused for."""
        asked = {each.site: each for each in self.choice.participants}
        for aside in self.store.released(self.terms.run, self.terms.round_index):
            participant = asked.get(aside.site)
            if participant is None or aside.site in self.admitted:
                continue
            reply = self.files.released(aside)
            if reply is None or reply.statement is None or reply.update is None:
                continue
            verdict = self._admit(participant, reply.statement, reply.update, waived=frozenset({aside.code}))
            if isinstance(verdict, Admitted):
                self._count(replace(reply, update=self.files.keep(self.terms.round_index, reply)), verdict, released=aside.code)
            else:
                _drop(reply)

    def take(self, reply: Reply) -> None:
        """Decide on one reply.

        | reply | outcome |
        | --- | --- |
        | from a site that was not asked | its file is dropped |
        | the same bytes again from a site | dropped; nothing changes |
        | another one from a site | quarantined as PF509; the first one's outcome stands |
        | a code | silent for PF515, refused otherwise; the code is kept if it is one, else PF405 |
        | neither code nor statement with update | refused, PF405 |
        | the site is revoked, suspended, or took its approval back | quarantined with that code |
        | after the deadline | PF561: quarantined, or where the plan says so checked and kept for the next attempt at the round |
        | any other | `admission.admit` decides |
        """
        participant = next((each for each in self.choice.participants if each.site == reply.site), None)
        if participant is None:
            _drop(reply)
            return
        if reply.site in self._outcomes:
            if self._is_replay(reply):
                _drop(reply)
            else:
                self._set_aside(reply, Refused(ErrorCode.UPDATE_STALE, "another reply"))
            return
        self.transfer_s += reply.transfer_s
        verdict = self._verdict(participant, reply)
        if isinstance(verdict, Refused):
            self._refuse(reply, verdict)
        elif reply.received_at > self.deadline:
            self._keep_late(reply, verdict)
        else:
            self._count(replace(reply, update=self.files.keep(self.terms.round_index, reply)), verdict)

    def has_enough(self) -> bool:
        """Whether the plan waits for no more updates."""
        enough = self.terms.plan.rounds.enough
        return bool(enough) and len(self.admitted) >= enough

    def close(self) -> None:
        """Those that have not answered are silent, or not needed any more."""
        self.take_released()
        code = ErrorCode.UPDATE_NOT_NEEDED if self.has_enough() else ErrorCode.SITE_SILENT
        for participant in self.open:
            self._decide(replace(self._offered(participant.site), state=ParticipationState.SILENT, code=code.value))

    def abandon(self, code: ErrorCode) -> None:
        """Nobody is asked, for the same reason; to be called before the round is opened."""
        for participant in self.open:
            self._outcomes[participant.site] = Participation(site=participant.site, state=ParticipationState.EXCLUDED, code=code.value)

    def _verdict(self, participant: Participant, reply: Reply) -> Admitted | Refused:
        if reply.code is not None:
            known = _CODE.fullmatch(reply.code) is not None and reply.code in set(ErrorCode)
            return Refused(ErrorCode(reply.code) if known else ErrorCode.MESSAGE_MALFORMED, "the site's own code")
        if reply.statement is None or reply.update is None:
            return Refused(ErrorCode.MESSAGE_MALFORMED, "a reply without statement or update")
        code = self.consent(reply.site)
        if code is not None:
            return Refused(ErrorCode(code), "no consent any more")
        if reply.received_at > self.deadline and self.terms.plan.rounds.late == "discard":
            return Refused(ErrorCode.UPDATE_LATE, f"{reply.received_at - self.deadline:.3f} s after the deadline")
        return self._admit(participant, reply.statement, reply.update)

    def _admit(
        self, participant: Participant, envelope: bytes, update: Path, *, waived: frozenset[str] = frozenset()
    ) -> Admitted | Refused:
        started = time.perf_counter()
        try:
            return admit(self.terms, participant, envelope=envelope, update=update, waived=waived)
        finally:
            self.admission_s += time.perf_counter() - started

    def _is_replay(self, reply: Reply) -> bool:
        """Whether a reply is, byte for byte, the one that was decided on: a network may bring it twice."""
        row = self._outcomes[reply.site]
        if reply.update is None or reply.statement is None:
            return reply.code == row.code
        same = row.update == file_digest(reply.update)
        return same and row.statement in (None, digest.of_bytes(reply.statement))

    def _keep_late(self, reply: Reply, verdict: Admitted) -> None:
        """Keep an update that passes every check but came late; the next attempt at this round recalls it."""
        self.files.keep(self.terms.round_index, reply)
        row = replace(self._offered(reply.site), state=ParticipationState.REFUSED, code=ErrorCode.UPDATE_LATE.value)
        update, size = verdict.statement.update, verdict.statement.update_bytes
        self._decide(replace(row, update=update, update_bytes=size, received_at=reply.received_at, transfer_s=reply.transfer_s))

    def _count(self, reply: Reply, verdict: Admitted, *, released: str | None = None) -> None:
        if reply.update is None:
            raise ValueError("an admitted reply has an update")
        self.admitted[reply.site] = (reply.update, verdict)
        stated = verdict.statement
        self._decide(
            Participation(
                site=reply.site,
                state=ParticipationState.ADMITTED,
                released=released,
                update=stated.update,
                update_bytes=stated.update_bytes,
                statement=verdict.statement_digest,
                epsilon_plan=stated.epsilon_plan,
                epsilon_total=stated.epsilon_total,
                rounding=verdict.rounding,
                figures={
                    "loss_sum": stated.figures.loss_sum,
                    "loss_sum_std": stated.figures.loss_sum_std,
                    "patients": stated.figures.patients,
                    "patients_std": stated.figures.patients_std,
                },
                reply_slot_s=stated.reply_slot_s,
                offered_at=self.offered_at,
                received_at=reply.received_at,
                transfer_s=reply.transfer_s,
            )
        )

    def _refuse(self, reply: Reply, refused: Refused) -> None:
        state = ParticipationState.SILENT if refused.code is ErrorCode.SITE_SILENT else ParticipationState.REFUSED
        row = replace(
            self._offered(reply.site), state=state, code=refused.code.value, received_at=reply.received_at, transfer_s=reply.transfer_s
        )
        aside = self._set_aside(reply, refused)
        if aside is not None:
            row = replace(row, update=aside.update, update_bytes=aside.update_bytes)
        self._decide(row)

    def _set_aside(self, reply: Reply, refused: Refused) -> Quarantined | None:
        if reply.update is None:
            return None
        path, found, size = self.files.set_aside(self.terms.round_index, reply)
        aside = Quarantined(
            run=self.terms.run,
            round_index=self.terms.round_index,
            site=reply.site,
            code=refused.code.value,
            update=found,
            update_bytes=size,
            path=self.files.relative(path),
            at=reply.received_at,
        )
        self.store.note_quarantine(self.attempt, aside)
        return aside

    def _decide(self, row: Participation) -> None:
        self._outcomes[row.site] = row
        self.store.note_participation(self.terms.run, self.attempt, self.terms.round_index, row, at=self.now())
        self.told(row)

    def _offered(self, site: SiteName) -> Participation:
        return Participation(site=site, state=ParticipationState.OFFERED, offered_at=self.offered_at)


def reasons(rows: Iterable[Participation]) -> str:
    """What became of each site, as text for people: ``a-hospital admitted, b-hospital PF508``."""
    return ", ".join(f"{each.site} {each.code or each.state.value}" for each in rows)


def _drop(reply: Reply) -> None:
    if reply.update is not None:
        reply.update.unlink(missing_ok=True)
