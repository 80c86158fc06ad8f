import errno
import io
import os
import time
from hashlib import sha256

import pytest

from toolchain.on_device import store as device_store
from toolchain.on_device.store import AlteredError, look, receive

BYTES = {"artifacts/1/model.onnx": b"graph", "artifacts/1/model.onnx.data": b"w" * 5000, "empty": b""}


def announced(files=BYTES):
    return [{"path": name, "sha256": sha256(raw).hexdigest(), "size": len(raw)} for name, raw in files.items()]


def digests():
    return {name: sha256(raw).hexdigest() for name, raw in BYTES.items()}


def stream(files=BYTES):
    return io.BytesIO(b"".join(files.values()))


def left(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_what_is_received_is_there_and_is_not_asked_for_again(tmp_path):
    assert set(look(tmp_path, digests(), ())["missing"]) == set(BYTES)
    assert receive(tmp_path / "device", announced(), stream()) == {"stored": list(BYTES)}
    root = tmp_path / "device"
    assert {name: (root / name).read_bytes() for name in left(root)} == BYTES
    assert look(root, digests(), ())["missing"] == []
    assert root.stat().st_mode & 0o077 == 0, "nobody else's business"
    (root / "artifacts/1/model.onnx").write_bytes(b"grapf")
    (root / "empty").unlink()
    assert look(root, digests(), ())["missing"] == ["artifacts/1/model.onnx", "empty"]


@pytest.mark.parametrize("fault", ["altered", "short"])
def test_bytes_that_are_not_as_announced_are_never_put_in_place(tmp_path, fault):
    raw = bytearray(stream().getvalue())
    raw[-1] ^= 1
    arriving = io.BytesIO(bytes(raw) if fault == "altered" else bytes(raw[:-100]))
    with pytest.raises(AlteredError, match=r"model\.onnx\.data.*(altered|100 bytes early)"):
        receive(tmp_path, announced(), arriving)
    assert left(tmp_path) == ["artifacts/1/model.onnx"]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path):
    large = [{**file, "size": 10**18} for file in announced()]
    with pytest.raises(OSError, match=r"3000000000000000000 bytes are needed, \d+ are free") as caught:
        receive(tmp_path, large, stream())
    assert caught.value.errno == errno.ENOSPC
    assert left(tmp_path) == []


def test_a_disk_that_fills_up_leaves_no_half_file(tmp_path, full_disk):
    full_disk(device_store.os, "fsync")
    with pytest.raises(OSError, match="No space left"):
        receive(tmp_path, announced(), stream())
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/etc/passwd", ""])
def test_names_outside_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="no name below the folder"):
        receive(tmp_path / "root", announced({name: b"x"}), io.BytesIO(b"x"))
    with pytest.raises(ValueError, match="no name below the folder"):
        look(tmp_path / "root", {name: ""}, ())


def test_only_old_remains_of_a_transfer_are_removed(tmp_path):
    old, young = tmp_path / f"a{device_store.PARTIAL}", tmp_path / f"b{device_store.PARTIAL}"
    for path in (old, young):
        path.touch()
    os.utime(old, (time.time() - 2 * device_store.DAY_S,) * 2)
    receive(tmp_path, [], io.BytesIO())
    assert (old.exists(), young.exists()) == (False, True)


def test_modules_are_reported_with_version_or_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_module_for_a_test.py").write_text("raise OSError('libgomp.so.1 is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = look(tmp_path, {}, ("numpy", "no_such_module", "broken_module_for_a_test"))["modules"]
    assert found["numpy"]["version"][0].isdigit()
    assert "ModuleNotFoundError" in found["no_such_module"]["error"]
    assert "libgomp" in found["broken_module_for_a_test"]["error"]
