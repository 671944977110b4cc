"""What came of handing a message to a receiver, and why it could not be: nothing of what the other side said, but its answer's number."""

import ssl
from dataclasses import dataclass

from pathfed_common.errors import ErrorCode, RoundError


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """A message was taken.

    Attributes:
        answer: the answer's number, of HTTP or SMTP.
        seconds: how long it took.
        refused: recipients that the mail server did not take it for; it took it for others.
    """

    answer: int
    seconds: float
    refused: int = 0


def delivery_error(error: BaseException, within_s: float) -> RoundError:
    """The error for what a library raised while it connected, sent or waited for the answer."""
    causes = _causes(error)
    refused = next((cause for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)), None)
    if refused is not None:
        return RoundError(ErrorCode.NOTICE_TLS, f"the receiver's certificate is not trusted: {refused.verify_message}")
    # A time that ran out, before the rest: it ends whatever was going on, a handshake too.
    if any(isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__ for cause in causes):
        return RoundError(ErrorCode.NOTICE_TIMEOUT, "the receiver did not answer in time", value=f"{within_s:g} s")
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return RoundError(ErrorCode.NOTICE_TLS, "TLS with the receiver failed")
    number = next((cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno), None)
    named = next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), type(error).__name__)
    return RoundError(ErrorCode.NOTICE_UNREACHABLE, f"the receiver is not reached: {named}", value=number)


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error, and what it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
