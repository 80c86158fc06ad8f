"""Pages of every suite, and cards of `models/`, from records alone: `python benchmarks/report.py [SUITE…]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import cards
import headline
from pages import page_of
from records import Results
from suite import SUITES, Suite

from toolchain.errors import SlimvitError
from toolchain.files import write_text

HERE = Path(__file__).resolve().parent


def regenerate(suite: Suite, results: Results) -> dict[str, str]:
    """File name → text of everything that follows from a suite's records; empty if there are none."""
    return page_of(suite.file.page)(suite, results)


def main(names: Sequence[str], results: Path = HERE / "results") -> int:
    """0 after the pages of the named suites, or of all, what `docs/` shows of them, and the cards of `models/`, were written."""
    try:
        for path in [Path(name) for name in names] or sorted(SUITES.glob("*.toml")):
            suite = Suite.load(path)
            for name, text in regenerate(suite, Results(results)).items():
                write_text(results / suite.name / name, text)
                print(results / suite.name / name)
        drawn = (headline.drawn, cards.drawn)
        for path, text in () if names else (item for draw in drawn for item in draw(Results(results)).items()):
            write_text(path, text)
            print(path)
    except SlimvitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
