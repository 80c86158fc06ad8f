"""What other budgets would do, as a table and a drawing."""

from __future__ import annotations

import math

import pytest
from made_up_reports import a_report

from toolchain.compress.outcome import FrontPoint, SizeBudget
from toolchain.report.front import TITLE, front_table
from toolchain.report.page import to_html
from toolchain.report.record import BlockDamage
from toolchain.report.sections.front import OWN, front_figure


def points(*ratios, **files):
    """Damage of e⁻ᵏ at some shares of parameters, and files that are as many times smaller."""
    return tuple(
        FrontPoint(
            ratio={"params": x, "macs": x / 2, **{f"size.{name}": x * share for name, share in files.items()}},
            damage=math.exp(-10 * x),
        )
        for x in ratios
    )


def test_rows_are_the_nearest_choices_within_what_the_front_reaches():
    rows = front_table(points(0.25, 0.31, 0.52, 0.77, 0.95)).rows
    assert [row[0] for row in rows] == ["77.00 %", "52.00 %", "31.00 %"]
    assert rows[0] == ("77.00 %", "38.50 %", "0.00045")
    assert front_table(()).rows == ()


def test_the_drawing_marks_this_run_on_the_line():
    report = a_report().model_copy(
        update={
            "front": points(0.2, 0.5, 0.9),
            "damage": (BlockDamage(block="blocks.0", kind="mlp_hidden", nats=0.01),),
        }
    )
    (figure,) = front_figure(report)
    assert len(figure.line) == 3
    (own,) = (dot for dot in figure.dots if dot.label)
    assert own.label == OWN
    assert next(tick[1] for tick in figure.x_ticks) == "0"
    heights = [dot.y for dot in sorted(figure.dots, key=lambda dot: dot.x) if not dot.label]
    assert heights == sorted(heights), "less damage is further down, and wider is further right"
    assert TITLE in to_html(report)


def test_files_of_several_precisions_are_drawn_by_their_bytes():
    """Rounding is a floor: a file that rounds more ends higher, however wide it is."""
    whole = 4 * a_report().stages[0].params
    sizes = tuple(
        SizeBudget(precision=name, requested=asked, predicted=round(0.06 * whole), reachable=(1, 2), rounding=damage)
        for name, asked, damage in (("int8", None, 1e-4), ("int4", 100_000, 1e-2), ("noise", None, None))
    )
    report = a_report().model_copy(update={"front": points(0.2, 0.5, 0.9, int8=0.25, int4=0.125), "size_budget": sizes})
    (figure,) = front_figure(report)
    assert figure.legend == ("int8", "int4")
    assert figure.line == ()
    assert "bytes" in figure.axes[0]
    by_style = {style: [dot for dot in figure.dots if dot.style == style and not dot.label] for style in (0, 1)}
    assert [len(dots) for dots in by_style.values()] == [3, 3]
    assert max(dot.y for dot in by_style[0]) > max(dot.y for dot in by_style[1])
    assert max(dot.x for dot in by_style[0]) > max(dot.x for dot in by_style[1])
    assert [(dot.label, dot.style) for dot in figure.dots if dot.label] == [(OWN, 1)]


def test_a_run_below_the_front_has_no_point():
    report = a_report()
    assert report.ratio.params < 0.7
    damage = (BlockDamage(block="blocks.0", kind="mlp_hidden", nats=0.01),)
    (figure,) = front_figure(report.model_copy(update={"front": points(0.7, 0.9), "damage": damage}))
    assert not any(dot.label for dot in figure.dots), "damage was not measured there"


@pytest.mark.parametrize("front", [(), points(0.5)], ids=["none", "one point"])
def test_nothing_is_drawn_of_nothing(front):
    assert front_figure(a_report().model_copy(update={"front": front, "size_budget": ()})) == ()
