from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from lightllm.plot import Curve, plot, ticks

SVG = "{http://www.w3.org/2000/svg}"


def texts(document: str) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(document).iter(f"{SVG}text")]


def test_points_are_where_their_values_are() -> None:
    points = [(100.0, 3.0), (200.0, 2.0), (300.0, 2.5)]
    root = ElementTree.fromstring(plot([Curve("files", points, line=False, dots=True)], "MB", "nats"))
    places = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in root.iter(f"{SVG}circle")]
    assert len(places) == 3
    (x1, y1), (x2, y2), (x3, y3) = places
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 < y3 < y2  # the larger the loss, the higher up
    assert y2 - y1 == pytest.approx(2 * (y2 - y3), abs=0.2)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert all(0 < x < width and 0 < y < height for x, y in places)


def test_a_line_goes_through_the_numbers_alone() -> None:
    curve = Curve("loss", [(0, 1.0), (1, math.nan), (2, 2.0), (3, math.inf)])
    root = ElementTree.fromstring(plot([curve], "step", "loss"))
    (line,) = [path for path in root.iter(f"{SVG}path") if path.attrib.get("stroke-width") == "1.3"]
    assert line.attrib["d"].count("L") == 1
    assert not list(root.iter(f"{SVG}circle"))


def test_labels_and_notes_are_text_and_may_hold_any_sign() -> None:
    document = plot([Curve("a < b", [(1, 1), (2, 2)], ["R&D", ""], dots=True)], "x & y", "<loss>")
    told = texts(document)
    assert {"a < b", "R&D", "x & y", "<loss>"} <= set(told)
    assert "" not in told


def test_notes_of_points_in_one_place_are_not_drawn_over_each_other() -> None:
    names = ["dense", "pruned", "trained", "exported"]
    document = plot([Curve("", [(1, 1.0 + index * 1e-6) for index in range(4)] + [(2, 2.0)], names)], "x", "y")
    found = [one for one in ElementTree.fromstring(document).iter(f"{SVG}text") if one.text in names]
    lines = sorted(float(one.attrib["y"]) for one in found)
    assert all(after - before >= 12 for before, after in pairwise(lines))


def test_one_point_is_drawn_and_none_is_refused() -> None:
    assert "circle" in plot([Curve("", [(5, 0.0)], dots=True)], "x", "y")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot([Curve("", [(math.nan, 1.0)])], "x", "y")


def test_the_same_numbers_make_the_same_file() -> None:
    curves = [Curve("one", [(0, 1), (1, 2)]), Curve("two", [(0, 2), (1, 1)], dots=True)]
    assert plot(curves, "x", "y") == plot(curves, "x", "y")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 6.0, [0, 1, 2, 3, 4, 5, 6]),
        (1.93, 2.61, [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6]),
        (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (70.0, 540.0, [100, 200, 300, 400, 500]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
