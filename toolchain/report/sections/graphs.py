"""Nodes of each operator: as torch exported the dense and the compressed model, and in each file."""

from __future__ import annotations

from collections import Counter

from toolchain.report.record import Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table, number


def _draw(report: Report) -> Part:
    columns = {}
    for name, graph in report.graphs.items():
        if name in ("dense", "compressed"):
            columns[f"{name}, exported"] = graph.nodes_before
        columns[name] = graph.nodes_after
    totals = sum(map(Counter, columns.values()), Counter[str]())
    ordered = sorted(totals, key=lambda operator: (-totals[operator], operator))
    rows = [(name, *(number(nodes.get(name, 0)) for nodes in columns.values())) for name in ordered]
    rows.append(("all", *(number(sum(nodes.values())) for nodes in columns.values())))
    table = Table("Nodes", ("operator", *columns), tuple(rows) if ordered else ())
    return Part(table.title, table=table, brief=())


SECTION = Section("graphs", _draw)
