"""One self-contained HTML page per run: no script, nothing fetched, readable on paper."""

import base64
import datetime
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pathfed_common.error_catalog import CATALOG
from pathfed_common.errors import ErrorCode
from pathfed_server.report.charts import Reference, Series, line_chart, stacked_bars
from pathfed_server.report.data import Estimate, ReportData, RoundReport, RoundTimes

#: Sites up to this number get a colour each; more share one, and the largest epsilon is named.
MOST_COLOURS = 8
#: Rows of a table under a figure; longer runs show the first and the last ones.
_MOST_ROWS = 40

_TIME_LAYERS: tuple[tuple[str, str], ...] = (
    ("slots_s", "reply slots, with training"),
    ("wait_s", "other waiting"),
    ("transfer_s", "transfer"),
    ("aggregation_s", "admission and average"),
    ("step_s", "server step and commit"),
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of the page: its chart, the words under it, its legend, and the same numbers as a table."""

    title: str
    chart: Markup | None
    caption: str
    legend: Sequence[tuple[str, str]]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def render(data: ReportData) -> str:
    """The page of a run, as HTML text in UTF-8's repertoire."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        utc=utc, duration=duration, number=number, png=png, code_title=code_title, short=short, plain=plain, sentence=sentence
    )
    figures = (_loss_figure(data), _epsilon_figure(data), _patients_figure(data), _times_figure(data))
    return environment.get_template("report.html.j2").render(
        data=data, figures=figures, summary=plan_summary(data), cards=headline(data), loss_words=loss_words(data.rounds)
    )


# ---- words and numbers ----


def utc(seconds: float) -> str:
    """UTC seconds as people read them."""
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: float) -> str:
    """A length of time in the two units that matter."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float | None, digits: int = 3) -> str:
    """A number at a fixed number of decimals, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def png(data: bytes) -> str:
    """PNG bytes as a data URI.

    Raises:
        ValueError: not a PNG.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("the contact sheet takes PNG files")
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def code_title(code: str) -> str:
    """What a code means, in the catalogue's few words."""
    try:
        return CATALOG[ErrorCode(code)].title
    except ValueError:
        return "unknown code"


def short(digest: str) -> str:
    """A digest for people: its first 12 hex digits."""
    return digest.removeprefix("sha256:")[:12]


def loss_words(rounds: Sequence[RoundReport]) -> str:
    """What the released loss allows one to say, and no more."""
    known = [round_.loss for round_ in rounds if round_.loss is not None]
    if len(known) < 2:
        return "There are too few released losses to compare."
    first, last = known[0], known[-1]
    change, spread = last.value - first.value, math.hypot(first.std, last.std)
    figures = f"from {first.value:.3f} to {last.value:.3f}, a change of {change:+.3f} with noise of {spread:.3f} (1σ)"
    if abs(change) < 2 * spread:
        return f"The released loss went {figures}: too little to tell from noise."
    return f"The released loss {'fell' if change < 0 else 'rose'} {figures}."


def slot_words(data: ReportData) -> str:
    """What the replies' times told of how many patients were drawn: what was seen, and no more."""
    length = f"{data.plan.rounds.reply_slot_s:g} s"
    without = [site.site for site in data.sites if not site.reply_slots]
    said = []
    slots = [(site.site, site.slot) for round_ in data.rounds for site in round_.sites if site.slot is not None]
    late = [site for site, slot in slots if slot > 1]
    if late:
        who = ", ".join(f"{site} {late.count(site)}" for site in sorted(set(late)))
        said.append(
            f"{len(late)} of {len(slots)} replies missed their first time slot of {length} ({who}): a reply's slot tells how "
            "long the training took, and with it something of how many patients were drawn, which ε does not cover. A longer "
            "rounds.reply_slot_s hides more."
        )
    elif slots:
        said.append(f"All {len(slots)} replies that wait for time slots came in the first one, {length} after the offer.")
    if without:
        who = "All sites have" if len(without) == len(data.sites) else ", ".join(without) + (" has" if len(without) == 1 else " have")
        said.append(f"{who} switched reply slots off: a reply's time hints at how many patients were drawn, and ε does not cover that.")
    return " ".join(said) or f"Sites answer {length}, or a multiple of it, after the offer."


def sentence(text: str) -> str:
    """Words as a sentence: a capital first, a full stop last."""
    return text if not text else text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def plain(value: float) -> str:
    """A small number as people write it: 1e-6, not 1e-06."""
    return re.sub(r"e([+-])0+", r"e\1", f"{value:g}")


def headline(data: ReportData) -> list[tuple[str, str, str]]:
    """The figures at the top: label, value, remark."""
    spent = [site.epsilon_plan for site in data.sites if site.epsilon_plan is not None]
    admitted = sum(site.admitted for round_ in data.rounds for site in round_.sites)
    asked = sum(len(round_.sites) for round_ in data.rounds)
    limit = data.plan.privacy.epsilon_limit
    cards = [
        ("Rounds", f"{len(data.rounds)} of {data.plan.rounds.count}", data.state),
        ("Sites", f"{len(data.sites)}", f"{admitted} of {asked} updates admitted"),
        ("Largest ε of a site", number(max(spent), 2) if spent else "–", f"limit {limit:g} at δ = {plain(data.plan.privacy.delta)}"),
        ("Encoder", millions(data.encoder_parameters), f"parameters, {data.plan.encoder.preset}"),
    ]
    if data.ended_at is not None:
        cards.append(("Time", duration(data.ended_at - data.started_at), f"{utc(data.started_at)[:16]} UTC"))
    return cards


def rounding_words(data: ReportData) -> str:
    """What the wire format's rounding added, beside the noise."""
    if data.plan.wire.dtype == "float32":
        return "nothing is rounded for it"
    worst = max((round_.rounding_share for round_ in data.rounds), default=0.0)
    return f"its rounding is at most {worst:.2%} of the noise in an update" if data.rounds else "rounded after the noise"


def millions(count: int) -> str:
    """A number of parameters for people."""
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def plan_summary(data: ReportData) -> list[tuple[str, str]]:
    """The plan in ten lines."""
    plan = data.plan
    privacy, rounds, cohort = plan.privacy, plan.rounds, plan.cohort
    return [
        ("Plan", plan.name),
        ("Digest", plan.digest),
        ("Privacy unit", f"one {privacy.unit}, with all slides and tiles"),
        (
            "Noise and clipping",
            f"σ = {privacy.noise_multiplier:g}, C = {privacy.clip_norm:g}, {privacy.figure_share:g} of C carries the figures",
        ),
        ("Patients a step", f"{privacy.expected_patients:g} expected at each site, Poisson sampled; {cohort.tiles_per_patient} tiles each"),
        ("Limit", f"ε ≤ {privacy.epsilon_limit:g} at δ = {plain(privacy.delta)}, for each patient at each site"),
        ("Rounds", f"{rounds.count}, {rounds.steps} private step{'s' if rounds.steps > 1 else ''} each, quorum {rounds.quorum}"),
        (
            "Deadline and reply slots",
            f"{duration(rounds.deadline_s)}; replies at multiples of {rounds.reply_slot_s:g} s unless a site switched them off",
        ),
        ("Tiles", f"{cohort.tile_px} px at {cohort.mpp:g} µm/px, at least {cohort.tissue_share:.0%} tissue"),
        ("Objective", f"{plan.objective.name}, {plan.objective.summary}"),
        ("Trained of the encoder", plan.encoder.part),
        ("Server optimiser", f"{plan.server_optimiser.name}, step size {plan.server_optimiser.learning_rate:g}"),
        ("Wire", f"{plan.wire.dtype}, {rounding_words(data)}"),
    ]


# ---- figures ----


def _loss_figure(data: ReportData) -> Figure:
    known = [(round_.index, round_.loss) for round_ in data.rounds]
    points = [(index, loss.value) for index, loss in known if loss is not None]
    spread = [loss.std for _, loss in known if loss is not None]
    chart = None
    if points:
        summary = f"Released loss per round: {points[0][1]:.3f} in round {points[0][0]}, {points[-1][1]:.3f} in round {points[-1][0]}."
        chart = line_chart(summary, [Series(name="loss", points=points, spread=spread)], band=True)
    return Figure(
        title="Released loss",
        chart=chart,
        caption="Mean loss per drawn patient over all admitted sites, from noised sums. The band is one standard deviation (1σ) of the "
        "privacy noise alone, by the delta method for a ratio; sampling of patients is not in it.",
        legend=[("loss", "c0"), ("±1σ of noise", "c0 soft")],
        head=("round", "loss", "1σ"),
        rows=_shorten([(str(index), *_cells(loss, 3)) for index, loss in known]),
    )


def _epsilon_figure(data: ReportData) -> Figure:
    limit = data.plan.privacy.epsilon_limit
    many = len(data.sites) > MOST_COLOURS
    series = [
        Series(
            name=site.site,
            points=[
                (round_.index, entry.epsilon_plan)
                for round_ in data.rounds
                for entry in round_.sites
                if entry.site == site.site and entry.epsilon_plan is not None
            ],
            colour="c0" if many else f"c{place}",
        )
        for place, site in enumerate(data.sites)
    ]
    series = [line for line in series if line.points]
    chart = None
    if series:
        ends = ", ".join(f"{line.name} {line.points[-1][1]:.2f}" for line in series[:MOST_COLOURS])
        chart = line_chart(
            f"Epsilon per site and round; limit {limit:g}. Last: {ends}.",
            series,
            reference=Reference(value=limit, words=f"limit {limit:g}"),
            from_zero=True,
        )
    return Figure(
        title="Privacy spent, ε of each site",
        chart=chart,
        caption=f"What this plan's releases could have cost one patient so far, at δ = {plain(data.plan.privacy.delta)}, as each site's "
        "ledger computed and signed it. A site refuses the round that would pass the limit.",
        legend=[(f"{len(series)} sites", "c0")] if many else [(line.name, line.colour) for line in series],
        head=("round", *(site.site for site in data.sites[:MOST_COLOURS])),
        rows=_shorten(
            [
                (str(r.index), *(number({e.site: e.epsilon_plan for e in r.sites}.get(s.site)) for s in data.sites[:MOST_COLOURS]))
                for r in data.rounds
            ]
        ),
    )


def _patients_figure(data: ReportData) -> Figure:
    known = [(round_.index, round_.patients) for round_ in data.rounds]
    points = [(index, count.value) for index, count in known if count is not None]
    spread = [count.std for _, count in known if count is not None]
    expected = data.plan.privacy.expected_patients * data.plan.rounds.steps
    sites = len(data.sites)
    chart = None
    if points:
        chart = line_chart(
            f"Noised number of patients per round; {expected * sites:g} expected when all {sites} sites are admitted.",
            [Series(name="patients", points=points, spread=spread)],
            reference=Reference(value=expected * sites, words="", kind="expected"),
            from_zero=True,
        )
    return Figure(
        title="Patients drawn, noised",
        chart=chart,
        caption=f"Sum over admitted sites. Bars are one standard deviation (1σ) of the privacy noise. The dashed line is the public "
        f"expectation with all {sites} sites: true counts vary about it, because patients are Poisson sampled, and stay at the sites.",
        legend=[("noised count ±1σ", "c0"), (f"public expectation, {expected * sites:g}", "dashed")],
        head=("round", "patients", "1σ", "wire rounding, share of an update's noise"),
        rows=_shorten([(str(r.index), *_cells(r.patients, 1), f"{r.rounding_share:.2%}") for r in data.rounds]),
    )


def _times_figure(data: ReportData) -> Figure:
    rounds = [round_.index for round_ in data.rounds]
    layers = [
        Series(name=words, points=[(round_.index, _seconds(round_.times, key)) for round_ in data.rounds], colour=f"t{place}")
        for place, (key, words) in enumerate(_TIME_LAYERS)
    ]
    means = [sum(value for _, value in layer.points) / max(len(rounds), 1) for layer in layers]
    words = ", ".join(f"{layer.name} {mean:.2f} s" for layer, mean in zip(layers, means, strict=True))
    return Figure(
        title="Where the server's time went",
        chart=stacked_bars(f"Seconds per round, mean of {len(rounds)}: {words}.", rounds, layers) if rounds else None,
        caption=f"Seconds by the server's clock. {slot_words(data)}",
        legend=[(layer.name, layer.colour) for layer in layers],
        head=("round", *(words for _, words in _TIME_LAYERS)),
        rows=_shorten([(str(r.index), *(number(_seconds(r.times, key), 2) for key, _ in _TIME_LAYERS)) for r in data.rounds]),
    )


def _seconds(times: RoundTimes, key: str) -> float:
    return float(getattr(times, key))


def _cells(estimate: Estimate | None, digits: int) -> tuple[str, str]:
    return (number(None), number(None)) if estimate is None else (number(estimate.value, digits), number(estimate.std, digits))


def _shorten(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    if len(rows) <= _MOST_ROWS:
        return rows
    half = _MOST_ROWS // 2
    return [*rows[:half], ("…", *("…" for _ in rows[0][1:])), *rows[-half:]]
