"""Bad input: one clear line on stderr, the right exit code, and nothing half-written."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from builders import Refusing
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from toolchain.errors import MeasurementError
from toolchain.export.precision import PRECISIONS
from toolchain.pipeline.folder import Workspace
from toolchain.surgery import replay
from toolchain.targets import TARGETS
from toolchain.targets.ort import OrtCpu
from toolchain.training import checkpoint as training_checkpoint

KWARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
FEW = "data.calibration_images=4"


@pytest.fixture
def refused(command, recipe, tmp_path):
    """Runs a recipe with overrides that cannot work; the message, after checking that nothing else was left."""

    def call(code, *overrides, text=None):
        if text is not None:
            recipe.write_text(text, encoding="utf-8")
        out = tmp_path / "out"
        outcome = command("run", recipe, "--out", out, *(part for o in overrides for part in ("--set", o)))
        message = only_line(outcome, few=FEW in overrides)
        assert outcome.code == code, message
        assert not out.exists(), sorted(out.rglob("*"))
        return message

    return call


def only_line(outcome, *, few=False):
    """The one line on stderr, without its prefix, after the note on few images where the recipe has them; stdout is empty."""
    lines = outcome.err.splitlines()
    if few:
        assert " 4 images are few to calibrate on" in lines.pop(0)
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("slimvit: error: ")
    assert outcome.out == ""
    return lines[0].removeprefix("slimvit: error: ")


def weights(num_classes=10):
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **KWARGS).state_dict()


# The recipe


def test_the_recipe_of_these_tests_is_good(command, recipe):
    outcome = command("run", recipe, "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")


def test_unknown_key_offers_the_nearest(refused):
    message = refused(2, "budget.parms=0.5")
    assert "'budget.parms'" in message
    assert "did you mean 'budget.params'?" in message


def test_wrong_type_is_named(refused):
    assert "finetune.epochs" in refused(2, "finetune.epochs=many")


@pytest.mark.parametrize("override", ["budget", "=1", "model.name.x=1"])
def test_malformed_override(refused, override):
    assert override.split("=")[0] in refused(2, override)


def test_not_toml(refused):
    assert "not valid TOML" in refused(2, text="[model\n")


def test_missing_recipe(command, tmp_path):
    outcome = command("run", tmp_path / "no.toml")
    assert outcome.code == 74
    assert "no.toml" in only_line(outcome)


def test_no_budget(refused, recipe):
    assert "[budget]" in refused(2, text=recipe.read_text().replace("params = 0.5", ""))


def test_methods_that_do_not_go_together_say_what_does(refused):
    message = refused(2, "compress.method=joint", "compress.allocation=solver", "compress.attention=svd")
    assert "compress.allocation = 'solver'" in message
    assert "'svd'" in message
    assert "'uniform'" in message


def test_an_unknown_precision_says_what_there_is(refused):
    message = refused(2, 'export.precisions=["fp8"]')
    assert "export.precisions" in message
    assert "fp16" in message


def test_names_between_commas_are_shown_as_the_list_that_they_should_be(refused):
    assert refused(2, "export.precisions=int4, fp32").endswith('export.precisions is a list: write ["int4", "fp32"]')


def test_a_list_without_quotes_is_shown_with_them(refused):
    for left, wanted in (
        ("[ort-cpu]", '["ort-cpu"]'),
        ("[int4, fp32]", '["int4", "fp32"]'),
    ):  # what a shell leaves of it
        message = refused(2, f"bench.targets={left}")
        assert f"bench.targets is a list: write {wanted}, and single quotes around KEY=VALUE" in message


def test_a_precision_that_nothing_here_runs_is_refused_before_any_work(refused, register):
    register(PRECISIONS, replace(PRECISIONS["fp16"], product="fixed point"))
    assert "nothing here runs fp16" in refused(5, 'export.precisions=["fp16"]')


def test_unreachable_budget_says_the_range(refused):
    message = refused(2, "budget.params=0.01")
    assert "budget.params" in message
    least = float(message.partition("reachable is")[2].partition("(")[2].split(" …")[0])
    assert 0.01 < least < 1
    refused(2, f"budget.params={least - 0.002:.3f}")


def test_the_range_that_is_named_can_be_met(refused, command, recipe):
    message = refused(2, "budget.params=0.01")
    least = float(message.partition("reachable is")[2].partition("(")[2].split(" …")[0])
    assert command("plan", recipe, "--set", f"budget.params={least + 0.002:.3f}").code == 0


# The model


def test_unknown_model_offers_the_nearest(refused):
    assert "did you mean 'vit_tiny_patch16_224'?" in refused(2, "model.name=vit_tiny_patch16_242")


def test_a_cnn_is_refused_with_the_reason(refused):
    message = refused(2, "model.name=resnet18", "model.kwargs={}")
    assert "resnet18" in message
    assert "slimvit models" in message


def test_untrained_model_without_train(refused, command, recipe):
    text = recipe.read_text()
    message = refused(2, text=text[: text.index("[train]")] + text[text.index("[compress]") :])
    assert "no weights" in message
    assert "[train]" in message
    for dry in (("run", recipe, "--dry-run"), ("plan", recipe)):
        outcome = command(*dry)
        assert (outcome.code, only_line(outcome)) == (2, message)


def test_weights_do_not_come_in_through_the_kwargs(refused):
    assert "use model.checkpoint" in refused(2, "model.kwargs.checkpoint_path=x.pth")


def test_missing_checkpoint(refused):
    assert "no.safetensors" in refused(74, "model.checkpoint=no.safetensors")


def test_missing_checkpoint_fails_the_dry_run_too(command, recipe):
    outcome = command("run", recipe, "--dry-run", "--set", "model.checkpoint=no.pth")
    assert outcome.code == 74
    assert "no.pth" in only_line(outcome)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_checkpoint(refused, command, recipe, tmp_path, suffix, share):
    path = tmp_path / f"cut.{suffix}"
    save_file(weights(), path) if suffix == "safetensors" else torch.save(weights(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = refused(3, f"model.checkpoint={path}")
    assert f"cut.{suffix}" in message
    outcome = command("run", recipe, "--dry-run", "--set", f"model.checkpoint={path}")
    assert (outcome.code, only_line(outcome)) == (3, message)


class Opener:
    """Unpickling an instance makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("layout", ["plain", "zip"])
def test_pickled_code_is_refused_and_not_executed(refused, tmp_path, layout):
    victim, path = tmp_path / "executed", tmp_path / "evil.pth"
    if layout == "plain":
        path.write_bytes(pickle.dumps({"model": Opener(victim)}))
    else:
        torch.save({"model": weights(), "args": Opener(victim)}, path)
        assert zipfile.is_zipfile(path)
    message = refused(3, f"model.checkpoint={path}")
    assert not victim.exists()
    assert "evil.pth" in message
    torch.load(path, weights_only=False) if layout == "zip" else pickle.loads(path.read_bytes())
    assert victim.exists(), "the file under test was harmless"


def test_checkpoint_with_other_classes(refused, tmp_path):
    save_file(weights(num_classes=7), tmp_path / "seven.safetensors")
    message = refused(2, f"model.checkpoint={tmp_path / 'seven.safetensors'}")
    assert "7 classes" in message
    assert "num_classes = 7" in message


def test_model_with_other_classes_than_the_data(refused):
    message = refused(2, "model.kwargs.num_classes=7")
    assert "model.kwargs.num_classes = 10" in message


# The data


@pytest.fixture
def images(tmp_path):
    """A folder of two classes with four images each."""
    root = tmp_path / "images"
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8), 30 * index).save(root / label / f"{index}.png")
    return root


def test_the_images_of_these_tests_are_good(command, recipe, images):
    outcome = command(
        "plan", recipe, "--set", f"data.source=imagefolder:{images}", "--set", "model.kwargs.num_classes=2"
    )
    assert outcome.code == 0


def test_plan_needs_no_images_and_a_dry_run_does(command, recipe, tmp_path):
    source = ("--set", f"data.source=imagefolder:{tmp_path / 'nowhere'}")
    planned = command("plan", recipe, *source)
    assert (planned.code, planned.err) == (0, "")
    assert planned.out == command("plan", recipe).out
    assert command("run", recipe, "--dry-run", *source).code == 2


def test_unknown_source_offers_the_nearest(refused):
    assert "did you mean 'digits'?" in refused(2, "data.source=digit")


def test_missing_image_folder(refused, tmp_path):
    assert "nowhere" in refused(2, f"data.source=imagefolder:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("classes", [(), ("cat", "dog")])
def test_empty_image_folder(refused, tmp_path, classes):
    for label in classes:
        (tmp_path / "empty" / label).mkdir(parents=True)
    (tmp_path / "empty").mkdir(exist_ok=True)
    assert "empty" in refused(2, f"data.source=imagefolder:{tmp_path / 'empty'}")


@pytest.mark.parametrize("content", [b"this is a text file\n", b"", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_image_is_named(refused, images, content):
    (images / "dog" / "2.png").write_bytes(content)
    message = refused(2, f"data.source=imagefolder:{images}", "model.kwargs.num_classes=2")
    assert str(images / "dog" / "2.png") in message


@pytest.mark.parametrize(
    ("section", "others"),
    [
        ("compress", ["compress.neurons=vtp", "finetune.epochs=0"]),
        ("finetune", ["compress.neurons=magnitude", "finetune.epochs=1", "finetune.distill=false"]),
    ],
)
def test_labels_are_missing(refused, images, tmp_path, section, others):
    save_file(weights(), tmp_path / "w.safetensors")
    message = refused(2, f"data.source=images:{images}", f"model.checkpoint={tmp_path / 'w.safetensors'}", FEW, *others)
    assert section in message
    assert "labels" in message


def test_labels_are_missing_to_train(refused, images):
    assert "[train]" in refused(
        2, f"data.source=images:{images}", FEW, "compress.neurons=magnitude", "finetune.epochs=0"
    )


# The targets


def test_unknown_target_offers_the_nearest(refused):
    assert "did you mean 'ort-cpu'?" in refused(2, 'bench.targets=["ort-cpus"]')


@pytest.fixture
def build_only(register):
    """A target that builds engines and has nothing to run them on."""
    register(TARGETS, Refusing("build-only", runs="no: there is no GPU"))


@pytest.mark.parametrize(
    ("option", "code", "words"),
    [
        ("budget.latency.ort-cpus=45%", 2, "did you mean 'ort-cpu'?"),
        ("budget.latency.build-only=45%", 5, "so nothing is measured; remove it from budget.latency"),
        ("budget.latency.ort-cpu=45 min", 2, "neither a share like '45%' nor a time like '8 ms'"),
    ],
)
def test_a_latency_limit_that_cannot_be_measured(refused, build_only, option, code, words):
    assert words in refused(code, option)


@pytest.mark.skipif(torch.cuda.is_available(), reason="TensorRT may be there")
def test_target_that_is_not_there(refused):
    assert "target 'trt' is unavailable: " in refused(5, 'engine.targets=["trt"]')


def test_target_that_cannot_be_measured(refused, command, recipe, build_only):
    message = refused(5, 'bench.targets=["ort-cpu", "build-only"]')
    assert "target 'build-only' is unavailable: it builds engines here and runs none (there is no GPU)" in message
    assert "bench.targets" in message
    assert command("plan", recipe, "--set", 'bench.targets=["build-only"]').code == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="TensorRT may be there")
@pytest.mark.parametrize("target", ["trt", "trt-rtx", "trt-rtx+graph", "ort-cuda"])
def test_target_that_needs_a_gpu_is_not_timed_without_one(refused, target):
    assert f"target '{target}' is unavailable: " in refused(5, f'bench.targets=["ort-cpu", "{target}"]')


# The command line


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("run", "--bogus"),
        ("runn",),
        ("run", "r.toml", "--require-speedup", "-1"),
        ("bench", "compare", "a"),
        ("export", "folder", "--out", "x.onnx", "--opset", "3"),
        ("engine", "x.onnx", "--out", "o", "--batch", "1", "two", "3"),
        ("schema", "recipes"),
        ("models", "zzz*"),
    ],
)
def test_usage(command, arguments):
    outcome = command(*arguments)
    assert outcome.code == 2
    assert "internal error" not in only_line(outcome)


def test_near_miss_of_a_verb(command):
    assert "run" in only_line(command("runn"))


@pytest.mark.parametrize("arguments", [(), ("bench",), ("manifest",)])
def test_no_verb_shows_the_help(command, arguments):
    outcome = command(*arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("Usage: slimvit")


def test_help_is_good(command):
    outcome = command("--help")
    assert outcome.code == 0
    assert outcome.out.startswith("Usage: slimvit")


class Failing(OrtCpu):
    """A target whose probe fails."""

    name = "failing"

    def __init__(self, error):
        self.error = error

    def probe(self):
        raise self.error


FAILS = ("--set", 'bench.targets=["failing"]')


def test_a_message_of_many_lines_is_one_line(command, recipe, register):
    register(TARGETS, Failing(MeasurementError("first\n  second\n\nthird")))
    outcome = command("plan", recipe, *FAILS)
    assert (outcome.code, only_line(outcome)) == (4, "first second third")


def test_a_fault_of_ours_is_told_as_such(command, recipe, monkeypatch, register):
    register(TARGETS, Failing(ZeroDivisionError("here")))
    outcome = command("plan", recipe, *FAILS)
    assert outcome.code == 70
    assert only_line(outcome).startswith("internal error: ZeroDivisionError: here")
    monkeypatch.setenv("SLIMVIT_DEBUG", "1")
    assert "Traceback" in command("plan", recipe, *FAILS).err


# The output folder


def test_a_file_in_place_of_the_folder(command, recipe, tmp_path):
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        outcome = command("run", recipe, "--out", out)
        assert outcome.code == 74
        assert str(out) in only_line(outcome)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_is_read_only(command, recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == out and mode & os.W_OK))
    outcome = command("run", recipe, "--out", out)
    assert outcome.code == 74
    assert str(out) in only_line(outcome)
    assert not list(out.iterdir())


def test_a_folder_that_cannot_be_made(command, recipe):
    outcome = command("run", recipe, "--out", "/proc/slimvit")
    assert outcome.code == 74
    assert "cannot write to /proc/slimvit" in only_line(outcome)


def no_space(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("module", [replay, training_checkpoint], ids=["model", "training"])
def test_full_disk_under_safetensors(command, recipe, tmp_path, monkeypatch, module):
    monkeypatch.setattr(module, "save_file", no_space)
    outcome = command("run", recipe, "--out", tmp_path / "out")
    assert outcome.code == 74
    assert "No space left" in only_line(outcome)
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left <= {"lock", "recipe.path", "dense.safetensors"}, "at most the state that training goes on from"
    assert not list((tmp_path / "cache").rglob("model*"))


@pytest.mark.slow
def test_full_disk_under_text(command, recipe, tmp_path, monkeypatch):
    real = Path.write_text

    def full(self, *args, **kwargs):
        if self.name.startswith(".plan.json"):
            real(self, "{")
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    outcome = command("run", recipe, "--out", tmp_path / "out")
    assert outcome.code == 74
    assert "plan.json: No space left" in outcome.err.splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*plan.json*"))
    monkeypatch.undo()


def test_two_runs_in_one_folder(command, recipe, tmp_path):
    with Workspace(tmp_path / "out").open():
        outcome = command("run", recipe, "--out", tmp_path / "out")
    assert outcome.code == 74
    assert "another run" in only_line(outcome)


# Processes


def environment(tmp_path):
    return {**os.environ, "SLIMVIT_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.mark.slow
def test_reader_that_stops_reading(tmp_path):
    code = "import sys; from toolchain.cli import main; sys.stdin.read(1); main(['schema', 'recipe', '--json'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(tmp_path),
    )
    process.stdout.close()
    _, err = process.communicate(b"x", timeout=60)
    assert (process.returncode, err) == (141, b""), "as of any program that such a pipe ended, and no fault of a disk"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_stdout_on_a_full_disk(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "toolchain", "schema", "plan"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(tmp_path),
            timeout=60,
        )
    assert done.returncode == 74
    assert done.stderr.decode().count("\n") == 1
    assert b"No space left" in done.stderr


@pytest.mark.parametrize("closed", ["1>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_read_and_written_nowhere(tmp_path, closed):
    """Kind: a stream of the process that is None in Python, or whose number the next file takes."""
    script = f"{sys.executable} -m toolchain schema plan {closed}"
    done = subprocess.run(["sh", "-c", script], stderr=subprocess.PIPE, env=environment(tmp_path), timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_current_folder_that_is_gone(command, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    outcome = command("schema", "plan")
    assert (outcome.code, outcome.out) == (74, "")
    assert only_line(outcome).endswith("the current folder is gone; cd to one that is there")


def processes_of_group(group):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(pgrp) == group and state != "Z":
            found.append(stat.parent.name)
    return found


def session_of_group(group):
    """Whether a process of the group measures; others that it starts, for a moment, do not count."""
    for pid in processes_of_group(group):
        with contextlib.suppress(OSError):
            if b"slimvit-bench-" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["training", "bench"])
def test_ctrl_c(recipe, finished, tmp_path, moment):
    """SIGINT ends the command with one line; no process and no half-written file stays after the next run."""
    out, settings = tmp_path / "out", environment(tmp_path)
    if moment == "training":
        recipe.write_text(recipe.read_text().replace("epochs = 1", "epochs = 400", 1))
        mark = "dense.safetensors"
    else:  # all is done but that, which goes on for as long as anyone looks
        recipe = finished.recipe.with_name("timed.toml")
        recipe.write_text(finished.recipe.read_text() + "batch = [1, 2]\n")
        settings["SLIMVIT_CACHE_DIR"] = str(finished.recipe.parent / "cache")
        shutil.copytree(finished.folder, out)
        mark = "onnx-compressed.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "toolchain", "run", str(recipe), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=settings,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - background jobs ignore it
    )
    try:
        deadline = time.monotonic() + 240
        while not (out / ".slimvit" / mark).exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        if moment == "bench":
            while not (measuring := session_of_group(process.pid)) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert measuring, "a session measures in a process of its own"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == 130, stderr
        assert stdout == ""
        assert "Traceback" not in stderr
        errors = [line for line in stderr.splitlines() if line.startswith("slimvit: error: ")]
        assert errors == [stderr.splitlines()[-1]]
        assert "Interrupted. Run the same command to resume." in errors[0]
        while processes_of_group(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not processes_of_group(process.pid)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert not list(out.rglob("*.partial"))


def test_the_next_run_sweeps_what_a_killed_one_left(command, recipe, tmp_path):
    out = tmp_path / "out"
    for path in (".plan.json.x1.partial", "onnx/.dense.fp32.onnx.x2.partial", ".slimvit/.dense.json.x3.partial"):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text("half")
    (out / ".dense.x4.partial" / "new").mkdir(parents=True)
    mine = out / "notes" / ".mine.partial"
    mine.parent.mkdir()
    mine.write_text("not ours")
    with Workspace(out).open():
        assert [path.relative_to(out).as_posix() for path in out.rglob("*.partial")] == ["notes/.mine.partial"]


@pytest.mark.parametrize(
    "line",
    [
        ("run", "{recipe}", "--out", "file/run"),
        ("sweep", "{recipe}", "--set", "budget.params=0.6,0.5", "--out", "file"),
        ("sweep", "{recipe}", "--set", "budget.params=0.6,0.5", "--out", "sweep"),
    ],
)
def test_a_dry_run_refuses_the_folder_that_the_work_cannot_be_written_to(command, recipe, line):
    Path("file").touch()
    Path("sweep").mkdir()
    Path("sweep", "params-0.5").touch()
    words = [word.format(recipe=recipe) for word in line]
    real, dry = command(*words), command(*words, "--dry-run")
    assert (dry.code, dry.out) == (real.code, "") == (74, "")
    assert only_line(dry) == only_line(real)
    assert "is not a folder" in dry.err
