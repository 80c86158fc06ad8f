"""Dense against compressed: the main figures, the most important first."""

from __future__ import annotations

from toolchain.outputs import FEATURES
from toolchain.report.record import Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table, number, percent, size


def _draw(report: Report) -> Part:
    dense, small, ratio = report.dense, report.compressed, report.ratio
    rows = [
        ("parameters", number(dense.params), number(small.params), f"{ratio.params:.3f} left"),
        ("MACs per image", number(dense.macs), number(small.macs), f"{ratio.macs:.3f} left"),
        ("ONNX file, fp32", size(dense.bytes), size(small.bytes), f"{ratio.bytes:.3f} left"),
    ]
    if dense.total is not None:
        increase = report.relative_error_increase
        more = "–" if increase is None else f"{100 * increase:+.1f} % errors"
        rows += [
            ("test accuracy", percent(dense.accuracy), percent(small.accuracy), ""),
            (f"wrong of {number(dense.total)}", number(dense.wrong), number(small.wrong), more),
        ]
    if small.error is not None:
        rows.append(("squared error of the outputs", "0", percent(small.error), "of the dense outputs' variance"))
    if (features := small.features) is not None:
        rows.append(("relative error of the features", "0", percent(features.error), "of the dense ones' variance"))
        cosine = "–" if features.cosine is None else f"{features.cosine:.4f}"
        rows.append(("mean cosine with the dense ones", "1", cosine, f"{number(features.images)} test images"))
        if (worst := features.worst) is not None and worst.error_at:
            rows.append(("largest error at a position", "0", percent(worst.error), worst.error_at))
        if (knn := features.knn) is not None:
            change = "" if knn.dense_right is None else f"{knn.right - knn.dense_right:+,} right"
            what = f"k-NN right of {number(knn.total)} (k = {knn.k}, {number(knn.bank)} training images)"
            rows.append((what, number(knn.dense_right), number(knn.right), change))
    for row in report.bench:
        times = (f"{row.dense_ms:.3f} ms", f"{row.compressed_ms:.3f} ms")
        rows.append((str(row), *times, f"{row.ratio.point:.3f} of the time"))
    table = Table("Dense against compressed", ("", "dense", "compressed", "change"), tuple(rows))
    return Part(table.title, _cautions(report), table)


def _cautions(report: Report) -> tuple[str, ...]:
    if report.synthetic:
        used = report.method
        return (
            (
                f"Synthetic images: accuracy is unknown, nothing was trained; neurons by {used.neurons}, "
                f"allocation {used.allocation} (recipe method: {report.requested_method})."
            ),
        )
    if report.output in FEATURES:
        features = report.compressed.features
        if features is None or features.error is None or features.error < FAR:
            return ()
        far = f"The features are far from the dense ones: the error is {percent(features.error)} of their variance"
        return (f"{far}, and a constant has 100 %. Leave more parameters, or calibrate on more images.",)
    reason = report.relative_error_increase_reason
    return (f"There is no relative error increase: {reason}.",) if reason else ()


FAR = 0.5
"""From this error of the features on, a report warns."""
SECTION = Section("headline", _draw)
