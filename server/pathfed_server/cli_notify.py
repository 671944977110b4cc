"""`pathfed-server notify`: who is told of what happens, and whether they are reached."""

import time
from typing import Annotated, Any

import typer

from pathfed_common.console import Json, show
from pathfed_common.errors import ErrorCode, PathfedError, RoundError
from pathfed_server.cli_options import HOME, Home
from pathfed_server.home import ServerHome
from pathfed_server.operators import Role, opened_by

notify_app = typer.Typer(no_args_is_help=True, help="See who is told of what happens by webhook or mail (`notify.toml`), and try it.")


@notify_app.command("status")
def notify_status(home: Home = HOME, as_json: Json = False) -> None:
    """List the receivers: what each is still to be told, since when it is not reached and why, and what was given up."""
    from pathfed_server.notifying.settings import receivers
    from pathfed_server.notifying.standing import standing

    with opened_by(home, Role.AUDITOR) as (store, _):
        rows = standing(store, receivers(ServerHome(home)).each)
    show(rows if as_json else [_line(row) for row in rows], as_json=as_json, title="receivers")


def _line(row: dict[str, Any]) -> dict[str, object]:
    """What fits a line; the rest is in the JSON."""
    failing = f" since {time.strftime('%m-%d %H:%M:%SZ', time.gmtime(row['began_at']))}" if row["state"] == "failing" else ""
    why = f", {row['code']} x{row['attempts']}" if failing else ""
    return {
        "receiver": row["receiver"],
        "to": row["to"],
        "state": row["state"] + failing + why,
        "pending": row["pending"],
        "sent": row["sent"],
        "given up": row["given_up"],
    }


@notify_app.command("test")
def notify_test(
    receiver: Annotated[str, typer.Argument(help="The receiver's name in notify.toml.")], home: Home = HOME, as_json: Json = False
) -> None:
    """Send a receiver one test message now, and say what came back."""
    from pathfed_server.notifying.delivering import deliver
    from pathfed_server.notifying.message import trial_message
    from pathfed_server.notifying.settings import receivers

    opened = ServerHome(home)
    with opened_by(home, Role.OPERATOR) as (store, by):
        each = receivers(opened).each
        if receiver not in each:
            known = ", ".join(sorted(each)) or "none"
            raise RoundError(ErrorCode.RECEIVER_UNKNOWN, "no receiver of this name", value=receiver, remedy=f"notify.toml has: {known}")
        code: str | None = None
        try:
            done = deliver(each[receiver], trial_message(receiver, opened.settings.consortium, at=time.time()))
        except PathfedError as error:
            code = error.code.value
            raise
        finally:
            store.audit(actor=by, action="notification.tested", subject=receiver, at=time.time(), detail={"code": code})
    told = {"receiver": receiver, "to": each[receiver].place, "answer": done.answer, "seconds": done.seconds, "refused": done.refused}
    show(told, as_json=as_json, title="The test message was taken.")
