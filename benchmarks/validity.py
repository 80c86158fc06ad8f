"""Whether the latency protocol says what is true: identical files, and slowdowns of known size.

`python benchmarks/validity.py` goes on with the comparisons that are not recorded yet, and writes the table anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import timm
from report import markdown

from toolchain.export.onnx_graph import export_onnx
from toolchain.files import write_text
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison, judge
from toolchain.measure.environment import cores_of_others, describe_machine
from toolchain.measure.intervals import bootstrap_medians, percentile_interval, slot_medians
from toolchain.measure.samples import CONTROL, SESSIONS, VARIANTS, A, B, Design
from toolchain.pipeline.job import tool
from toolchain.surgery.load import randomise_untrained

HERE = Path(__file__).resolve().parent
SCHEMA = "slimvit.benchmarks.validity/1"
SHAPE = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 128, "num_heads": 4}
TAU, ALPHA = 0.05, 0.05
SECONDS = 26.0
"""What one comparison is predicted to take until some are recorded: six sessions of warm-up and 12 blocks."""
LOAD = """import numpy as np, os, random, time
r, x = random.Random({seed}), np.ones((600, 600), np.float32)
while os.getppid() == {parent}:
    end = time.time() + r.uniform(0.2, 2)
    while time.time() < end: x @ x
    time.sleep(r.uniform(0.2, 2))
"""
"""A process that works in bursts, and ends by itself once its parent was killed: left behind, it would be beside every
experiment that follows."""


@dataclass(frozen=True)
class Experiment:
    """Comparisons of one pair of depths, often.

    Attributes:
        name: of its file and row.
        depths: blocks of A and of B: a call's time grows with their number, but for the patch embedding and the head.
        count: comparisons.
        loaded: whether another process works now and then beside them.
        wanted: what the issue of this project asks for, in words.
    """

    name: str
    depths: tuple[int, int]
    count: int
    loaded: bool = False
    wanted: str = ""


EXPERIMENTS = (
    Experiment("same-idle", (20, 20), 240, wanted="no `regressed`; at least 80 % `pass`"),
    Experiment("same-loaded", (20, 20), 60, loaded=True, wanted="no `regressed`"),
    Experiment("slower-8", (25, 27), 100, wanted="at least 85 % `regressed`"),
    Experiment("slower-10", (20, 22), 100, wanted="at least 95 % `regressed`"),
)


def model(depth: int, folder: Path) -> Path:
    """An ONNX file of one seeded ViT block, so many times; blocks differ in their random weights alone."""
    path = folder / f"depth{depth}.onnx"
    if not path.exists():
        module = timm.create_model("vit_tiny_patch16_224", depth=depth, **SHAPE).eval()
        randomise_untrained(module, 0)
        meta = {"slimvit.tool": tool(), "benchmark": path.stem}
        export_onnx(module, path, input_size=(1, 28, 28), opset=20, metadata=meta, simplify=True)
    return path


@contextlib.contextmanager
def load(seed: int, *, wanted: bool) -> Iterator[subprocess.Popen[bytes] | None]:
    """Bursts of work on one core, of 0.2 to 2 s with pauses of that length, by the process given, while the block runs."""
    if not wanted:
        yield None
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    code = LOAD.format(seed=seed, parent=os.getpid())
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def record(experiment: Experiment, index: int, found: Comparison, seconds: float) -> dict[str, Any]:
    """What is kept of a comparison: the median of every slot in ns, from which all its statistics follow."""
    slots = [{name: slot_medians(session.slots_ns(name)).tolist() for name in VARIANTS} for session in found.sessions]
    return {
        "schema": SCHEMA,
        "experiment": experiment.name,
        "index": index,
        "depths": list(experiment.depths),
        "verdict": found.verdict,
        "looks": found.design.looks,
        "slots_ns": slots,
        "seconds": round(seconds, 2),
        "cores_of_others": cores_of_others([(s.fingerprint.before, s.fingerprint.after) for s in found.sessions]),
        "artifacts": {name: facts.sha256 for name, facts in found.artifacts.items()},
        "environment": found.environment,
        "tool": tool(),
    }


def verdicts_of(stored: dict[str, Any]) -> tuple[str, str]:
    """(the verdict that follows from a record's slots, what its first look had said if no other could follow).

    Raises:
        ValueError: it says another.
    """
    sessions, looks = stored["slots_ns"], stored["looks"]
    first = sessions[:SESSIONS]
    if len(first) == len(sessions):
        found, alone = judged(first, (ALPHA / looks, ALPHA), seed=stored["index"])
    else:
        (found,) = judged(sessions, (ALPHA / looks,), seed=stored["index"])
        (alone,) = judged(first, (ALPHA,), seed=stored["index"])
    if found != stored["verdict"]:
        raise ValueError(f"{stored['experiment']} {stored['index']} says {stored['verdict']}, its slots give {found}")
    return found, alone


def judged(sessions: Sequence[dict[str, list[float]]], alphas: Sequence[float], *, seed: int) -> list[str]:
    """The verdict of sessions, each the slot medians of its variants, at each confidence 1 - alpha."""
    logs = {
        name: [np.log(np.array(each[name]) / np.array(each[A])) for each in sessions] for name in VARIANTS if name != A
    }
    drawn = {name: bootstrap_medians(each, seed=seed) for name, each in logs.items()}
    medians = [float(np.median(each)) for each in logs[B]]
    found = []
    for alpha in alphas:
        ratio, control = (percentile_interval(logs[name], drawn[name], alpha=alpha) for name in (B, CONTROL))
        found.append(judge(ratio, control, medians, TAU))
    return found


def path_of(results: Path, experiment: Experiment) -> Path:
    """Where an experiment's records are kept, one a line."""
    return results / f"{experiment.name}.jsonl"


def recorded(results: Path, experiment: Experiment) -> list[dict[str, Any]]:
    """The records of an experiment, in order; a line that a killed run left unfinished is dropped."""
    path = path_of(results, experiment)
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def measure(experiments: Sequence[Experiment], results: Path, work: Path, told: Callable[[str], None]) -> None:
    """Goes on with the experiments, always with the one of which the smallest share is done.

    So each has met the same hours of the machine, however far the whole has come. A comparison is on disk before the
    next begins.
    """
    results.mkdir(parents=True, exist_ok=True)
    counts = {}
    for experiment in experiments:
        done = recorded(results, experiment)
        write_text(
            path_of(results, experiment), "".join(json.dumps(each, separators=(",", ":")) + "\n" for each in done)
        )
        counts[experiment] = len(done)
    while any(counts[experiment] < experiment.count for experiment in experiments):
        experiment = min(experiments, key=lambda each: counts[each] / each.count)
        index = counts[experiment]
        pair = [model(depth, work) for depth in experiment.depths]
        begun = time.monotonic()
        with load(index, wanted=experiment.loaded):
            found = compare(*pair, design=Design(tau=TAU, seed=index))
        line = record(experiment, index, found, time.monotonic() - begun)
        with path_of(results, experiment).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
        counts[experiment] += 1
        told(f"{experiment.name} {index + 1}/{experiment.count}: {found.verdict}, {line['seconds']:.0f} s")


def share(hits: int, total: int) -> str:
    """A share with its Wilson interval, 95 %, in percent."""
    if total == 0:
        return "—"
    z, p = 1.96, hits / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return f"{100 * p:.1f} % [{100 * max(0.0, middle - half):.1f}, {100 * min(1.0, middle + half):.1f}]"


VERDICTS = ("pass", "improved", "regressed", "inconclusive", "invalid")


def table(results: Path, experiments: Sequence[Experiment]) -> str:
    """The page, every verdict recomputed from its slots."""
    rows, alone, machines = [], [], Counter[str]()
    for experiment in experiments:
        found = recorded(results, experiment)
        both = [verdicts_of(each) for each in found]
        verdicts, firsts = [each for each, _ in both], [each for _, each in both]
        one_look_s = [each["seconds"] for each in found if len(each["slots_ns"]) <= SESSIONS]
        machines.update(describe_machine(each["environment"]) for each in found)
        others = [known for each in found if (known := each.get("cores_of_others")) is not None]
        per_call = [np.median([s for session in each["slots_ns"] for s in session[A]]) / 1e6 for each in found]
        rows.append(
            [
                f"`{experiment.name}`",
                f"{experiment.depths[0]} : {experiment.depths[1]}",
                f"{len(found)} of {experiment.count}",
                *(share(verdicts.count(verdict), len(found)) for verdict in VERDICTS),
                "—" if not found else f"{np.median(per_call):.1f}",
                "—" if not found else f"{np.median([each['seconds'] for each in found]):.0f}",
                "—" if not found else f"{max(each['seconds'] for each in found):.0f}",
                f"{np.median(others):.2f}" if others else "—",
                experiment.wanted,
            ]
        )
        alone.append(
            [
                f"`{experiment.name}`",
                *(share(firsts.count(verdict), len(found)) for verdict in VERDICTS),
                f"{max(one_look_s):.0f}" if one_look_s else "—",
            ]
        )
    head = ["Experiment", "Blocks A : B", "Done", *VERDICTS, "ms a call", "Median, s", "Longest, s"]
    head += ["Cores others kept busy", "Wanted"]
    lines = [
        "# Does the latency protocol say what is true?",
        "",
        "Comparisons of identical files, and of stacks of one block whose depths are known, each by",
        "`slimvit bench compare` as it is by default: six fresh processes, 12 blocks each, and more while nothing can be",
        "said. `same-loaded` has another process that works in bursts beside it. Shares with 95 % Wilson intervals. Every",
        "verdict is recomputed from the recorded slot medians. What other processes did is the median over the comparisons",
        "that recorded it.",
        "",
        "Regenerated by `python benchmarks/validity.py --report`; do not edit.",
        "",
        markdown(head, rows),
        "",
        "With one look, `--looks 1`, no comparison takes longer than that look. The first six sessions of each comparison",
        "above, judged alone at 95 %; the seconds are the most that a comparison of one look took.",
        "",
        markdown(["Experiment", *VERDICTS, "Longest, s"], alone),
        "",
        *(f"- {count} measured on: {machine}." for machine, count in machines.most_common()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    """0 when everything that was asked for is recorded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="one experiment")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and how long it would take")
    parser.add_argument("--report", action="store_true", help="only write the table anew")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "validity")
    parser.add_argument("--work", type=Path, default=HERE / "work" / "validity", help="where the models are kept")
    options = parser.parse_args(arguments)
    chosen = [each for each in EXPERIMENTS if options.only in ("", each.name)]
    if not chosen:
        print(
            f"error: no experiment {options.only!r}; there are {', '.join(e.name for e in EXPERIMENTS)}",
            file=sys.stderr,
        )
        return 2
    if not options.report:
        known = [each["seconds"] for experiment in EXPERIMENTS for each in recorded(options.results, experiment)]
        each_s = float(np.mean(known)) if known else SECONDS
        left = {e.name: e.count - len(recorded(options.results, e)) for e in chosen}
        print(
            f"validity: {sum(left.values())} comparisons to do, predicted {sum(left.values()) * each_s / 3600:.2f} hours"
        )
        for name, count in left.items():
            print(f"  {count:4d} to do, {count * each_s / 60:6.1f} min  {name}")
        if options.dry_run:
            return 0
        options.work.mkdir(parents=True, exist_ok=True)
        measure(chosen, options.results, options.work, lambda text: print(text, flush=True))
    write_text(options.results / "README.md", table(options.results, EXPERIMENTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
