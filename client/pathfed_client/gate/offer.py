"""Whether this site answers an offer: decided from public facts alone, before any patient's data is touched."""

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, ProvenanceError, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.plan import RoundsPlan
from pathfed_common.protocol.messages import OFFER_TYPE, RoundOffer
from pathfed_common.provenance.dsse import open_envelope
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.units import CLOCK_SKEW_S

#: What a deadline may be off by, seconds, for rounding.
_DEADLINE_SLACK_S = 1.0


def open_offer(envelope: bytes, server_key: VerifyKey, site: SiteName) -> RoundOffer:
    """Verify an offer's signature and addressee.

    Raises:
        TransportError: PF406, not signed by this site's server, or meant for another site; PF405, not an offer.
    """
    try:
        payload = open_envelope(envelope, payload_type=OFFER_TYPE, keys=server_key, where="round offer")
    except ProvenanceError as error:
        raise TransportError(ErrorCode.OFFER_NOT_AUTHENTIC, error.what, where="round offer") from error
    offer = RoundOffer.from_bytes(payload)
    if offer.site != site:
        raise TransportError(ErrorCode.OFFER_NOT_AUTHENTIC, "the offer is meant for another site", where="round offer", value=offer.site)
    return offer


def check_bounds(offer: RoundOffer, rounds: RoundsPlan, now: float) -> None:
    """Check that the offer stays within the plan it names: a server cannot make a site wait long or run ahead of the plan.

    A round beyond the plan's last would move the run's secret on for nothing, an offer from the future would hold the site until then.

    Args:
        offer: the offer.
        rounds: the approved plan's rounds.
        now: UTC seconds by this site's clock.

    Raises:
        TransportError: PF409, the plan has no such round, the offer lies in the future by more than `CLOCK_SKEW_S`, or its deadline is
            before it or later than the plan allows.
    """
    found = None
    if offer.round_index > rounds.count:
        found = "the plan has fewer rounds", f"{offer.round_index} > {rounds.count}", "tell the consortium's operator"
    elif offer.offered_at > now + CLOCK_SKEW_S:
        found = "the offer lies in the future", f"{offer.offered_at - now:.0f} s by this site's clock", "set this machine's clock"
    elif not 0 <= offer.deadline - offer.offered_at <= rounds.deadline_s + _DEADLINE_SLACK_S:
        allowed = f"{offer.deadline - offer.offered_at:g} s, the plan allows {rounds.deadline_s:g} s"
        found = "the offer's deadline is not the plan's", allowed, "tell the consortium's operator"
    if found is not None:
        what, value, remedy = found
        where = f"round {offer.round_index}"
        raise TransportError(ErrorCode.ROUND_OUT_OF_ORDER, what, where=where, value=value, remedy=f"nothing was charged; {remedy}")


def check_deadline(offer: RoundOffer, now: float) -> None:
    """Check that an answer can still count: training for a round that is over would cost budget for nothing.

    Raises:
        TransportError: PF409, the offer's deadline has passed by this site's clock (`now`, UTC seconds).
    """
    if now > offer.deadline:
        raise TransportError(
            ErrorCode.ROUND_OUT_OF_ORDER,
            "the offer's deadline has passed",
            where=f"round {offer.round_index}",
            value=f"{now - offer.deadline:.0f} s ago by this site's clock",
            remedy="nothing was charged; if it stays so, set this machine's clock",
        )


def check_order(offer: RoundOffer, last_round: int | None, last_update_of_round: Digest | None) -> None:
    """Check that the offer is for a round this site has not answered: a run only goes forward.

    Args:
        offer: the offer.
        last_round: latest round of the run this site has sealed an update for, or None.
        last_update_of_round: digest of that update, for the message.

    Raises:
        TransportError: PF409, the round is behind the site's own record of the run.
    """
    if last_round is not None and offer.round_index <= last_round:
        raise TransportError(
            ErrorCode.ROUND_OUT_OF_ORDER,
            "the offer is for a round this site is past, on another base state",
            value=f"round {offer.round_index}, last answered {last_round} ({digest.short(last_update_of_round or '')})",
        )


def reply_time(offer: RoundOffer, slot_s: float, now: float) -> float:
    """The next public time slot at or after `now`: offered_at + n * slot_s, n >= 1 (UTC seconds)."""
    passed = max(0.0, now - offer.offered_at)
    slots = max(1, -int(-passed // slot_s))
    return offer.offered_at + slots * slot_s
