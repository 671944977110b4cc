"""The head file: the ledger's head, remembered outside the database; and the site's ledger with all its witnesses.

The file lies beside the run secrets, in the folder that is left out of backups. A database put back to an older state, emptied, replaced
or cut short (SQLite drops the end of a torn write-ahead log without a word) no longer holds the head that this file names. It is made
with the home, before any charge, so that its absence means something: a home restored without it, or one that lost it.

What it does not find: a disk restored whole, this file included, and an operator of the machine who puts both back. Only a witness outside
the machine finds those (`pathfed_client.budget.witness`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from pathfed_client.budget.ledger import Ledger, LedgerPort
from pathfed_client.budget.witness import HeadsPort, SeenHead
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.io.server_records import Alarm
from pathfed_common import digest, files
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, PrivacyError
from pathfed_common.provenance.keys import SigningKey, VerifyKey

_NAME = "ledger-head"


class HeadFile:
    """The ledger's head in a file of its own, replaced whole."""

    def __init__(self, folder: Path) -> None:
        """Use the file in `folder`; nothing is read yet."""
        self._path = folder / _NAME

    @classmethod
    def create(cls, folder: Path) -> Self:
        """Begin with an empty ledger.

        Raises:
            HostError: PF901, PF904, it cannot be written.
        """
        made = cls(folder)
        made._write(SeenHead(head=None, sequence=0, where=_NAME))
        return made

    def heads(self) -> tuple[SeenHead, ...]:
        """The head that was kept last.

        Raises:
            PrivacyError: PF310, the file is missing, unreadable or not one.
        """
        try:
            raw = json.loads(self._path.read_bytes())
            return (SeenHead(head=raw["head"], sequence=raw["sequence"], where=f"the head file {self._path}"),)
        except OSError as error:
            raise self._unwitnessed(f"the ledger's head file cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise self._unwitnessed(f"the ledger's head file was changed: {error}") from None

    def keep(self, head: Digest, sequence: int) -> None:
        """Remember a head; on the disk when this returns.

        Raises:
            HostError: PF901, PF904, it cannot be written; the earlier one is still there.
        """
        self._write(SeenHead(head=head, sequence=sequence, where=_NAME))

    def _write(self, seen: SeenHead) -> None:
        files.write_atomic(self._path, digest.canonical({"head": seen.head, "sequence": seen.sequence}), secret=True)

    def _unwitnessed(self, what: str) -> PrivacyError:
        remedy = "do not train with a home restored from a backup; without this file nothing shows that the ledger is the newest"
        return PrivacyError(ErrorCode.LEDGER_UNWITNESSED, what, where=self._path, remedy=remedy)


class LogKnowledge(Protocol):
    """A database that keeps what the transparency log showed."""

    def alarms(self) -> Sequence[Alarm]:
        """The alarms that stand."""
        ...


class StatingStore(LedgerPort, LogKnowledge, Protocol):
    """A database that keeps entries, and statements that name heads."""

    def stated_heads(self) -> Sequence[Digest]:
        """The head that each sealed statement of this site names, of all runs."""
        ...


class LogWitness:
    """The transparency log as a witness: it holds each statement of this site, whose ledger's head came before it.

    The agent reads the log leaf by leaf and compares: a statement of this site that this home does not have means that the home was put
    back to before it, its head file included. That is the one witness outside the machine that is asked without anybody's doing.
    """

    def __init__(self, store: LogKnowledge) -> None:
        """Ask what the agent found."""
        self._store = store

    def heads(self) -> tuple[SeenHead, ...]:
        """None: a statement that is known is a witness by itself (`StatedHeads`).

        Raises:
            PrivacyError: PF309, the log holds a statement of this site that this home does not have.
        """
        for alarm in self._store.alarms():
            if alarm.code is ErrorCode.LOG_FOREIGN_LEAF and alarm.subject.startswith("statement"):
                raise PrivacyError(
                    ErrorCode.LEDGER_BEHIND,
                    "the transparency log holds a statement of this site that this home does not have: charges were forgotten",
                    where=f"alarm {alarm.code.value}",
                    value=alarm.subject,
                    remedy="do not train with this home: it was put back to an earlier state, or somebody else holds its key",
                )
        return ()


class StatedHeads:
    """The site's own sealed statements as a witness."""

    def __init__(self, store: StatingStore) -> None:
        """Ask the statements in `store`."""
        self._store = store

    def heads(self) -> list[SeenHead]:
        """One for each statement; statements do not say a sequence number."""
        return [SeenHead(head=head, sequence=None, where="a statement this site has sealed") for head in self._store.stated_heads()]


def site_ledger(
    store: StatingStore,
    key: SigningKey,
    policy: SitePolicy,
    secrets: Path,
    *,
    witnesses: Sequence[HeadsPort] = (),
    former: Sequence[VerifyKey] = (),
) -> Ledger:
    """The site's one ledger, with every witness that this machine has.

    Args:
        store: the site database.
        key: the site's evidence key.
        policy: gives delta and the largest epsilon.
        secrets: the folder of the run secrets, which holds the head file.
        witnesses: more of them.
        former: evidence keys the site had before, in their order.
    """
    return Ledger(
        store,
        key,
        keeper=HeadFile(secrets),
        witnesses=(StatedHeads(store), LogWitness(store), *witnesses),
        former=former,
        delta=policy.delta,
        max_epsilon=policy.max_epsilon,
    )
