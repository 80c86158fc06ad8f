"""report.html: one self-contained page, drawn without a script and without a request."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from toolchain.report.claim import claim as claim_of
from toolchain.report.figures import BAR, LEFT, MARGIN, RIGHT, WIDTH
from toolchain.report.markdown import origin, title
from toolchain.report.record import Report
from toolchain.report.sections import Part, parts


def to_html(report: Report) -> str:
    """The report as one HTML page, every number from report.json."""
    return drawn(title(report), origin(report), list(parts(report)), claim_of(report))


def drawn(title: str, origin: str, parts: Sequence[Part], claim: str = "") -> str:
    """Some parts as one page, under a title, what they claim, and a line that says where they are from."""
    environment = Environment(loader=PackageLoader("toolchain.report"), autoescape=True, undefined=StrictUndefined)
    page: str = environment.get_template("page.html.j2").render(
        title=title,
        origin=origin,
        claim=claim,
        parts=parts,
        geometry={"bar": BAR, "left": LEFT, "width": WIDTH, "margin": MARGIN, "right": WIDTH - RIGHT},
    )
    return page
