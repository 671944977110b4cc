"""Witnesses: a ledger put back to an older state is found by whoever has seen a newer one."""

import json
from collections.abc import Sequence

import pytest

from pathfed_client.budget.ledger import Ledger
from pathfed_client.budget.witness import SeenHead, check_heads, parse_heads
from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, PrivacyError
from pathfed_common.ids import run_name, site_name
from pathfed_common.privacy.accounting import PrivacyEvent
from pathfed_common.provenance.keys import SigningKey

KEY = SigningKey.generate()
CHAIN = [digest.of_bytes(b"entry %d" % number) for number in range(1, 6)]
OTHER = digest.of_bytes(b"another history")
SITE = site_name("st-elsewhere")


def seen(head: Digest | None, sequence: int | None, where: str = "a witness") -> SeenHead:
    return SeenHead(head=head, sequence=sequence, where=where)


class Witness:
    """A witness that says what it is told to."""

    def __init__(self, *heads: SeenHead) -> None:
        self.seen = list(heads)

    def heads(self) -> Sequence[SeenHead]:
        return list(self.seen)

    def keep(self, head: Digest, sequence: int) -> None:
        self.seen = [seen(head, sequence, "the keeper")]


class Entries:
    """Stored entries; `meanwhile` happens each time just before they are read."""

    def __init__(self) -> None:
        self.stored: list[bytes] = []
        self.meanwhile = lambda: None

    def entries(self) -> list[bytes]:
        self.meanwhile()
        return list(self.stored)

    def append(self, sequence: int, entry: bytes) -> None:
        assert sequence == len(self.stored) + 1
        self.stored.append(entry)


def make(entries: Entries, keeper: Witness, *witnesses: Witness) -> Ledger:
    return Ledger(entries, KEY, keeper=keeper, witnesses=witnesses, delta=1e-6, max_epsilon=50.0)


def charge(ledger: Ledger, number: int) -> None:
    ledger.charge(
        release_id=digest.of_value(number),
        plan=digest.of_bytes(b"plan"),
        run=run_name("run-1"),
        round_index=number,
        event=PrivacyEvent(sampling_rate=0.1, noise_multiplier=3.0, steps=1),
        plan_delta=1e-6,
        plan_limit=50.0,
        now=1000.0 + number,
    )


@pytest.mark.parametrize(
    "heads",
    [[], [seen(None, 0)], [seen(CHAIN[4], 5)], [seen(CHAIN[1], 2)], [seen(CHAIN[2], None)], [seen(head, None) for head in CHAIN]],
    ids=["nothing known", "an empty ledger", "the last", "an earlier one", "without a number", "all"],
)
def test_what_was_seen_and_is_there_is_no_contradiction(heads: list[SeenHead]) -> None:
    check_heads(heads, CHAIN)


@pytest.mark.parametrize(
    ("head", "chain", "sentence"),
    [
        (seen(CHAIN[4], 5), CHAIN[:4], "a witness has seen entry 5, the ledger ends at 4"),
        (seen(CHAIN[0], 1), [], "a witness has seen entry 1, the ledger ends at 0"),
        (seen(OTHER, 3), CHAIN, "a witness has seen another entry 3 than the ledger holds"),
        (seen(CHAIN[3], 3), CHAIN, "a witness has seen another entry 3 than the ledger holds"),
        (seen(OTHER, None), CHAIN, f"a witness names the head {digest.short(OTHER)}, which the ledger does not hold"),
        (seen(CHAIN[4], None), CHAIN[:4], "which the ledger does not hold"),
    ],
    ids=["cut off", "emptied", "another history", "at another place", "unknown head", "cut off, without a number"],
)
def test_a_head_that_was_seen_and_is_not_there_is_refused(head: SeenHead, chain: list[Digest], sentence: str) -> None:
    with pytest.raises(PrivacyError, match=sentence) as caught:
        check_heads([seen(None, 0), head], chain)
    assert caught.value.code is ErrorCode.LEDGER_BEHIND
    assert "ledger verify --heads" in str(caught.value.remedy)


def test_each_witness_alone_finds_a_ledger_put_back() -> None:
    entries, keeper = Entries(), Witness()
    ledger = make(entries, keeper)
    for number in range(1, 5):
        charge(ledger, number)
    newest = list(keeper.seen)
    stated = Witness(seen(newest[0].head, None, "a statement"))
    outside = Witness(seen(newest[0].head, 4, "a receipt"))
    for cut in range(4):
        older = Entries()
        older.stored = entries.stored[:cut]
        for keeps, others in ((Witness(*newest), ()), (Witness(), (stated,)), (Witness(), (Witness(), outside))):
            put_back = make(older, keeps, *others)
            for call in (put_back.verify, put_back.entries, put_back.spent, lambda it=put_back: charge(it, 9)):
                with pytest.raises(PrivacyError, match="PF309"):
                    call()
        assert older.stored == entries.stored[:cut]


def test_a_ledger_that_went_another_way_after_it_was_put_back_is_refused() -> None:
    entries, keeper = Entries(), Witness()
    ledger = make(entries, keeper)
    charge(ledger, 1)
    charge(ledger, 2)
    newest, older = list(keeper.seen), Entries()
    older.stored = entries.stored[:1]
    unseen = make(older, Witness())  # trained on with the witness gone
    for number in range(5, 9):
        charge(unseen, number)
    with pytest.raises(PrivacyError, match=r"PF309.*another entry 2"):
        charge(make(older, Witness(*newest)), 9)


def test_an_entry_stored_while_the_ledger_is_read_is_no_contradiction() -> None:
    """`pathfed-site ledger` beside a running client: witnesses are asked before entries are read."""
    entries, keeper = Entries(), Witness()
    writer = make(entries, keeper)
    charge(writer, 1)
    reader = make(entries, keeper)

    def another() -> None:
        entries.meanwhile = lambda: None
        charge(writer, 2)

    entries.meanwhile = another
    assert len(reader.verify()) == 2


@pytest.mark.parametrize(
    ("head", "sequence"),
    [(None, 1), (CHAIN[0], 0), (None, None), (CHAIN[0], -1), (CHAIN[0], True), ("sha256:12", 1), (CHAIN[0], 1.0)],
)
def test_heads_that_cannot_be_are_refused(head: Digest | None, sequence: int | None) -> None:
    with pytest.raises(ValueError):
        seen(head, sequence)


def test_heads_are_read_from_lines_and_from_json() -> None:
    lines = f"# made by the operator\n\n{SITE} 2 {CHAIN[1]}\nanother-site 7 {OTHER}\n{SITE} - {CHAIN[2]}\n"
    raw = [{"site": SITE, "sequence": 2, "head": CHAIN[1]}, {"site": SITE, "sequence": None, "head": CHAIN[2]}]
    expected = [seen(CHAIN[1], 2, "heads"), seen(CHAIN[2], None, "heads")]
    assert parse_heads(lines.encode(), SITE, where="heads") == expected
    assert parse_heads(json.dumps(raw).encode(), SITE, where="heads") == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        f"another-site 2 {CHAIN[1]}",
        f"{SITE} 2",
        f"{SITE} two {CHAIN[1]}",
        f"{SITE} 2 sha256:12",
        f"{SITE} 0 {CHAIN[1]}",
        f"{SITE} 2 {CHAIN[1]} more",
        "[1]",
        '[{"site": "st-elsewhere"}]',
        f'[{{"site": "st-elsewhere", "sequence": "2", "head": "{CHAIN[1]}"}}]',
        "[",
        "\xff",
    ],
)
def test_a_file_that_would_compare_nothing_is_refused(text: str) -> None:
    with pytest.raises(HostError, match=r"PF905.*heads"):
        parse_heads(text.encode("latin-1"), SITE, where="heads")
