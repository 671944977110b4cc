"""Looking at a sample of slides, in a process beside this one: a slide that crashes or hangs its decoder is a finding, not an end.

Slides are judged as a scan judges them, and nothing is written. Label and macro images are never opened.
"""

import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Self

import numpy as np

from pathfed_client.io.direct_reader import trusted_level
from pathfed_client.io.doctor.decoders import check_decoders
from pathfed_client.io.doctor.seen import DecoderSeen, SlideSeen, mpp_state
from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.io.side_process import EndedError, SideProcess, serve
from pathfed_client.io.slide_files import SlideFiles
from pathfed_client.io.tile_reader import SlideSource
from pathfed_client.slides.examine import examine
from pathfed_client.slides.tile_map import TileMap
from pathfed_common.code_digest import module_command
from pathfed_common.errors import ErrorCode, SiteDataError
from pathfed_common.plan import CohortPlan

#: Seconds one slide may take.
SLIDE_TIMEOUT_S = 60.0
#: Tiles of a slide whose places are drawn for measuring speed: so many that few are read twice, which would be the page cache's speed.
PLACES = 256
_MODULE = "pathfed_client.io.doctor.slides"


@dataclass(frozen=True)
class LookTask:
    """One slide to look at."""

    slide: SlideFiles = field(repr=False)
    plan: CohortPlan
    seed: int


@dataclass(frozen=True)
class Look:
    """What looking at a slide gave: what may be told, and where to read tiles.

    Attributes:
        seen: for the findings.
        source: to read tiles from; None where it has none.
        places: corners (x, y) of some tiles, pixels of the source's level.
    """

    seen: SlideSeen
    source: SlideSource | None = None
    places: tuple[tuple[int, int], ...] = ()


def draw_sample(slides: Sequence[SlideFiles], count: int, seed: int) -> tuple[SlideFiles, ...]:
    """Some slides, the same for the same seed: from each folder and each kind of file in turn, so that rare ones are seen as well.

    Args:
        slides: to draw from.
        count: at most so many, at least 0.
        seed: of the draw.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    groups: defaultdict[tuple[str, str], list[SlideFiles]] = defaultdict(list)
    for slide in sorted(slides, key=lambda one: one.path):
        groups[slide.path.rpartition("//")[0], slide.opened.suffix.lower()].append(slide)
    generator = random.Random(seed)  # noqa: S311 - which slides are looked at is no secret
    queues = [generator.sample(group, min(count, len(group))) for _, group in sorted(groups.items())]
    in_turn = [queue[turn] for turn in range(count) for queue in queues if turn < len(queue)]
    return tuple(in_turn[:count])


def look_at(task: LookTask) -> Look:
    """Open one slide, judge it, and find some of its tiles. Never raises for what a slide holds or lacks."""
    slide = task.slide
    seen = SlideSeen(path=slide.path)
    try:
        with OpenSlideReader(slide.opened, name=slide.path, files=slide.files) as reader:
            seen = replace(seen, vendor=reader.vendor, mpp=mpp_state(reader.mpp, task.plan))
            native = partial(trusted_level, reader, slide.files, slide.path)
            tiles = examine(reader, task.plan, where=slide.path, native=native).tiles
    except SiteDataError as error:
        return Look(replace(seen, code=error.code))
    except (OSError, MemoryError, ValueError, ArithmeticError):
        # What decoders raise on damaged files they did not foresee, as in a scan.
        return Look(replace(seen, code=ErrorCode.SLIDE_UNREADABLE))
    source = SlideSource(slide.path, slide.parts, slide.state.size, slide.state.mtime_ns, tiles.grid)
    return Look(replace(seen, direct=tiles.grid.direct), source, _places(tiles, task.seed))


def _places(tiles: TileMap, seed: int) -> tuple[tuple[int, int], ...]:
    generator = np.random.default_rng(seed)
    picked = generator.choice(len(tiles), min(PLACES, len(tiles)), replace=False)
    return tuple(tiles.grid.place(*tiles.cell(int(index)), *generator.random(2).tolist()) for index in picked)


class Looker:
    """The process that looks, and its successors. A context manager."""

    def __init__(self, *, timeout_s: float = SLIDE_TIMEOUT_S, module: str = _MODULE) -> None:
        """Make it; the process starts with the first task.

        Args:
            timeout_s: seconds a task may take.
            module: what the process runs.
        """
        self._timeout_s = timeout_s
        self._module = module
        self._process: SideProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def decoders(self) -> tuple[DecoderSeen, ...]:
        """The self-test; empty when it took the process with it."""
        answer = self._ask(check_decoders)
        return () if isinstance(answer, ErrorCode) else answer

    def look(self, task: LookTask) -> Look:
        """See `look_at`; a slide that ends the process has the code PF220, one that takes too long PF221."""
        answer = self._ask(partial(look_at, task))
        return Look(SlideSeen(path=task.slide.path, code=answer)) if isinstance(answer, ErrorCode) else answer

    def _ask(self, work: Callable[[], Any]) -> Any:
        """The answer, or why there is none."""
        if self._process is None:
            self._process = SideProcess(module_command(self._module), timeout_s=self._timeout_s)
        process = self._process
        process.more_time()
        process.send(work)
        answer, code = None, ErrorCode.SLIDE_CRASHED
        try:
            while answer is None:
                code = ErrorCode.SLIDE_CRASHED
                if wait([process.connection], timeout=max(0.0, process.deadline - time.monotonic())):
                    answer = process.receive()
                else:
                    code = ErrorCode.SLIDE_TIMEOUT
                    process.check_time()
        except EndedError:
            self._end()
            return code
        return answer

    def _end(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None


def look_at_sample(looker: Looker, tasks: Collection[LookTask], *, within_s: float) -> list[Look]:
    """Look at slides one by one; none is begun after `within_s` seconds, but the first always is."""
    until = time.monotonic() + within_s
    looks: list[Look] = []
    for task in tasks:
        if looks and time.monotonic() >= until:
            break
        looks.append(looker.look(task))
    return looks


def _work(work: Callable[[], Any]) -> Any:
    return work()


if __name__ == "__main__":
    serve(int(sys.argv[1]), _work)
