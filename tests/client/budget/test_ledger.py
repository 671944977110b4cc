"""The ledger: charged first, once, never over budget, and any change is found."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from pathfed_client.budget import ledger as budget
from pathfed_client.budget.entry import LEDGER_TYPE, LedgerEntry
from pathfed_client.budget.ledger import Ledger
from pathfed_client.budget.witness import SeenHead
from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, PrivacyError
from pathfed_common.ids import run_name
from pathfed_common.privacy import accounting
from pathfed_common.privacy.accounting import PrivacyEvent, composed_epsilon
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.units import CLOCK_SKEW_S

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC).timestamp()
DELTA, PLAN_DELTA = 1e-6, 1e-5
EVENT = PrivacyEvent(sampling_rate=0.1, noise_multiplier=2.0, steps=1)
PLAN, OTHER_PLAN = digest.of_bytes(b"plan"), digest.of_bytes(b"other plan")
KEY = SigningKey.generate()


class Memory:
    """The ports' contracts, in lists: entries, and the head that the keeper has seen."""

    def __init__(self, *entries: bytes, seen: Sequence[SeenHead] = ()) -> None:
        self.stored = list(entries)
        self.seen = list(seen)

    def entries(self) -> list[bytes]:
        return list(self.stored)

    def append(self, sequence: int, entry: bytes) -> None:
        if sequence != len(self.stored) + 1:
            raise ValueError(f"entry {sequence} exists")
        self.stored.append(entry)

    def heads(self) -> list[SeenHead]:
        return list(self.seen)

    def keep(self, head: Digest, sequence: int) -> None:
        self.seen = [SeenHead(head=head, sequence=sequence, where="the keeper")]


def make(port: Memory, *, max_epsilon: float = 50.0, key: SigningKey = KEY, delta: float = DELTA) -> Ledger:
    return Ledger(port, key, keeper=port, delta=delta, max_epsilon=max_epsilon)


def charge(ledger: Ledger, number: int, **changes) -> LedgerEntry:
    values = {
        "release_id": digest.of_bytes(b"release %d" % number),
        "plan": PLAN,
        "run": run_name("run-1"),
        "round_index": number,
        "event": EVENT,
        "plan_delta": PLAN_DELTA,
        "plan_limit": 50.0,
        "now": NOW + number,
    }
    return ledger.charge(**{**values, **changes})


@pytest.fixture
def port() -> Memory:
    return Memory()


@pytest.fixture(scope="module")
def four() -> list[bytes]:
    """The stored bytes of four charges."""
    port = Memory()
    ledger = make(port)
    for number in range(1, 5):
        charge(ledger, number)
    return port.stored


def test_a_charge_is_stored_before_it_returns(port: Memory) -> None:
    ledger = make(port)
    entry = charge(ledger, 1)
    assert (entry.sequence, entry.previous, entry.at) == (1, None, NOW + 1)
    assert entry.epsilon_total == pytest.approx(composed_epsilon([EVENT], DELTA))
    assert entry.epsilon_plan == pytest.approx(composed_epsilon([EVENT], PLAN_DELTA))
    assert ledger.verify() == (entry,)
    second = charge(ledger, 2)
    assert second.previous == digest.of_bytes(port.stored[0])
    assert ledger.head == digest.of_bytes(port.stored[1])


def test_an_empty_ledger_has_no_head_and_has_spent_nothing(port: Memory) -> None:
    ledger = make(port)
    assert ledger.head is None
    assert ledger.verify() == ()
    assert ledger.spent().epsilon == 0.0


def test_the_same_release_is_charged_once(port: Memory) -> None:
    ledger = make(port)
    first = charge(ledger, 1)
    assert charge(ledger, 1, now=NOW + 999) == first
    assert charge(make(port), 1) == first
    assert len(port.stored) == 1


def test_another_release_of_the_same_round_is_another_charge(port: Memory) -> None:
    ledger = make(port)
    charge(ledger, 1)
    charge(ledger, 1, release_id=digest.of_bytes(b"another base state"))
    assert len(port.stored) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": OTHER_PLAN},
        {"run": run_name("run-2")},
        {"round_index": 7},
        {"event": PrivacyEvent(sampling_rate=0.1, noise_multiplier=2.0, steps=2)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_release_name_used_for_something_else_is_refused(changes, port: Memory) -> None:
    ledger = make(port)
    charge(ledger, 1)
    with pytest.raises(ValueError, match="was charged for another plan, run, round or event"):
        charge(ledger, 1, **changes)


def test_a_charge_over_the_policys_epsilon_is_refused_and_stores_nothing(port: Memory) -> None:
    one, two = (composed_epsilon([EVENT] * n, DELTA) for n in (1, 2))
    ledger = make(port, max_epsilon=(one + two) / 2)
    charge(ledger, 1)
    with pytest.raises(PrivacyError) as caught:
        charge(ledger, 2, plan=OTHER_PLAN)
    assert caught.value.code is ErrorCode.BUDGET_SPENT
    for figure in (one, two, (one + two) / 2):
        assert f"{figure:.4f}" in caught.value.what
    assert len(port.stored) == 1
    assert charge(ledger, 1).sequence == 1  # what was charged before may still be sent


def test_a_charge_that_meets_the_limit_exactly_is_allowed(port: Memory) -> None:
    ledger = make(port, max_epsilon=composed_epsilon([EVENT] * 2, DELTA))
    charge(ledger, 1)
    assert charge(ledger, 2).sequence == 2


def test_a_charge_over_the_plans_limit_is_refused_while_another_plan_goes_on(port: Memory) -> None:
    ledger = make(port)
    limit = composed_epsilon([EVENT], PLAN_DELTA) * 1.01
    charge(ledger, 1, plan_limit=limit)
    with pytest.raises(PrivacyError) as caught:
        charge(ledger, 2, plan_limit=limit)
    assert caught.value.code is ErrorCode.PLAN_LIMIT_REACHED
    assert f"{limit:.4f}" in caught.value.what
    assert charge(ledger, 3, plan=OTHER_PLAN, plan_limit=limit).sequence == 2


@pytest.mark.parametrize("limit", [0.0, float("nan")])
def test_a_limit_of_nothing_or_of_no_number_refuses(limit: float, port: Memory) -> None:
    with pytest.raises(PrivacyError) as caught:
        charge(make(port), 1, plan_limit=limit)
    assert caught.value.code is ErrorCode.PLAN_LIMIT_REACHED
    assert port.stored == []


def test_accountants_that_contradict_each_other_stop_the_charge(port: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_rdp", lambda merged, delta: 0.01)
    with pytest.raises(PrivacyError) as caught:
        charge(make(port), 1)
    assert caught.value.code is ErrorCode.ACCOUNTANTS_DISAGREE
    assert port.stored == []


def test_spent_gives_totals_and_each_plan(port: Memory) -> None:
    ledger = make(port)
    charge(ledger, 1)
    charge(ledger, 2)
    charge(ledger, 3, plan=OTHER_PLAN, event=PrivacyEvent(sampling_rate=0.05, noise_multiplier=1.5, steps=4))
    spent = ledger.spent()
    assert (spent.releases, spent.delta, spent.max_epsilon) == (3, DELTA, 50.0)
    assert spent.epsilon == ledger.verify()[-1].epsilon_total
    assert (spent.plans[PLAN].releases, spent.plans[PLAN].steps, spent.plans[OTHER_PLAN].steps) == (2, 2, 4)
    assert spent.plans[PLAN].epsilon == pytest.approx(composed_epsilon([EVENT] * 2, PLAN_DELTA))
    assert max(plan.epsilon for plan in spent.plans.values()) < spent.epsilon


def test_a_charge_is_what_it_costs_whatever_the_entries_figures_say(port: Memory) -> None:
    """Epsilon is recomputed from events: a lowered figure in a signed entry gives no budget back."""
    ledger = make(port)
    entry = charge(ledger, 1)
    lowered = LedgerEntry(**{**vars(entry), "epsilon_total": 0.0, "epsilon_plan": 0.0})
    forged = Memory(dsse.seal(lowered.to_payload(), LEDGER_TYPE, KEY))
    assert make(forged).spent().epsilon == ledger.spent().epsilon


def test_a_figure_that_a_test_of_the_events_refutes_is_not_shown(port: Memory) -> None:
    """What is shown is the last entry's own figure, as long as it is not below what an attacker could demonstrate."""
    ledger = make(port)
    assert ledger.stated(ledger.entries()) == 0.0
    entry = charge(ledger, 1, event=PrivacyEvent(sampling_rate=1.0, noise_multiplier=1.0, steps=9))
    assert ledger.stated(ledger.entries()) == entry.epsilon_total
    lowered = LedgerEntry(**{**vars(entry), "epsilon_total": 0.8 * entry.epsilon_total})
    forged = make(Memory(dsse.seal(lowered.to_payload(), LEDGER_TYPE, KEY)))
    with pytest.raises(PrivacyError, match="a test shows at least") as caught:
        forged.stated(forged.entries())
    assert caught.value.code is ErrorCode.ACCOUNTANTS_DISAGREE


def test_two_writers_cannot_both_take_a_sequence_number(port: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = make(port)
    charge(ledger, 1)
    stale, seen = port.entries(), port.heads()
    charge(ledger, 2)
    monkeypatch.setattr(port, "entries", lambda: stale)
    monkeypatch.setattr(port, "heads", lambda: seen)
    with pytest.raises(ValueError, match="entry 2 exists"):
        charge(make(port), 3)


def damage(code: ErrorCode = ErrorCode.LEDGER_DAMAGED):
    return pytest.raises(PrivacyError, match=code.value)


def test_any_changed_byte_is_found(four: list[bytes]) -> None:
    for place in range(0, len(four[1]), 7):
        changed = bytearray(four[1])
        changed[place] ^= 1
        with damage():
            make(Memory(four[0], bytes(changed), *four[2:])).verify()


@pytest.mark.parametrize(
    "order",
    [[0, 2, 3], [1, 2, 3], [0, 2, 1, 3], [0, 1, 1, 2, 3], [0, 1, 2, 3, 3], [3, 2, 1, 0], [0, 1, 3]],
    ids=["inner missing", "first missing", "swapped", "repeated", "last repeated", "reversed", "third missing"],
)
def test_missing_swapped_and_repeated_entries_are_found(order: list[int], four: list[bytes]) -> None:
    with damage():
        make(Memory(*(four[index] for index in order))).verify()


def test_a_release_charged_twice_in_a_well_formed_chain_is_found(four: list[bytes]) -> None:
    first = make(Memory(four[0])).verify()[0]
    second = LedgerEntry(**{**vars(first), "sequence": 2, "previous": digest.of_bytes(four[0])})
    with pytest.raises(PrivacyError, match="charged twice"):
        make(Memory(four[0], dsse.seal(second.to_payload(), LEDGER_TYPE, KEY))).verify()


def test_entries_of_another_key_or_type_are_found(four: list[bytes]) -> None:
    with damage():
        make(Memory(*four), key=SigningKey.generate()).verify()
    payload = dsse.open_envelope(four[0], payload_type=LEDGER_TYPE, keys=KEY.public)
    with damage():
        make(Memory(dsse.seal(payload, "text/plain", KEY))).verify()


def test_a_ledger_has_one_delta_for_its_whole_life(four: list[bytes]) -> None:
    """A larger delta would make what was spent look small."""
    port = Memory(*four)
    other = make(port, delta=1e-3)
    for call in (other.verify, other.spent, lambda: charge(other, 9)):
        with pytest.raises(HostError, match=r"PF905.*delta.*0\.001, the ledger's is 1e-06"):
            call()
    assert len(port.stored) == 4


def test_an_entry_with_another_delta_in_a_well_formed_chain_is_found(four: list[bytes]) -> None:
    second = make(Memory(*four)).verify()[1]
    forged = dsse.seal(LedgerEntry(**{**vars(second), "delta": 1e-3}).to_payload(), LEDGER_TYPE, KEY)
    with pytest.raises(PrivacyError, match=r"PF304.*another delta"):
        make(Memory(four[0], forged)).verify()


def test_all_accountants_are_asked_at_first_and_when_the_steps_have_grown_tenfold(port: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    full = accounting.check_accountants

    def counting(events, delta) -> float:
        asked.append(sum(event.steps for event in events))
        return full(events, delta)

    monkeypatch.setattr(budget, "check_accountants", counting)
    ledger = make(port)
    for number in range(1, 12):
        charge(ledger, number, plan_delta=DELTA)
    assert asked == [1, 10]
    charge(ledger, 12, plan_delta=DELTA, event=PrivacyEvent(sampling_rate=0.1, noise_multiplier=3.0, steps=1))
    assert asked == [1, 10, 12]  # a new mechanism
    charge(ledger, 13)
    assert asked == [1, 10, 12, 13]  # another delta


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_charge_between_full_checks_still_stops_where_accountants_disagree(
    factor: float, port: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make(port)
    charge(ledger, 1)
    true = accounting._pld
    monkeypatch.setattr(budget, "check_accountants", lambda events, delta: pytest.fail("not a full check"))
    monkeypatch.setattr(accounting, "_pld", lambda merged, delta: true(merged, delta) * factor)
    with pytest.raises(PrivacyError, match="PF305"):
        charge(ledger, 2)
    assert len(port.stored) == 1


def test_a_damaged_ledger_refuses_to_charge_and_to_report(four: list[bytes]) -> None:
    port = Memory(four[0], four[2])
    for call in (lambda: charge(make(port), 9), lambda: make(port).spent()):
        with damage():
            call()
    assert len(port.stored) == 2


def test_damage_after_the_ledger_was_opened_is_found(four: list[bytes]) -> None:
    port = Memory(*four)
    ledger = make(port)
    ledger.verify()
    port.stored[1] = port.stored[1].replace(b"payloadType", b"payloadtype")
    with damage():
        charge(ledger, 9)


def test_payloads_are_canonical_and_spell_out_the_time(four: list[bytes]) -> None:
    payload = dsse.open_envelope(four[0], payload_type=LEDGER_TYPE, keys=KEY.public)
    raw = json.loads(payload)
    assert raw["at_text"] == "2026-11-23T12:00:01+00:00"
    assert digest.canonical(raw) == payload
    for changed in (payload + b" ", digest.canonical({**raw, "more": 1}), digest.canonical({**raw, "sequence": 0}), b"[]", b"{}", b"x"):
        with pytest.raises(ValueError):
            LedgerEntry.from_payload(changed)


@pytest.mark.parametrize("changes", [{"round_index": 0}, {"release_id": "x"}, {"plan": "x"}, {"run": "A b"}, {"now": float("nan")}])
def test_entries_out_of_bounds_are_never_stored(changes, port: Memory) -> None:
    with pytest.raises(ValueError):
        charge(make(port), 1, **changes)
    assert port.stored == []


@pytest.mark.parametrize(("delta", "max_epsilon"), [(0.0, 1.0), (1.0, 1.0), (1e-6, 0.0), (1e-6, float("inf")), (1e-6, float("nan"))])
def test_a_policy_out_of_bounds_is_refused(delta: float, max_epsilon: float, port: Memory) -> None:
    with pytest.raises(ValueError, match="must be"):
        make(port, delta=delta, max_epsilon=max_epsilon)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which envelopes' signatures were checked."""
    names: list[str] = []
    original = dsse.open_envelope

    def counting(*args, where: str, **options) -> bytes:
        names.append(where)
        return original(*args, where=where, **options)

    monkeypatch.setattr(dsse, "open_envelope", counting)
    return names


def test_every_signature_is_checked_once_a_process(four: list[bytes], opened: list[str]) -> None:
    ledger = make(Memory(*four))
    ledger.verify()
    ledger.verify()
    ledger.spent()
    assert len(opened) == 4


def test_opening_a_ledger_checks_the_last_signature_which_vouches_for_all(four: list[bytes], opened: list[str]) -> None:
    port = Memory(*four)
    ledger = make(port)
    ledger.spent()
    assert opened == ["ledger entry 4"]
    charge(ledger, 9)
    charge(ledger, 10)
    assert opened == ["ledger entry 4", "ledger entry 5"]


@pytest.mark.parametrize("read", [Ledger.verify, Ledger.entries, Ledger.spent], ids=lambda read: read.__name__)
def test_an_entry_exchanged_by_who_lacks_the_key_is_found_whichever_signature_is_checked(read, four: list[bytes]) -> None:
    """With the chain closed again up to the end, so that only a signature can tell."""
    stranger = SigningKey.generate()
    for place in range(4):
        entries, previous = list(four[:place]), None if place == 0 else digest.of_bytes(four[place - 1])
        for data in four[place:]:
            entry = LedgerEntry.from_payload(dsse.parse(data).payload)
            changed = LedgerEntry(**{**vars(entry), "previous": previous, "event": replace(EVENT, noise_multiplier=9.0)})
            real = dsse.parse(data)
            forged = dsse._encode(replace(real, payload=changed.to_payload(), signature=stranger.sign(changed.to_payload())))
            entries.append(forged)
            previous = digest.of_bytes(forged)
        with damage():
            read(make(Memory(*entries)))


def test_an_entry_that_the_site_itself_left_unverified_is_found_when_every_signature_is_checked(four: list[bytes]) -> None:
    """A fault of our own: an honest entry appended to a foreign one. The chain and its last signature are whole."""
    first = dsse.seal(dsse.parse(four[0]).payload, LEDGER_TYPE, KEY)
    broken = dsse._encode(replace(dsse.parse(first), signature=bytes(64)))
    second = LedgerEntry.from_payload(dsse.parse(four[1]).payload)
    on_top = dsse.seal(LedgerEntry(**{**vars(second), "previous": digest.of_bytes(broken)}).to_payload(), LEDGER_TYPE, KEY)
    assert len(make(Memory(broken, on_top)).entries()) == 2
    with damage():
        make(Memory(broken, on_top)).verify()


@pytest.mark.parametrize("length", [0, 1, 40, -1], ids=["zero bytes", "one byte", "forty bytes", "all but one"])
def test_a_half_written_last_entry_is_found_and_nothing_is_charged(length: int, four: list[bytes]) -> None:
    for torn in (four[3][:length], four[3][:length].ljust(len(four[3]), b"\0")):
        port = Memory(*four[:3], torn)
        for call in (make(port).verify, make(port).spent, lambda port=port: charge(make(port), 9)):
            with pytest.raises(PrivacyError, match=r"PF304.*last entry is half-written.*do: do not train"):
                call()
        assert port.stored == [*four[:3], torn]


def test_a_clock_set_back_charges_nothing(four: list[bytes]) -> None:
    port = Memory(*four)
    for back in (CLOCK_SKEW_S + 1, 10 * 365 * 86400.0):
        with pytest.raises(PrivacyError, match=r"PF308.*the machine's clock.*do: put the machine's clock right"):
            charge(make(port), 9, now=NOW + 4 - back)
    assert len(port.stored) == 4
    assert charge(make(port), 9, now=NOW + 4 - CLOCK_SKEW_S).sequence == 5


def test_a_clock_is_held_against_the_latest_time_so_that_small_steps_back_do_not_add_up(port: Memory) -> None:
    ledger = make(port)
    charge(ledger, 1, now=NOW)
    charge(ledger, 2, now=NOW - 200)
    with pytest.raises(PrivacyError, match="PF308"):
        charge(ledger, 3, now=NOW - 400)


def test_a_charge_made_before_is_given_again_whatever_the_clock_says(four: list[bytes]) -> None:
    assert charge(make(Memory(*four)), 2, now=0.0).sequence == 2


def test_entries_whose_times_go_backwards_are_found(four: list[bytes]) -> None:
    second = LedgerEntry.from_payload(dsse.parse(four[1]).payload)
    for back, found in ((CLOCK_SKEW_S - 2, False), (CLOCK_SKEW_S + 2, True)):
        entry = LedgerEntry(**{**vars(second), "at": NOW + 1 - back})
        port = Memory(four[0], dsse.seal(entry.to_payload(), LEDGER_TYPE, KEY))
        if not found:
            assert len(make(port).verify()) == 2
            continue
        for read in (make(port).verify, make(port).spent):
            with pytest.raises(PrivacyError, match=r"PF308.*ledger entry 2"):
                read()
