"""Fills a run's report from the database and the record, and writes the page."""

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import pathfed_common
from pathfed_common import digest, files, synthetic
from pathfed_common.ids import RunName
from pathfed_common.plan import Plan
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.record import ENCODER, MANIFEST
from pathfed_server.db.rows import RoundRow, RunRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.report.data import (
    ContactRow,
    MemoryPeak,
    ReportData,
    RoundReport,
    RoundTimes,
    SiteFigures,
    SiteReport,
    SiteRound,
    Verdict,
)
from pathfed_server.report.page import render
from pathfed_server.rounds.state import Participation, ParticipationState, RoundState, RunState

_TILES = 4
_TILE_SEED = 1
_MASK_CONTEXT = {"purpose": "report"}
_STATES = {
    RunState.FINISHED: ("finished", "every round of the plan is committed"),
    RunState.RUNNING: ("running", "the run goes on"),
    RunState.PLANNED: ("running", "the run has not begun"),
    RunState.PAUSING: ("running", "the run pauses after this round"),
    RunState.DRAINING: ("running", "the run stops after this round"),
    RunState.PAUSED: ("stopped", "paused by the operator; it can be resumed"),
    RunState.STOPPED: ("stopped", "stopped by the operator; what is committed stays"),
    RunState.FAILED: ("failed", "the run could not go on"),
}


def write_report(
    home: ServerHome, run: RunName, out: Path, *, memory: Sequence[MemoryPeak] = (), places: Mapping[str, str] | None = None
) -> None:
    """Write a run's report.

    Args:
        home: the server's home.
        run: the run.
        out: the HTML file.
        memory: peaks, where somebody measured.
        places: more things to find, and where they are.

    Raises:
        RoundError: PF510, no such run.
        HostError: the page cannot be written.
    """
    with SqlStore(home.database_url) as store:
        data = _gather(home, store, store.run(run), tuple(memory), dict(places or {}))
    files.write_atomic(out, render(data).encode())


def _gather(home: ServerHome, store: SqlStore, run: RunRow, memory: tuple[MemoryPeak, ...], places: dict[str, str]) -> ReportData:
    plan = store.plan(run.plan).plan()
    rounds = [row for row in store.rounds(run.name) if row.state is RoundState.COMMITTED]
    taken_part = {row.round_index: store.participations(run.name, row.round_index) for row in store.rounds(run.name)}
    record = home.record(run.name)
    encoder = record / ENCODER
    checkpoints = store.checkpoints(run.name)
    state = home.root / checkpoints[-1].state_path if checkpoints else None
    name, text = _STATES[run.state]
    noise = _noise_norm(plan)
    return ReportData(
        run=run.name,
        state=name,  # type: ignore[arg-type]
        state_text=text + (f" ({run.code})" if run.code else ""),
        plan=plan,
        started_at=run.started_at or run.planned_at,
        ended_at=run.ended_at,
        made_at=time.time(),
        encoder=digest.of_bytes(encoder.read_bytes()) if encoder.exists() else None,
        encoder_parameters=_encoder_parameters(plan),
        verdict=_verdict(home, store, record),
        rounds=tuple(_round(row, taken_part[row.round_index], noise) for row in rounds),
        sites=tuple(_sites(store, run, plan, taken_part)),
        memory=memory,
        contact_sheet=() if state is None else _contact_sheet(plan, state),
        files=tuple({"encoder": str(encoder), "record": str(record), "database": _database(home), **places}.items()),
        verify_command=f"pathfed verify {record} --trust trust.json",
        next_commands=(
            ("rounds and who took part", f"pathfed-server rounds {run.name} --home {home.root}"),
            ("check the record offline", f"pathfed verify {record}"),
        ),
        version=pathfed_common.__version__,
    )


def _database(home: ServerHome) -> str:
    """Where the metadata database is, without a password."""
    return SqlStore(home.database_url).address


def _encoder_parameters(plan: Plan) -> int:
    from pathfed_common.model import encoder_spec

    return encoder_spec(plan).parameters


def _noise_norm(plan: Plan) -> float:
    from pathfed_common.model import noise_norm

    return noise_norm(plan)


def _verdict(home: ServerHome, store: SqlStore, record: Path) -> Verdict:
    """What verification says when it trusts the keys this server enrolled."""
    from pathfed_common.provenance.record_reader import TrustedKeys
    from pathfed_common.provenance.verify import verify_record

    if not (record / MANIFEST).exists():
        return Verdict(state="unchecked", text="the run has no record yet")
    trusted = TrustedKeys(
        server=home.evidence_key.public, sites={site.name: VerifyKey.from_text(site.evidence_key) for site in store.sites()}
    )
    # The server drew the first state itself; drawing it again would take the memory of a second model.
    findings = verify_record(record, trusted, redraw=False).findings
    if findings:
        return Verdict(state="failed", text=findings[0].what, code=findings[0].code.value)
    return Verdict(state="verified", text="every byte, signature and chain of the record holds, with the keys enrolled at this server")


def _round(row: RoundRow, participations: Sequence[Participation], noise: float) -> RoundReport:
    """One round; `noise` is the L2 norm of the noise in an update (`model.noise_norm`)."""
    times = row.times
    if times is None:
        raise ValueError(f"round {row.round_index} is not committed")
    waited = max(0.0, times.exchange_s - times.transfer_s - times.admission_s)
    until_slot = max((slot * one.reply_slot_s for one in participations if (slot := _slot(one)) and one.reply_slot_s), default=0.0)
    return RoundReport(
        index=row.round_index,
        sites=tuple(_site_round(one) for one in participations),
        times=RoundTimes(
            slots_s=min(waited, until_slot),
            wait_s=max(0.0, waited - until_slot),
            transfer_s=times.transfer_s,
            aggregation_s=times.admission_s + times.aggregation_s,
            step_s=times.step_s,
        ),
        rounding_share=max((one.rounding for one in participations if one.rounding is not None), default=0.0) / noise,
    )


def _site_round(one: Participation) -> SiteRound:
    figures = one.figures
    return SiteRound(
        site=one.site,
        admitted=one.state is ParticipationState.ADMITTED,
        code=one.code,
        epsilon_plan=one.epsilon_plan,
        figures=SiteFigures(**figures) if figures else None,
        slot=_slot(one),
    )


def _slot(one: Participation) -> int | None:
    """The time slot in which a reply came: the last that began before its first byte was seen, and the first at least."""
    if one.reply_slot_s is None or one.offered_at is None or one.received_at is None:
        return None
    return max(1, int((one.received_at - (one.transfer_s or 0.0) - one.offered_at) // one.reply_slot_s))


def _sites(store: SqlStore, run: RunRow, plan: Plan, rounds: Mapping[int, Sequence[Participation]]) -> list[SiteReport]:
    approvals = {given.site: given for given in store.approvals(run.plan)}
    found = []
    for site in run.sites:
        mine = [one for index in sorted(rounds) for one in rounds[index] if one.site == site]
        admitted = [one for one in mine if one.state is ParticipationState.ADMITTED]
        approval = approvals.get(site)
        declared = approval.declared_patients if approval else 0
        found.append(
            SiteReport(
                site=site,
                declared_patients=declared,
                sampling_rate=_rate(plan, declared),
                rounds_admitted=len(admitted),
                epsilon_plan=admitted[-1].epsilon_plan if admitted else None,
                epsilon_total=admitted[-1].epsilon_total if admitted else None,
                last_code=next((one.code for one in reversed(mine) if one.code), None),
                reply_slots=approval.reply_slots if approval else True,
            )
        )
    return found


def _rate(plan: Plan, declared: int) -> float:
    return min(1.0, plan.privacy.expected_patients / declared) if declared else 0.0


def _contact_sheet(plan: Plan, state: Path) -> tuple[ContactRow, ...]:
    """Synthetic tiles through the last encoder: nobody's tissue is in this picture."""
    import torch

    from pathfed_common.encoder import weights
    from pathfed_common.model import build_model
    from pathfed_common.objectives.mae import normalise
    from pathfed_common.privacy.randomness import KeyedRandom

    model = build_model(plan).eval()
    model.load_state_dict(weights.load(state.read_bytes()))
    tiles = synthetic.synthetic_tiles(_TILES, plan.cohort.tile_px, seed=_TILE_SEED)
    with torch.no_grad():
        made = model.pictures(normalise(tiles), model.draw(_TILES, KeyedRandom(bytes(32), _MASK_CONTEXT)))
    return tuple(
        ContactRow(original=_png(tiles[i]), made=tuple((caption, _png(pictures[i])) for caption, pictures in made.items()))
        for i in range(_TILES)
    )


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()
