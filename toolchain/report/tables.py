"""Plain tables of text, which a terminal, Markdown and a page draw, and how numbers are written in them."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.outputs import Output, divergence_words
from toolchain.training.stages import FinetuneFacts


@dataclass(frozen=True)
class Table:
    """A titled table of text; `text` are the columns that hold words, the others hold numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: tuple[int, ...] = (0,)


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
