"""The device's files as a device sees them: other Pythons, schedules from standard input, files by digest, no neighbours."""

import ast
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from builders import write_stack
from played.cpus import CPUS, play

from toolchain.on_device import bundle_run
from toolchain.on_device import runner as device_runner
from toolchain.on_device import store as device_store
from toolchain.on_device.runner import SCHEDULE_SCHEMA, emulation, main, schedule_digest

ON_DEVICES = [Path(module.__file__) for module in (device_runner, device_store, bundle_run)]
OPENERS = {"still": lambda path, threads: Still()}


class Still:
    """A runner that takes a microsecond, says the clock."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def infer(self, feeds):
        return dict(feeds)

    def time_ns(self, feeds, samples):
        return [1000] * samples


CPUINFO, MODALIAS, ARCH = "/proc/cpuinfo", "/sys/devices/system/cpu/modalias", "/proc/sys/kernel/arch"
ARM = "processor\t: 0\nmodel name\t: ARMv8 Processor rev 0 (v8l)\nCPU implementer\t: 0x41\n"


def schedule(**changes):
    return {
        "schema": SCHEDULE_SCHEMA,
        "seed": 0,
        "session": 0,
        "blocks": 2,
        "slot_ms": 0.01,
        "threads": 1,
        "warmup": {"calls": 2, "seconds": 0.0},
        "inputs": {"count": 2, "seed": 0, "tensors": [{"shape": [1, 2], "dtype": "float32"}]},
        "variants": [{"name": n, "path": "m", "runtime": "still", "inputs": ["x"]} for n in ("A", "B", "A'")],
        **changes,
    }


@pytest.mark.parametrize("path", ON_DEVICES, ids=lambda path: path.name)
def test_what_runs_on_a_device_is_python_3_8_and_stands_alone(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    declared = {module for modules in device_runner.MODULES.values() for module in modules}
    allowed = declared if path == Path(device_runner.__file__) else set()
    assert imported <= {*sys.stdlib_module_names, *allowed}


def test_the_version_linter_agrees_and_notices(tmp_path):
    linter = [str(Path(sys.executable).with_name("vermin")), "--no-tips", "-t=3.8-", "--violations"]
    found = subprocess.run([*linter, *map(str, ON_DEVICES)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    (tmp_path / "new.py").write_text("import itertools\nprint(list(itertools.pairwise([1, 2])))\n")
    assert subprocess.run([*linter, str(tmp_path / "new.py")], capture_output=True).returncode != 0


def test_files_that_are_not_those_of_the_schedule_are_never_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("good").write_bytes(b"1")
    files = {"good": sha256(b"1").hexdigest()}
    Path("schedule.json").write_text(json.dumps(schedule(files=files)))
    assert main(["schedule.json", "out.json"], OPENERS) == 0
    assert json.loads(Path("out.json").read_text())["schedule_sha256"] == schedule_digest(schedule(files=files))
    Path("out.json").unlink()
    for name, digest in (("good", "0" * 64), ("gone", files["good"])):
        Path("schedule.json").write_text(json.dumps(schedule(files={name: digest})))
        assert main(["schedule.json", "out.json"], OPENERS) == device_runner.EXIT_FILES
        assert name in capsys.readouterr().err
    assert not Path("out.json").exists()


@pytest.mark.parametrize(
    ("machine", "seen", "emulated"),
    [
        ("aarch64", {CPUINFO: "vendor_id\t: GenuineIntel\n"}, True),
        ("riscv64", {CPUINFO: "processor\t: 0\nvendor_id\t: AuthenticAMD\n"}, True),
        ("aarch64", {CPUINFO: ARM, MODALIAS: "cpu:type:x86,ven0000fam0006mod0055:feature:,0000,0001"}, True),
        ("aarch64", {CPUINFO: ARM, ARCH: "x86_64"}, True),
        ("aarch64", {CPUINFO: ARM, ARCH: "aarch64", MODALIAS: "cpu:type:aarch64:feature:,0000,0001"}, False),
        ("aarch64", {CPUINFO: ARM}, False),
        ("x86_64", {CPUINFO: "vendor_id\t: GenuineIntel\n", ARCH: "x86_64"}, False),
        ("x86_64", {CPUINFO: "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n"}, False),
        ("x86_64", {CPUINFO: "vendor_id\t: VirtualApple\n"}, True),
        ("x86_64", {CPUINFO: ARM, ARCH: "aarch64"}, True),
        ("x86_64", {CPUINFO: ARM, MODALIAS: "cpu:type:aarch64:feature:,0000,0001"}, True),
        ("x86_64", {CPUINFO: "vendor_id\t: AuthenticAMD\nmodel name\t: QEMU TCG CPU version 2.5+\n"}, True),
    ],
)
def test_an_emulated_device_is_recognised(machine, seen, emulated):
    assert bool(emulation(machine, seen.get)) is emulated


def test_an_emulated_device_is_never_timed(monkeypatch, tmp_path, capsys):
    (tmp_path / "schedule.json").write_text(json.dumps(schedule()))
    cpu = CPUS["avx2"]
    play(replace(cpu, files={**cpu.files, CPUINFO: "model name\t: QEMU TCG CPU version 2.5+\n"}), monkeypatch)
    code = main([str(tmp_path / "schedule.json"), str(tmp_path / "out.json")], OPENERS)
    assert code == device_runner.EXIT_UNAVAILABLE
    assert "emulated" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.fixture
def streamed(tmp_path):
    """A session that reads its schedule from standard input, in a folder of its own."""
    path = write_stack(tmp_path / "m.onnx")
    started = []

    def start(**changes):
        variants = [{"name": n, "path": path.name, "runtime": "ort-cpu", "inputs": ["image"]} for n in ("A", "B", "A'")]
        tensors = {"count": 2, "seed": 0, "tensors": [{"shape": [1, 96], "dtype": "float32"}]}
        asked = schedule(variants=variants, inputs=tensors, **changes)
        process = subprocess.Popen(
            [sys.executable, "-P", device_runner.__file__, "-", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        )
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        process.stdin.flush()
        started.append(process)
        return process, asked

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def test_a_streamed_session_answers_on_standard_output(streamed):
    process, asked = streamed()
    result = json.loads(process.stdout.read().splitlines()[-1])
    assert process.wait(10) == 0
    assert result["schedule_sha256"] == schedule_digest(asked)
    assert len(result["blocks"]) == 2


def test_a_session_keeps_to_the_cores_of_its_schedule(streamed):
    core = max(os.sched_getaffinity(0))
    process, _ = streamed(affinity=[core])
    result = json.loads(process.stdout.read().splitlines()[-1])
    assert result["fingerprint"]["before"]["machine"]["affinity"] == [core]


def test_a_streamed_session_ends_at_once_when_its_input_closes(streamed):
    process, _ = streamed(warmup={"calls": 10, "seconds": 600.0})  # nothing is written for ten minutes
    process.stderr.readline()
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(5) != 0


def test_two_sessions_never_run_at_once_in_one_folder(streamed, tmp_path):
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process, _ = streamed()
        assert b"waiting for another measurement" in process.stderr.readline()
        assert process.poll() is None
        fcntl.flock(held, fcntl.LOCK_UN)
        assert process.wait(20) == 0


def test_a_device_that_stays_busy_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Path("lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert device_runner._alone(lambda *_: None, wait_s=0.0) is None
        fcntl.flock(held, fcntl.LOCK_UN)
        with device_runner._alone(lambda *_: None), pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
