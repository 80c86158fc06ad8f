"""Quality against size and time: what is drawn, and where its labels stand."""

from __future__ import annotations

from itertools import combinations

from hypothesis import example, given
from hypothesis import strategies as st
from made_up_reports import a_report, timed

from toolchain.report.figures import LABEL, TALL, Axis, Point, scatter
from toolchain.report.markdown import to_markdown
from toolchain.report.record import FileRow
from toolchain.report.sections import SECTIONS

FILES = tuple(
    FileRow(path=f"onnx/{model}.fp32.onnx", model=model, precision="fp32", bytes=4, wrong=wrong, total=359)
    for model, wrong in (("dense", 14), ("compressed", 18))
)
FOLDERS = {"target": "eager", "baseline": "dense", "path": "deploy"}


def drawn(*bench):
    """The part, and the (target, label, share of images wrong) of each dot of its last drawing, which may be that by bytes."""
    part = SECTIONS["quality"].draw(a_report().model_copy(update={"artifacts": FILES, "bench": bench}))
    *_, figure = part.figures
    low, high = (float(text.removesuffix(" %")) for _, text in (figure.y_ticks[0], figure.y_ticks[-1]))
    share = {dot: (low + (high - low) * (1 - dot.y / TALL)) / 100 for dot in figure.dots}
    return part, {(figure.legend[dot.style], dot.label, round(359 * share[dot])) for dot in figure.dots}


def test_a_runtime_that_times_model_folders_is_drawn_as_any_other():
    _, dots = drawn(timed("fp32", 0.6), timed("fp32", 0.7, **FOLDERS))
    wrong = {("dense", 14), ("fp32", 18)}
    assert dots == {(target, *each) for target in ("ort-cpu", "eager") for each in wrong}


def test_comparisons_that_are_not_drawn_are_counted():
    part, dots = drawn(
        timed("fp32", 0.6), timed("fp32", 0.6, "invalid", **FOLDERS), timed("fp32", 0.6, "inconclusive", "pi")
    )
    assert {target for target, *_ in dots} == {"ort-cpu"}
    assert part.lines == ("The drawings leave out 2 comparisons, which are invalid or inconclusive.",)
    part, _ = drawn(timed("fp32", 0.6, "invalid"))
    assert part.lines == ("The drawings leave out one comparison, which is invalid or inconclusive.",)
    assert len(part.figures) == 1
    assert drawn(timed("fp32", 0.6))[0].lines == ()


def test_markdown_has_no_heading_of_what_is_only_drawn():
    shown = a_report().model_copy(update={"artifacts": FILES, "bench": ()})
    assert drawn()[0].figures
    assert drawn()[0].title not in to_markdown(shown)


POINTS = st.builds(
    Point,
    st.integers(0, 60).map(lambda n: n / 20),
    st.integers(0, 40).map(lambda n: n / 359),
    st.sampled_from(["a", "int8-dynamic"]),
)


@given(st.lists(POINTS, min_size=1, max_size=12))
@example([Point(1.0, 1.0, "int8-dynamic")] * 12)
@example([Point(1.0, 0.0, "dense"), *[Point(1.0, 1.0, "int8-dynamic")] * 5])
def test_labels_stay_at_the_plot_and_cover_no_other(points):
    dots = scatter(points, (Axis("ms"), Axis("images wrong")), "Each file by its time").dots
    assert all(-10 <= dot.label_y <= TALL + 10 for dot in dots)
    for one, other in combinations(dots, 2):
        apart = abs(one.label_y - other.label_y) >= LABEL - 1e-6
        assert apart or one.x + 7 * len(one.label) < other.x or other.x + 7 * len(other.label) < one.x
