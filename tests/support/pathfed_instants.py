"""Instants of a round, in the processes where they pass; see `instants/sitecustomize.py`. Imports the standard library alone.

    <folder>/armed/<instant>@<owner>      made by a test: the first process of the owner that comes there stops
    <folder>/reached/<instant>@<owner>    the same file, moved by the process that stopped; it holds the process id

The owner is `server`, or a site's name.
"""

import functools
import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from after_import import after_import

FOLDER_VARIABLE = "PATHFED_TEST_INSTANTS"
SERVER = "server"
_SITE = re.compile(r"/sites/([^/\s]+)")

#: module -> function in it -> the instants as it is entered and as it has returned; "": none; "stage": the name of the stage told.
POINTS: dict[str, dict[str, tuple[str, str]]] = {
    "pathfed_server.driving": {"_tell": ("", "stage")},
    "pathfed_server.transport.flower_server": {"_message": ("", "offer made"), "_Outbox.note_sent": ("", "offered")},
    "pathfed_server.bulk": {"BulkFiles.shard": ("base state leaves", ""), "BulkFiles.writer": ("update arrives", "")},
    "pathfed_server.rounds.collection": {"admit": ("collecting", "checked")},
    "pathfed_server.rounds.files": {"RunFiles.keep": ("", "spooled")},
    "pathfed_server.db.rounds_store": {"RoundsStore.commit_round": ("", "in the database")},
    # SuperLink has marked the offer as delivered, and its answer has not left.
    "flwr.superlink.servicer.fleet.fleet_handlers": {"message_to_proto": ("", "offer delivered")},
    "pathfed_client.transport.resident_runner": {
        "pull_task_input": ("offer travels", ""),
        "_answered": ("offer taken", ""),
        "push_message": ("statement travels", "statement handed over"),
        "push_task_output": ("", "answered"),
    },
    "flwr.supernode.start_client_internal": {
        "pull_objects": ("SuperNode receives", ""),
        "push_object_contents_from_iterable": ("SuperNode sends", ""),
    },
    "pathfed_client.transport.bulk_client": {
        "BulkClient.fetch_shard": ("base state travels", "base state fetched"),
        "BulkClient.send_shard": ("update travels", "update handed over"),
    },
    "pathfed_client.answering": {
        "SiteAnswerer._charge": ("before the charge", "charged"),
        "SiteAnswerer._draw": ("training", "trained"),
        "SiteAnswerer._write_down": ("", "written down"),
    },
    "pathfed_client.io.ledger_head": {"HeadFile.keep": ("charge stored", "")},
    "pathfed_client.io.run_secrets": {"RunSecrets.advance": ("sealed", "secret erased")},
    "pathfed_client.io.database.ledger_part": {"LedgerPart.put_sealed": ("update written", "")},
    "pathfed_client.training.ranks.program": {"RankProgram.patient": ("a rank trains", "")},
}


def install() -> None:
    """Wrap the functions of `POINTS` as their modules are imported."""
    after_import(dict.fromkeys(POINTS, _wrap_all))


def owner() -> str:
    """Whose process this is."""
    for words in _words(os.getpid()), _words(os.getppid()):
        found = _SITE.search(words)
        if found:
            return found[1]
    return SERVER


def _words(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def reach(instant: str) -> None:
    """This process is at an instant: stop, where somebody asked for that."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    name = f"{instant}@{owner()}"
    armed, reached = folder / "armed" / name, folder / "reached" / name
    if not armed.exists():
        return
    part = folder / f"{os.getpid()}.part"
    try:
        armed.rename(part)
    except FileNotFoundError:
        return  # another process of this owner was first
    part.write_text(str(os.getpid()))
    part.rename(reached)
    os.kill(os.getpid(), signal.SIGSTOP)


def _wrap_all(module: ModuleType) -> None:
    for function, instants in POINTS[module.__name__].items():
        _wrap(module, function, *instants)


def _wrap(module: ModuleType, function: str, entered: str, left: str) -> None:
    *outer, name = function.split(".")
    holder: Any = functools.reduce(getattr, outer, module)
    setattr(holder, name, _wrapped(getattr(holder, name), entered, left))


def _wrapped(work: Callable[..., Any], entered: str, left: str) -> Callable[..., Any]:
    @functools.wraps(work)
    def at_instants(*args: Any, **kwargs: Any) -> Any:
        if entered:
            reach(entered)
        result = work(*args, **kwargs)
        if left:
            reach(args[0].stage.value if left == "stage" else left)
        return result

    return at_instants
