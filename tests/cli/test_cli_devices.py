"""Devices by name in the verbs, against a real sshd and an unpacked bundle."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from builders import write_stack
from loopback import loopback
from sweeps import swept

from toolchain.cli import bench
from toolchain.errors import TargetUnavailable
from toolchain.targets import TARGETS, BuildOptions

TINY = Path(__file__).parents[1] / "targets" / "litert"


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def pair(tmp_path):
    return write_stack(tmp_path / "a.onnx"), write_stack(tmp_path / "b.onnx", layers=8)


@pytest.mark.slow
def test_targets_asks_the_devices_that_are_named(command, tmp_path):
    server = loopback(tmp_path)
    try:
        targets = server.targets_toml(tmp_path / "targets.toml")
        targets.write_text(
            targets.read_text() + '[gone]\ntransport = "ssh"\nhost = "gone"\n[vault]\ntransport = "bundle"\n'
        )
        (tmp_path / "ssh_config").write_text(
            (tmp_path / "ssh_config").read_text() + "Host gone\n  HostName 127.0.0.1\n  Port 1\n"
        )
        text = targets.read_text().replace('host = "gone"', f'host = "gone"\nssh_config = "{tmp_path}/ssh_config"')
        targets.write_text(text)
        outcome = command("targets", "--targets", targets, "--json")
        rows = {row["target"]: row for row in json.loads(outcome.out)}
        shown = command("targets", "--targets", targets).out
    finally:
        server.kill()
    assert set(rows) == {*TARGETS, "board", "gone", "vault"}
    assert [rows[name]["available"] for name in ("board", "gone", "vault")] == [True, False, True]
    assert rows["board"]["runtime"].startswith("onnxruntime ")
    assert "Connection refused" in rows["gone"]["details"]["reason"]
    assert rows["gone"]["install"] == f"ssh -F {tmp_path}/ssh_config gone true"
    assert "board" in shown


def test_a_folder_in_place_of_targets_toml_offers_the_one_in_it(command, tmp_path):
    (tmp_path / "recipe.toml").write_text("")
    (tmp_path / "targets.toml").write_text("")
    outcome = command("targets", "--targets", tmp_path)
    assert (outcome.code, outcome.err) == (
        74,
        f"slimvit: error: the targets file {tmp_path} is a folder; did you mean {tmp_path}/targets.toml?\n",
    )


def test_a_name_like_no_target_is_told_all_of_them(command, pair):
    assert (
        "unknown target 'nope'; known targets: ort-cpu, "
        in command("bench", "profile", pair[0], "--target", "nope").err
    )


def test_a_named_target_is_measured_with_its_own_settings(command, pair, tmp_path):
    cores = sorted(os.sched_getaffinity(0))[-2:]
    if len(cores) < 2:
        pytest.skip("two threads need two cores")
    (tmp_path / "work" / "targets.toml").write_text(f'[two]\ntransport = "local"\nthreads = 2\naffinity = {cores}\n')
    outcome = command("bench", "compare", *pair, "--target", "two", "--json")
    assert outcome.code in (0, 1, 4), outcome.err
    found = json.loads(outcome.out)
    assert found["raw"]["scenario"]["target"] == "ort-cpu"
    assert (found["environment"]["threads"], found["environment"]["affinity"]) == (2, cores)
    outcome = command("bench", "compare", *pair, "--target", "two", "--threads", "1", "--json")
    assert json.loads(outcome.out)["environment"]["threads"] == 1


@pytest.mark.parametrize(
    ("table", "code", "words"),
    [
        ('transport = "ssh"\nhost = "-oProxyCommand=x"', 2, "not starting with a dash"),
        ('transport = "bundle"', 5, "slimvit bench pack A B --target pi"),
        ('transport = "ssh"\nhost = "pi"\nhots = "x"', 2, "did you mean 'host'"),
    ],
)
def test_what_cannot_be_measured_ends_with_its_code(command, pair, tmp_path, table, code, words):
    (tmp_path / "work" / "targets.toml").write_text(f"[pi]\n{table}\n")
    outcome = command("bench", "compare", *pair, "--target", "pi")
    assert (outcome.code, words in outcome.err) == (code, True), outcome.err


def test_a_bundle_goes_out_and_its_result_comes_back(command, pair, tmp_path):
    (tmp_path / "work" / "targets.toml").write_text('[vault]\ntransport = "bundle"\nthreads = 1\n')
    bundle = tmp_path / "bundle.tar"
    asked = ("--target", "vault", "--sessions", 3, "--blocks", 4, "--tau", 0.5, "--batch", 4)
    facts = json.loads(command("bench", "pack", *pair, "-o", bundle, *asked, "--json").out)
    assert facts["bytes"] == bundle.stat().st_size
    with tarfile.open(bundle) as tar:
        tar.extractall(tmp_path / "device", filter="data")
    subprocess.run([sys.executable, str(tmp_path / "device" / "run.py")], check=True, capture_output=True)
    result, comparison = tmp_path / "device" / "result.json", tmp_path / "comparison.json"
    outcome = command("bench", "unpack", result, bundle, "-o", comparison, "--json")
    found = json.loads(outcome.out)
    assert outcome.code == bench.EXIT.get(found["verdict"], 0)
    assert json.loads(comparison.read_text()) == found
    assert found["verdict"] in command("bench", "unpack", result, bundle).out
    result.write_text(result.read_text().replace('"session":0', '"session":1'))
    altered = command("bench", "unpack", result, bundle)
    assert (altered.code, "altered" in altered.err) == (3, True)


RUNTIMES = {
    "litert-cpu": ("tflite", ["numpy", "ai_edge_litert"]),
    "executorch-xnnpack": ("pte", ["numpy", "torch", "executorch"]),
}
"""Target → the suffix of its files, and what a device needs for them."""


@pytest.mark.clock
@pytest.mark.parametrize("name", swept(RUNTIMES, ["litert-cpu"]))
def test_files_of_other_runtimes_are_timed_over_ssh_and_from_a_bundle(name, command, tmp_path):
    """Kind: a format that the device runner opens here, and that is not sent, or not asked for, elsewhere."""
    target, (suffix, modules) = TARGETS[name], RUNTIMES[name]
    try:
        target.require_run()
    except TargetUnavailable as error:
        pytest.skip(str(error))
    pair = [TINY / f"tiny.{precision}.{suffix}" for precision in ("fp32", "int8-dynamic")]
    if not all(path.exists() for path in pair):  # no such file is kept, and a ViT takes a minute to convert
        stacks = [write_stack(tmp_path / f"{layers}.onnx", layers=layers) for layers in (2, 3)]
        pair = [target.build(path, tmp_path, BuildOptions((3, 3, 3))).path for path in stacks]
    asked = ("--batch", 3)
    design = ("--sessions", 3, "--blocks", 4, "--tau", 0.5)
    server = loopback(tmp_path)
    try:
        table = server.targets_toml(tmp_path / "work" / "targets.toml", runtime=name)
        table.write_text(table.read_text() + f'[vault]\ntransport = "bundle"\nruntime = "{name}"\n')
        there = command("bench", "compare", *pair, "--target", "board", *asked, "--json")
    finally:
        server.kill()
    packed = command("bench", "pack", *pair, "-o", tmp_path / "bundle.tar", "--target", "vault", *asked, *design)
    assert packed.code == 0, packed.err
    device = tmp_path / "device"
    with tarfile.open(tmp_path / "bundle.tar") as tar:
        tar.extractall(device, filter="data")
    assert json.loads((device / "bundle.json").read_text())["modules"] == modules
    assert f"with {' and '.join(modules)}" in (device / "README.txt").read_text()
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(["sh", "run.sh"], cwd=device, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith(("session ", "progress ", "done: "))]
    assert said == [], "what the runtime tells of itself does not reach who runs the bundle"
    back = command("bench", "unpack", device / "result.json", tmp_path / "bundle.tar", "--json")
    for outcome in (there, back):
        assert outcome.code in (0, 1, 4), outcome.err
        assert json.loads(outcome.out)["raw"]["scenario"]["target"] == name
