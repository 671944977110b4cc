"""`pathfed plan traffic`: the model of `traffic_model.py`, as people and scripts read it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NoReturn

from pathfed_common.errors import ErrorCode, HostError
from pathfed_local.plan_privacy import read_any_plan
from pathfed_local.traffic_model import Conditions, Load, RoundTime, Variant, limiting_line, round_time, variants

#: Rounds, where neither a plan nor an option says how many.
_ROUNDS: Final = 100


def time_rows(chosen: Sequence[Variant], conditions: Sequence[Conditions]) -> list[dict[str, Any]]:
    """A row for each variant under each of the conditions, as people read it."""
    rows = []
    for given in conditions:
        for variant in chosen:
            found = round_time(variant.load, given)
            rows.append(
                {
                    "site line": line(given.site_mbit_s),
                    "server line": line(given.server_mbit_s),
                    "update": variant.name,
                    "round": duration(found.total_s),
                    **{name: duration(found.stages[name]) for name in ("download", "upload", "admission", "aggregation", "step")},
                    "bottleneck": found.bottleneck,
                }
            )
    return rows


def traffic_rows(chosen: Sequence[Variant], sites: int, rounds: int) -> list[dict[str, Any]]:
    """What a round moves, and what so many rounds do."""
    rows = []
    for variant in chosen:
        sent, received = sites * variant.load.down, sites * variant.load.up
        rows.append(
            {
                "update": variant.name,
                "to a site": size(variant.load.down),
                "from a site": size(variant.load.up),
                "server sends": size(sent),
                "server receives": size(received),
                f"in {rounds} rounds": size(rounds * (sent + received)),
                "spool on the server's disk": size(received),
            }
        )
    return rows


def fewer_rounds(load: Load, conditions: Conditions, *, rounds: int, factors: Sequence[int]) -> list[dict[str, Any]]:
    """The same private steps in fewer rounds, each with as many times the work: what is left of the time and of the traffic."""
    rows = []
    for factor in factors:
        found = round_time(load, replace(conditions, compute_s=conditions.compute_s * factor))
        count = rounds / factor
        rows.append(
            {
                "rounds": f"{count:,.0f}",
                "compute in each": duration(found.compute_s),
                "a round": duration(found.total_s),
                "all rounds": duration(count * found.total_s),
                "server sends and receives": size(count * (found.sent + found.received)),
                "share of time that computes": f"{100 * found.compute_s / found.total_s:.0f}%",
            }
        )
    return rows


def line(mbit_s: float) -> str:
    """A line as it is sold."""
    return f"{mbit_s / 1000:g} Gbit/s" if mbit_s >= 1000 else f"{mbit_s:g} Mbit/s"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 86400:,.3g} days" if seconds < 86400 * 999 else f"{seconds / 86400:,.0f} days"


def size(count: float) -> str:
    """Bytes as people say them, in steps of 1000."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"


@dataclass(frozen=True, kw_only=True)
class TrafficReport:
    """What `pathfed plan traffic` says.

    Attributes:
        subject: what travels, as told to people.
        chosen: as the plan has it, or a whole model in bfloat16.
        alternatives: the same model in other ways.
        conditions: lines and machines.
        rounds: of the run.
    """

    subject: str
    chosen: Load
    alternatives: tuple[Variant, ...]
    conditions: Conditions
    rounds: int

    @property
    def time(self) -> RoundTime:
        """The round as chosen."""
        return round_time(self.chosen, self.conditions)

    def figures(self) -> dict[str, str]:
        """For people."""
        found = self.time
        return {
            "to a site": size(self.chosen.down),
            "from a site": size(self.chosen.up),
            "server sends": size(found.sent),
            "server receives": size(found.received),
            "a round": duration(found.total_s),
            f"{self.rounds} rounds": duration(self.rounds * found.total_s),
            "slowest stage": found.bottleneck,
            "whose line bounds transfers": f"the {limiting_line(self.conditions)}'s",
        }

    def stages(self) -> list[dict[str, str]]:
        """Each stage of the round."""
        found = self.time
        return [
            {"stage": name, "takes": duration(seconds), "share": f"{100 * seconds / found.total_s:.0f}%"}
            for name, seconds in found.stages.items()
        ]

    def others(self) -> list[dict[str, Any]]:
        """The alternatives in a few words."""
        rows = time_rows(self.alternatives, [self.conditions])
        moved = traffic_rows(self.alternatives, self.conditions.sites, self.rounds)
        return [
            {"update": row["update"], "round": row["round"], "slowest stage": row["bottleneck"], **_moved(traffic)}
            for row, traffic in zip(rows, moved, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """For scripts: seconds and bytes."""
        return {
            "subject": self.subject,
            "sites": self.conditions.sites,
            "rounds": self.rounds,
            "limiting_line": limiting_line(self.conditions),
            **_plain("as chosen", self.chosen, self.conditions),
            "alternatives": [_plain(one.name, one.load, self.conditions) for one in self.alternatives],
        }


def traffic_report(
    file: Path | None, parameters: float | None, conditions: Conditions, *, rounds: int | None, slot_s: float | None
) -> TrafficReport:
    """The report for a plan's file, or for a model of so many numbers.

    Raises:
        HostError: PF905, neither or both are given, or a number is out of bounds; PF904, the file cannot be read.
        PlanError: PF1xx, it is no plan.
    """
    if (file is None) == (parameters is None):
        _refuse("a plan or a number of parameters is needed, and not both", "PLAN", None, "give a plan's file, or --parameters 1.9e9")
    if file is None:
        numbers = parameters or 0.0
        if not (math.isfinite(numbers) and 1 <= numbers <= 1e13):
            _refuse("no model has so many numbers", "--parameters", numbers, "give 1 to 1e13, such as 1.9e9")
        chosen, subject = Load.of_numbers(numbers, "bfloat16"), f"{numbers:.3g} numbers in bfloat16"
        return TrafficReport(
            subject=subject,
            chosen=chosen,
            alternatives=variants(numbers),
            conditions=replace(conditions, slot_s=slot_s or 0.0),
            rounds=rounds or _ROUNDS,
        )
    plan = read_any_plan(file)
    chosen = Load.of_plan(plan)
    return TrafficReport(
        subject=plan.name,
        chosen=chosen,
        alternatives=variants(chosen.state_numbers, slots=chosen.slots),
        conditions=replace(conditions, slot_s=plan.rounds.reply_slot_s if slot_s is None else slot_s),
        rounds=rounds or plan.rounds.count,
    )


def _moved(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("server sends", "server receives")}


def _plain(name: str, load: Load, conditions: Conditions) -> dict[str, Any]:
    found = round_time(load, conditions)
    return {
        "update": name,
        "down_bytes": load.down,
        "up_bytes": load.up,
        "server_sends_bytes": found.sent,
        "server_receives_bytes": found.received,
        "round_s": found.total_s,
        "stages_s": found.stages,
        "bottleneck": found.bottleneck,
    }


def _refuse(what: str, where: str, value: object, remedy: str) -> NoReturn:
    raise HostError(ErrorCode.SETTINGS_INVALID, what, where=where, value=value, remedy=remedy)
