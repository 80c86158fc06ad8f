"""Against a real sshd on loopback; the device is a folder, and its Python a program that may lie."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from builders import write_stack
from loopback import loopback
from measuring import progress_to
from sweeps import swept

import toolchain
from toolchain.devices.device import open_device, probe
from toolchain.devices.kept import FOLDER
from toolchain.devices.ssh import SshTransport
from toolchain.devices.targets_toml import named_target
from toolchain.errors import (
    ArtifactError,
    DeviceLost,
    MeasurementError,
    StorageError,
    TargetUnavailable,
    WorkloadRefused,
)
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison
from toolchain.measure.samples import Design, Workload
from toolchain.measure.single import measure
from toolchain.on_device import runner as device_runner
from toolchain.progress import SILENT

FOUR = Workload(batch=4)
SHORT = Design(slot_ms=2.0, warmup_s=0.02, tau=0.6, looks=1, sessions=2, blocks=4)
NAME = "de vice's $(touch pwned)"  # every byte of it has to reach the device as it is


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = loopback(tmp_path_factory.mktemp("sshd"))
    yield started
    started.kill()


@pytest.fixture
def board(server, tmp_path, monkeypatch):
    """A device with an empty folder; called with settings, it is that device with them."""
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    if server.process is None:
        server.start()

    def settings(**changes):
        return server.targets_toml(tmp_path / "targets.toml", folder=str(tmp_path / NAME), **changes)

    return settings


@pytest.fixture
def pair(tmp_path):
    return write_stack(tmp_path / "a.onnx"), write_stack(tmp_path / "b.onnx", layers=8)


def measured(pair, targets, tell=lambda *_: None, **changes):
    """(the comparison, the transport that it went over); a lost device is left alone only for a moment."""
    with open_device("board", targets) as device:
        ssh = device.fresh
        ssh.pause_s = 0.1
        design, progress = SHORT.model_copy(update=changes), progress_to(lambda share, text: tell(text, share))
        return compare(*pair, device, FOUR, design, progress=progress), ssh


def on_device(tmp_path):
    return sorted(path.relative_to(tmp_path / NAME) for path in (tmp_path / NAME).rglob("*") if path.is_file())


def runners(tmp_path):
    """The processes that measure on the device now."""
    here = [p.info for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == str(tmp_path / NAME)]
    return [info for info in here if "-" in (info["cmdline"] or [])]


def wait_until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def lying_python(tmp_path, code):
    """An interpreter on the device that runs `code` first; `argv` is what it was asked."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport os, subprocess, sys\nargv = sys.argv[1:]\n{code}\n")
    with path.open("a") as file:
        file.write(f"os.execv({sys.executable!r}, [{sys.executable!r}, *argv])\n")
    path.chmod(0o755)
    return path


def test_a_comparison_over_ssh_is_the_local_one_on_another_machine(board, pair, tmp_path):
    remote, ssh = measured(pair, board())
    local = compare(*pair, "ort-cpu", FOUR, SHORT)
    assert (remote.design, remote.scenario, remote.artifacts) == (local.design, local.scenario, local.artifacts)
    orders = [[[b.order for b in s.blocks] for s in found.sessions] for found in (remote, local)]
    assert orders[0] == orders[1]
    facts = [[s.variants["B"].outputs for s in found.sessions] for found in (remote, local)]
    assert facts[0] == facts[1]
    assert remote.environment["cpu"] == local.environment["cpu"]
    remote.save(tmp_path / "result.json")
    assert Comparison.load(tmp_path / "result.json").verdict == remote.verdict
    # the runner, a and b, each once, and nothing that is not named by its content but the lock
    assert len(ssh.sent) == 3
    there = on_device(tmp_path)
    assert sorted(map(str, there)) == sorted([*ssh.sent, "lock"])
    assert not list(tmp_path.rglob("pwned"))
    assert not runners(tmp_path)

    again, ssh = measured(pair, board())
    assert ssh.sent == []
    assert again.artifacts == remote.artifacts
    damaged = tmp_path / NAME / next(path for path in there if path.name == "b.onnx")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    _, ssh = measured(pair, board(), sessions=1)
    assert ssh.sent == [damaged.relative_to(tmp_path / NAME).as_posix()], "what lies there is read, never trusted"


def test_external_data_keeps_its_name_beside_the_graph(board, pair, tmp_path):
    import onnx

    model = onnx.load(pair[0])
    (tmp_path / "big").mkdir()
    big = tmp_path / "big" / "m.onnx"
    onnx.save(model, big, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    found, ssh = measured((big, big), board(), sessions=1)
    folders = {Path(name).parent for name in ssh.sent if name.startswith("artifacts/")}
    assert {Path(name).name for name in ssh.sent if Path(name).parent in folders} == {"m.onnx", "m.onnx.data"}
    assert len(folders) == 1
    assert found.artifacts["A"].size_bytes == sum(path.stat().st_size for path in big.parent.iterdir())


@pytest.mark.slow
def test_a_lost_device_is_named_and_the_next_run_goes_on(board, server, pair, tmp_path):
    def cut(text, _):
        if text.startswith("session 2: block"):
            server.kill()

    with pytest.raises(DeviceLost) as lost:
        measured(pair, board(), cut)
    for words in ("board", "root@board" if os.geteuid() == 0 else "@board", "connecting again did not help"):
        assert words in str(lost.value)
    assert "kept" in str(lost.value)
    assert lost.value.exit_code == 5
    kept = list((tmp_path / "cache" / FOLDER).iterdir())
    assert len(kept) == 1
    assert wait_until(lambda: not runners(tmp_path)), "the runner outlived its connection"

    server.start()
    seen = []
    found, _ = measured(pair, board(), lambda text, _: seen.append(text))
    assert [text for text in seen if text.startswith("session 1:")] == ["session 1: finished by an earlier run"]
    assert "session 2: block 4/4" in seen
    assert [session.session for session in found.sessions] == [0, 1]
    assert list((tmp_path / "cache" / FOLDER).iterdir()) == []


@pytest.mark.slow
def test_a_device_that_comes_back_is_connected_to_again_once(board, server, pair):
    cuts = []

    def cut(text, _):
        if text.startswith("session 2: block") and not cuts:
            cuts.append(text)
            server.kill()
        elif "connecting again" in text:
            server.start()

    found, ssh = measured(pair, board(), cut)
    assert len(cuts) == 1
    assert len(found.sessions) == 2
    assert len(ssh.sent) == 3, "nothing is sent a second time"


def test_nothing_runs_on_when_the_client_is_killed(board, pair, tmp_path):
    code = f"""
import sys
from pathlib import Path
from toolchain.devices.device import open_device
from toolchain.measure.compare import compare
from toolchain.measure.samples import Design, Workload
with open_device("board", Path({str(board())!r})) as device:
    compare(*map(Path, {list(map(str, pair))!r}), device, Workload(batch=4), Design(blocks=100000))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(toolchain.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as client:
        try:
            assert wait_until(lambda: runners(tmp_path), 60)
        finally:
            client.kill()
    assert wait_until(lambda: not runners(tmp_path))


def test_ctrl_c_leaves_nothing_running_either(board, pair, tmp_path):
    def interrupt(text, _):
        if "block" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(pair, board(), interrupt)
    assert wait_until(lambda: not runners(tmp_path))


FAULTS = ["data[:-1] + bytes([data[-1] ^ 1])", "data[:-10]"]


@pytest.mark.parametrize("fault", swept(FAULTS, FAULTS[:1]))
def test_an_upload_that_arrives_altered_or_short_is_caught(board, pair, tmp_path, fault):
    python = lying_python(
        tmp_path,
        f"""if "receive" in argv:
    data = sys.stdin.buffer.read()
    data = {fault}
    sys.exit(subprocess.run([{sys.executable!r}, *argv], input=data).returncode)""",
    )
    with pytest.raises(MeasurementError, match=r"board.*files were sent.*b\.onnx.*(arrived altered|10 bytes early)"):
        measured(pair, board(python=str(python)))
    assert not [path for path in on_device(tmp_path) if path.name == "b.onnx" or path.suffix == ".partial"]
    _, ssh = measured(pair, board(), sessions=1)
    assert [Path(name).name for name in ssh.sent] == ["b.onnx"]


def test_a_file_that_changes_on_the_device_before_it_is_opened_is_caught(board, pair, tmp_path):
    python = lying_python(
        tmp_path,
        """if argv[-2:] == ["-", "-"]:
    import glob
    (path,) = glob.glob("artifacts/*/b.onnx")
    open(path, "ab").write(b"x")""",
    )
    with pytest.raises(MeasurementError, match=r"session 1 was measured: missing, or not the file.*b\.onnx"):
        measured(pair, board(python=str(python)))
    _, ssh = measured(pair, board(), sessions=1)
    assert [Path(name).name for name in ssh.sent] == ["b.onnx"]


def test_a_full_disk_on_the_device_is_a_clear_error(board, tmp_path, pair):
    big = write_stack(tmp_path / "big.onnx", width=600)  # more than the largest file that is allowed there
    python = lying_python(tmp_path, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))")
    with pytest.raises(StorageError, match=r"on board.*files were sent: cannot write .*File too large") as full:
        measured((big, big), board(python=str(python)))
    assert full.value.exit_code == 74
    assert not [path for path in on_device(tmp_path) if path.suffix == ".partial"]


def test_an_answer_that_is_cut_short_is_no_result(board, pair, tmp_path):
    python = lying_python(
        tmp_path,
        f"""if argv[-2:] == ["-", "-"]:
    out = subprocess.run([{sys.executable!r}, *argv], stdout=subprocess.PIPE).stdout
    os.write(1, out[:-100])
    sys.exit(0)""",
    )
    with pytest.raises(MeasurementError, match="truncated or no JSON"):
        measured(pair, board(python=str(python)))


def test_a_killed_runner_is_not_taken_for_a_lost_connection(board, pair, tmp_path):
    python = lying_python(tmp_path, 'if argv[-2:] == ["-", "-"]: os.kill(os.getpid(), 9)')
    with pytest.raises(MeasurementError, match="exit code 137, most likely for want of memory"):
        measured(pair, board(python=str(python)))


def test_a_workload_that_the_device_refuses_is_no_missing_device(board):
    ssh = SshTransport("board", named_target("board", board()))
    with pytest.raises(WorkloadRefused, match="8 threads are more than the 4"):
        ssh._fail("timing", device_runner.EXIT_WORKLOAD, ["8 threads are more than the 4 core(s) there"])


def test_a_model_that_does_not_run_there_is_a_bad_artifact(board, tmp_path, pair):
    bad = write_stack(tmp_path / "bad.onnx", scale=1e30)
    with pytest.raises(ArtifactError, match=r"on board.*: B \(artifacts/.*bad\.onnx\).*not finite"):
        measured((pair[0], bad), board())


@pytest.mark.parametrize(
    ("code", "words", "fix"),
    [
        ("argv.insert(0, '-S'); argv.insert(0, '-E')", "cannot import numpy: ModuleNotFoundError", "-m pip install numpy"),
        ("os.environ['PYTHONPATH'] = PLANTED", "cannot import onnxruntime.*libgomp", "-m pip install numpy onnxruntime"),
        ("sys.exit('Python 3.7.3 is too old, 3.8 or newer is needed')", "3.7.3 is too old", "`python` in targets.toml"),
        (None, "no-python.*not found", "`python` in targets.toml"),
    ],
)  # fmt: skip
def test_what_the_device_lacks_is_said_with_the_fix(board, pair, tmp_path, code, words, fix):
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "onnxruntime.py").write_text("raise ImportError('libgomp.so.1 is missing')")
    planted = f"PLANTED = {str(tmp_path / 'planted')!r}\n"
    python = tmp_path / "no-python" if code is None else lying_python(tmp_path, planted + code)
    targets = board(python=str(python))
    with pytest.raises(TargetUnavailable, match=words) as missing:
        measured(pair, targets)
    assert fix in missing.value.install
    with pytest.raises(TargetUnavailable, match=words):
        probe("board", named_target("board", targets))


@pytest.mark.slow
def test_a_device_that_does_not_answer_is_unavailable_and_says_what_to_do(board, server, pair, tmp_path):
    def refused(words, fix, targets):
        with pytest.raises(TargetUnavailable, match=f"{words}") as error:
            measured(pair, targets)
        assert fix in error.value.install

    config = (server.root / "ssh_config").read_text()
    other = tmp_path / "config"
    other.write_text(config.replace(str(server.root / "user"), str(server.root / "host")))
    refused("Permission denied", "ssh-copy-id", board(ssh_config=str(other)))
    other.write_text(config.replace(str(server.root / "known_hosts"), str(tmp_path / "nobody")))
    refused("Host key verification failed", "connect once by hand", board(ssh_config=str(other)))
    (tmp_path / "changed").write_text(
        f"[127.0.0.1]:{server.port} {' '.join((server.root / 'user.pub').read_text().split()[:2])}\n"
    )
    other.write_text(config.replace(str(server.root / "known_hosts"), str(tmp_path / "changed")))
    refused("has changed", "remove its old key", board(ssh_config=str(other)))
    other.write_text(config.replace("HostName 127.0.0.1", "HostName no-such-host.invalid"))
    refused("Could not resolve", "`host` in targets.toml", board(ssh_config=str(other)))
    server.kill()
    refused("Connection refused", "true", board())


def test_no_setting_becomes_an_option_or_a_command(board):
    settings = named_target("board", board(user="pi", port=2222, python="~/a b/python", ssh_config="none"))
    ssh = SshTransport("board", settings)
    command = ssh._client()
    assert command[-4:] == ["-p", "2222", "--", "board"]
    assert command[command.index("-F") + 1] == "none"
    assert command[command.index("-l") + 1] == "pi"
    assert "BatchMode=yes" in command
    assert ssh._python() == "\"$HOME\"/'a b/python'"


def test_what_a_user_is_told_to_run_reaches_the_same_device(board):
    """Kind: a board behind a port of its own, where the line that was told reached another machine."""
    ssh = SshTransport("board", named_target("board", board(user="pi", port=2222, ssh_config="none")))
    assert ssh._hint("connect to host: Connection refused") == "ssh -F none -p 2222 pi@board true"
    assert ssh._hint("pi@board: Permission denied").endswith("ssh-copy-id -F none -p 2222 pi@board")


def test_what_the_devices_shell_says_first_may_be_in_any_encoding(board, tmp_path):
    python = lying_python(tmp_path, r'os.write(1, b"Willkommen, Ger\xe4t 7\n")')
    assert probe("board", named_target("board", board(python=str(python)))).target == "board"


def test_a_driver_that_is_too_old_is_not_taken_for_the_python(board):
    ssh = SshTransport("board", named_target("board", board()))
    words = ["UserWarning: The NVIDIA driver on your system is too old (found version 11040).", "Segmentation fault"]
    with pytest.raises(MeasurementError, match="exit code 139"):
        ssh._fail("timing", 139, words)


def test_large_files_may_take_the_time_that_a_slow_card_needs(board, pair, monkeypatch):
    """Kind: two files of several GB, of which a board never told in three minutes whether it has them."""
    ssh, limits = SshTransport("board", named_target("board", board())), []

    def looked(stage, script, feed, **changes):
        limits.append(changes["limit_s"])
        raise TargetUnavailable("board", "enough")

    monkeypatch.setattr(ssh, "_ssh", looked)
    monkeypatch.setattr("toolchain.devices.ssh.sha256", lambda _: "0" * 64)
    os.truncate(pair[0], 3 * 10**9)  # of which the disk holds next to nothing
    with pytest.raises(TargetUnavailable, match="enough"):
        ssh._ensure({"a": pair[0]}, SILENT)
    assert limits == [180 + 600]


def test_a_probe_says_what_answers(board):
    found = probe("board", named_target("board", board()))
    assert found.target == "board"
    assert device_runner.cpu_model() in found.device
    assert found.details["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.slow
def test_one_artifact_over_ssh_with_its_cold_start(board, pair):
    with open_device("board", board()) as device:
        found = measure(pair[0], device, FOUR, SHORT.model_copy(update={"sessions": 1}), cold_starts=2)
    assert [start.open_ns > 0 for start in found.cold] == [True, True]
    assert found.cold[0].open_ns != found.cold[1].open_ns
