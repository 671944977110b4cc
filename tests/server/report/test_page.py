import dataclasses
import re
from html.parser import HTMLParser

import pytest

from pathfed_common.error_catalog import CATALOG
from pathfed_common.errors import ErrorCode
from pathfed_server.report.data import ContactRow, Estimate
from pathfed_server.report.page import MOST_COLOURS, duration, headline, loss_words, plain, png, render, sentence, slot_words, utc

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed wrongly or never."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("size", [{"rounds": 0}, {"rounds": 1, "sites": 1}, {}, {"rounds": 300, "sites": 14}])
def test_runs_of_any_size_give_a_well_formed_page(report, size):
    page = render(report(**size))
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []


def test_page_refers_to_nothing_outside_itself(report):
    page = render(report())
    for address in re.findall(r'(?:src|href|action|url)\s*[=(]\s*"?([^"\s>)]+)', page):
        assert address.startswith(("data:", "#")), address
    assert "<script" not in page
    assert "@import" not in page


def test_hostile_text_stays_text(report):
    data = report()
    hostile = '<img src=x onerror=alert(1)>"&'
    data = dataclasses.replace(
        data,
        state_text=hostile,
        verify_command=hostile,
        files=((hostile, hostile),),
        sites=(dataclasses.replace(data.sites[0], last_code=hostile),),
    )
    page = render(data)
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x") >= 5


def test_page_holds_what_a_reader_looks_for(report):
    data = report()
    page = render(data)
    for wanted in (
        data.run,
        data.plan.digest,
        data.encoder,
        data.verify_command,
        "PF515",
        CATALOG[ErrorCode.SITE_SILENT].title,
        *(site.site for site in data.sites),
        *(path for _, path in data.files),
    ):
        assert str(wanted) in page
    assert page.count("data:image/png;base64,") == 3 * len(data.contact_sheet)
    assert page.count("<figcaption>what it predicts</figcaption>") == len(data.contact_sheet)
    assert page.count('<svg class="chart wide"') == 4


@pytest.mark.parametrize("state", ["verified", "consistent", "failed", "unchecked"])
def test_verdict_is_said_in_words(report, state):
    words = {"verified": "Verified", "consistent": "Consistent", "failed": "Verification failed", "unchecked": "Not verified yet"}
    page = render(report(verdict=state))
    assert f'<section class="verdict {state}"' in page
    assert [word for word in words.values() if re.search(rf'verdict-word">{word}\s*(<code>|</p>)', page)] == [words[state]]


def test_change_inside_the_noise_is_not_called_learning(report):
    [one, *_] = report(rounds=1).rounds

    def with_loss(value, std):
        return type("Round", (), {"loss": Estimate(value=value, std=std)})()

    assert "too little to tell from noise" in loss_words([with_loss(0.8, 0.1), with_loss(0.6, 0.1)])
    assert "fell from 0.800 to 0.400" in loss_words([with_loss(0.8, 0.1), with_loss(0.4, 0.1)])
    assert "rose" in loss_words([with_loss(0.4, 0.1), with_loss(0.8, 0.1)])
    assert "too few" in loss_words([one])


def test_switched_off_reply_slots_are_said(report):
    data = report(rounds=0)
    off = [dataclasses.replace(site, reply_slots=False) for site in data.sites]
    assert slot_words(data) == "Sites answer 1 s, or a multiple of it, after the offer."
    assert slot_words(dataclasses.replace(data, sites=(off[0], *data.sites[1:]))).startswith(f"{off[0].site} has switched reply slots off")
    assert slot_words(dataclasses.replace(data, sites=tuple(off))).startswith("All sites have switched")


def test_replies_that_missed_their_first_slot_are_counted_and_what_that_tells_is_said(report):
    data = report(rounds=4)
    assert slot_words(data).startswith("All 12 replies that wait for time slots came in the first one, 1 s after the offer.")
    rounds = list(data.rounds)
    for index in (0, 2):
        late = dataclasses.replace(rounds[index].sites[1], slot=3)
        rounds[index] = dataclasses.replace(rounds[index], sites=(rounds[index].sites[0], late, rounds[index].sites[2]))
    words = slot_words(dataclasses.replace(data, rounds=tuple(rounds)))
    assert words.startswith("2 of 12 replies missed their first time slot of 1 s (hospital-lake 2):")
    assert "ε does not cover" in words
    assert "in the first one" not in words


def test_sites_beyond_the_colours_share_one(report):
    page = render(report(sites=MOST_COLOURS + 4, rounds=3))
    assert f"{MOST_COLOURS + 4} sites</li>" in page
    assert f"c{MOST_COLOURS}" not in re.findall(r'class="line (c\d+)"', page)


def test_memory_over_the_limit_is_marked(report):
    data = report()
    assert "exceeded" not in render(data)
    heavy = dataclasses.replace(data.memory[-1], together_mb=1600.0)
    assert "exceeded" in render(dataclasses.replace(data, memory=(*data.memory[:-1], heavy)))


def test_figures_at_the_top_come_from_the_run(report):
    cards = {label: (value, remark) for label, value, remark in headline(report())}
    assert cards["Rounds"] == ("12 of 12", "finished")
    assert cards["Sites"] == ("3", "35 of 36 updates admitted")
    assert cards["Encoder"][0] == "5.5 M"


def test_only_png_enters_the_contact_sheet(report):
    with pytest.raises(ValueError, match="PNG"):
        png(b"GIF89a")
    row = ContactRow(original=b"<svg>", made=())
    with pytest.raises(ValueError, match="PNG"):
        render(dataclasses.replace(report(), contact_sheet=(row,)))


@pytest.mark.parametrize(("seconds", "words"), [(0.04, "0.0 s"), (59.4, "59.4 s"), (125, "2 min 05 s"), (7260, "2 h 01 min")])
def test_durations_read_well(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(("words", "read"), [("it ran", "It ran."), ("It ran.", "It ran."), ("", "")])
def test_words_become_sentences(words, read):
    assert sentence(words) == read


def test_times_are_utc_and_small_numbers_plain():
    assert utc(0) == "1970-01-01 00:00:00 UTC"
    assert [plain(value) for value in (1e-6, 0.001, 1e10)] == ["1e-6", "0.001", "1e+10"]
