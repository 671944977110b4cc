"""Who runs a command, and whether that person may.

A person is known by a key: an Ed25519 key file in that person's possession, which `PATHFED_OPERATOR_KEY` names. The database holds the
public halves, with a name and a role each. While it holds none, whoever may write the server's home acts, as ``operator``.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from pathfed_common import files
from pathfed_common.errors import ErrorCode, HostError, RoundError
from pathfed_common.ids import operator_name
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_server.db.rows import AuditRow, OperatorRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome

OPERATOR_VARIABLE = "PATHFED_OPERATOR_KEY"
#: Who acts where the server has no operators by name.
NOBODY_BY_NAME = "operator"


class Role(StrEnum):
    """What a person may do; each role may do what those after it may."""

    ADMIN = "admin"
    OPERATOR = "operator"
    AUDITOR = "auditor"


_RANK = {Role.AUDITOR: 0, Role.OPERATOR: 1, Role.ADMIN: 2}


def acting(store: SqlStore, needs: Role) -> str:
    """Who runs this command, as the audit trail names it: ``operator:<name>``.

    Args:
        store: the open store.
        needs: the least role that may.

    Raises:
        RoundError: PF522, no key is given, or it is nobody's; PF523, the person's role does not allow it.
        HostError: PF906, the key file is not one, or others may read it.
    """
    people = [row for row in store.operators() if row.removed_at is None]
    if not people:
        return NOBODY_BY_NAME
    named = os.environ.get(OPERATOR_VARIABLE)
    if not named:
        raise RoundError(
            ErrorCode.OPERATOR_UNKNOWN,
            "this server wants to know who runs the command",
            remedy=f"let {OPERATOR_VARIABLE} name the file with your key",
        )
    key = SigningKey.from_pem(files.read_secret(Path(named))).public.to_text()
    person = next((row for row in people if row.key == key), None)
    if person is None:
        raise RoundError(ErrorCode.OPERATOR_UNKNOWN, "the key is that of no operator", where=named, value=key)
    if _RANK[Role(person.role)] < _RANK[needs]:
        raise RoundError(ErrorCode.OPERATOR_FORBIDDEN, f"this takes the role {needs}", value=f"{person.name} is {person.role}")
    return f"operator:{person.name}"


@contextmanager
def opened_by(root: Path, needs: Role) -> Iterator[tuple[SqlStore, str]]:
    """The open store of a server's home, and who opened it; see `acting` for the arguments and errors."""
    with SqlStore(ServerHome(root).database_url) as store:
        yield store, acting(store, needs)


def make_key(out: Path) -> VerifyKey:
    """Make a person's key file; its public half.

    Raises:
        HostError: PF904, something is there already, or it cannot be written.
    """
    if out.exists():
        raise HostError(ErrorCode.HOME_UNUSABLE, "something is there already and is left as it is", where=out, remedy="choose another file")
    key = SigningKey.generate()
    files.write_atomic(out, key.to_pem(), secret=True)
    return key.public


def add_operator(root: Path, name: str, *, role: Role, key: str) -> None:
    """Add a person.

    Raises:
        HostError: PF905, not a name, or not a public key.
        RoundError: PF522, PF523, see `acting`; PF523, the first is no admin; PF524, name or key is taken.
    """
    try:
        operator_name(name)
        VerifyKey.from_text(key)
    except ValueError as error:
        raise HostError(ErrorCode.SETTINGS_INVALID, str(error), where="the operator's name or key") from None
    with opened_by(root, Role.ADMIN) as (store, by):
        store.add_operator(name, role=role, key=key, at=time.time(), by=by)


def remove_operator(root: Path, name: str) -> None:
    """Remove a person.

    Raises:
        RoundError: PF522, PF523, see `acting`; PF522, nobody has this name; PF523, it is the last admin.
    """
    with opened_by(root, Role.ADMIN) as (store, by):
        store.remove_operator(name, at=time.time(), by=by)


def list_operators(root: Path) -> list[OperatorRow]:
    """Everybody, removed ones too.

    Raises:
        RoundError: PF522, see `acting`.
    """
    with opened_by(root, Role.AUDITOR) as (store, _):
        return store.operators()


def audit_trail(root: Path, *, after: int = 0, actor: str | None = None, subject: str | None = None) -> list[AuditRow]:
    """The audit trail, in order.

    Args:
        root: the server's home.
        after: events with a greater number alone.
        actor: events of one actor alone, such as ``operator:ann`` or ``site:hospital-north``.
        subject: events about one thing alone, such as a site or a run.

    Raises:
        RoundError: PF522, see `acting`.
    """
    with opened_by(root, Role.AUDITOR) as (store, _):
        events = store.audit_events(after=after)
    return [event for event in events if actor in (None, event.actor) and subject in (None, event.subject)]
