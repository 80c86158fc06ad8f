"""Plain tables of text, which a terminal, Markdown and a page draw, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.outputs import Output, divergence_words

if TYPE_CHECKING:  # a table is drawn without what some tables are of
    from toolchain.report.record import Counts
    from toolchain.training.outcome import Features, FinetuneFacts


@dataclass(frozen=True)
class Table:
    """A titled table of text; `text` are the columns that hold words, the others hold numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: tuple[int, ...] = (0,)

    def without_blanks(self) -> Table:
        """The same without the columns in which no row says anything."""
        kept = [index for index in range(len(self.header)) if any(row[index] not in ("", "–") for row in self.rows)]
        rows = tuple(tuple(row[index] for index in kept) for row in self.rows)
        header, text = tuple(self.header[index] for index in kept), [kept.index(i) for i in self.text if i in kept]
        return Table(self.title, header, rows, tuple(text))


def number(value: float | None) -> str:
    """1_234_567 → "1,234,567"; None → "–"."""
    return "–" if value is None else f"{value:,.0f}"


def size(size_bytes: float | None) -> str:
    """Bytes in kB or MB of powers of 1000."""
    if size_bytes is None:
        return "–"
    return f"{size_bytes / 1e6:,.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:,.1f} kB"


def operations(macs: float | None) -> str:
    """MACs in M or G: 20_507_392 → "20.51 M"."""
    if macs is None:
        return "–"
    return f"{macs / 1e9:,.2f} G" if macs >= 1e9 else f"{macs / 1e6:,.2f} M"


def percent(share: float | None) -> str:
    """0.972 → "97.20 %"."""
    return "–" if share is None else f"{100 * share:.2f} %"


def call_words(batch: int, threads: int) -> str:
    """A call of a file, in words: "batch 1, 2 threads"."""
    return f"batch {batch}, {threads} thread{'s' * (threads > 1)}"


def counted(rows: Sequence[Counts]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(headers, cells of each row) of what is known of how right some forms of a model are."""
    if any(row.error is not None for row in rows):
        return ("squared error",), [(percent(row.error),) for row in rows]
    known = [row.features for row in rows if row.features is not None]
    if known:
        votes = [each.knn for each in known if each.knn is not None]
        header = ("relative error", "cosine", *([f"k-NN right of {number(votes[0].total)}"] if votes else []))
        return header, [_feature_cells(row.features, len(header)) for row in rows]
    totals = [row.total for row in rows if row.total is not None]
    wrong = f"wrong of {number(max(totals))}" if totals else "wrong"
    return ("accuracy", wrong), [(percent(row.accuracy), number(row.wrong)) for row in rows]


def _feature_cells(features: Features | None, count: int) -> tuple[str, ...]:
    if features is None:
        return ("–",) * count
    cosine = "–" if features.cosine is None else f"{features.cosine:.4f}"
    return (percent(features.error), cosine, number(features.knn.right if features.knn else None))[:count]


def loss_words(row: Counts) -> str:
    """What `loss_of` is a share of, as the name of an axis."""
    if row.features is not None:
        return "relative error" if row.features.knn is None else "images that k-NN gets wrong"
    return "squared error" if row.error is not None else "images wrong"


def features_lines(features: Features) -> tuple[str, ...]:
    """How good features are, in sentences."""
    lines = []
    if features.cosine is not None:
        known = "There is no relative error: the dense features do not vary. The"
        said = (
            known if features.error is None else f"The relative error of the features is {percent(features.error)}, the"
        )
        on = "" if features.images is None else f" on {number(features.images)} images"
        lines.append(f"{said} mean cosine {'is ' if features.error is None else ''}{features.cosine:.4f}{on}.")
    if (worst := features.worst) is not None and worst.error_at:
        lines.append(
            f"Worst are {percent(worst.error)} at {worst.error_at} and a cosine of {worst.cosine:.4f} at {worst.cosine_at}."
        )
    if (knn := features.knn) is not None:
        dense = "" if knn.dense_right is None else f"; {number(knn.dense_right)} by the dense ones"
        share = percent(knn.right / knn.total)
        searched = f"{knn.k} of {number(knn.bank)} training images"
        lines.append(f"k-NN, {searched}: {number(knn.right)} of {number(knn.total)} images right ({share}){dense}.")
    return tuple(lines)


def finetune_line(facts: FinetuneFacts, output: Output = "logits") -> str:
    """What fine-tuning did on validation, and which model it kept."""
    if facts.judged_by == "errors":
        before, after = number(facts.before), number(facts.after)
        counted = f"{before} of {number(facts.images)} validation images wrong before, {after} after"
    else:
        before, after = ("not a number" if end is None else f"{end:.3g}" for end in (facts.before, facts.after))
        counted = (
            f"without labels, {divergence_words(output)} from the dense model {before} before, {after} after "
            f"({number(facts.images)} validation images)"
        )
    return f"Fine-tuning: {counted}; the model {facts.kept} it was kept."
