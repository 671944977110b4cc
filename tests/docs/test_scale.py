"""docs/scale.md has the tables that the model gives, and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pathfed_local.plan_traffic import fewer_rounds, time_rows, traffic_rows
from pathfed_local.traffic_model import Conditions, Variant, variants

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
NUMBERS = 1.9e9
ALL = variants(NUMBERS)
BY_NAME = {one.name: one for one in ALL}
WIRE = [BY_NAME["bfloat16"], BY_NAME["int8"]]
DEFAULT = Conditions()
LINES = [replace(DEFAULT, site_mbit_s=site, server_mbit_s=server) for site in (100.0, 1000.0) for server in (1000.0, 10_000.0)]
FAST = replace(DEFAULT, server_mbit_s=10_000.0)

TABLES: dict[str, list[dict[str, Any]]] = {
    "a round by lines and number type": time_rows(WIRE, LINES),
    "what travels": traffic_rows(list(ALL), DEFAULT.sites, 100),
    "what helps": time_rows(list(ALL), [DEFAULT]),
    "fewer and larger rounds": fewer_rounds(BY_NAME["int8"].load, FAST, rounds=400, factors=(1, 4, 16)),
}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a table of the page."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@pytest.mark.parametrize("name", TABLES)
def test_each_table_is_what_the_model_gives(name: str) -> None:
    assert table(TABLES[name]) in PAGE.read_text(encoding="utf-8"), f"{name} should be\n{table(TABLES[name])}"


def test_a_model_that_changed_is_found() -> None:
    """Of another size, no table is in the page."""
    page = PAGE.read_text(encoding="utf-8")
    assert table(traffic_rows(list(variants(2.0e9)), DEFAULT.sites, 100)) not in page
    assert table(time_rows([Variant("bfloat16", WIRE[0].load)], [replace(DEFAULT, sites=51)])) not in page


def test_every_default_stands_in_the_table_of_sources() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for shown in (
        f"{DEFAULT.compute_s:g} s",
        f"{DEFAULT.admission_gb_s:g} GB/s",
        f"{DEFAULT.aggregation_gb_s:g} GB/s",
        f"{DEFAULT.step_gb_s:g} GB/s",
        "0.94",
    ):
        assert f"| {shown} |" in page, shown
