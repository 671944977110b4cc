import re
from xml.etree import ElementTree

import pytest

from pathfed_server.report.charts import Reference, Series, line_chart, stacked_bars

SVG = "<svg"


def drawings(chart: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(SVG + part) for part in str(chart).split(SVG)[1:]]


def test_chart_is_drawn_for_both_widths_with_a_text_alternative():
    wide, narrow = drawings(line_chart("Loss fell.", [Series(name="loss", points=[(1, 0.5), (2, 0.4)], spread=[0.1, 0.1])], band=True))
    assert (wide.get("class"), narrow.get("class")) == ("chart wide", "chart narrow")
    assert {drawing.get("role") for drawing in (wide, narrow)} == {"img"}
    assert {drawing.get("aria-label") for drawing in (wide, narrow)} == {"Loss fell."}


def test_words_cannot_become_markup():
    chart = line_chart('"><script>x</script>', [Series(name="a", points=[(1, 1.0)])], reference=Reference(value=2, words="<b>&"))
    assert "<script" not in chart
    assert "<b>" not in chart
    assert drawings(chart)


def test_everything_drawn_lies_inside_the_picture():
    series = [Series(name="a", points=[(1, -3.0), (7, 900.0)], spread=[5.0, 40.0]), Series(name="b", points=[(2, 0.01)], colour="c1")]
    for drawing in drawings(line_chart("x", series, reference=Reference(value=1200, words="limit"), from_zero=True)):
        _, _, width, height = (float(part) for part in str(drawing.get("viewBox")).split())
        for part in drawing.iter():
            for key in ("x1", "x2", "cx", "x"):
                assert 0 <= float(part.get(key, 0)) <= width
            for key in ("y1", "y2", "cy", "y"):
                assert 0 <= float(part.get(key, 0)) <= height


def test_higher_values_are_drawn_higher():
    [wide, _] = drawings(line_chart("x", [Series(name="a", points=[(1, 1.0), (2, 3.0), (3, 2.0)])]))
    heights = [float(dot.get("cy", 0)) for dot in wide.iter("circle")]
    assert heights[1] < heights[2] < heights[0]


def test_chart_without_points_is_refused():
    with pytest.raises(ValueError, match="at least one point"):
        line_chart("x", [Series(name="a", points=[])])


def test_bars_stack_without_gaps_and_to_scale():
    layers = [Series(name="a", points=[(1, 2.0)], colour="t0"), Series(name="b", points=[(1, 1.0)], colour="t1")]
    [wide, _] = drawings(stacked_bars("x", [1], layers))
    lower, upper = wide.iter("rect")
    assert float(upper.get("y", 0)) + float(upper.get("height", 0)) == pytest.approx(float(lower.get("y", 0)), abs=0.2)
    assert float(lower.get("height", 0)) == pytest.approx(2 * float(upper.get("height", 0)), abs=0.5)


def test_long_runs_are_grouped_into_means():
    rounds = list(range(1, 301))
    chart = stacked_bars("x", rounds, [Series(name="a", points=[(index, 4.0) for index in rounds], colour="t0")])
    [wide, _] = drawings(chart)
    bars = list(wide.iter("rect"))
    assert len(bars) <= 48
    assert len({bar.get("height") for bar in bars}) == 1


def test_layers_that_do_not_cover_the_rounds_are_refused():
    with pytest.raises(ValueError, match="every layer"):
        stacked_bars("x", [1, 2], [Series(name="a", points=[(1, 1.0)])])


def test_colours_are_named_in_the_style_sheet():
    from pathlib import Path

    import pathfed_server.report as package

    style = (Path(package.__path__[0]) / "report.css").read_text()
    for place in range(8):
        assert re.search(rf"\.line\.c{place}\b", style)
        assert re.search(rf"\.dot\.c{place}\b", style)
        assert place == 0 or re.search(rf"\.swatch\.c{place}\b", style)
    for place in range(4):
        assert re.search(rf"\.fill\.t{place}\b", style)
