"""The door: whatever leaves the site is written down here first, and leaves only then.

    outlet.message("server.example:9094", EgressKind.DECISION, request.SerializeToString(), plan=plan)
    stub.Decide(request)

"No entry, no byte": where the record cannot be written, the call raises and the caller sends nothing. A message that is tried again is
written again, since it may have left the first time; the record may say more than left, never less.
"""

from typing import Protocol

from pathfed_client.egress.entry import EgressKind, Outgoing
from pathfed_common import digest
from pathfed_common.digest import Digest


class EgressPort(Protocol):
    """Keeps the record. MUST be append-only, and durable when `append` returns."""

    def append(self, *sent: Outgoing) -> None:
        """Store entries, all or none.

        Raises:
            HostError: PF901, PF904, it cannot be written; PF913, the record is missing or damaged. Nothing may leave.
        """
        ...

    def left_before(self, kind: EgressKind, run: str, round_index: int) -> bool:
        """Whether something of this kind was written down for this round."""
        ...


class Outlet:
    """Writes down what leaves."""

    def __init__(self, record: EgressPort) -> None:
        """Take the record to write to."""
        self._record = record

    def message(
        self,
        destination: str,
        kind: EgressKind,
        data: bytes,
        *,
        plan: Digest | None = None,
        run: str | None = None,
        round_index: int | None = None,
    ) -> None:
        """Write down a message that carries nothing that depends on patients. Send it when this has returned, and not otherwise.

        Args:
            destination: HOST:PORT.
            kind: what it is.
            data: its bytes, as they are handed to the network library.
            plan: digest of the plan it is about, if any.
            run: the run, if any.
            round_index: the round, if any.

        Raises:
            HostError: PF901, PF904, PF913: it must not leave.
        """
        self._record.append(
            Outgoing(
                destination=destination,
                kind=kind,
                size=len(data),
                digest=digest.of_bytes(data),
                plan=plan,
                run=run,
                round_index=round_index,
            )
        )

    def part(
        self, destination: str, kind: EgressKind, size: int, told: Digest, *, run: str | None = None, round_index: int | None = None
    ) -> None:
        """Write down a message of that size and digest, as `message` does for one that is at hand. Raises as `message`."""
        self._record.append(Outgoing(destination=destination, kind=kind, size=size, digest=told, run=run, round_index=round_index))

    def answer(self, update: Outgoing, statement: Outgoing) -> None:
        """Write down a round's answer: update and statement, both or neither. Raises as `message`."""
        self._record.append(update, statement)

    def left_before(self, run: str, round_index: int) -> bool:
        """Whether this round's update was written down before. Raises as `message`."""
        return self._record.left_before(EgressKind.UPDATE, run, round_index)
