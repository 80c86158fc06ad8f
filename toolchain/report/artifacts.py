"""The files that could ship, side by side: size, download, accuracy, latency; and which of them to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COUNTS = ("accuracy", "wrong", "total")


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
    rows: Sequence[Mapping[str, Any]], bench: Sequence[Mapping[str, Any]], accuracy_loss: float
) -> dict[str, Any]:
    """Which compressed file to take: the smallest, and on each target the fastest, within an accuracy limit.

    Args:
        rows: of `artifact_rows`.
        bench: the report's rows of latency.
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
        ]
        if timed:
            best = min(timed, key=lambda row: row["ratio"]["point"])
            where = dict(zip(("target", "batch", "threads"), key, strict=True))
            fastest.append({**where, "path": good[best["precision"]]["path"], "ratio": best["ratio"]})
    return {
        "accuracy_loss": accuracy_loss,
        "smallest": min(good.values(), key=lambda row: row["bytes"])["path"],
        "fastest": fastest,
        "left_out": [row["path"] for row in offered if row["precision"] not in good],
    }


def int8_choices(duels: Sequence[Mapping[str, Any]], bench: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """On each target the faster of the two kinds of int8, by a comparison of their own; none where fp32 is faster than it.

    Args:
        duels: rows of int8-qdq (B) against int8-dynamic (A).
        bench: the report's rows of latency, against the dense file.

    Returns:
        One record for each duel: target, batch, threads; chosen, a precision or None; ratio, of int8-qdq to int8-dynamic;
        verified, whether its interval excludes 1; slower_than_fp32.
    """
    found = []
    for duel in duels:
        place = {key: duel[key] for key in ("target", "batch", "threads")}
        ratio = duel["ratio"]
        faster = "int8-qdq" if ratio["point"] < 1 else "int8-dynamic"
        shares = {
            row["precision"]: row["ratio"]["point"]
            for row in bench
            if all(row[key] == value for key, value in place.items()) and row["verdict"] != "invalid"
        }
        slower = {faster, "fp32"} <= set(shares) and shares[faster] >= shares["fp32"]
        found.append(
            {
                **place,
                "chosen": None if slower else faster,
                "ratio": ratio,
                "verified": duel["verdict"] != "invalid" and not ratio["lo"] <= 1 <= ratio["hi"],
                "slower_than_fp32": slower,
            }
        )
    return found
