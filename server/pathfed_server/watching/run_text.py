"""Where a run stands, in lines for people that fit a terminal of 100 columns."""

import textwrap
from collections.abc import Iterator

from pathfed_common.digest import short
from pathfed_server.db.watch_rows import Outcome, RoundFacts
from pathfed_server.watching.event_lines import COLUMNS, reason
from pathfed_server.watching.run_view import RunView, Trouble
from pathfed_server.watching.spans import duration, moment

_LABEL = 10
#: What a state means for who reads it; the other states say enough.
_STATES = {
    "planned": "planned; a running `pathfed-server start` takes it up",
    "finished": "finished: every round of the plan is committed",
    "stopped": "stopped; `run resume` lets it go on from its last committed round",
    "failed": "failed; `run resume` lets it go on from its last committed round",
    "paused": "paused; `run resume` lets it go on",
}


def run_lines(view: RunView, *, now: float) -> list[str]:
    """A run in lines."""
    lines = [f"{view.run}: {_STATES.get(view.state, view.state)}"]
    if view.code:
        lines.append(_line("why", reason(view.code)))
    lines.append(_line("plan", f"{view.plan_name} ({short(view.plan)})"))
    lines.append(_line("rounds", _progress(view, now)))
    if view.round_s is not None:
        lines.append(_line("pace", _pace(view)))
    lines.append(_line("privacy", _privacy(view)))
    lines.append(_line("attempt", f"{view.attempt}" + (f", failed attempts at this round: {view.failures}" if view.failures else "")))
    if view.round is not None:
        lines.extend(_round(view.round, now))
    for trouble in view.troubles:
        lines.extend(_trouble(trouble))
    return lines


def progress_line(view: RunView) -> str:
    """What a follower is told after each commit."""
    ahead = f", ends about {moment(view.ends_at)}" if view.ends_at is not None else ""
    took = f", {duration(view.round_s)} a round" if view.round_s is not None else ""
    return f"{view.committed} of {view.planned} rounds committed{took}{ahead}"


def _line(label: str, text: str) -> str:
    return f"  {label:<{_LABEL}}{text}"


def _progress(view: RunView, now: float) -> str:
    last = f", the last {moment(view.last_commit_at)} ({duration(max(0.0, now - view.last_commit_at))} ago)" if view.last_commit_at else ""
    return f"{view.committed} of {view.planned} committed{last}"


def _pace(view: RunView) -> str:
    ends = f"; at that pace it ends about {moment(view.ends_at)}" if view.ends_at is not None else ""
    return f"{duration(view.round_s or 0.0)} a round (median){ends}"


def _privacy(view: RunView) -> str:
    if view.epsilon is None:
        return f"nothing stated yet; the plan may cost a patient epsilon {view.epsilon_limit:g} at delta {view.delta:g}"
    least, most = view.epsilon
    spread = f"{most:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
    return f"epsilon {spread} of {view.epsilon_limit:g} spent at delta {view.delta:g}, as the sites state it"


def _round(facts: RoundFacts, now: float) -> Iterator[str]:
    offer = f", offer {facts.attempt}" if facts.attempt > 1 else ""
    why = f", {reason(facts.code)}" if facts.code else ""
    yield _line("round", f"{facts.index}: {facts.state}{offer}{why}{_deadline(facts, now)}")
    width = max((len(each.site) for each in facts.outcomes), default=0)
    for each in facts.outcomes:
        yield _line("", f"{each.site:<{width}}  {outcome_text(each)}".rstrip())


def _deadline(facts: RoundFacts, now: float) -> str:
    if facts.deadline is None or facts.committed_at is not None or facts.state == "failed":
        return ""
    left = facts.deadline - now
    return f", deadline in {duration(left)}" if left >= 0 else f", {duration(-left)} past its deadline"


def outcome_text(outcome: Outcome) -> str:
    """What became of a site: state, and why or when."""
    came = moment(outcome.received_at) if outcome.received_at is not None and outcome.code is None else ""
    return f"{outcome.state:<10}  {reason(outcome.code) or came}"


def _trouble(trouble: Trouble) -> Iterator[str]:
    what = f"round {trouble.round} failed" if trouble.round is not None else "the run failed"
    yield _line("trouble", f"{moment(trouble.at)}  {what}: {reason(trouble.code) or 'no code'}")
    if trouble.do:
        indent = " " * (_LABEL + 2)
        yield from textwrap.wrap(f"do: {trouble.do}", COLUMNS, initial_indent=indent, subsequent_indent=indent)
