from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
from benching import changed
from pages import panels, plots
from pages.accuracy import recorded
from pages.panels import Bars, Cells, Lines, Point, Series
from pages.rows import Table
from records import Record, Results
from suite import Suite


def shares(block: int, kind: str, total: int, removed: int, *, physical: bool = True) -> dict[str, object]:
    return {"block": f"blocks.{block}", "kind": kind, "total": total, "removed": removed, "physical": physical}


def drawn(suite: Suite, results: Results) -> dict[str, str]:
    return {name: svg for name, (_, svg) in plots.draw(Table(suite, of(suite, results))).items()}


def words(svg: str) -> list[str]:
    return re.findall(r">([^<>]+)</text>", svg)


def of(suite: Suite, results: Results) -> tuple[Record, ...]:
    """The records of a suite, in its order."""
    return tuple(recorded(suite, results)[0])


def plan(**result: object) -> Record:
    return Record("tiny", "cell", "compression", "", {}, result, {})


class TestShares:
    def test_a_block_that_is_left_whole_counts_as_nothing_removed(self):
        both = [shares(0, "mlp_hidden", 100, 50), shares(2, "mlp_hidden", 100, 25)]
        record = plan(pruned_shares=both, units={"mlp_hidden": 400})
        assert plots.removed(record) == {("mlp_hidden", True): [50.0, 0.0, 25.0, 0.0]}

    def test_linears_of_one_block_count_together(self):
        record = plan(pruned_shares=[shares(0, "rank", 30, 15), shares(0, "rank", 10, 1)], units={})
        assert plots.removed(record) == {("rank", True): [40.0]}

    def test_kinds_are_kept_apart(self):
        both = [shares(0, "attn_in", 10, 1, physical=False), shares(1, "mlp_hidden", 10, 2)]
        record = plan(pruned_shares=both, units={})
        assert plots.removed(record) == {("attn_in", False): [10.0, 0.0], ("mlp_hidden", True): [0.0, 20.0]}

    def test_a_dense_model_has_none(self):
        assert plots.removed(plan(pruned_shares=[], units={})) == {}


class TestWhatIsDrawn:
    def test_numbers_are_those_of_the_records(self, suite, results):
        table = Table(suite, of(suite, results))
        found = plots.draw(table)
        dense, vtp = (results.read("tiny", f"{row}.zero.tiny_s0") for row in ("dense", "vtp.params0.7"))
        assert dense is not None
        assert vtp is not None
        cells = [word for word in words(found["pruned.tiny.svg"][1]) if word.isdigit()]
        hidden = [share for share in vtp.result["pruned_shares"] if share["kind"] == "mlp_hidden"]
        for share in hidden:
            assert f"{100 * share['removed'] / share['total']:.0f}" in cells
        assert "feed-forward neurons (cut)" in words(found["pruned.tiny.svg"][1])
        assert "attention input (zeroed only)" in words(found["pruned.tiny.svg"][1])
        point = table.against_dense(next(row for row in table.rows if row.name == "vtp.params0.7"))
        assert point is not None
        assert point.point == pytest.approx(vtp.result["test"]["wrong"] / dense.result["test"]["wrong"] - 1)

    def test_another_outcome_is_another_figure(self, suite, results):
        before = drawn(suite, results)
        joint = results.read("tiny", "joint.params0.5.zero.tiny_s0")
        first, *rest = joint.result["pruned_shares"]
        results.save(changed(joint, pruned_shares=[{**first, "removed": first["removed"] - 1}, *rest]))
        after = drawn(suite, results)
        assert [name for name in before if before[name] != after[name]] == ["widths.tiny.svg"]

    def test_both_trainings_have_their_panel(self, suite, results):
        text = words(drawn(suite, results)["increase.tiny.svg"])
        assert {"without training", "after recovery", "joint", "vtp", "parameters left, % of dense"} <= set(text)

    def test_missing_cells_leave_the_others(self, suite, results):
        results.path("tiny", "joint.params0.5.recovered.tiny_s0").unlink()
        results.path("tiny", "vtp.params0.7.zero.tiny_s0").unlink()
        found = drawn(suite, results)
        assert list(found) == ["increase.tiny.svg", "widths.tiny.svg"]
        text = words(found["increase.tiny.svg"])
        assert "joint" in text
        assert "after recovery" not in text
        assert "vtp" not in text

    def test_a_plan_that_is_recorded_only_with_recovery_is_shown_all_the_same(self, suite, results):
        before = drawn(suite, results)["widths.tiny.svg"]
        results.path("tiny", "joint.params0.5.zero.tiny_s0").unlink()
        assert drawn(suite, results)["widths.tiny.svg"] == before

    def test_without_the_dense_model_there_is_nothing_to_compare_with(self, suite, results):
        results.path("tiny", "dense.zero.tiny_s0").unlink()
        assert drawn(suite, results) == {}

    def test_four_rows_of_one_budget_are_bars(self, suite, results):
        rows = Table(suite, of(suite, results))
        joint = next(record for record in rows.records if record.definition["row"] == "joint.params0.5")
        more = tuple(changed(joint, {"row": f"{name}.params0.5", "training": "zero"}) for name in ("b", "c", "d"))
        found = plots.draw(Table(suite, (*rows.records, *more)))
        assert "parts.tiny.svg" in found
        assert "increase.tiny.svg" not in found
        text = words(found["parts.tiny.svg"][1])
        assert [word for word in text if word in ("joint", "b", "c", "d")].count("joint") == 2  # zero and recovered
        assert "50 % of the parameters left" in text

    def test_calibration_images_have_a_figure_of_their_own(self, suite, results):
        table = Table(suite, of(suite, results))
        joint = next(record for record in table.records if record.cell == "joint.params0.5.zero.tiny_s0")
        more = [
            changed(joint, {"row": f"images.{count}", "tried": {plots.IMAGES: count, "budget.params": 0.5}})
            for count in (32, 64, 128, 256, 512)
        ]
        found = plots.draw(Table(suite, (*table.records, *more)))
        assert list(found)[-1] == "calibration.svg"
        assert "parts.tiny.svg" not in found, "the tries of a calibration size are not variants"
        assert {"calibration images", "KL divergence, nats per image", "50 % left"} <= set(
            words(found["calibration.svg"][1])
        )


class TestNumbers:
    def made(self, suite, results) -> dict[str, plots.Drawing]:
        return plots.drawings(Table(suite, of(suite, results)))

    def test_increase(self, suite, results):
        table = Table(suite, of(suite, results))
        zero, recovered = plots.drawings(table)["increase.tiny.svg"].panels
        assert [series.label for series in zero.series] == ["joint", "vtp"]
        assert [series.label for series in recovered.series] == ["joint"]
        assert zero.level is None
        assert recovered.level is None, "there is no dense model that was trained on"
        dense = results.read("tiny", "dense.zero.tiny_s0")
        for series, cell in (
            (zero.series[0], "joint.params0.5.zero"),
            (zero.series[1], "vtp.params0.7.zero"),
            (recovered.series[0], "joint.params0.5.recovered"),
        ):
            record = results.read("tiny", f"{cell}.tiny_s0")
            (point,) = series.points
            assert point.x == pytest.approx(100 * record.result["params"] / record.result["dense"]["params"], abs=1e-5)
            assert point.y == pytest.approx(
                100 * (record.result["test"]["wrong"] / dense.result["test"]["wrong"] - 1), abs=1e-5
            )
            assert point.lo <= point.y <= point.hi
        vtp = zero.series[1].points[0]
        assert vtp.lo < vtp.y < vtp.hi

    def test_the_dense_model_trained_on_is_a_line(self, suite, results):
        records = of(suite, results)
        dense = next(record for record in records if record.definition["row"] == "dense")
        test = results.read("tiny", "vtp.params0.7.zero.tiny_s0").result["test"]
        trained = changed(dense, {"training": "recovered"}, test=test)
        drawing = plots.drawings(Table(suite, (*records, trained)))["increase.tiny.svg"]
        increase = 100 * (test["wrong"] / dense.result["test"]["wrong"] - 1)
        assert drawing.panels[1].level == ("dense, trained on", pytest.approx(increase, abs=1e-5))

    def test_widths_are_what_is_kept(self, suite, results):
        record = results.read("tiny", "joint.params0.5.zero.tiny_s0")
        drawing = self.made(suite, results)["widths.tiny.svg"]
        assert len(drawing.panels) == 2
        for kind, panel in zip(("head_dim", "mlp_hidden"), drawing.panels, strict=True):
            (series,) = panel.series
            assert series.label == "50 % left"
            removed = plots.removed(record)[kind, True]
            assert [point.y for point in series.points] == pytest.approx([100 - gone for gone in removed], abs=1e-5)
            whole = {"head_dim": 16, "mlp_hidden": 128}[kind]
            kept = {each["module"]: each["kept"] for each in record.result["widths"] if each["unit"] == kind}
            for point in series.points:
                part = "attn" if kind == "head_dim" else "mlp"
                assert point.y == pytest.approx(
                    100 * kept.get(f"blocks.{int(point.x)}.{part}", whole) / whole, abs=1e-5
                )

    def test_seeds_are_a_mean_with_its_range(self, suite, results):
        records = of(suite, results)
        first = next(record for record in records if record.cell == "vtp.params0.7.zero.tiny_s0")
        shares = [
            {**s, "removed": 0 if s["kind"] == "mlp_hidden" else s["removed"]} for s in first.result["pruned_shares"]
        ]
        whole = [share for share in shares if share["removed"]]
        second = changed(first, {"seed": 1}, pruned_shares=whole)
        drawing = plots.drawings(Table(suite, (*records, second)))["pruned.tiny.svg"]
        (panel,) = drawing.panels
        hidden = panel.values[panel.rows.index("feed-forward neurons (cut)")]
        alone = plots.removed(first)["mlp_hidden", True]
        assert hidden[:-1] == pytest.approx([share / 2 for share in alone], abs=1e-5)
        assert hidden[-1] == pytest.approx(sum(alone) / 2 / len(alone), abs=1e-5)
        assert panel.columns == ("0", "1", "all")
        assert panel.rule == 2

    def test_bars_are_in_the_order_of_the_suite_and_say_their_training(self, suite, results):
        records = of(suite, results)
        joint = next(record for record in records if record.cell == "joint.params0.5.zero.tiny_s0")
        other = results.read("tiny", "vtp.params0.7.zero.tiny_s0").result["test"]
        more = tuple(changed(joint, {"row": f"{name}.params0.5"}, test=other) for name in ("b", "c", "d"))
        half, most = plots.drawings(Table(suite, (*records, *more)))["parts.tiny.svg"].panels[::-1]
        assert [(label, meaning) for label, _, _, meaning in half.bars] == [
            ("joint", "without training"),
            ("joint", "after recovery"),
            ("b", "without training"),
            ("c", "without training"),
            ("d", "without training"),
        ]
        assert most.title == "70 % of the parameters left"
        dense = results.read("tiny", "dense.zero.tiny_s0")
        for place, test in ((0, joint.result["test"]), (2, other)):
            increase = 100 * (test["wrong"] / dense.result["test"]["wrong"] - 1)
            assert half.bars[place][1].y == pytest.approx(increase, abs=1e-5)
        assert half.bars[2][1].lo < half.bars[2][1].hi

    def test_calibration(self, suite, results):
        records = of(suite, results)
        joint = next(record for record in records if record.cell == "joint.params0.5.zero.tiny_s0")
        more = [
            changed(
                joint,
                {"row": f"images.{n}", "tried": {plots.IMAGES: n}},
                validation={**joint.result["validation"], "kl": 1 / n},
            )
            for n in (32, 64)
        ]
        drawing = plots.drawings(Table(suite, (*records, *more)))["calibration.svg"]
        increase, divergence = drawing.panels
        assert [point.x for point in increase.series[0].points] == [32, 64]
        assert [(point.x, point.y) for point in divergence.series[0].points] == [
            (32, pytest.approx(1 / 32)),
            (64, pytest.approx(1 / 64)),
        ]

    def test_calibration_without_the_dense_model_is_left_out(self, suite, results):
        joint = results.read("tiny", "joint.params0.5.zero.tiny_s0")
        assert plots.drawings(Table(suite, (changed(joint, {"tried": {plots.IMAGES: 32}}),))) == {}

    def test_cost(self, results):
        joint = results.read("tiny", "joint.params0.5.zero.tiny_s0")
        spent = dataclasses.replace(joint, seconds={"damage": 1.5, "closed form": 6})
        drawing = plots.cost([changed(spent, blocks=2, peak_bytes=3 * 2**30)])
        seconds, memory = (panel.series[0] for panel in drawing.panels)
        assert (seconds.label, seconds.points[0].x, seconds.points[0].y) == ("vit_tiny, 2 blocks", 64, 2), (
            "three β are tried"
        )
        assert memory.points[0].y == 3
        assert "vit_tiny, 2 blocks" in words(drawing.svg())


class TestPanels:
    def line(self, high: float) -> Lines:
        points = (Point(20, high, high - 1, high + 1), Point(50, 1, 0, 2))
        return Lines("a panel", "x, %", "y, %", (Series("one", points, 0),))

    def test_a_wide_range_is_stretched_and_says_so(self):
        assert "y, %" in words(panels.lines([self.line(5)], shared=True))
        assert "y, % (logarithmic above 10)" in words(panels.lines([self.line(150)], shared=True))

    def test_bars_carry_their_numbers(self):
        made = panels.bars(
            [Bars("p", "x", (("a", Point(0, 2.04, 1, 3), 0, "m"), ("b", Point(0, -1.5, -2, -1), 1, "n")))]
        )
        assert {"a", "b", "+2.0", "\N{MINUS SIGN}1.5", "m", "n"} <= set(words(made))

    def test_cells_carry_their_numbers(self):
        made = panels.cells([Cells("p", ("r",), ("0", "all"), ((12.3, 98.7),), "block", 1)])
        assert {"r", "0", "all", "12", "99", "block"} <= set(words(made))

    def test_equal_numbers_give_equal_bytes_and_others_another_digest(self):
        assert panels.lines([self.line(5)]) == panels.lines([self.line(5)])
        digests = [re.search(r"numbers (\w+)", panels.lines([self.line(high)])) for high in (5, 6)]
        assert digests[0] is not None
        assert digests[1] is not None
        assert digests[0][1] != digests[1][1]

    def test_last_bits_in_which_processors_differ_are_no_other_numbers_and_a_seventh_digit_is(self):
        drawn = [panels.lines([self.line(high)]) for high in (5.1, math.nextafter(5.1, 6), 5.100001)]
        digests = [re.findall(r"numbers (\w+)", svg) for svg in drawn]
        assert drawn[0] == drawn[1]
        assert digests[0] != digests[2]

    def test_an_interval_of_resamples_may_miss_its_point(self):
        made = panels.lines([Lines("", "x", "y", (Series("s", (Point(1, 0.5, 0.6, 0.7),), 0),))])
        assert "nan" not in made

    def test_neighbouring_lines_can_be_told_apart_without_colours(self):
        def grey(colour: str) -> float:
            return float(np.dot([int(colour[i : i + 2], 16) for i in (1, 3, 5)], [0.299, 0.587, 0.114]))

        assert len(set(panels.COLOURS)) == len(panels.COLOURS) == len(set(panels.MARKERS))
        levels = [grey(colour) for colour in panels.COLOURS[:2]]
        assert abs(levels[0] - levels[1]) > 10
