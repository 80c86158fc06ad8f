"""report.html: one self-contained page, drawn without a script and without a request."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from toolchain.report.figures import BAR, LEFT, WIDTH
from toolchain.report.markdown import origin, title
from toolchain.report.record import Report
from toolchain.report.sections import parts


def to_html(report: Report) -> str:
    """The report as one HTML page, every number from report.json."""
    environment = Environment(loader=PackageLoader("toolchain.report"), autoescape=True, undefined=StrictUndefined)
    page: str = environment.get_template("page.html.j2").render(
        title=title(report),
        origin=origin(report),
        parts=list(parts(report)),
        geometry={"bar": BAR, "left": LEFT, "width": WIDTH},
    )
    return page
