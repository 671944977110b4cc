"""`pathfed verify --replay`: recomputes a record's states from the updates that sites signed, with the server's own aggregation."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, ProvenanceError, RoundError
from pathfed_common.ids import SiteName
from pathfed_common.part_file import file_digest
from pathfed_common.provenance import record
from pathfed_common.provenance.consistency import Contents
from pathfed_common.provenance.record import RoundRecord
from pathfed_common.wire_format import open_update

if TYPE_CHECKING:
    from pathfed_server.rounds.replay import Replayed


def replay(updates: Path, folder: Path, contents: Contents) -> Iterator[ProvenanceError]:
    """Recompute every state; what differs, the first alone, for all later states rest on it.

    Args:
        updates: folder with `round-0001/<site>.safetensors` and so on.
        folder: the record, whose documents were verified and whose first state is there.
        contents: its documents.

    Yields:
        PF622, an update is missing or not the one its site signed; PF621, a state is not the aggregate of its round's updates, or
        running average, weights' factors or an update's rounding error are others than recorded.

    Raises:
        HostError: the disk is full (PF901) or cannot be written (PF904).
    """
    missing = list(_update_faults(updates, contents))
    if missing:
        yield from missing
        return
    yield from _rounding_faults(updates, contents)
    from pathfed_server.rounds.replay import replay_states

    sites = [[site.site for site in found.admitted] for found, _ in contents.rounds]
    with tempfile.TemporaryDirectory(prefix="pathfed-replay-") as work:
        first = folder / record.state_path(0)
        try:
            for replayed in replay_states(
                contents.plan, sites, lambda index, site: _place(updates, index, site), first=first, work=Path(work)
            ):
                fault = _fault(replayed, contents.rounds[replayed.round_index - 1][0])
                if fault is not None:
                    yield fault
                    return
        except (ValueError, RoundError) as error:
            yield _differs(None, str(error))


def _fault(replayed: "Replayed", recorded: RoundRecord) -> ProvenanceError | None:
    """How a round's record differs from what the updates give: its state, the running average, a weight's factor."""
    index = replayed.round_index
    state = _digest(replayed.state)
    if state != recorded.next_state:
        return _differs(index, f"{state}, recorded {recorded.next_state}")
    if replayed.average != recorded.average:
        return _differs(index, f"average {replayed.average}, recorded {recorded.average}")
    for site in recorded.admitted:
        factor = replayed.factors.get(site.site, 1.0)
        if factor != site.factor:
            return _differs(index, f"factor {factor} of {site.site}, recorded {site.factor}")
    return None


def _update_faults(updates: Path, contents: Contents) -> Iterator[ProvenanceError]:
    for (index, site), sealed in sorted(contents.statements.items(), key=lambda item: item[0]):
        path = _place(updates, index, site)
        try:
            found = _digest(path)
        except HostError as error:
            yield ProvenanceError(ErrorCode.UPDATE_MISSING, error.what, where=path)
            continue
        if found != sealed.statement.update:
            yield ProvenanceError(ErrorCode.UPDATE_MISSING, "the update is not the one that its site signed", where=path, value=found)


def _rounding_faults(updates: Path, contents: Contents) -> Iterator[ProvenanceError]:
    """Rounding errors that the record states otherwise than the updates show them."""
    for recorded, _ in contents.rounds:
        for site in recorded.admitted:
            try:
                found = open_update(_place(updates, recorded.round_index, site.site)).rounding()
            except ValueError as error:
                yield _differs(None, f"the update of {site.site} in round {recorded.round_index}: {error}")
                continue
            if found != site.rounding:
                yield ProvenanceError(
                    ErrorCode.REPLAY_DIFFERS,
                    "the record states another rounding error of an update's wire format",
                    where=record.round_path(recorded.round_index),
                    value=f"{site.site}: {found!r}, recorded {site.rounding!r}",
                )


def _place(updates: Path, index: int, site: SiteName) -> Path:
    return updates / record.update_path(index, site).removeprefix("updates/")


def _digest(path: Path) -> Digest:
    try:
        return file_digest(path)
    except OSError as error:
        raise HostError(ErrorCode.HOME_UNUSABLE, f"cannot be read: {error.strerror}", where=path) from None


def _differs(index: int | None, value: str) -> ProvenanceError:
    where = None if index is None else record.state_path(index)
    return ProvenanceError(ErrorCode.REPLAY_DIFFERS, "the updates do not give the recorded state", where=where, value=value)
