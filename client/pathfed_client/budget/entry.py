"""One entry of the ledger, as a value and as the bytes that are signed."""

import json
import math
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Self

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, run_name
from pathfed_common.privacy.accounting import PrivacyEvent
from pathfed_common.units import UtcSeconds

LEDGER_TYPE = "application/vnd.pathfed.ledger-entry+json"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One charge.

    Attributes:
        sequence: 1 for the first entry.
        previous: digest of the entry before (its stored bytes), or None for the first.
        release_id: names the release.
        plan: digest of the plan.
        run: the run.
        round_index: the round.
        event: what the release costs each patient.
        delta: the policy's delta.
        epsilon_total: epsilon of all plans together after this charge, at `delta`.
        plan_delta: the plan's delta.
        epsilon_plan: epsilon of this plan's releases after this charge, at `plan_delta`.
        at: UTC seconds of the charge.
    """

    sequence: int
    previous: Digest | None
    release_id: Digest
    plan: Digest
    run: RunName
    round_index: int
    event: PrivacyEvent
    delta: float
    epsilon_total: float
    plan_delta: float
    epsilon_plan: float
    at: UtcSeconds

    def __post_init__(self) -> None:
        for name in ("release_id", "plan"):
            digest.parse(getattr(self, name))
        if self.previous is not None:
            digest.parse(self.previous)
        run_name(self.run)
        for name in ("sequence", "round_index"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("delta", "plan_delta"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be within (0, 1), got {getattr(self, name)!r}")
        for name in ("epsilon_total", "epsilon_plan", "at"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)!r}")

    def to_payload(self) -> bytes:
        """Canonical JSON; `at` is also spelled out as ISO 8601 for people."""
        when = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="seconds")
        return digest.canonical({"version": _VERSION, "at_text": when, **vars(self), "event": vars(self.event)})

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Read an entry back.

        Raises:
            ValueError: not the canonical payload of an entry of this version.
        """
        try:
            raw: dict[str, Any] = json.loads(payload)
            plain = {field.name: raw[field.name] for field in fields(cls) if field.name != "event"}
            entry = cls(**plain, event=PrivacyEvent(**raw["event"]))
            canonical = entry.to_payload()
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a ledger entry: {error}") from None
        if canonical != payload:
            raise ValueError("not the canonical payload of a ledger entry")
        return entry
