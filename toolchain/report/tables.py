"""Plain tables of text, which a terminal, Markdown and a page draw, and how numbers are written in them."""

from __future__ import annotations

from dataclasses import dataclass


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
