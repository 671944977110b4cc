"""What the transport asks of the site, one answer to one round offer, and what the site asks of the bulk plane for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pathfed_common.protocol.messages import RoundOffer
from pathfed_common.shards import Manifest


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A site's answer to an offer: the statement of an update that lies at the server, or a code and nothing else.

    Attributes:
        code: the refusal's or failure's code, or None.
        statement: the signed statement (DSSE bytes), or None with a code.
    """

    code: str | None
    statement: bytes | None = None


class BulkPort(Protocol):
    """Moves bulk files between site and server, through every cut, until the offer's deadline."""

    def fetch(self, offer: RoundOffer) -> Path:
        """The offer's base state: a file that MUST have the length and the digest that the offer names, and stays until the next call.

        Raises:
            TransportError: PF408, the server's bytes are others; PF460, it gives none; PF465, it did not arrive in time; PF401, PF430.
            HostError: PF901, PF904: it cannot be written.
        """
        ...

    def deliver(self, update: Path, manifest: Manifest, offer: RoundOffer) -> None:
        """Send a sealed update, written down before; return when all of it lies at the server. Again: only what is missing is sent.

        Raises:
            TransportError: PF461, PF462, the server does not take it; PF465, it did not arrive in time; PF401, PF430.
            HostError: PF901, PF904, PF913: a part that is sent again cannot be written down.
        """
        ...


#: (offer envelope) -> answer. Whatever goes wrong becomes a code. What leaves is written down by it; it raises HostError
#: where not even the code can be, and then nothing may leave.
Answerer = Callable[[bytes], Answer]

#: (code) -> None. Writes down that a code leaves which no answerer gave. Raises HostError where it cannot, and then nothing may leave.
Refusals = Callable[[str], None]
