"""The ledger: what releases have cost the patients of this site, over all plans and runs.

Guarantees:
    - **Charged first.** `charge` returns once the entry is stored; only then may anything be released.
    - **Once.** A release is named by a digest of everything it depends on. The same name is charged once, however often it is asked for;
      another name is another release and another charge.
    - **It refuses.** A charge that would take the site over its policy's epsilon, or the plan over its own limit, stores nothing.
    - **Any change is found.** Entries are numbered, hash-chained (each names the digest of the one before) and signed with the site's
      evidence key; `verify` finds a changed byte and a missing, swapped, foreign or duplicate entry. An end cut off is found against the
      heads that the site's sealed statements name: each must still be in the chain. A charge looks at all of this again.
    - **Epsilon is computed, not stored and trusted**: from the events of all entries, at the policy's delta, by PLD; the entry's own
      figures are what was known when it was written. Before each charge an upper and a lower bound by other methods must not contradict
      it, and now and then a third accountant is asked too (`pathfed_common.privacy.accounting` says when, and why that is enough).
    - **Delta is fixed for the ledger's life.** A policy with another delta than the entries' is refused; nothing is read or charged.
    - It is never reset, whatever happens to the cohort. A patient is taken to have been in the cohort all along, which is the worst case.

Pure: entries are kept by a port, the time is passed in. Two writers cannot both charge one sequence number: the port refuses the second.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pathfed_client.budget.entry import LEDGER_TYPE, LedgerEntry
from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, PrivacyError, ProvenanceError
from pathfed_common.ids import RunName
from pathfed_common.privacy.accounting import FULL_CHECK_GROWTH, PrivacyEvent, check_accountants, check_bounds, composed_epsilon
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.units import UtcSeconds


class LedgerPort(Protocol):
    """Keeps entries. MUST be append-only and durable when `append` returns."""

    def entries(self) -> list[bytes]:
        """All entries in order of their sequence numbers."""
        ...

    def append(self, sequence: int, entry: bytes) -> None:
        """Store an entry; MUST fail if the sequence number exists."""
        ...

    def stated_heads(self) -> list[Digest]:
        """The head that each sealed statement of this site names, of all runs."""
        ...


@dataclass(frozen=True, kw_only=True)
class PlanSpend:
    """What one plan's releases have cost.

    Attributes:
        releases: charges.
        steps: private steps in them.
        delta: the plan's delta.
        epsilon: at that delta, of this plan's releases alone.
    """

    releases: int
    steps: int
    delta: float
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class Spend:
    """What all releases have cost.

    Attributes:
        releases: charges.
        delta: the policy's delta.
        epsilon: at that delta, of all plans together.
        max_epsilon: the policy's limit.
        plans: each plan by its digest.
    """

    releases: int
    delta: float
    epsilon: float
    max_epsilon: float
    plans: dict[Digest, PlanSpend]


class Ledger:
    """The site's one ledger."""

    def __init__(self, port: LedgerPort, key: SigningKey, *, delta: float, max_epsilon: float) -> None:
        """Open the ledger; nothing is read yet.

        Args:
            port: keeps the entries.
            key: the site's evidence key.
            delta: fixed in the site's policy.
            max_epsilon: the policy's limit over all plans, at `delta`.

        Raises:
            ValueError: delta is not within (0, 1), or max_epsilon is not finite and above 0.
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta must be within (0, 1), got {delta}")
        if not 0 < max_epsilon < math.inf:
            raise ValueError(f"max_epsilon must be finite and above 0, got {max_epsilon}")
        self._port, self._key, self._delta, self._max_epsilon = port, key, delta, max_epsilon
        # Signatures verified in this process, by the digest of the exact bytes: a charge then costs hashes, not a signature for each entry.
        self._opened: dict[Digest, LedgerEntry] = {}
        # Steps at which all accountants agreed in this process, by the mechanisms and the delta.
        self._agreed: dict[tuple[frozenset[tuple[float, float]], float], int] = {}

    def verify(self) -> tuple[LedgerEntry, ...]:
        """Check every entry, the chain and its end; return the entries in order.

        Raises:
            PrivacyError: PF304, the ledger is damaged, cut off, or not this site's.
            HostError: PF905, the policy's delta is not the one that the ledger was begun with.
        """
        return tuple(self._chain()[0])

    def _chain(self) -> tuple[list[LedgerEntry], list[Digest]]:
        """All entries, checked, and the digest of each."""
        entries: list[LedgerEntry] = []
        heads: list[Digest] = []
        releases: set[Digest] = set()
        for sequence, data in enumerate(self._port.entries(), start=1):
            head = digest.of_bytes(data)
            entry = self._open(data, head, sequence)
            if entry.sequence != sequence:
                raise _damaged(f"entry {sequence} carries the number {entry.sequence}: an entry is missing, swapped or repeated", sequence)
            if entry.previous != (heads[-1] if heads else None):
                raise _damaged("an entry does not follow from the one before it", sequence)
            if entry.delta != (entries[0] if entries else entry).delta:
                raise _damaged("an entry has another delta than the first", sequence)
            if entry.release_id in releases:
                raise _damaged("a release is charged twice", sequence)
            releases.add(entry.release_id)
            entries.append(entry)
            heads.append(head)
        known = set(heads)
        lost = next((head for head in self._port.stated_heads() if head not in known), None)
        if lost is not None:
            raise _damaged(f"the end was cut off: a head stated before, {digest.short(lost)}, is not in the chain", len(heads))
        if entries and entries[0].delta != self._delta:
            raise _other_delta(self._delta, entries[0].delta)
        return entries, heads

    @property
    def head(self) -> Digest | None:
        """Digest of the last stored entry, or None for an empty ledger. Not verified here."""
        stored = self._port.entries()
        return digest.of_bytes(stored[-1]) if stored else None

    def charge(
        self,
        *,
        release_id: Digest,
        plan: Digest,
        run: RunName,
        round_index: int,
        event: PrivacyEvent,
        plan_delta: float,
        plan_limit: float,
        now: UtcSeconds | float,
    ) -> LedgerEntry:
        """Charge a release, once; return its entry, the earlier one where it was charged before.

        Args:
            release_id: digest of everything the release depends on.
            plan: digest of the plan.
            run: the run.
            round_index: the round.
            event: what the release costs each patient.
            plan_delta: the plan's delta.
            plan_limit: the plan's own limit, at `plan_delta`.
            now: UTC seconds.

        Raises:
            PrivacyError: PF301 over the policy's epsilon, PF302 over the plan's limit, PF304 the ledger is damaged, PF305 the accountants
                contradict each other. Nothing was stored.
            HostError: PF905, the policy's delta is not the ledger's. Nothing was stored.
            ValueError: the release was charged before for another plan, run, round or event.
        """
        entries, heads = self._chain()
        earlier = next((entry for entry in entries if entry.release_id == release_id), None)
        if earlier is not None:
            if (earlier.plan, earlier.run, earlier.round_index, earlier.event) != (plan, run, round_index, event):
                raise ValueError(f"release {digest.short(release_id)} was charged for another plan, run, round or event")
            return earlier
        before = [entry.event for entry in entries]
        plan_before = [entry.event for entry in entries if entry.plan == plan]
        total = self._within(before, event, self._delta, self._max_epsilon, ErrorCode.BUDGET_SPENT, "the site's budget")
        of_plan = self._within(plan_before, event, plan_delta, plan_limit, ErrorCode.PLAN_LIMIT_REACHED, "the plan's limit")
        entry = LedgerEntry(
            sequence=len(entries) + 1,
            previous=heads[-1] if heads else None,
            release_id=release_id,
            plan=plan,
            run=run,
            round_index=round_index,
            event=event,
            delta=self._delta,
            epsilon_total=total,
            plan_delta=plan_delta,
            epsilon_plan=of_plan,
            at=UtcSeconds(now),
        )
        self._port.append(entry.sequence, dsse.seal(entry.to_payload(), LEDGER_TYPE, self._key))
        return entry

    def spent(self) -> Spend:
        """What all releases have cost, in total and by plan.

        Raises:
            PrivacyError: PF304, the ledger is damaged.
            HostError: PF905, the policy's delta is not the ledger's.
        """
        entries = self.verify()
        total = composed_epsilon([entry.event for entry in entries], self._delta)
        return Spend(releases=len(entries), delta=self._delta, epsilon=total, max_epsilon=self._max_epsilon, plans=_by_plan(entries))

    def _within(self, before: list[PrivacyEvent], event: PrivacyEvent, delta: float, limit: float, code: ErrorCode, name: str) -> float:
        """Epsilon after the event, if that is within the limit."""
        after = self._checked([*before, event], delta)
        # Written so that a NaN, which compares false with everything, refuses.
        if not after <= limit:
            spent = composed_epsilon(before, delta)
            raise PrivacyError(
                code,
                f"{name} does not allow this release: epsilon {spent:.4f} is spent, it would be {after:.4f}, the limit is {limit:.4f}",
                value=f"delta {delta:g}, rate {event.sampling_rate:.6g}, sigma {event.noise_multiplier:g}, steps {event.steps}",
                remedy="nothing was charged or released; budget does not come back",
            )
        return after

    def _checked(self, events: list[PrivacyEvent], delta: float) -> float:
        """Epsilon, within its bounds; all accountants are asked for new mechanisms and where the steps have grown much."""
        kind = frozenset((event.sampling_rate, event.noise_multiplier) for event in events), delta
        steps = sum(event.steps for event in events)
        if kind in self._agreed and steps < FULL_CHECK_GROWTH * self._agreed[kind]:
            return check_bounds(events, delta)
        after = check_accountants(events, delta)
        self._agreed[kind] = steps
        return after

    def _open(self, data: bytes, head: Digest, sequence: int) -> LedgerEntry:
        if head not in self._opened:
            try:
                payload = dsse.open_envelope(data, payload_type=LEDGER_TYPE, keys=self._key.public, where=f"ledger entry {sequence}")
                self._opened[head] = LedgerEntry.from_payload(payload)
            except (ProvenanceError, ValueError) as error:
                raise _damaged(f"an entry was changed or is not this site's: {error}", sequence) from error
        return self._opened[head]


def last_charge(port: LedgerPort) -> LedgerEntry | None:
    """The last stored entry, or None for an empty ledger. Read without any check, for showing only.

    Raises:
        ValueError: not a ledger entry.
    """
    stored = port.entries()
    return LedgerEntry.from_payload(dsse.parse(stored[-1]).payload) if stored else None


def _by_plan(entries: Sequence[LedgerEntry]) -> dict[Digest, PlanSpend]:
    groups: dict[Digest, list[LedgerEntry]] = {}
    for entry in entries:
        groups.setdefault(entry.plan, []).append(entry)
    return {
        plan: PlanSpend(
            releases=len(group),
            steps=sum(entry.event.steps for entry in group),
            delta=group[-1].plan_delta,
            epsilon=composed_epsilon([entry.event for entry in group], group[-1].plan_delta),
        )
        for plan, group in groups.items()
    }


def _other_delta(policy: float, ledger: float) -> HostError:
    return HostError(
        ErrorCode.SETTINGS_INVALID,
        "delta differs from the one that this site's ledger was begun with, which holds for the ledger's whole life",
        where="policy.toml, key delta",
        value=f"{policy:g}, the ledger's is {ledger:g}",
        remedy=f"write delta = {ledger!r} again; nothing was charged or released",
    )


def _damaged(what: str, sequence: int) -> PrivacyError:
    remedy = "do not train at this site; compare the ledger with the heads in the statements it has sent"
    return PrivacyError(ErrorCode.LEDGER_DAMAGED, what, where=f"ledger entry {sequence}", remedy=remedy)
