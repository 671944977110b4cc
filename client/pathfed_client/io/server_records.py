"""What the site keeps of its talk with the server: words that are to reach it, leaves that must be in the log, receipts, alarms.

Plain and frozen, free of any database library.
"""

from dataclasses import dataclass, field

from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode


@dataclass(frozen=True, kw_only=True)
class ReceivedPlan:
    """A plan that the server has published, its signature checked when it came.

    Attributes:
        plan: the plan's digest.
        signed_plan: the server's envelope around it.
        at: when it came, UTC seconds.
    """

    plan: Digest
    signed_plan: bytes = field(repr=False)
    at: float


@dataclass(frozen=True, kw_only=True)
class Word:
    """The site's signed word on a plan, on its way to the server.

    Attributes:
        envelope: the signed bytes.
        leaf: the leaf that the log must hold once the server has taken it.
        at: when it was given, UTC seconds.
        taken_at: when the server took it, UTC seconds; None: not yet.
        code: why the server refused it the last time, or None.
    """

    envelope: bytes = field(repr=False)
    leaf: bytes = field(repr=False)
    at: float
    taken_at: float | None = None
    code: ErrorCode | None = None


@dataclass(frozen=True, kw_only=True)
class OwnLeaf:
    """A leaf of the log that is this site's.

    Attributes:
        leaf: its bytes.
        promised_at: when the server acknowledged what it is about, UTC seconds; None: the server has promised nothing (a statement, which
            only counts once its round is committed).
        receipt: the co-signed proof that it is in the log (`log_checkpoint.LogProof`), or None.
        received_at: when the receipt was stored, UTC seconds.
    """

    leaf: bytes = field(repr=False)
    promised_at: float | None = None
    receipt: bytes | None = field(default=None, repr=False)
    received_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something that must not happen, and that people have to look at.

    Attributes:
        at: when it was seen first, UTC seconds.
        code: what it is.
        subject: what it is about: a checkpoint's size, a leaf's hash.
        detail: one sentence.
        evidence: the server's own signed bytes that show it, or None.
        ended_at: when it was no longer so, UTC seconds; None: it stands.
    """

    at: float
    code: ErrorCode
    subject: str
    detail: str
    evidence: bytes | None = field(default=None, repr=False)
    ended_at: float | None = None
