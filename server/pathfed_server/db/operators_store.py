"""The people who run the server, in its database. Their names and keys are never used again: the audit trail refers to them."""

from sqlalchemy import and_, func, insert, or_, select, update

from pathfed_common.errors import ErrorCode, RoundError
from pathfed_server.db.audit_store import AuditStore, add_event
from pathfed_server.db.membership import lock_table
from pathfed_server.db.rows import OperatorRow
from pathfed_server.db.schema import operator


class OperatorsStore(AuditStore):
    """Who may do what at the server."""

    def add_operator(self, name: str, *, role: str, key: str, at: float, by: str) -> None:
        """Add a person. The first one must be an admin: from then on every command asks who runs it.

        Raises:
            RoundError: PF524, name or key is taken; PF523, the first is no admin.
        """
        with self._write() as connection:
            lock_table(connection, "operator")
            taken = or_(operator.c.name == name, operator.c.key == key)
            if connection.execute(select(operator.c.name).where(taken)).first() is not None:
                raise RoundError(ErrorCode.OPERATOR_EXISTS, "an operator has or had this name or this key", value=name)
            if role != "admin" and connection.execute(select(func.count()).select_from(operator)).scalar() == 0:
                raise RoundError(ErrorCode.OPERATOR_FORBIDDEN, "the first operator is an admin", value=role)
            connection.execute(insert(operator).values(name=name, role=role, key=key, added_at=at))
            add_event(connection, actor=by, action="operator.added", subject=name, at=at, detail={"role": role, "key": key})

    def remove_operator(self, name: str, *, at: float, by: str) -> None:
        """Remove a person; removing one again changes nothing.

        Raises:
            RoundError: PF522, nobody has this name; PF523, it is the last admin.
        """
        with self._write() as connection:
            lock_table(connection, "operator")
            row = connection.execute(select(operator).where(operator.c.name == name)).mappings().first()
            if row is None:
                raise RoundError(ErrorCode.OPERATOR_UNKNOWN, "no operator has this name", value=name)
            if row["removed_at"] is not None:
                return
            admins = and_(operator.c.role == "admin", operator.c.removed_at.is_(None), operator.c.name != name)
            if connection.execute(select(operator.c.name).where(admins)).first() is None:
                raise RoundError(ErrorCode.OPERATOR_FORBIDDEN, "the last admin stays", value=name, remedy="add another admin first")
            connection.execute(update(operator).where(operator.c.name == name).values(removed_at=at))
            add_event(connection, actor=by, action="operator.removed", subject=name, at=at)

    def operators(self) -> list[OperatorRow]:
        """Everybody, removed ones too, in name order."""
        with self._read() as connection:
            rows = connection.execute(select(operator)).mappings().all()
        return sorted((OperatorRow(**row) for row in rows), key=lambda row: row.name)
