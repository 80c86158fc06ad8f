"""Writes are whole or not there: a failure at any moment leaves what was there before and nothing beside it."""

from __future__ import annotations

import errno
import gzip
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from toolchain import errors
from toolchain.errors import ArtifactError, StorageError
from toolchain.files import (
    atomic_folder,
    atomic_path,
    check_replaceable,
    digest_of,
    exclusive,
    expanded,
    files_below,
    read_json,
    sha256,
    user_cache,
    write_json,
    write_text,
)
from toolchain.model import MODEL_FILES, Preprocess

FULL = os.strerror(errno.ENOSPC)


def tree(root: Path) -> dict[str, str | None]:
    """Every path below a folder, hidden ones too, with the text of files."""
    return {str(p.relative_to(root)): p.read_text() if p.is_file() else None for p in sorted(root.rglob("*"))}


def no_space(*_args: object, **_kwargs: object) -> NoReturn:
    raise OSError(errno.ENOSPC, FULL)


def unwritable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a folder read-only; for root, who may write anywhere, the system's answer is put in by hand."""
    folder.chmod(0o555)
    if os.geteuid() == 0:

        def refuse(*_args: object, **_kwargs: object) -> NoReturn:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(tempfile, "mkdtemp", refuse)


def test_what_the_system_says_never_stands_alone_in_a_message():
    """Kind: "No such file or directory", and no word on what to do; `fault_words` has one. What runs on devices imports nothing."""
    package = Path(errors.__file__).parent
    files = (path for path in package.rglob("*.py") if "on_device" not in path.parts and path.name != "errors.py")
    assert [path.name for path in files if "strerror" in path.read_text(encoding="utf-8")] == []


# Files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    for text in ("old", "new: ä\n"):
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
            assert temporary.parent == path.parent  # a rename across file systems would not be atomic
        assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_readers_see_the_old_content_until_the_end(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
    assert path.read_text() == "half"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_in_the_middle_changes_no_file(tmp_path, error, existed):
    path = tmp_path / "a.txt"
    if existed:
        path.write_text("old")
    before = tree(tmp_path)
    with pytest.raises(error), atomic_path(path) as temporary:  # noqa: PT012 - the failure is inside the block
        temporary.write_text("half")
        raise error
    assert tree(tmp_path) == before


@pytest.mark.parametrize("moment", ["write_text", "replace"])
def test_a_full_disk_changes_no_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, moment, no_space)
        with pytest.raises(StorageError, match=rf"cannot write .*a\.txt: {FULL}") as caught:
            write_text(path, "new")
    assert caught.value.exit_code == 74
    assert tree(tmp_path) == {"a.txt": "old"}


def test_a_disk_that_is_full_only_at_fsync_changes_no_file(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(StorageError, match=FULL):
            write_text(tmp_path / "a.txt", "new")
        with pytest.raises(StorageError, match=FULL), atomic_folder(tmp_path / "b") as partial:
            (partial / "c.txt").write_text("new")
    assert tree(tmp_path) == {}


def test_content_is_on_disk_before_it_gets_its_name(tmp_path, watched):
    watched(os, "fsync")
    calls = watched(Path, "replace")
    write_text(tmp_path / "a.txt", "x")
    with atomic_folder(tmp_path / "b") as partial:
        (partial / "one").write_text("1")
        (partial / "sub").mkdir()
        (partial / "sub" / "two").write_text("2")
    order = [call.name for call in calls]
    assert [what for what in order if what == "fsync"] == ["fsync"] * 3
    assert order.index("replace") == 1
    assert "replace" not in order[2:4]


def test_a_read_only_folder_is_a_storage_error(tmp_path, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir()
    unwritable(folder, monkeypatch)
    try:
        with pytest.raises(StorageError, match=r"cannot write .*a\.txt: Permission denied") as file_error:
            write_text(folder / "a.txt", "x")
        wanted = pytest.raises(StorageError, match=r"cannot write .*b: Permission denied")
        with wanted as folder_error, atomic_folder(folder / "b"):
            pytest.fail("the block must not start")
    finally:
        folder.chmod(0o755)
    assert (file_error.value.exit_code, folder_error.value.exit_code) == (74, 74)
    assert tree(folder) == {}


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        write_text(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(StorageError, match="cannot write"), atomic_folder(tmp_path / "file" / "b"):
        pytest.fail("the block must not start")
    assert tree(tmp_path) == {"file": "x"}


# Folders


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "deep" / "model"
    with atomic_folder(folder) as partial:
        (partial / "old.txt").write_text("1")
    with atomic_folder(folder) as partial:
        (partial / "new.txt").write_text("2")
        assert tree(folder) == {"old.txt": "1"}
    assert tree(tmp_path) == {"deep": None, "deep/model": None, "deep/model/new.txt": "2"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_in_the_middle_changes_no_folder(tmp_path, error, existed):
    folder = tmp_path / "model"
    if existed:
        folder.mkdir()
        (folder / "old.txt").write_text("1")
    before = tree(tmp_path)
    with pytest.raises(error), atomic_folder(folder) as partial:  # noqa: PT012 - the failure is inside the block
        (partial / "half.txt").write_text("2")
        raise error
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_moved_into_place_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.txt").write_text("1")
    replace = Path.replace

    def fail_for_the_new(self: Path, to: Path) -> Path:
        return no_space() if self.name == "new" else replace(self, to)

    monkeypatch.setattr(Path, "replace", fail_for_the_new)
    with pytest.raises(StorageError, match=FULL), atomic_folder(folder) as partial:
        (partial / "new.txt").write_text("2")
    assert tree(tmp_path) == {"model": None, "model/old.txt": "1"}


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (("model.json", "model.safetensors", "plan.json", "allocation.json"), None),
        (("model.json", ".plan.json.x1.partial"), None),
        ((), None),
        (("model.safetensors",), r"has no model\.json"),
        (("model.json", "thesis.tex"), r"holds thesis\.tex"),
        (("model.json", "sub/model.json"), "holds sub"),
    ],
)
def test_only_a_folder_of_ours_is_replaced(tmp_path, there, said):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in there:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("1")
    before = tree(tmp_path)
    if said is None:
        check_replaceable(folder, MODEL_FILES)
        with atomic_folder(folder, MODEL_FILES) as partial:
            (partial / "model.json").write_text("2")
        assert tree(folder) == {"model.json": "2"}
        return
    with pytest.raises(StorageError, match=said), atomic_folder(folder, MODEL_FILES) as partial:
        (partial / "model.json").write_text("2")
    assert tree(tmp_path) == before


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "model").write_text("1")
    with pytest.raises(StorageError, match="cannot write"), atomic_folder(tmp_path / "model", MODEL_FILES):
        raise AssertionError("the block is not entered")
    assert tree(tmp_path) == {"model": "1"}
    check_replaceable(tmp_path / "absent", MODEL_FILES)


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path)
    with pytest.raises(StorageError, match=r"model cannot be written: .* is read-only .*choose another folder"):
        check_replaceable(tmp_path / "new" / "model", MODEL_FILES)
    (tmp_path / "file").write_text("1")
    with pytest.raises(StorageError, match=r"model cannot be written: .*file is a file; choose another name"):
        check_replaceable(tmp_path / "file" / "model", MODEL_FILES)


@pytest.mark.parametrize("path", ["x" * 300, "/".join(["y" * 200] * 25)])
@pytest.mark.parametrize("reads", [True, False])
def test_a_name_that_is_too_long_is_said_to_be_so(tmp_path, path, reads):
    with pytest.raises(StorageError, match="File name too long; choose a shorter one"):
        read_json(tmp_path / path) if reads else write_text(tmp_path / path, "1")


def test_two_writers_of_one_folder_do_not_disturb_each_other(tmp_path):
    """Recipes share the cache of baselines, and may be run side by side."""
    folder = tmp_path / "entry"
    with atomic_folder(folder) as first:
        (first / "a.txt").write_text("first")
        with atomic_folder(folder) as second:
            (second / "a.txt").write_text("second")
        assert tree(folder) == {"a.txt": "second"}
        (first / "b.txt").write_text("first")
    assert tree(tmp_path) == {"entry": None, "entry/a.txt": "first", "entry/b.txt": "first"}


# JSON and digests


def test_json_round_trips_and_holds_no_nan(tmp_path):
    path = tmp_path / "a.json"
    value = {"b": [1, 2.5, None, "ä"], "a": {}}
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_text(encoding="utf-8").endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == value


def test_gzipped_json_is_read_as_plain_json_is_whatever_the_file_is_called(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(gzip.compress('{"a": "ä"}'.encode()))
    assert read_json(path) == {"a": "ä"}
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:12] + b"\0" * (len(whole) - 12), gzip.compress(b"{")):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="is not JSON"):
            read_json(path)


def test_reading_what_is_not_there_or_not_json(tmp_path):
    path = tmp_path / "a.json"
    for read in (read_json, sha256):
        with pytest.raises(StorageError, match=r"cannot read .*a\.json: No such file"):
            read(path)
    for content in (b"{", b"", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="is not JSON") as caught:
            read_json(path)
        assert caught.value.exit_code == 3


def test_sha256_reads_past_its_buffer(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"a" * 1_000_000)
    assert sha256(path) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"  # FIPS 180-2, B.3
    path.write_bytes(bytes(3 << 20))
    zeros = sha256(path)
    path.write_bytes(bytes((3 << 20) - 1) + b"\x01")
    assert sha256(path) != zeros


def test_digest_of_depends_on_values_alone():
    assert digest_of("a", {"x": 1, "y": (2, 3)}) == digest_of("a", {"y": [2, 3], "x": 1})
    different = {digest_of(*parts) for parts in ((), ("a",), (["a"],), ("a", None), ("a", 1), ("a", "1"), ("a", True))}
    assert len(different) == 7


def test_preprocess_survives_json():
    preprocess = Preprocess((1, 28, 28), (0.1,), (0.2,), "bicubic", 0.9, "center")
    raw = json.loads(json.dumps(vars(preprocess)))
    assert Preprocess.from_dict(raw) == preprocess


@pytest.mark.parametrize(
    "raw", [None, [], {}, {"input_size": [3, 8]}, {"input_size": [3, 8, 8], "mean": "0", "std": []}]
)
def test_preprocess_that_is_none(raw):
    with pytest.raises(ArtifactError, match="preprocessing is invalid at"):
        Preprocess.from_dict(raw)


def test_a_pipe_is_written_into_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "all of it")
    assert os.read(reader, 100) == b"all of it"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_user_without_a_home_folder_is_told_to_name_one(monkeypatch):
    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    for name in ("HOME", "SLIMVIT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(StorageError, match="set HOME"):
        user_cache()


def test_the_files_of_a_folder_are_those_that_its_links_lead_to(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "weights.bin").write_bytes(b"1")
    (folder / "linked").symlink_to(elsewhere)
    assert files_below(folder) == [folder / "linked" / "weights.bin"]
    (elsewhere / "loop").symlink_to(elsewhere)
    with pytest.raises(StorageError, match="loop is a link to a folder that it lies in"):
        files_below(folder)
    (elsewhere / "loop").unlink()
    (folder / "gone").symlink_to(tmp_path / "nothing")
    with pytest.raises(StorageError, match=r"gone is a link to .*nothing, which is not there"):
        files_below(folder)


# Names, users and links


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_files_and_folders_are_for_those_whom_the_umask_lets_in(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "x")
        with atomic_folder(tmp_path / "b") as partial:
            write_text(partial / "c.txt", "x")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "b/c.txt", "b")]
    assert modes == [0o666 & ~mask, 0o666 & ~mask, 0o777 & ~mask]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_names_may_be_as_long_as_the_file_system_allows(tmp_path, name):
    write_text(tmp_path / name, "old")
    write_text(tmp_path / name, "new")
    assert tree(tmp_path) == {name: "new"}
    (tmp_path / name).unlink()
    with exclusive(tmp_path / name), atomic_folder(tmp_path / name) as partial:
        write_text(partial / name, "new")
    assert (tmp_path / name / name).read_text() == "new"


def test_only_what_is_left_of_one_name_is_removed(tmp_path):
    for name in (".*.1.partial", ".other.1.partial"):
        (tmp_path / name).mkdir()
    with exclusive(tmp_path / "*"):
        assert sorted(each.name for each in tmp_path.glob("*.partial")) == [".other.1.partial"]


def test_a_folder_is_replaced_where_its_link_leads(tmp_path):
    (tmp_path / "there" / "old").mkdir(parents=True)
    (tmp_path / "link").symlink_to("there/old")
    with atomic_folder(tmp_path / "link") as partial:
        write_text(partial / "new", "x")
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "there") == {"old": None, "old/new": "x"}


def test_a_name_that_is_no_text_is_told(tmp_path):
    name = os.fsdecode(b"pictures\xff")
    with pytest.raises(StorageError, match=r"'source = pictures\\udcff' is no UTF-8; rename the file or folder"):
        write_text(tmp_path / "recipe.toml", f"[data]\nsource = {name}\n")
    assert tree(tmp_path) == {}


def test_a_home_folder_that_the_system_does_not_know_is_told():
    with pytest.raises(StorageError, match=r"~nobody-here/a: the system names no home folder for that user; write"):
        expanded("~nobody-here/a")
