"""Consent at dispatch, with the real store and the real loop: no message goes to a site that has not approved, or does so no more."""

from collections.abc import Callable

import pytest
from tests.server.rounds.consortium import DECLARED, KEYS, NAMES, RUN, Consortium, make_plan

from pathfed_common import digest
from pathfed_common.errors import RoundError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.documents import REJECTION, REVOCATION, Approval, Decision
from pathfed_common.units import UtcSeconds
from pathfed_server.rounds.ports import Offer
from pathfed_server.rounds.state import ParticipationState
from pathfed_server.words import record_word

A, B, C = NAMES


@pytest.fixture
def made(consortium: Callable[..., Consortium]) -> Consortium:
    """Three sites that have approved a plan of three rounds, two of which make a quorum."""
    return consortium(plan=make_plan(rounds=3, quorum=2))


def word(made: Consortium, site: SiteName, kind: str) -> bytes:
    """A site's signed word against the plan."""
    approved = next(given.envelope for given in made.store.approvals(made.plan.digest) if given.site == site)
    approval = digest.of_bytes(approved) if kind == REVOCATION else None
    said = Decision(site=site, plan=made.plan.digest, kind=kind, approval=approval, reason="", decided_at=UtcSeconds(1.0))
    return said.to_bytes(KEYS[site])


def revoke(made: Consortium, site: SiteName) -> None:
    record_word(made.store, word(made, site, REVOCATION), by=f"site:{site}", site=site)


def asked(made: Consortium, site: SiteName) -> list[int]:
    """Rounds for which an offer went out to the site."""
    return [index for name, index in made.sites.asked if name == site]


def test_a_site_that_revokes_between_rounds_is_asked_no_more_and_the_run_goes_on(made: Consortium) -> None:
    def after_the_first(offers: list[Offer]) -> list[Offer]:
        if asked(made, B) == [1] and C not in made.store.words_against(made.plan.digest):
            revoke(made, C)
        return offers

    made.sites.arrival = after_the_first
    made.drive()
    assert asked(made, A) == asked(made, B) == [1, 2, 3]
    assert asked(made, C) == [1]
    assert [made.codes(index)[C] for index in (1, 2, 3)] == [None, "PF530", "PF530"]


def test_a_revocation_after_the_round_was_opened_and_before_the_sending_stops_the_message(made: Consortium) -> None:
    def before_the_sending(offers: list[Offer]) -> list[Offer]:
        assert C in {offer.site for offer in offers} or asked(made, A)
        if not asked(made, A):
            revoke(made, C)
        return offers

    made.sites.arrival = before_the_sending
    made.drive()
    assert asked(made, C) == []
    (first,) = (each for each in made.store.participations(RUN, 1) if each.site == C)
    assert (first.state, first.code, first.update) == (ParticipationState.REFUSED, "PF530", None)
    assert made.codes(2)[C] == "PF530"


def test_without_a_quorum_of_consenting_sites_nobody_is_asked_and_nobody_is_charged(made: Consortium) -> None:
    for site in (B, C):
        revoke(made, site)
    with pytest.raises(RoundError, match="PF503"):
        made.drive()
    assert made.sites.asked == []


def test_an_old_approval_handed_in_again_brings_no_site_back(made: Consortium) -> None:
    again = Approval(site=C, plan=made.plan.digest, declared_patients=DECLARED, reply_slots=True, approved_at=UtcSeconds(1.0)).to_bytes(
        KEYS[C]
    )
    revoke(made, C)
    with pytest.raises(RoundError, match="PF530"):
        record_word(made.store, again, by="operator")
    made.drive()
    assert asked(made, C) == []


@pytest.mark.parametrize(
    ("signer", "site", "caller", "code"),
    [(A, C, None, "PF501"), (C, C, A, "PF501"), (SiteName("stranger"), C, None, "PF501"), (A, C, A, "PF501")],
)
def test_nobody_revokes_for_another_site(made: Consortium, signer, site, caller, code) -> None:
    approved = next(given.envelope for given in made.store.approvals(made.plan.digest) if given.site == site)
    said = Decision(
        site=site,
        plan=made.plan.digest,
        kind=REVOCATION,
        approval=digest.of_bytes(approved),
        reason="",
        decided_at=UtcSeconds(1.0),
    )
    with pytest.raises(RoundError, match=code):
        record_word(made.store, said.to_bytes(KEYS[signer]), by="operator", site=caller)
    assert made.store.words_against(made.plan.digest) == {}


def test_a_rejection_of_an_approved_plan_is_out_of_order(made: Consortium) -> None:
    with pytest.raises(RoundError, match="PF531"):
        record_word(made.store, word(made, C, REJECTION), by="operator")
