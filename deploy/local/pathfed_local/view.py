"""What a person sees while the demo runs: one line a phase, and a live table of the sites."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, kw_only=True)
class SiteLine:
    """One row of the live table.

    Attributes:
        site: the site.
        state: what it does now, in a word or two.
        slides: slides looked at, and how many of them are usable.
        patients: patients with a usable tile.
        rounds: rounds whose update was admitted.
        epsilon_spent: over all plans, at the site's delta.
        epsilon_left: what the site's policy still allows.
    """

    site: str
    state: str
    slides: str
    patients: int
    rounds: int
    epsilon_spent: float
    epsilon_left: float


class View:
    """Prints phases and events; shows the table while one is open."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._began = time.monotonic()

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """A phase with its duration. An error leaves it marked."""
        began = time.monotonic()
        self.say(f"[dim]...[/] {text}")
        try:
            yield
        except BaseException:
            self.say(f"[red]✗[/] {text}")
            raise
        self.say(f"[green]✓[/] {text} [dim]{time.monotonic() - began:.0f} s[/]")

    def say(self, markup: str) -> None:
        """Print a line above the table."""
        self._console.print(markup, soft_wrap=True, highlight=False)

    def event(self, text: str) -> None:
        """Print what a process told."""
        style = "yellow" if text.startswith("PF") or ": PF" in text else "dim"
        self.say(f"    [{style}]{escape(text)}[/]")

    @contextmanager
    def table(self) -> Iterator[None]:
        """Show a table that `update` fills, until the block ends."""
        with Live(Text("starting"), console=self._console, refresh_per_second=4, transient=False) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None
        self._console.print()

    def update(self, title: str, lines: Sequence[SiteLine], notes: Sequence[str] = ()) -> None:
        """Fill the open table."""
        if self._live is not None:
            self._live.update(_picture(title, lines, notes, time.monotonic() - self._began))


def _picture(title: str, lines: Sequence[SiteLine], notes: Sequence[str], seconds: float) -> RenderableType:
    table = Table(title=f"{title}   {seconds:.0f} s", title_justify="left", box=None, pad_edge=False, header_style="dim")
    for name in ("site", "state", "slides", "patients", "rounds", "ε spent", "left"):
        table.add_column(name, justify="left" if name in ("site", "state") else "right", no_wrap=True)
    for line in lines:
        spent, left = f"{line.epsilon_spent:.2f}", f"{line.epsilon_left:.2f}"
        table.add_row(line.site, escape(line.state), line.slides, str(line.patients), str(line.rounds), spent, left)
    return Group(table, *(Text(note, style="dim") for note in notes))
