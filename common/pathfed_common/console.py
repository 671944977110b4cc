"""What every command line of pathfed does alike: results for people or as JSON, errors with their code, exit statuses.

Results go to standard output, everything else to standard error, so that `--json` output can be piped. A pathfed error ends the command
with its family's exit status; any other error is a bug of ours and shows its trace.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pathfed_common.errors import PathfedError

#: The `--json` option of every command.
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON value, for scripts.")]

#: Exit status after Ctrl-C, as shells count it.
INTERRUPTED = 130

out = Console()
err = Console(stderr=True)


def run(app: typer.Typer) -> NoReturn:
    """Run a command line: the body of every `main`."""
    try:
        app()
    except PathfedError as error:
        show_error(error, as_json="--json" in sys.argv)
        sys.exit(error.exit_status)
    except SystemExit as ended:
        # Typer turns a KeyboardInterrupt into this status.
        if ended.code == INTERRUPTED:
            err.print("stopped by you; nothing was half-written")
        raise
    sys.exit(0)


def show_error(error: PathfedError, *, as_json: bool = False) -> None:
    """Print an error: as JSON on standard output for scripts, else in lines on standard error for people."""
    if as_json:
        typer.echo(json.dumps({"error": error.to_dict()}))
        return
    err.print(f"[bold red]{error.code.value}[/] {escape(error.what)}")
    for label, text in (("where", error.where), ("value", error.value), ("do", error.remedy)):
        if text:
            err.print(f"  [dim]{label:>5}[/]  {escape(text)}", soft_wrap=True)
    err.print(f"  [dim] page[/]  docs/errors/{error.code.value}.md", soft_wrap=True)


def show(value: Mapping[str, object] | Sequence[Mapping[str, object]], *, as_json: bool, title: str = "") -> None:
    """Print a result: one mapping as lines, a list of mappings as a table, or either as JSON."""
    if as_json:
        typer.echo(json.dumps(value, default=str))
    elif isinstance(value, Mapping):
        if title:
            out.print(f"[bold]{escape(title)}[/]")
        width = max((len(key) for key in value), default=0)
        for key, item in value.items():
            out.print(f"  [dim]{escape(key):<{width}}[/]  {escape(_told(key, item))}", soft_wrap=True)
    else:
        out.print(_table(value, title))


def _table(rows: Sequence[Mapping[str, object]], title: str) -> Table | str:
    if not rows:
        return f"{title or 'nothing'}: none"
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for key in rows[0]:
        table.add_column(key)
    for row in rows:
        table.add_row(*(escape(_told(key, item)) for key, item in row.items()))
    return table


def _told(key: str, item: object) -> str:
    """A value for people; times, which are UTC seconds, as dates."""
    if isinstance(item, float) and (key == "at" or key.endswith("_at")):
        return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(item))
    return _text(item)


def _text(item: object) -> str:
    if item is None:
        return "-"
    if isinstance(item, float):
        return f"{item:.6g}"
    if isinstance(item, Mapping):
        return ", ".join(f"{key} {_text(value)}" for key, value in item.items()) or "-"
    if isinstance(item, list | tuple):
        return ", ".join(_text(value) for value in item) or "-"
    return str(item)


def teller(*, as_json: bool) -> Callable[[str], None]:
    """What a long-running command tells its events through: a line each, with the UTC time, at once."""

    def tell(line: str) -> None:
        if as_json:
            typer.echo(json.dumps({"at": time.time(), "event": line}))
        else:
            out.print(f"{time.strftime('%H:%M:%SZ', time.gmtime())} {line}", soft_wrap=True, markup=False, highlight=False)

    return tell


def log_to_stderr(level: int = logging.INFO) -> None:
    """Log lines as `UTC time level name: message` on standard error, which a supervisor appends to a file."""
    logging.Formatter.converter = time.gmtime
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every poll
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)sZ %(levelname)s %(name)s: %(message)s", force=True)
