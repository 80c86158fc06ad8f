"""A run that is killed, at any moment and as often as you like, ends with the files of an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from recipes import tiny_recipe

from toolchain.cli.main import main

RECIPE = tiny_recipe("""[train]
epochs = 3

[compress]
method = "hybrid"
vtp = { epochs = 2 }

[budget]
params = 0.5

[finetune]
epochs = 2
lr = 1e-3
""")
FORKS = multiprocessing.get_context("forkserver")
"""A run is a process of its own, forked from one that has imported what a run needs: most of its seconds would be imports."""
FORKS.set_forkserver_preload(
    ["toolchain.cli.main", "toolchain.pipeline.run", "toolchain.pipeline.preview", "toolchain.report.sections"]
)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def carry_out(recipe, out, cache, log):
    os.environ["SLIMVIT_CACHE_DIR"] = str(cache)
    torch.set_num_threads(1)
    with Path(log).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
        main(["run", str(recipe), "--out", str(out)])


def start(recipe, out, cache):
    process = FORKS.Process(target=carry_out, args=(recipe, out, cache, f"{out}.log"))
    process.start()
    return process


def finish(recipe, out, cache):
    process = start(recipe, out, cache)
    process.join(900)
    log = Path(f"{out}.log").read_text(encoding="utf-8")
    assert process.exitcode == 0, log
    return log


def kill_when(recipe, out, cache, moment):
    """Starts a run and kills it at `moment` (a function that says whether it is now); whether it was still running."""
    process = start(recipe, out, cache)
    while process.is_alive() and not moment():
        time.sleep(0.002)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def digests(out):
    paths = [out / "plan.json", out / "allocation.json", *out.rglob("*.safetensors"), *out.rglob("*.onnx")]
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if ".slimvit" not in path.parts
    }


def facts(out):
    """What the report says, without what differs by nature."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    for stage in report["stages"]:
        del stage["seconds"]
    return {key: value for key, value in report.items() if key != "bench"}


def mtime(path):
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.slow
def test_killed_at_several_moments(recipe, tmp_path):
    """In the middle of each training, and during export."""
    finish(recipe, tmp_path / "whole", tmp_path / "cache_whole")
    out, cache, draw = tmp_path / "killed", tmp_path / "cache_killed", random.Random(20)
    private = out / ".slimvit"

    def after(path, delay):
        """True once `path` has been there, as this attempt wrote it, for `delay` seconds."""
        before, seen = mtime(path), []

        def moment():
            if not seen and mtime(path) != before:
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() - seen[0] >= delay

        return moment

    scratches = [private / f"{stage}.safetensors" for stage in ("dense", "compress", "finetune")]
    moments = [
        *((path, draw.uniform(0, 0.02)) for path in scratches),  # an epoch was saved, more are to come
        (private / "deploy.json", draw.uniform(0, 1.0)),  # somewhere in the exports
    ]
    kills = sum(kill_when(recipe, out, cache, after(path, delay)) for path, delay in moments)
    assert kills >= 3, "most runs were still running when they were killed"
    assert not (out / "report.json").exists()
    log = finish(recipe, out, cache)
    assert "kept from an earlier run" in log

    expected = digests(tmp_path / "whole")
    assert len([name for name in expected if name.endswith(".safetensors")]) == 4
    assert len([name for name in expected if name.endswith(".onnx")]) == 2
    assert digests(out) == expected
    assert not list(out.rglob("*.partial"))
    ours, theirs = facts(out), facts(tmp_path / "whole")
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_demo_recipe_killed_at_random(tmp_path, seed):
    demo = Path(__file__).parents[2] / "models" / "digits_vit" / "recipe.toml"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(demo.read_text(encoding="utf-8").partition("[engine]")[0], encoding="utf-8")
    began = time.monotonic()
    finish(recipe, tmp_path / "whole", tmp_path / "cache_whole")
    whole_s, draw = time.monotonic() - began, random.Random(seed)
    for _ in range(5):
        until = time.monotonic() + draw.uniform(0.1, 0.6) * whole_s
        kill_when(recipe, tmp_path / "killed", tmp_path / "cache_killed", lambda until=until: time.monotonic() > until)
    finish(recipe, tmp_path / "killed", tmp_path / "cache_killed")
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
