"""What `pathfed-server lineage` shows: which states and releases a site's updates are in, and which sites are in a release."""

from collections.abc import Sequence
from typing import Any

from pathfed_common.digest import Digest, short
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance import record
from pathfed_common.provenance.record import Manifest
from pathfed_server.db.rows import RunRow, SiteRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.operators import Role, opened_by
from pathfed_server.provenance.lineage import RunLine, Touched, can_be_undone, cannot_be_undone, sites_in, touched_by
from pathfed_server.rounds.machine import OPEN
from pathfed_server.rounds.state import RunState, SiteState

_OPEN = (*sorted(OPEN), RunState.PAUSED, RunState.STOPPED, RunState.FAILED)


def overview(home: ServerHome) -> list[dict[str, Any]]:
    """Every site, and how far its updates went."""
    with opened_by(home.root, Role.AUDITOR) as (store, _):
        sites, lines = store.sites(), run_lines(home, store)
    return [_overview(site, touched_by(site.name, lines)) for site in sites]


def of(home: ServerHome, name: str) -> dict[str, Any]:
    """The lineage of a site by its name, or of a release or run by the release's digest (or enough of its start) or the run's name.

    Raises:
        ProvenanceError: PF612, nothing has this name, or several releases begin so.
    """
    with opened_by(home.root, Role.AUDITOR) as (store, _):
        lines = run_lines(home, store)
        sites = {site.name: site for site in store.sites()}
    if name in sites:
        return _of_site(sites[SiteName(name)], lines)
    releases = {release: line for line in lines for release in line.releases}
    bare = name.removeprefix("sha256:")
    found = [release for release in releases if bare and release.removeprefix("sha256:").startswith(bare)]
    runs = [line for line in lines if line.run == name]
    if len(found) == 1:
        return _of_run(releases[found[0]], lines, sites, release=found[0])
    if runs and not found:
        return _of_run(runs[0], lines, sites, release=None)
    raise ProvenanceError(
        ErrorCode.LINEAGE_UNKNOWN,
        "several releases begin so" if found else "no site, release or run of this name",
        value=name,
        remedy="`pathfed-server sites list`, `run status` and `log leaves` show what there is",
    )


def run_lines(home: ServerHome, store: SqlStore) -> list[RunLine]:
    """Every run as far as its lineage goes, in the order in which they were planned."""
    released = store.releases()
    return [_line(home, store, run, tuple(name for name, of_run, _ in released if of_run == run.name)) for run in store.runs()]


def _line(home: ServerHome, store: SqlStore, run: RunRow, releases: tuple[Digest, ...]) -> RunLine:
    plan = store.plan(run.plan).plan()
    checkpoints = store.checkpoints(run.name)
    return RunLine(
        run=run.name,
        plan=run.plan,
        open=run.state in _OPEN,
        quorum=plan.rounds.quorum,
        listed=run.sites,
        committed=max(len(checkpoints) - 1, 0),
        contributions=store.contributions(run.name),
        encoder=_encoder(home, run.name) if run.state is RunState.FINISHED else None,
        starts_from=Digest(plan.encoder.init_from) if plan.encoder.init_from else None,
        releases=releases,
    )


def _encoder(home: ServerHome, run: RunName) -> Digest | None:
    """Digest of a finished run's exported encoder, as its record lists it."""
    path = home.record(run) / record.MANIFEST
    entry = Manifest.from_bytes(path.read_bytes(), where=str(path)).entry(record.ENCODER) if path.is_file() else None
    return None if entry is None else entry.digest


def _overview(site: SiteRow, touched: Sequence[Touched]) -> dict[str, Any]:
    return {
        "site": site.name,
        "state": site.state.value,
        "revoked_at": site.revoked_at,
        "rounds": sum(len(each.rounds) for each in touched),
        "runs": [each.line.run for each in touched],
        "states": sum(each.states for each in touched),
        "releases": [short(name) for each in touched for name in each.line.releases],
    }


def _of_site(site: SiteRow, lines: Sequence[RunLine]) -> dict[str, Any]:
    touched = touched_by(site.name, lines)
    return {
        "site": site.name,
        "state": site.state.value,
        "revoked_at": site.revoked_at,
        "runs": [
            {
                "run": each.line.run,
                "own_rounds": list(each.rounds),
                "through": each.through,
                "first_state": each.first_state,
                "last_state": each.line.committed,
                "releases": list(each.line.releases),
            }
            for each in touched
        ],
        "can_be_undone": can_be_undone(site.name, revoked=site.state is SiteState.REVOKED, lines=lines),
        "cannot_be_undone": cannot_be_undone(touched),
    }


def _of_run(line: RunLine, lines: Sequence[RunLine], sites: dict[SiteName, SiteRow], *, release: Digest | None) -> dict[str, Any]:
    within = sites_in(line, lines)
    origins = {each.line.run for found in within.values() for each in found}
    return {
        "release": release,
        "run": line.run,
        "plan": line.plan,
        "starts_from": line.starts_from,
        "goes_back_to": [each.run for each in lines if each.run in origins and each.run != line.run],
        "sites": [
            {
                "site": name,
                "state": sites[name].state.value,
                "revoked_at": sites[name].revoked_at,
                "rounds": {each.line.run: list(each.rounds) for each in found},
            }
            for name, found in within.items()
        ],
    }
