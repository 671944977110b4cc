"""What the transport asks of the site: one answer to one round offer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A site's answer to an offer: a sealed update, or a code and nothing else.

    Attributes:
        code: the refusal's or failure's code, or None.
        statement: the signed statement (DSSE bytes), or None with a code.
        update: the sealed update's file, or None with a code.
    """

    code: str | None
    statement: bytes | None = None
    update: Path | None = None


#: (offer envelope, base state bytes) -> answer. Whatever goes wrong becomes a code. What leaves is written down by it; it raises HostError
#: where not even the code can be, and then nothing may leave.
Answerer = Callable[[bytes, bytes], Answer]

#: (code) -> None. Writes down that a code leaves which no answerer gave. Raises HostError where it cannot, and then nothing may leave.
Refusals = Callable[[str], None]
