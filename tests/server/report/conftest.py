"""A run as the report sees it: plausible, seeded, and with every kind of trouble in it. tests/browser loads it too."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pathfed_common import digest
from pathfed_common.ids import run_name, site_name
from pathfed_common.plan import Plan
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

PLAN = {
    "name": "demo",
    "privacy": {"expected_patients": 6.0, "noise_multiplier": 0.8, "clip_norm": 1.0, "epsilon_limit": 12.0},
    "rounds": {"count": 12, "quorum": 2, "deadline_s": 60.0, "reply_slot_s": 1.0},
    "cohort": {"tile_px": 64, "mpp": 1.0},
}


def picture(seed: int) -> bytes:
    """A small PNG in the colours of a stain."""
    random = np.random.default_rng(seed)
    grid = random.normal(0, 1, (8, 8)).repeat(8, 0).repeat(8, 1)
    pixels = np.stack([210 + 20 * grid, 150 + 35 * grid, 195 + 18 * grid], axis=-1).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def make_round(index: int, names: list[str], random: np.random.Generator) -> RoundReport:
    """Site 3 is silent in round 5."""
    entries = []
    for place, name in enumerate(names):
        silent = place == 2 and index == 5
        patients = random.poisson(6) + random.normal(0, 2.6)
        mean = 0.55 + 0.45 * np.exp(-index / 5)
        figures = SiteFigures(loss_sum=patients * mean + random.normal(0, 1.2), loss_sum_std=1.2, patients=patients, patients_std=1.1)
        entries.append(
            SiteRound(
                site=site_name(name),
                admitted=not silent,
                code="PF515" if silent else None,
                epsilon_plan=None if silent else (1.1 + place * 0.25) * index**0.62,
                figures=None if silent else figures,
                slot=None if silent else 1,
            )
        )
    times = RoundTimes(slots_s=6.0, wait_s=2 * random.random(), transfer_s=0.6, aggregation_s=0.45, step_s=0.3 + 0.1 * random.random())
    return RoundReport(index=index, sites=tuple(entries), times=times)


def build(*, rounds: int = 12, sites: int = 3, state: str = "finished", verdict: str = "verified") -> ReportData:
    """Report data of any size."""
    random = np.random.default_rng(7)
    names = (["hospital-north", "hospital-lake", "hospital-hill"] + [f"hospital-{place}" for place in range(4, sites + 1)])[:sites]
    plan = Plan.model_validate(PLAN)
    made = [make_round(index, names, random) for index in range(1, rounds + 1)]
    reports = tuple(
        SiteReport(
            site=site_name(name),
            declared_patients=40 + 8 * place,
            sampling_rate=6 / (40 + 8 * place),
            rounds_admitted=sum(entry.admitted for r in made for entry in r.sites if entry.site == name),
            epsilon_plan=max((e.epsilon_plan or 0.0 for r in made for e in r.sites if e.site == name), default=None),
            epsilon_total=max((e.epsilon_plan or 0.0 for r in made for e in r.sites if e.site == name), default=None),
            last_code="PF515" if place == 2 and rounds >= 5 else None,
        )
        for place, name in enumerate(names)
    )
    memory = [
        MemoryPeak(
            owner=name, role="site", processes=(("supernode", 142.0), ("runner", 611.0 + 20 * place)), together_mb=760.0 + 20 * place
        )
        for place, name in enumerate(names)
    ]
    memory.append(
        MemoryPeak(
            owner="server",
            role="server",
            processes=(("superlink", 260.0), ("superexec", 190.0), ("path filter", 88.0), ("serverapp", 640.0)),
            together_mb=1170.0,
        )
    )
    return ReportData(
        run=run_name("demo-2026-11-23"),
        state=state,  # type: ignore[arg-type]
        state_text=f"{rounds} of 12 rounds are committed.",
        plan=plan,
        started_at=1_795_460_000.0,
        ended_at=1_795_460_141.0 if state == "finished" else None,
        made_at=1_795_460_150.0,
        encoder=digest.of_bytes(b"encoder"),
        encoder_parameters=5_524_416,
        verdict=Verdict(
            state=verdict,  # type: ignore[arg-type]
            text="Every signature, digest and chain of the record was checked against the keys of the three hospitals.",
            code="PF601" if verdict == "failed" else None,
        ),
        rounds=tuple(made),
        sites=reports,
        memory=tuple(memory),
        contact_sheet=tuple(
            ContactRow(original=picture(i), made=(("what it sees", picture(i + 50)), ("what it predicts", picture(i + 90))))
            for i in range(6)
        ),
        files=(("Encoder", "/home/kim/pathfed/demo-out/release/encoder.safetensors"), ("Record", "/home/kim/pathfed/demo-out/record")),
        verify_command="pathfed verify demo-out/record",
        next_commands=(("See what a site spent", "pathfed-site ledger show --home demo-out/sites/hospital-north"),),
        version="0.1.0",
    )


@pytest.fixture
def report() -> Callable[..., ReportData]:
    """Builds report data: rounds, sites, state, verdict."""
    return build
