"""The ledger: what releases have cost the patients of this site, over all plans and runs.

Guarantees:
    - **Charged first.** `charge` returns once the entry is stored, and its head with the keeper; only then may anything be released.
    - **Once.** A release is named by a digest of everything it depends on. The same name is charged once, however often it is asked for;
      another name is another release and another charge.
    - **It refuses.** A charge that would take the site over its policy's epsilon, or the plan over its own limit, stores nothing.
    - **Any change is found.** Entries are numbered, hash-chained (each names the digest of the one before) and signed with the site's
      evidence key; a half-written or changed byte and a missing, swapped, foreign or duplicate entry are found (`chain`), and so are times
      that go backwards.
    - **An older state is found** against the heads that witnesses have seen (`witness`): each must still be in the chain. A charge
      looks at all of this again.
    - **Epsilon is computed, not stored and trusted**: from the events of all entries, at the policy's delta, by PLD; the entry's own
      figures are what was known when it was written. Before each charge an upper and a lower bound by other methods must not contradict
      it, and now and then a third accountant is asked too (`pathfed_common.privacy.accounting` says when, and why that is enough).
    - **Delta is fixed for the ledger's life.** A policy with another delta than the entries' is refused; nothing is read or charged.
    - It is never reset, whatever happens to the cohort. A patient is taken to have been in the cohort all along, which is the worst case.

Crashes. A charge does three things in this order: (1) the entry is stored for good, (2) the keeper remembers the new head for good, (3) the
charge returns and something may be released.

    killed before (1)          nothing has happened; the keeper's head is the ledger's.
    killed between (1) and (2) the ledger is one entry ahead of the keeper. That is no contradiction, for the chain still holds the keeper's
                               head: the site is not locked out. The release is charged; asked for again it finds its entry, and does (2)
                               before it returns. Until then a database put back before (1) would not be found, and nothing is hidden by it:
                               what was charged in (1) was never released.
    killed after (2)           as after any charge.

So the keeper is never ahead of a database that lost nothing, and never behind a release. The other order would lock a site out after a
crash between the two. Either write is whole or not there (a database transaction; a file renamed into place).

Pure: entries and heads are kept by ports, the time is passed in. Two writers cannot both charge one sequence number: the port refuses
the second.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from pathfed_client.budget.chain import Chain, ChainReader, check_clock
from pathfed_client.budget.entry import LEDGER_TYPE, LedgerEntry
from pathfed_client.budget.spend import Spend, by_plan
from pathfed_client.budget.witness import HeadKeeper, HeadsPort, check_heads
from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, PrivacyError
from pathfed_common.ids import RunName
from pathfed_common.privacy.accounting import (
    FULL_CHECK_GROWTH,
    PrivacyEvent,
    check_accountants,
    check_bounds,
    check_stated,
    composed_epsilon,
)
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.units import UtcSeconds


class LedgerPort(Protocol):
    """Keeps entries. MUST be append-only and durable when `append` returns."""

    def entries(self) -> list[bytes]:
        """All entries in order of their sequence numbers.

        Raises:
            PrivacyError: PF304, what is stored cannot be read back.
        """
        ...

    def append(self, sequence: int, entry: bytes) -> None:
        """Store an entry whole or not at all; MUST fail if the sequence number exists."""
        ...


class Ledger:
    """The site's one ledger."""

    def __init__(
        self,
        port: LedgerPort,
        key: SigningKey,
        *,
        keeper: HeadKeeper,
        witnesses: Sequence[HeadsPort] = (),
        former: Sequence[VerifyKey] = (),
        delta: float,
        max_epsilon: float,
    ) -> None:
        """Open the ledger; nothing is read yet.

        Args:
            port: keeps the entries.
            key: the site's evidence key.
            keeper: remembers the head, apart from the entries.
            witnesses: others who have seen heads.
            former: evidence keys the site had before, in their order.
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
        self._keeper, self._witnesses = keeper, (keeper, *witnesses)
        self._reader = ChainReader(*former, key.public)
        # Steps at which all accountants agreed in this process, by the mechanisms and the delta.
        self._agreed: dict[tuple[frozenset[tuple[float, float]], float], int] = {}

    def verify(self) -> tuple[LedgerEntry, ...]:
        """Check every entry and every signature, the chain, its times and its end; return the entries in order.

        Raises:
            PrivacyError: PF304, the ledger is damaged or not this site's; PF308, its times go backwards; PF309, it is older than a head
                that a witness has seen; PF310, the keeper's own head is missing.
            HostError: PF905, the policy's delta is not the one that the ledger was begun with.
        """
        return self._read(every_signature=True).entries

    def entries(self) -> tuple[LedgerEntry, ...]:
        """The entries in order, checked as before a charge: the last signature vouches for all (`chain`). Raises as `verify`."""
        return self._read().entries

    def _read(self, *, every_signature: bool = False) -> Chain:
        # Witnesses first: an entry that another process stores meanwhile is then more than they have seen, never less.
        seen = [head for witness in self._witnesses for head in witness.heads()]
        chain = self._reader.read(self._port.entries(), every_signature=every_signature)
        check_heads(seen, chain.heads)
        if chain.entries and chain.entries[0].delta != self._delta:
            raise _other_delta(self._delta, chain.entries[0].delta)
        return chain

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
            PrivacyError: PF301 over the policy's epsilon, PF302 over the plan's limit, PF305 the accountants contradict each other, PF308
                the clock was set back, PF304, PF309, PF310 as `verify`. Nothing was stored.
            HostError: PF905, the policy's delta is not the ledger's: nothing was stored. PF901 or PF904, the disk failed: the entry may be
                stored, nothing may be released, and the same charge may be asked for again.
            ValueError: the release was charged before for another plan, run, round or event.
        """
        chain = self._read()
        entries = chain.entries
        earlier = next((entry for entry in entries if entry.release_id == release_id), None)
        if earlier is not None:
            if (earlier.plan, earlier.run, earlier.round_index, earlier.event) != (plan, run, round_index, event):
                raise ValueError(f"release {digest.short(release_id)} was charged for another plan, run, round or event")
            self._catch_up(chain)
            return earlier
        if chain.latest is not None:
            check_clock(now, chain.latest, "the machine's clock")
        before = [entry.event for entry in entries]
        plan_before = [entry.event for entry in entries if entry.plan == plan]
        total = self._within(before, event, self._delta, self._max_epsilon, ErrorCode.BUDGET_SPENT, "the site's budget")
        of_plan = self._within(plan_before, event, plan_delta, plan_limit, ErrorCode.PLAN_LIMIT_REACHED, "the plan's limit")
        entry = LedgerEntry(
            sequence=len(entries) + 1,
            previous=chain.heads[-1] if chain.heads else None,
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
        data = dsse.seal(entry.to_payload(), LEDGER_TYPE, self._key)
        self._port.append(entry.sequence, data)
        self._keeper.keep(digest.of_bytes(data), entry.sequence)
        return entry

    def _catch_up(self, chain: Chain) -> None:
        """Let the keeper remember the last entry, where a crash came between storing that and remembering it."""
        if all(one.head != chain.heads[-1] for one in self._keeper.heads()):
            self._keeper.keep(chain.heads[-1], len(chain.entries))

    def spent(self) -> Spend:
        """What all releases have cost, in total and by plan.

        Raises:
            PrivacyError, HostError: as `verify`.
        """
        entries = self.entries()
        total = composed_epsilon([entry.event for entry in entries], self._delta)
        return Spend(releases=len(entries), delta=self._delta, epsilon=total, max_epsilon=self._max_epsilon, plans=by_plan(entries))

    def stated(self, entries: Sequence[LedgerEntry]) -> float:
        """Epsilon of all releases as it was computed and signed with the last of these entries: for showing, and never for a charge.

        Computing it again takes seconds in a new process, most of them for loading the accountants' libraries. A figure that a test of
        the same events refutes is not shown; `charge`, `spent` and who calls `check_accountants` compute it.

        Args:
            entries: all, as `entries` gave them.

        Raises:
            PrivacyError: PF305, the figure is below what a test of the events shows.
        """
        last = entries[-1].epsilon_total if entries else 0.0
        return check_stated(last, [entry.event for entry in entries], self._delta)

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


def last_charge(port: LedgerPort) -> LedgerEntry | None:
    """The last stored entry, or None for an empty ledger. Read without any check, for showing only.

    Raises:
        ValueError: not a ledger entry.
    """
    stored = port.entries()
    return LedgerEntry.from_payload(dsse.parse(stored[-1]).payload) if stored else None


def _other_delta(policy: float, ledger: float) -> HostError:
    return HostError(
        ErrorCode.SETTINGS_INVALID,
        "delta differs from the one that this site's ledger was begun with, which holds for the ledger's whole life",
        where="policy.toml, key delta",
        value=f"{policy:g}, the ledger's is {ledger:g}",
        remedy=f"write delta = {ledger!r} again; nothing was charged or released",
    )
