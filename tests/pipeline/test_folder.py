"""A run's folder: a stage is done again exactly if something that it depends on, or that it wrote, changed."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import PIL
import pytest

from toolchain.errors import ModelError, StorageError
from toolchain.files import exclusive, files_below, read_json, user_cache, write_text
from toolchain.model import Made
from toolchain.parity import TOLERANCES, not_run
from toolchain.pipeline.folder import OUTPUTS, Nothing, Workspace, step_key
from toolchain.pipeline.tools import Tools
from toolchain.records import Record


class Facts(Record):
    times: int
    nested: tuple[int | None, ...] = (1, None)


RUNG = not_run("a", "b", tolerance=TOLERANCES["fp32"], reason="made up")


class Work:
    """A stage that counts how often it is carried out, and writes one file and one folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.times = root, 0

    def __call__(self) -> Made[list[Path], Facts]:
        self.times += 1
        write_text(self.root / "a.txt", "content")
        write_text(self.root / "b" / "c" / "d.txt", "deep")
        return Made([self.root / "a.txt", self.root / "b"], Facts(times=self.times), (RUNG,))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def work(root: Path) -> Work:
    return Work(root)


@contextmanager
def other_process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed its first line, and is killed at the end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        try:
            yield process
        finally:
            process.kill()


# Records


def test_a_stage_is_done_once(root, work):
    with Workspace(root).open() as space:
        first = space.step("stage", "key", Facts, work)
        again = space.step("stage", "key", Facts, work)
    assert (first.reused, again.reused, work.times) == (False, True, 1)
    assert (again.facts, again.seconds) == (first.facts, first.seconds)
    with Workspace(root).open() as space:
        later = space.step("stage", "key", Facts, work)
    assert later.reused
    assert (later.facts, later.rungs) == (Facts(times=1), (RUNG,))


def test_stages_do_not_share_a_record(root, work):
    with Workspace(root).open() as space:
        space.step("one", "key", Facts, work)
        assert not space.step("two", "key", Facts, work).reused
        assert space.step("one", "key", Facts, work).reused


def test_another_key_does_the_work_again(root, work):
    with Workspace(root).open() as space:
        space.step("stage", "key", Facts, work)
        assert not space.step("stage", "other", Facts, work).reused
        assert not space.step("stage", "key", Facts, work).reused  # one record per stage: the newest
    assert work.times == 3


def test_without_resume_every_stage_is_done_again(root, work):
    for resume in (True, False, False):
        with Workspace(root, resume=resume).open() as space:
            assert not space.step("stage", "key", Facts, work).reused
    with Workspace(root).open() as space:
        assert space.step("stage", "key", Facts, work).reused


def test_without_resume_no_checkpoint_is_taken_up(root, work):
    for resume in (True, False):
        with Workspace(root, resume=resume).open() as space:
            scratch = space.scratch("stage")
            scratch.write_text("epoch 1")
            found = []
            space.step(
                "stage", f"key {resume}", Facts, lambda at=scratch, to=found: (to.append(at.exists()), work())[1]
            )
            assert found == [resume]


def test_facts_that_settle_nothing_are_found_out_again(root, work):
    def settled(facts):
        return facts.times >= 2

    with Workspace(root).open() as space:
        assert [space.step("stage", "key", Facts, work, settled=settled).reused for _ in range(3)] == [
            False,
            False,
            True,
        ]


def test_facts_that_settle_nothing_stay_until_others_are_found(root, work):
    def fails() -> Made[list[Path], Facts]:
        raise ModelError("no")

    with Workspace(root).open() as space:
        found = space.step("stage", "key", Facts, work)
        with pytest.raises(ModelError):
            space.step("stage", "key", Facts, fails, settled=lambda _: False)
        kept = space.recorded("stage", "key", Facts)
        assert (kept.facts, kept.outputs, kept.reused) == (found.facts, found.outputs, True)
        assert space.recorded("stage", "another key", Facts) is None


def test_a_stage_that_is_recorded_is_found_by_its_beginning(root, work):
    with Workspace(root).open() as space:
        space.step("bench-board.b1", "key", Facts, work)
        found = [space.has(prefix) for prefix in ("bench-board.b", "bench-boar.b", "bench-b*")]
    assert found == [True, False, False]
    assert not Workspace(root, resume=False).has("bench-board.b")


@pytest.mark.parametrize("name", ["a.txt", "b/c/d.txt"])
@pytest.mark.parametrize("damage", ["changed", "truncated", "gone"])
def test_an_altered_output_does_the_work_again(root, work, name, damage):
    with Workspace(root).open() as space:
        space.step("stage", "key", Facts, work)
        path = root / name
        before = path.read_text()
        if damage == "gone":
            path.unlink()
        else:
            path.write_text(before[:-1] if damage == "truncated" else before.upper())
        assert not space.step("stage", "key", Facts, work).reused
        assert path.read_text() == before
        assert space.step("stage", "key", Facts, work).reused


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"key": "key"}', b"\xff", b'{"key": "key", "outputs": 3}']
)
def test_a_damaged_record_does_the_work_again(root, work, content):
    with Workspace(root).open() as space:
        space.step("stage", "key", Facts, work)
        (space.private / "stage.json").write_bytes(content)
        assert not space.step("stage", "key", Facts, work).reused
        assert space.step("stage", "key", Facts, work).reused


def test_a_record_without_facts_does_the_work_again(root, work):
    with Workspace(root).open() as space:
        space.step("stage", "key", Facts, work)
        record = space.private / "stage.json"
        kept = {name: value for name, value in read_json(record).items() if name != "facts"}
        record.write_text(json.dumps(kept))
        assert not space.step("stage", "key", Facts, work).reused


def test_a_stage_that_fails_half_way_is_no_earlier_success(root, work):
    """What it wrote before it failed is no longer what the old record describes."""

    def fails() -> Made[list[Path], Facts]:
        write_text(root / "a.txt", "half")
        raise ModelError("no")

    with Workspace(root).open() as space:
        space.step("stage", "old", Facts, work)
        with pytest.raises(ModelError):
            space.step("stage", "new", Facts, fails)
        assert not space.step("stage", "old", Facts, work).reused


HERE = Tools(slimvit="slimvit 0.1.0", sources="abc", torch="2.13.0", timm="1.0.20", pillow="12.0.0", threads=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch": "2.14.1"}, "torch is 2.14.1, it was 2.13.0"),
        ({"timm": "1.1", "torch": "2.14.1"}, "torch is 2.14.1, it was 2.13.0; timm is 1.1, it was 1.0.20"),
        ({"pillow": "12.1.0"}, "Pillow is 12.1.0, it was 12.0.0"),
        ({"threads": 2}, r"the number of threads \(OMP_NUM_THREADS\) is 2, it was 1"),
        ({"slimvit": "slimvit 0.2.0", "sources": "def"}, r"slimvit is 0.2.0, it was 0.1.0\."),
        ({"sources": "def"}, "the sources of slimvit have changed"),
    ],
)
def test_what_keeps_a_run_from_being_taken_up_is_said_once(root, work, caplog, change, words):
    """Kind: hours of training are done again because of another OMP_NUM_THREADS, and no line says so."""
    stages = "dense", "finetune"
    with Workspace(root).open() as space:
        for stage in stages:
            space.step(stage, "key", Facts, work, tools=HERE)
    assert not caplog.records, "what was never there is not made anew"
    with Workspace(root).open() as space:
        for stage in stages:
            space.step(stage, "other", Facts, work, tools=HERE.model_copy(update=change))
    (line,) = caplog.messages
    assert re.match(f"dense is made anew, and so is all that follows: {words}", line)


def test_a_record_that_tells_no_version_is_not_said_to_have_had_another():
    before = {key: each for key, each in HERE.model_dump().items() if key != "pillow"}
    assert HERE.other_than(Tools.model_validate(before)) == ""


def test_another_decoder_of_pictures_is_another_input_of_every_stage(monkeypatch):
    """Kind: pictures that are resized otherwise, and what was made with the others is taken for made with these."""
    before = step_key("stage", "slimvit", [])
    assert step_key("stage", "slimvit", []) == before
    monkeypatch.setattr(PIL, "__version__", "0.1")
    assert step_key("stage", "slimvit", []) != before
    assert Tools.now("").pillow == "0.1"


def test_an_output_that_was_altered_is_named(root, work, caplog):
    with Workspace(root).open() as space:
        space.step("stage", "key", Facts, work, tools=HERE)
        (root / "b" / "c" / "d.txt").write_text("mine")
        space.step("stage", "key", Facts, work, tools=HERE)
    assert caplog.messages == ["stage is made anew: b/c/d.txt is gone or is not as it was written"]


def test_a_change_that_was_made_on_purpose_and_an_old_record_are_no_warning(root, work, caplog):
    with Workspace(root).open() as space:
        space.step("stage", "key", Facts, work, tools=HERE)
        space.step("stage", "other recipe", Facts, work, tools=HERE)
        space.step("old", "key", Facts, work)
        space.step("old", "other", Facts, work, tools=HERE)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_without_resume_nothing_needs_to_be_said(root, work, caplog):
    for threads in (1, 2):
        with Workspace(root, resume=False).open() as space:
            space.step("stage", str(threads), Facts, work, tools=HERE.model_copy(update={"threads": threads}))
    assert not caplog.records


def test_a_run_that_is_interrupted_at_such_a_line_is_taken_up_by_what_made_it(root, work):
    """Kind: the line comes too late, for the record is gone when it is read."""

    def interrupted() -> Made[list[Path], Facts]:
        raise KeyboardInterrupt

    with Workspace(root).open() as space:
        space.step("stage", "one thread", Facts, work, tools=HERE)
        with pytest.raises(KeyboardInterrupt):
            space.step("stage", "two", Facts, interrupted, tools=HERE.model_copy(update={"threads": 2}))
    with Workspace(root).open() as space:
        assert space.step("stage", "one thread", Facts, work, tools=HERE).reused


def test_scratch_is_removed_when_the_stage_is_done_and_kept_when_it_is_not(root, work):
    with Workspace(root).open() as space:
        scratch = space.scratch("stage")

        def fails() -> Made[list[Path], Facts]:
            scratch.write_text("epoch 1")
            raise ModelError("no")

        with pytest.raises(ModelError):
            space.step("stage", "key", Facts, fails)
        assert scratch.read_text() == "epoch 1"
        space.step("stage", "key", Facts, work)
        assert not scratch.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from toolchain.files import atomic_folder, write_text
from toolchain.model import Made
from toolchain.pipeline.folder import Nothing, Workspace
root = Path(sys.argv[1])
with Workspace(root).open() as space:
    def done():
        write_text(root / "first.txt", "1")
        return Made([root / "first.txt"], Nothing())
    def half():
        with atomic_folder(root / "dense") as partial:
            (partial / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    space.step("first", "key", Nothing, done)
    space.step("second", "key", Nothing, half)
"""


@pytest.mark.slow
def test_a_run_killed_half_way_goes_on_where_it_stopped(root):
    made = subprocess.run([sys.executable, "-c", KILLED, str(root)], check=False)
    assert made.returncode == -signal.SIGKILL
    assert list(root.glob(".dense.*.partial")), "the kill came too early to test anything"
    with Workspace(root).open() as space:
        assert sorted(path.name for path in root.iterdir()) == [".slimvit", "first.txt"]
        assert space.step("first", "key", Nothing, lambda: pytest.fail("done before the kill")).reused

        def second() -> Made[list[Path], Nothing]:
            write_text(root / "dense" / "weights", "whole")
            return Made([root / "dense"], Nothing())

        assert not space.step("second", "key", Nothing, second).reused


# Sweep and lock


def test_sweep_removes_half_written_things_and_nothing_else(root):
    """It looks only where a run writes: the folder may hold other things, too."""
    keep = [
        "a.partial", ".other.x0.partial", "data/.b.x0.partial", "onnx/.hidden", "dense/model.safetensors", "bench/partial",
        ".slimvit/stage.json",
    ]  # fmt: skip
    half = [f"{name}/.c.x1.partial" for name in OUTPUTS if "." not in name]
    half += [f".{name}.x2.partial" for name in OUTPUTS]
    half += [".slimvit/.stage.json.x3.partial", "engines/trt-rtx/.e.x4.partial"]
    half += [".dense.x5.partial/new/model.safetensors", ".masked.x6.partial/new/.n.partial"]
    for name in (*keep, *half):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    with Workspace(root).open():
        found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert found == {*keep, ".slimvit/lock"}


def test_what_a_changed_recipe_no_longer_writes_is_removed_unless_it_was_altered(root, work):
    def other() -> Made[list[Path], Nothing]:
        for name in ("onnx/old.onnx", "onnx/edited.onnx", "only/one.txt", "a.txt"):
            write_text(root / name, "other" if name != "a.txt" else "content")
        return Made([root / "onnx", root / "only", root / "a.txt"], Nothing())

    with Workspace(root).open() as space:
        space.step("old", "key", Nothing, other)
        kept = space.step("stage", "key", Facts, work)
        assert kept.outputs == ("a.txt", "b/c/d.txt")
        write_text(root / "onnx" / "edited.onnx", "mine")
        space.forget_all_but(["stage"])
        assert {str(p.relative_to(root)) for p in files_below(root) if ".slimvit" not in p.parts} == {
            "a.txt",
            "b/c/d.txt",
            "onnx/edited.onnx",
        }
        assert not (root / "only").exists()
        assert space.step("stage", "key", Facts, work).reused
        assert not (space.private / "old.json").exists()


LOCK = """
import sys, time
from pathlib import Path
from toolchain.pipeline.folder import Workspace
with Workspace(Path(sys.argv[1])).open():
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_folder_in_use_by_another_run_is_refused_until_that_run_ends(root):
    with other_process(LOCK, root) as holder:
        (root / ".dense.x.partial").write_text("of the other run")
        wanted = pytest.raises(StorageError, match=r"another run is writing to .*choose another --out")
        with wanted as caught, Workspace(root).open():
            pytest.fail("the block must not start")
        assert caught.value.exit_code == 74
        assert (root / ".dense.x.partial").exists(), "swept away what another run is writing"
        holder.kill()
        holder.wait()
        with Workspace(root).open():
            pass


def test_other_folders_are_not_held(tmp_path):
    with Workspace(tmp_path / "one").open(), Workspace(tmp_path / "two").open():
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot write to .*file") as caught, Workspace(tmp_path / "file").open():
        pytest.fail("the block must not start")
    assert caught.value.exit_code == 74
    with pytest.raises(StorageError, match="is not a folder"):
        Workspace(tmp_path / "file" / "run").check()
    Workspace(tmp_path / "not" / "there").check()
    assert not (tmp_path / "not").exists()
    with pytest.raises(StorageError, match="cannot write to /proc/new"), Workspace(Path("/proc/new")).open():
        pytest.fail("the block must not start")


# The shared cache


EXCLUSIVE = """
import sys, time
from pathlib import Path
from toolchain.files import exclusive
path = Path(sys.argv[1])
with exclusive(path):
    print("ready", flush=True)
    time.sleep(1.0)
    path.write_text("first")
"""


def test_a_cache_entry_is_made_by_one_process_at_a_time(tmp_path):
    path = tmp_path / "dense" / "key"
    with other_process(EXCLUSIVE, path) as holder:
        half = path.with_name(".key.x.partial")
        half.mkdir()
        with exclusive(path):
            assert path.read_text() == "first", "did not wait for the other process"
            assert not half.exists()
        holder.wait()


def test_a_killed_process_does_not_block_the_cache(tmp_path):
    path = tmp_path / "key"
    with other_process(EXCLUSIVE, path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with exclusive(path):
            assert not path.exists()


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(StorageError, match=r"cannot write to the cache .*SLIMVIT_CACHE_DIR"),
        exclusive(tmp_path / "file" / "a"),
    ):
        pytest.fail("the block must not start")


# Folders


def test_files_below(tmp_path):
    for name in ("b", "a/z", "a/y/x"):
        write_text(tmp_path / name, "")
    assert [str(path.relative_to(tmp_path)) for path in files_below(tmp_path)] == ["a/y/x", "a/z", "b"]
    assert files_below(tmp_path / "b") == [tmp_path / "b"]


def test_user_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SLIMVIT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache() == tmp_path / ".cache" / "slimvit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg" / "slimvit"
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "own"))
    assert user_cache() == tmp_path / "own"
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", "~/own")  # as a file of settings says it, which no shell reads
    assert user_cache() == tmp_path / "own"
