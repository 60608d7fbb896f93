"""Axes and marks of charts."""

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cisformer.evaluation.svg import Chart, Scale

SVG = "{http://www.w3.org/2000/svg}"


def _parsed(chart):
    return ET.fromstring(chart.svg().replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
@example(1.0, 400_001.0, 2)
def test_linear_ticks_are_round_and_inside(low, width, wanted):
    scale = Scale(low, low + width)
    ticks = scale.ticks(wanted)
    assert all(scale.low - 1e-9 <= tick <= scale.high + 1e-6 for tick in ticks)
    assert 1 <= len(ticks) <= wanted + 1 or width < 1e-2


@given(st.floats(1e-6, 1), st.floats(0.1, 6))
def test_log_ticks_are_inside(low, decades):
    scale = Scale(low, low * 10**decades, "log")
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks())


def test_places():
    assert Scale(10, 20).place(15) == 0.5
    assert Scale(0.01, 1, "log").place(0.1) == pytest.approx(0.5)
    assert Scale.over([None, math.nan, 3.0, 5.0]).place(4.0) == pytest.approx(0.5)


def test_points_land_where_the_scale_says_and_undefined_ones_are_left_out():
    chart = Chart("t", "d", Scale(0, 10), Scale(0, 10), width=120, height=120, margins=(10, 10, 10, 10))
    chart.line([0, 5, 10, 7], [0, 5, 10, None], "c0", name="model")
    tree = _parsed(chart)
    assert tree.find(f"{SVG}polyline").get("points") == "10.0,110.0 60.0,60.0 110.0,10.0"
    assert [c.find(f"{SVG}title").text for c in tree.iter(f"{SVG}circle")] == [
        "model: 0, 0",
        "model: 5, 5",
        "model: 10, 10",
    ]


def test_names_are_escaped_and_charts_are_titled():
    chart = Chart("a < b", "say & tell", Scale(0, 1), Scale(0, 1), "x & y")
    chart.text(0.5, 0.5, "<script>")
    tree = _parsed(chart)
    assert tree.find(f"{SVG}title").text == "a < b"
    assert tree.get("aria-labelledby").split() == [
        tree.find(f"{SVG}title").get("id"),
        tree.find(f"{SVG}desc").get("id"),
    ]


def test_points_beyond_the_frame_lie_on_its_edge():
    chart = Chart("t", "d", Scale(0, 1), Scale(0, 1), width=100, height=100, margins=(0, 0, 0, 0))
    assert chart.at(5, -3) == (100, 100)
