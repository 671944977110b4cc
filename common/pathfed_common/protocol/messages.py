"""What server and sites say to each other: round offers and replies.

An offer is signed by the server; a reply carries the site's signed statement, or a code. Messages are canonical JSON; unknown or missing
keys and any other spelling are refused, so that a message means the same to both sides. Bulk bytes (base states, updates) move over
the bulk plane and are named by digest. A refusal is a code alone: no text, no value, nothing a patient's data could have shaped.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.ids import RunName, SiteName, run_name, site_name

PROTOCOL_VERSION = 1
OFFER_TYPE = "application/vnd.pathfed.offer+json"
#: The year 9999, UTC seconds. Larger times are mistakes, and some are larger than a float.
_END_OF_TIME = 253_402_300_800


@dataclass(frozen=True, kw_only=True)
class RoundOffer:
    """The server asks one site for one round's update.

    Attributes:
        run: the run.
        site: the site the offer is for; an offer passed to another site is refused there.
        round_index: 1 for a run's first round.
        plan: digest of the plan.
        base_state: digest of the base state's bytes.
        base_state_bytes: their length.
        offered_at: UTC seconds; reply slots count from here.
        deadline: UTC seconds; a reply after it does not count.
    """

    run: RunName
    site: SiteName
    round_index: int
    plan: Digest
    base_state: Digest
    base_state_bytes: int
    offered_at: float
    deadline: float

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return digest.canonical({"version": PROTOCOL_VERSION, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read an offer back.

        Raises:
            TransportError: PF405, not an offer of this version.
        """
        try:
            raw = json.loads(data)
            version = raw.pop("version")
            if version != PROTOCOL_VERSION:
                raise ValueError(f"version {version}, expected {PROTOCOL_VERSION}")
            offer = cls(**raw)
            _check_offer(offer)
            if offer.to_bytes() != data:
                raise ValueError("not in canonical form")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise TransportError(ErrorCode.MESSAGE_MALFORMED, f"not a round offer: {error}") from None
        return offer


def _check_offer(offer: RoundOffer) -> None:
    run_name(offer.run)
    site_name(offer.site)
    digest.parse(offer.plan)
    digest.parse(offer.base_state)
    _whole("round_index", offer.round_index, 1)
    _whole("base_state_bytes", offer.base_state_bytes, 1)
    for name in ("offered_at", "deadline"):
        value: Any = getattr(offer, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < _END_OF_TIME:
            raise ValueError(f"{name} must be UTC seconds, got {str(value)[:40]}")


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
