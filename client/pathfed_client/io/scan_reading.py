"""Reading one slide: a task in, plain data out. What a scan's worker does, wherever it runs; it writes to no database.

An executor takes tasks and gives readings back, in any order. `InlineExecutor` reads in this process; `io.scan_workers` in processes of
this machine, `io.scan_dask` on many machines.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from pathfed_client.io.direct_reader import trusted_level
from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.io.slide_files import FileState, file_state, fingerprint
from pathfed_client.slides.examine import SlideFacts, examine
from pathfed_client.slides.filters import FilteredSlideError, FilterReport
from pathfed_common.errors import ErrorCode, SiteDataError
from pathfed_common.plan import CohortPlan


@dataclass(frozen=True, kw_only=True)
class SlideTask:
    """One slide to read. Its text shows no name: executors may log it.

    Attributes:
        number: the slide's number in the site database.
        name: what to call it in errors.
        files: all its files, the one to open first.
        state: their size and time when they were listed.
        plan: the cohort rules.
        key: the key of the site's fingerprints.
        mpp_override: um/px of level 0 that the patient list gives, instead of what the file states; None for the file's.
    """

    number: int
    name: str = field(repr=False)
    files: tuple[Path, ...] = field(repr=False)
    state: FileState
    plan: CohortPlan = field(repr=False)
    key: bytes = field(repr=False)
    mpp_override: float | None = None


@dataclass(frozen=True, kw_only=True)
class SlideReading:
    """What reading a slide gave: facts, or a code.

    Attributes:
        number: the task's.
        fingerprint: of its content; empty when it could not be reached.
        facts: of a usable slide.
        code: why it is not usable.
        detail: the same in words, for the site's own eyes.
        filters: what the quality filters removed, of a slide that shows tissue.
        unsettled: it changed while it was read, and should be read again later.
    """

    number: int
    fingerprint: str = field(default="", repr=False)
    facts: SlideFacts | None = field(default=None, repr=False)
    code: ErrorCode | None = None
    detail: str | None = field(default=None, repr=False)
    filters: FilterReport | None = field(default=None, repr=False)
    unsettled: bool = False


class SlideExecutor(Protocol):
    """Where slides are read."""

    @property
    def slots(self) -> int:
        """How many slides it takes at once, at least 1."""
        ...

    def submit(self, task: SlideTask, /) -> None:
        """Begin a slide; never more than `slots` that have not come back."""
        ...

    def finished(self) -> Sequence[SlideReading]:
        """Wait for a slide that was begun, and return all that are done.

        Raises:
            HostError: it can read no more; slides that have not come back were not read.
        """
        ...

    def close(self) -> None:
        """Stop reading. Safe to call twice."""
        ...


class InlineExecutor:
    """Reads in this process, one slide at a time."""

    slots = 1

    def __init__(self) -> None:
        self._tasks: list[SlideTask] = []

    def submit(self, task: SlideTask, /) -> None:
        """See `SlideExecutor`."""
        self._tasks.append(task)

    def finished(self) -> Sequence[SlideReading]:
        """See `SlideExecutor`."""
        return [read_slide(self._tasks.pop(0))]

    def close(self) -> None:
        """See `SlideExecutor`."""
        self._tasks.clear()


def read_slide(task: SlideTask) -> SlideReading:
    """Read one slide. Never raises for what a slide holds or lacks."""
    content = ""
    try:
        content = fingerprint(task.files, task.key)
    except OSError as error:
        detail = f"cannot be reached: {error.strerror}"
        return SlideReading(number=task.number, code=ErrorCode.SLIDE_UNOPENABLE, detail=detail)
    reading = _examined(task, content)
    try:
        unsettled = file_state(task.files) != task.state
    except OSError:
        unsettled = True
    return SlideReading(number=task.number, unsettled=True) if unsettled else reading


def _examined(task: SlideTask, content: str) -> SlideReading:
    try:
        with OpenSlideReader(task.files[0], name=task.name, files=task.files) as reader:
            native = partial(trusted_level, reader, task.files, task.name)
            facts = examine(reader, task.plan, where=task.name, mpp_override=task.mpp_override, native=native)
    except SiteDataError as error:
        detail = error.what if error.value is None else f"{error.what}: {error.value}"
        filters = error.report if isinstance(error, FilteredSlideError) else None
        return SlideReading(number=task.number, fingerprint=content, code=error.code, detail=detail, filters=filters)
    except (OSError, MemoryError, ValueError, ArithmeticError) as error:
        # What decoders raise on damaged files they did not foresee; anything else is a bug of ours.
        detail = f"the slide cannot be read: {error!r}"
        return SlideReading(number=task.number, fingerprint=content, code=ErrorCode.SLIDE_UNREADABLE, detail=detail)
    return SlideReading(number=task.number, fingerprint=content, facts=facts, filters=facts.filters)
