"""A whole recipe whose board goes off, against a real sshd on loopback."""

import json
from functools import partial

import pytest
from loopback import loopback

from toolchain.cost import Widths
from toolchain.devices.device import Devices
from toolchain.devices.kept import KeptSessions
from toolchain.errors import TargetUnavailable
from toolchain.measure.compare import compare
from toolchain.measure.samples import Design
from toolchain.pipeline.job import prepare
from toolchain.pipeline.latency_budget import time_widths
from toolchain.pipeline.run import run
from toolchain.pipeline.stages.latency import clocks
from toolchain.progress import SILENT
from toolchain.recipe import Recipe
from toolchain.report.record import Report

SHORT = Design(slot_ms=2.0, warmup_s=0.02, tau=0.6, looks=1, sessions=1, blocks=4)
SHAPE = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
ASKED = {
    "model": {"name": "vit_tiny_patch16_224", "kwargs": SHAPE, "pretrained": False},
    "data": {"source": "none"},
    "budget": {"params": 0.7},
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A running board that is named in the current folder's targets.toml."""
    started = loopback(tmp_path)
    started.targets_toml(tmp_path / "targets.toml")
    monkeypatch.chdir(tmp_path)
    yield started
    started.kill()


briefly = partial(compare, design=SHORT)


@pytest.mark.slow
def test_what_was_measured_counts_while_the_board_is_off(server, tmp_path):
    recipe, root = Recipe.from_dict({**ASKED, "bench": {"targets": ["board"], "batch": [1, 2]}}), tmp_path / "run"
    report = run(recipe, root, compare=briefly)
    server.kill()
    for batch in (1, 2):
        found(root, batch, "improved")  # whatever a busy machine says of so few samples
    again = run(recipe, root, compare=briefly)
    kept = tuple(row.model_copy(update={"verdict": "improved"}) for row in report.bench)
    assert (again.bench, again.not_measured) == (kept, ())

    found(root, 1, "inconclusive")  # to be measured again, which cannot be: what is known of it stays
    with pytest.raises(TargetUnavailable, match="board"):
        run(recipe, root, compare=briefly)
    left = Report.load(root)
    assert [row.batch for row in left.bench] == [1, 2]
    assert [row.target for row in left.not_measured] == ["board"]

    (root / "bench" / "board.fp32.b2.t1.json").unlink()
    with pytest.raises(TargetUnavailable, match="board"):
        run(recipe, root, compare=briefly)
    assert [row.batch for row in Report.load(root).bench] == [1]
    server.start()
    assert [row.batch for row in run(recipe, root, compare=briefly).bench] == [1, 2]


def found(root, batch, verdict):
    """Gives the record of a comparison another verdict."""
    path = root / ".slimvit" / f"bench-board.b{batch}.t1.json"
    record = json.loads(path.read_text())
    record["facts"]["verdict"] = verdict
    path.write_text(json.dumps(record))


@pytest.mark.slow
def test_a_board_that_was_never_measured_on_is_asked_before_any_work(server, tmp_path):
    here = Recipe.from_dict({**ASKED, "bench": {"targets": ["ort-cpu"]}})
    run(here, tmp_path / "run", compare=briefly)
    server.kill()
    there = Recipe.from_dict({**ASKED, "budget": {"params": 0.6}, "bench": {"targets": ["board"]}})
    before = (tmp_path / "run" / "plan.json").read_bytes()
    for folder in ("run", "fresh"):
        with pytest.raises(TargetUnavailable, match="board"):
            run(there, tmp_path / folder, compare=briefly)
    assert (tmp_path / "run" / "plan.json").read_bytes() == before
    assert not (tmp_path / "fresh").exists()


def test_what_this_machine_lacks_ends_a_run_at_once(tmp_path):
    asked = []

    def refuse(_a, _b, _device, workload, *_, **__):
        asked.append(workload.batch)
        raise TargetUnavailable("ort-cpu", "the runtime chose another precision.")

    recipe = Recipe.from_dict({**ASKED, "bench": {"targets": ["ort-cpu"], "batch": [1, 2]}})
    with pytest.raises(TargetUnavailable, match="another precision"):
        run(recipe, tmp_path / "run", compare=refuse)
    assert asked == [1]
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.slow
def test_a_latency_budget_is_measured_on_the_board(server):
    """The board is one of targets.toml: its clock times whole models there, over ssh."""
    job = prepare(Recipe.from_dict({**ASKED, "budget": {"latency": {"board": "90%"}}}))
    with Devices() as devices:
        (clock,) = clocks(job, job.dense, devices, SILENT)
        assert (clock.setting.target, clock.setting.device.is_here) == ("board", False)
        assert isinstance(clock.setting.device.measurer, KeptSessions), "what it measured outlives a lost connection"
        timing = time_widths(job.dense, [Widths({("blocks.0.mlp", "mlp_hidden"): 8})], clock.setting, SHORT)
    assert timing.dense_ms > 0
    assert len(timing.ratios) == 1
    assert list((server.root / "device" / "artifacts").iterdir()), "the files were sent there"
