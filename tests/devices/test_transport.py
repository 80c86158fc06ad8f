import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from measuring import progress_to

from toolchain.devices import transport
from toolchain.devices.transport import LocalTransport
from toolchain.errors import ArtifactError, MeasurementError
from toolchain.on_device.runner import SCHEDULE_SCHEMA
from toolchain.progress import SILENT

pytestmark = pytest.mark.clock


def schedule(path, **changes):
    variants = [{"name": n, "path": str(path), "runtime": "ort-cpu", "inputs": ["image"]} for n in ("A", "B", "A'")]
    tensors = [{"shape": [1, 96], "dtype": "float32"}]
    return {
        "schema": SCHEDULE_SCHEMA,
        "seed": 0,
        "session": 0,
        "blocks": 2,
        "slot_ms": 0.1,
        "threads": 1,
        "warmup": {"calls": 2, "seconds": 0.0},
        "inputs": {"count": 8, "seed": 0, "tensors": tensors},
        "variants": variants,
        **changes,
    }


@pytest.fixture
def run(tmp_path):
    """What a session gives whose interpreter is a script."""

    def session(script, path="x"):
        python = tmp_path / "python"
        python.write_text(f"#!{sys.executable}\n{script}\n")
        python.chmod(0o755)
        return LocalTransport(str(python)).run(schedule(path), SILENT)

    return session


def test_a_session_runs_in_a_process_of_its_own_and_reports_progress(stack, tmp_path):
    seen = []
    result = LocalTransport().run(
        schedule(stack(tmp_path / "m.onnx")), progress_to(lambda *report: seen.append(report))
    )
    assert [len(result["blocks"]), "schedule_sha256" in result] == [2, False]
    assert seen[-2:] == [(0.5, "block 1/2"), (1.0, "block 2/2")]
    # torch is loaded here, and is not where only ONNX Runtime is timed
    assert set(result["fingerprint"]["after"]["machine"]["runtimes"]) == {"numpy", "onnxruntime"}


def test_a_variant_that_cannot_be_opened_is_a_bad_artifact(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"A \(.*m\.onnx\) does not run on ort-cpu"):
        LocalTransport().run(schedule(tmp_path / "m.onnx"), SILENT)


def test_a_process_that_dies_is_reported_with_its_last_lines(run):
    with pytest.raises(MeasurementError, match=r"exit code 1(?s:.*)the reason"):
        run("raise SystemExit('the reason')")
    with pytest.raises(MeasurementError, match=f"exit code -{int(signal.SIGKILL)}, most likely for want of memory"):
        run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


@pytest.mark.parametrize(
    ("code", "words"),
    [(-9, "want of memory"), (137, "want of memory"), (-4, "its processor lacks"), (132, "its processor lacks")],
)
def test_what_ended_a_process_is_told_here_and_through_a_shell(code, words):
    """Kind: a wheel of numpy for newer boards than the one that it is on."""
    assert words in transport.how_it_died(code)
    assert transport.how_it_died(1) == transport.how_it_died(-6) == ""


ABORTS = """
import os
class Interpreter:
    def __init__(self, **_):
        os.write(2, b"Check failed: the reason\\n")
        os.abort()
"""


@pytest.mark.parametrize("beside", [[], ["openvino-cpu"]])
def test_the_last_words_of_a_runtime_that_aborts_are_told(beside, tmp_path, monkeypatch):
    """By either program of a session: the device's runner alone, or the worker for what that has not built in."""
    package = tmp_path / "ai_edge_litert"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "interpreter.py").write_text(ABORTS)
    path = tmp_path / "m.tflite"
    path.touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    variants = [
        {"name": runtime, "path": str(path), "runtime": runtime, "inputs": ["x"]} for runtime in ("litert-cpu", *beside)
    ]
    with pytest.raises(MeasurementError, match=rf"exit code -{int(signal.SIGABRT)}(?s:.*)Check failed: the reason"):
        LocalTransport().run(schedule(path, variants=variants), SILENT)


def test_what_a_library_says_before_it_goes_on_is_no_reason_to_end():
    lines = ["progress 0.000 opening A\n", "INFO: created\n", "progress 0.000 opening B\n", "the reason\n"]
    assert list(transport.follow(lines, SILENT)) == ["the reason"]


OTHER_SEED = """
import json, pathlib, subprocess, sys
path = pathlib.Path(sys.argv[-2])
path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 1}))
sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))
"""


def test_samples_of_another_schedule_are_refused(run, stack, tmp_path):
    with pytest.raises(MeasurementError, match="another schedule"):
        run(OTHER_SEED, stack(tmp_path / "m.onnx"))


def test_a_session_loads_no_other_runtime_than_its_own():
    """Else their memory and the time to load them would be the artifact's."""
    code = (
        "import contextlib, sys, toolchain.devices.worker as w\n"
        "from toolchain.errors import SlimvitError\n"
        "others = ('torch', 'timm', 'onnx', 'onnxruntime', 'scipy', 'openvino')\n"
        "assert not set(others) & set(sys.modules), sorted(set(others) & set(sys.modules))\n"
        "with contextlib.suppress(SlimvitError):\n"
        "    w.OPENERS['openvino-cpu']('absent.onnx', 1).__enter__()\n"
        "assert not set(others[:-1]) & set(sys.modules), sorted(set(others) & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_left_running_after_an_interruption(stack, tmp_path):
    running = []

    def interrupt(*_):
        running.extend(psutil.Process().children())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LocalTransport().run(schedule(stack(tmp_path / "m.onnx"), blocks=10**6), progress_to(interrupt))
    assert running
    assert not any(process.is_running() for process in running)


def test_a_session_ends_when_its_parent_is_gone(stack, tmp_path):
    (tmp_path / "schedule.json").write_text(json.dumps(schedule(stack(tmp_path / "m.onnx"), blocks=10**6)))
    command = [
        sys.executable,
        "-P",
        transport.device_runner.__file__,
        str(tmp_path / "schedule.json"),
        str(tmp_path / "out"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"}) as process:
        process.stderr.readline()
        process.stderr.close()
        deadline = time.monotonic() + 10
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        ended = process.poll()
        process.kill()
    assert ended not in (None, 0)
    assert not (tmp_path / "out").exists()


def test_one_session_runs_at_a_time_on_a_machine(stack, tmp_path):
    seen, path = [], stack(tmp_path / "m.onnx")
    with transport.exclusive(transport.user_cache() / "measuring"):
        other = threading.Thread(
            target=LocalTransport().run, args=(schedule(path), progress_to(lambda *report: seen.append(report)))
        )
        other.start()
        deadline = time.monotonic() + 20
        while not seen and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [text for _, text in seen] == ["waiting for another measurement on this machine"]
    other.join(60)
    assert seen[-1] == (1.0, "block 2/2")


def test_a_cache_that_cannot_be_written_stops_no_measurement(stack, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert LocalTransport().run(schedule(stack(tmp_path / "m.onnx")), SILENT)["blocks"]
    assert "may run beside this one" in caplog.text
