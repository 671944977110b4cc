import re

import numpy as np
import pytest

from pathfed_common.encoder import weights
from pathfed_common.errors import RoundError
from pathfed_common.ids import RunName
from pathfed_common.model import initial_state
from pathfed_server import app, reporting


@pytest.fixture
def planned(server_home, plan_file, member):
    plan = app.publish_plan(server_home.root, plan_file, plan_file.with_suffix(".dsse"))
    for name in ("site-a", "site-b"):
        site = member(name)
        app.add_site(server_home.root, site.card)
        app.add_approval(server_home.root, site.approve(plan.digest))
    app.start_run(server_home.root, plan.digest, RunName("run-1"), [])
    return plan


def test_a_run_without_rounds_has_a_report_that_says_so(server_home, planned, tmp_path):
    out = tmp_path / "report.html"
    reporting.write_report(server_home, RunName("run-1"), out)
    text = out.read_text(encoding="utf-8")
    assert "site-a" in text
    assert "no record yet" in text
    assert not re.search(r"""(?:src|href)=["']https?:""", text)
    assert "NaN" not in text


def test_a_run_that_is_not_there_writes_no_page(server_home, tmp_path):
    with pytest.raises(RoundError, match="PF510"):
        reporting.write_report(server_home, RunName("none"), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_contact_sheet_shows_synthetic_tiles_and_hides_what_the_encoder_does_not_see(planned, tmp_path):
    state = tmp_path / "state.safetensors"
    state.write_bytes(weights.dump(initial_state(planned), {}))
    rows = reporting._contact_sheet(planned, state)
    assert len(rows) == 4
    assert all(png.startswith(b"\x89PNG") for row in rows for png in (row.original, row.masked, row.reconstruction))
    assert [row.original for row in reporting._contact_sheet(planned, state)] == [row.original for row in rows]


def test_hidden_patches_are_grey_and_shown_ones_untouched():
    tiles = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    masked = reporting._masked(tiles, np.array([[0], [3]]), 16)
    assert (masked[0, :16, :16] == tiles[0, :16, :16]).all()
    assert (masked[0, 16:] == 200).all()
    assert (masked[1, 16:, 16:] == tiles[1, 16:, 16:]).all()
    assert (masked[1, :, :16] == 200).all()


@pytest.mark.parametrize(("declared", "rate"), [(0, 0.0), (2, 1.0), (4, 1.0), (40, 0.1)])
def test_the_sampling_rate_in_the_report_is_never_above_one(planned, declared, rate):
    assert reporting._rate(planned, declared) == rate
