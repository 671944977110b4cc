"""What an answer leaves in the egress record: before it leaves, with what it cost, and only then does it leave."""

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from answering_site import Site, bytes_of, opened

from pathfed_client import app
from pathfed_client.cohort.withdrawal import Withdrawn, WithdrawnKind
from pathfed_client.egress.entry import EgressKind, Outgoing
from pathfed_client.gate.ports import Answer
from pathfed_client.home import SiteHome
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.io.site_records import Event, SealedUpdate
from pathfed_client.io.site_store import SiteStore
from pathfed_common import digest
from pathfed_common.errors import ErrorCode, HostError


@pytest.fixture
def site(copy_home: Callable[..., SiteHome]) -> Iterator[Site]:
    with opened(copy_home()) as made:
        yield made


def left(home: SiteHome) -> list[Outgoing]:
    with app.open_egress(home) as record:
        record.verified()
        return [entry.sent for entry in record.entries()]


def test_update_and_statement_are_written_down_with_round_digest_and_price(world, site):
    answer = site.answer(world.offer(), world.base_state)
    update, statement = left(site.home)
    charged = app.open_ledger(site.home, site.store).entries()[-1].epsilon_total
    assert answer.statement is not None
    assert (update.kind, update.digest, update.size) == (EgressKind.UPDATE, digest.of_bytes(bytes_of(answer)), len(bytes_of(answer)))
    assert (statement.kind, statement.digest) == (EgressKind.STATEMENT, digest.of_bytes(answer.statement))
    assert (update.epsilon_charged, statement.epsilon_charged) == (charged, None)
    for sent in (update, statement):
        assert (sent.plan, sent.run, sent.round_index) == (world.plan.digest, "run-1", 1)
    card = site.home.server_card
    assert (update.destination, statement.destination) == (card.control_address, card.fleet_address)


def test_a_resend_is_written_down_again_and_charged_nothing(world, site):
    first, again = (site.answer(world.offer(), world.base_state) for _ in range(2))
    assert first == again
    updates = [sent for sent in left(site.home) if sent.kind is EgressKind.UPDATE]
    assert [sent.digest for sent in updates] == [updates[0].digest] * 2
    assert updates[0].epsilon_charged == pytest.approx(app.open_ledger(site.home, site.store).spent().epsilon)
    assert updates[1].epsilon_charged == 0.0


def test_prices_of_rounds_add_up_to_the_ledgers_total(world, site):
    for number in (1, 2):
        assert site.answer(world.offer(round_index=number), world.base_state).code is None
    prices = [sent.epsilon_charged for sent in left(site.home) if sent.kind is EgressKind.UPDATE]
    assert len(prices) == 2
    assert sum(price or 0.0 for price in prices) == pytest.approx(app.open_ledger(site.home, site.store).spent().epsilon)


def test_a_draw_that_was_discarded_is_in_the_price_of_the_round(world, site, monkeypatch):
    """Both charges of a round whose cohort changed meanwhile."""
    put_sealed, done = SiteStore.put_sealed, []

    def withdraw_first(store: SiteStore, sealed: SealedUpdate, **more: int) -> None:
        if not done:
            done.append(True)
            slide = store.all_slides()[0]
            assert slide.patient is not None
            store.withdraw([Withdrawn(WithdrawnKind.PATIENT, slide.patient)], Event(at=1.0, kind="withdraw"))
        put_sealed(store, sealed, **more)

    monkeypatch.setattr(SiteStore, "put_sealed", withdraw_first)
    assert site.answer(world.offer(), world.base_state).code is None
    assert site.charges() == 2
    (update, _) = left(site.home)
    assert update.epsilon_charged == pytest.approx(app.open_ledger(site.home, site.store).spent().epsilon)


def test_a_refusal_is_written_down_with_the_round_it_refuses(world, site):
    assert site.answer(world.offer(round_index=9), world.base_state) == Answer(code="PF409")
    (refusal,) = left(site.home)
    assert (refusal.kind, refusal.size, refusal.digest) == (EgressKind.REFUSAL, 5, digest.of_bytes(b"PF409"))
    assert (refusal.run, refusal.round_index, refusal.plan, refusal.epsilon_charged) == ("run-1", 9, world.plan.digest, None)


def test_an_offer_that_is_not_authentic_names_nothing_in_the_record(world, site):
    assert site.answer(b"forged", world.base_state).code == "PF406"
    (refusal,) = left(site.home)
    assert (refusal.kind, refusal.run, refusal.plan) == (EgressKind.REFUSAL, None, None)


def test_an_answer_that_cannot_be_written_down_does_not_leave(world, site, monkeypatch):
    """Nor does a code. The seal stays: the same bytes leave once the record can be written."""
    with monkeypatch.context() as patch:

        def full(log: EgressLog, *sent: Outgoing) -> None:
            raise HostError(ErrorCode.DISK_FULL, "the disk is full", where=log.path)

        patch.setattr(EgressLog, "append", full)
        for envelope in (world.offer(), world.offer(round_index=9), b"forged"):
            with pytest.raises(HostError, match="PF901"):
                site.answer(envelope, world.base_state)
    assert left(site.home) == []
    assert site.answer(world.offer(), world.base_state).code is None
    assert site.charges() == 1
    update, _ = left(site.home)
    assert update.epsilon_charged is not None
    assert update.epsilon_charged > 0, "it leaves for the first time now, though it was sealed before"


class Crash(BaseException):
    """Like a killed process."""


def test_a_crash_before_the_entry_leaves_no_answer_and_one_after_it_a_line_too_many_at_most(world, copy_home, monkeypatch):
    home = copy_home()
    append, calls = EgressLog.append, []

    def crash(log: EgressLog, *sent: Outgoing) -> None:
        calls.append(sent)
        if len(calls) == 2:
            append(log, *sent)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(EgressLog, "append", crash)
        for expected in (0, 2):
            with opened(SiteHome(home.root)) as site, pytest.raises(Crash):
                site.answer(world.offer(), world.base_state)
            assert len(left(home)) == expected
    with opened(SiteHome(home.root)) as site:
        answer = site.answer(world.offer(), world.base_state)
        assert site.charges() == 1
    updates = [sent for sent in left(home) if sent.kind is EgressKind.UPDATE]
    assert [sent.digest for sent in updates] == [digest.of_bytes(bytes_of(answer))] * 2


def test_a_site_without_its_record_does_not_answer(world, copy_home):
    home = copy_home()
    home.egress.unlink()
    with pytest.raises(HostError, match="PF913"), opened(home):
        pass
    home.egress.touch()
    with closing(EgressLog(home.egress)), opened(home) as site:
        assert site.answer(world.offer(), world.base_state).code is None


def test_a_code_for_what_is_no_offer_is_written_down_too(site):
    site.answer.refused("PF405")
    (refusal,) = left(site.home)
    assert (refusal.kind, refusal.size, refusal.digest) == (EgressKind.REFUSAL, 5, digest.of_bytes(b"PF405"))
