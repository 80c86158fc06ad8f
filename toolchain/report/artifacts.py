"""The files that could ship, side by side: size, download, accuracy, latency; and which of them to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.export.precision import EITHER_OF

COUNTS = ("accuracy", "wrong", "total", "error")


def artifact_rows(facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each ONNX file of a run: the dense one, the compressed one, then its other precisions.

    A file that was refused, because it is not the same model, has a row with the reason and no size.
    """
    rows = []
    for name, stage in facts.items():
        if not name.startswith("onnx-"):
            continue
        which = "dense" if name == "onnx-dense" else "compressed"
        precision = stage.get("precision", "fp32")
        rows.append(
            {
                "path": f"onnx/{which}.{precision}.onnx",
                "model": which,
                "precision": precision,
                "bytes": stage.get("bytes"),
                "download_bytes": stage.get("download_bytes"),
                **{key: stage.get(key) for key in COUNTS},
                "judged_on": stage.get("judged_on", "ort-cpu"),
                "refused": stage.get("refused"),
            }
        )
    return rows


def engine_rows(facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each engine of a run: what it weighs beside the dense ONNX file, what it multiplies in, what was compared.

    Args:
        facts: what the stages found, by name.
    """
    dense = facts["onnx-dense"]["bytes"]
    return [
        {
            **{key: value for key, value in found.items() if key not in ("parity", "seconds")},
            "of_dense": found["bytes"] / dense,
            "verdict": found["parity"][0]["verdict"],
        }
        for name, found in facts.items()
        if name.startswith("engine-") and "bytes" in found
    ]


def layer_rows(facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Layer → bytes in the dense fp32 file, and in each file that could ship."""
    files = {
        row["path"]: facts[name].get("layers") or {}
        for name, row in zip((n for n in facts if n.startswith("onnx-")), artifact_rows(facts), strict=True)
        if row["refused"] is None
    }
    layers = dict.fromkeys(layer for found in files.values() for layer in found)
    return [{"layer": layer, "bytes": {path: found.get(layer, 0) for path, found in files.items()}} for layer in layers]


def suggestion(
    rows: Sequence[Mapping[str, Any]],
    bench: Sequence[Mapping[str, Any]],
    accuracy_loss: float,
    int8: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Which compressed file to take: the smallest, and on each target the fastest, within an accuracy limit.

    Args:
        rows: of `artifact_rows`.
        bench: the report's rows of latency.
        int8: what `int8_choices` found; on each of its targets the other kind of int8 is no candidate for the fastest.
        accuracy_loss: how much less accurate than the compressed fp32 file a file may be, as a share of the images; without
            labels every file that passed parity is within it.
    """
    offered = [row for row in rows if row["model"] == "compressed" and row["refused"] is None]
    whole = next(row for row in offered if row["precision"] == "fp32")

    def within(row: Mapping[str, Any]) -> bool:
        return bool(whole["total"] is None or row["wrong"] - whole["wrong"] <= accuracy_loss * whole["total"])

    good = {row["precision"]: row for row in offered if within(row)}
    fastest = []
    for key in dict.fromkeys((row["target"], row["batch"], row["threads"]) for row in bench):
        timed = [
            row
            for row in bench
            if (row["target"], row["batch"], row["threads"]) == key
            and row["precision"] in good
            and row["verdict"] not in ("invalid", "inconclusive")
            and not (_slower_kind(row, int8) and set(EITHER_OF) <= set(good))
        ]
        if timed:
            best = min(timed, key=lambda row: row["ratio"]["point"])
            where = dict(zip(("target", "batch", "threads"), key, strict=True))
            path = (
                "deploy" if best["target"] == "eager" else good[best["precision"]]["path"]
            )  # eager runs model folders
            fastest.append({**where, "path": path, "ratio": best["ratio"]})
    return {
        "accuracy_loss": accuracy_loss,
        "smallest": min(good.values(), key=lambda row: row["bytes"])["path"],
        "fastest": fastest,
        "left_out": [row["path"] for row in offered if row["precision"] not in good],
    }


def _slower_kind(row: Mapping[str, Any], int8: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a comparison of the two kinds of int8 on the row's target chose the other."""
    chosen = next((each["chosen"] for each in int8 if _at(each, row_place(row))), None)
    return row["precision"] in EITHER_OF and chosen in EITHER_OF and row["precision"] != chosen


def row_place(row: Mapping[str, Any]) -> dict[str, Any]:
    """Target, batch and threads of a comparison."""
    return {key: row[key] for key in ("target", "batch", "threads")}


def _at(row: Mapping[str, Any], place: Mapping[str, Any]) -> bool:
    return all(row[key] == value for key, value in place.items())


def _shares(bench: Sequence[Mapping[str, Any]], place: Mapping[str, Any]) -> dict[str, float]:
    """Precision → its share of the dense file's time, of the valid comparisons on a target."""
    return {r["precision"]: r["ratio"]["point"] for r in bench if _at(r, place) and r["verdict"] != "invalid"}


def int8_choices(duels: Sequence[Mapping[str, Any]], bench: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """On each target the faster of the two kinds of int8, by a comparison of their own; none where fp32 is faster than it.

    Args:
        duels: rows of int8-qdq (B) against int8-dynamic (A).
        bench: the report's rows of latency, against the dense file.

    Returns:
        One record for each duel: target, batch, threads; chosen, a precision or None; ratio, of int8-qdq to int8-dynamic;
        verified, whether its interval excludes 1 by more than its control strays; slower_than_fp32, None where fp32 has no
        valid comparison. And one without a ratio where there is one kind of int8 alone.
    """
    found = []
    for key in dict.fromkeys((row["target"], row["batch"], row["threads"]) for row in bench):
        place = dict(zip(("target", "batch", "threads"), key, strict=True))
        shares = _shares(bench, place)
        kinds = [name for name in EITHER_OF if name in shares]
        if len(kinds) == 1 and "fp32" in shares and not any(_at(duel, place) for duel in duels):
            slower = shares[kinds[0]] >= shares["fp32"]
            chosen = None if slower else kinds[0]
            found.append({**place, "chosen": chosen, "ratio": None, "verified": False, "slower_than_fp32": slower})
    for duel in duels:
        place, ratio, control = row_place(duel), duel["ratio"], duel["control"]
        noise = max(
            abs(control["lo"] - 1), abs(control["hi"] - 1)
        )  # what the control sees where there is nothing to see
        faster = "int8-qdq" if ratio["point"] < 1 else "int8-dynamic"
        shares = _shares(bench, place)
        known = {faster, "fp32"} <= set(shares)
        loses = shares[faster] >= shares["fp32"] if known else None
        found.append(
            {
                **place,
                "chosen": faster if loses is False else None,
                "ratio": ratio,
                "verified": duel["verdict"] != "invalid" and not ratio["lo"] - noise <= 1 <= ratio["hi"] + noise,
                "slower_than_fp32": loses,
            }
        )
    return found
