import ast
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from toolchain import errors
from toolchain.measure.environment import describe_machine
from toolchain.on_device import runner as device_runner
from toolchain.on_device.runner import (
    SCHEDULE_SCHEMA,
    VariantError,
    WorkloadRefused,
    block_orders,
    calls_per_slot,
    cpu_seconds,
    fingerprint,
    main,
    make_inputs,
    opening_order,
    run_schedule,
    schedule_digest,
    time_calls_ns,
)

SOURCE = Path(device_runner.__file__).read_text(encoding="utf-8")


class Clockwork:
    """A runner of exactly known times that records every feed it is given."""

    def __init__(self, call_ns, log, name, output=0.0):
        self.call_ns, self.log, self.name, self.output = call_ns, log, name, output

    def __enter__(self):
        self.log.append((self.name, "open"))
        return self

    def __exit__(self, *_):
        self.log.append((self.name, "close"))

    def infer(self, feeds):
        return {"logits": np.full((2, 3), self.output)}

    def time_ns(self, feeds, samples):
        self.log.append((self.name, samples, tuple(float(next(iter(feed.values())).flat[0]) for feed in feeds)))
        return [self.call_ns + i for i in range(samples)]


def schedule(**changes):
    return {
        "schema": SCHEDULE_SCHEMA,
        "seed": 7,
        "session": 1,
        "blocks": 10,
        "slot_ms": 50.0,
        "threads": 1,
        "warmup": {"calls": 10, "seconds": 1.0},
        "inputs": {"count": 8, "seed": 3, "tensors": [{"shape": [2, 4], "dtype": "float32"}]},
        "variants": [
            {"name": "A", "path": "a", "runtime": "clockwork", "inputs": ["x"]},
            {"name": "B", "path": "b", "runtime": "clockwork", "inputs": ["y"]},
            {"name": "A'", "path": "a", "runtime": "clockwork", "inputs": ["x"]},
        ],
        **changes,
    }


def opener(log, times, output=0.0):
    return {"clockwork": lambda path, threads: Clockwork(times[path], log, path, output)}


def test_the_file_is_python_3_8_and_needs_only_the_modules_that_it_declares():
    tree = ast.parse(SOURCE, feature_version=(3, 8))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    declared = {module for modules in device_runner.MODULES.values() for module in modules}
    assert imported - {*sys.stdlib_module_names} == declared
    top_level = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top_level |= {str(node.module).partition(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not (declared - {"numpy"}) & top_level, "a device has the runtime that it is for, and no other"
    assert "tomllib" not in imported  # stdlib only since 3.11


def test_it_is_the_only_timing_loop():
    package = Path(device_runner.__file__).parents[1]
    others = [
        path.name
        for path in package.rglob("*.py")
        if path != Path(device_runner.__file__) and "perf_counter_ns" in path.read_text(encoding="utf-8")
    ]
    assert others == []


@pytest.mark.parametrize(
    ("call_ms", "calls", "discarded"),
    [
        (0.01, 5000, 1),
        (1, 50, 1),
        (9, 6, 1),
        (19.9, 5, 1),
        (20, 3, 1),
        (100, 3, 1),
        (100.1, 2, 1),
        (1000, 2, 1),
        (1000.1, 1, 0),
    ],
)
def test_a_slot_is_long_enough_and_has_enough_calls(call_ms, calls, discarded):
    assert calls_per_slot(call_ms * 1e6, 50.0) == (calls, discarded)
    assert calls * call_ms >= 50


def test_orders_are_seeded_permutations_and_stay_what_they_are():
    names = ["A", "B", "A'"]
    orders = block_orders(names, 600, seed=0, session=0)
    assert all(sorted(order) == sorted(names) for order in orders)
    assert orders == block_orders(names, 600, seed=0, session=0)
    assert orders != block_orders(names, 600, seed=0, session=1)
    assert orders != block_orders(names, 600, seed=1, session=0)
    counts = {tuple(order): orders.count(order) for order in orders}
    assert len(counts) == 6
    assert min(counts.values()) > 65
    # Stored measurements are checked against this draw: it must never change.
    assert [" ".join(order) for order in orders[:4]] == ["A B A'", "A B A'", "A' B A", "A B A'"]


def test_inputs_are_the_same_for_a_seed_and_of_the_asked_types():
    spec = {"count": 8, "seed": 1, "tensors": [{"shape": [2, 3], "dtype": d} for d in ("float16", "uint8", "bool")]}
    sets = make_inputs(spec)
    assert len(sets) == 8
    assert [array.dtype.name for array in sets[0]] == ["float16", "uint8", "bool"]
    assert all(np.array_equal(x, y) for x, y in zip(sets[3], make_inputs(spec)[3], strict=True))
    assert not np.array_equal(sets[0][0], sets[1][0])
    assert sets[0][1].max() < 128


def test_calls_are_timed_one_by_one_over_rotating_feeds():
    seen = []
    times = time_calls_ns(seen.append, [{"x": 0}, {"x": 1}, {"x": 2}], 5)
    assert [feed["x"] for feed in seen] == [0, 1, 2, 0, 1]
    assert len(times) == 5
    assert all(isinstance(t, int) and t >= 0 for t in times)


def test_a_session_follows_its_schedule():
    log = []
    result = run_schedule(schedule(), opener(log, {"a": 2_000_000, "b": 30_000_000}))
    assert result["schedule_sha256"] == schedule_digest(schedule())
    assert result["session"] == 1
    assert [block["order"] for block in result["blocks"]] == block_orders(["A", "B", "A'"], 10, 7, 1)
    assert {n: f["calls_per_slot"] for n, f in result["variants"].items()} == {"A": 25, "B": 3, "A'": 25}
    for block in result["blocks"]:
        assert block["samples_ns"]["A"] == [2_000_000 + i for i in range(1, 25)]  # the first is discarded
        assert block["samples_ns"]["B"] == [30_000_001, 30_000_002]
    json.dumps(result, allow_nan=False)
    # Session 1 begins with B; one more is opened last, and never timed.
    assert [entry[0] for entry in log[:4]] == ["b", "a", "a", "b"]
    assert [entry[1] for entry in log[-4:]] == ["close"] * 4


def test_every_variant_is_opened_first_in_some_session_and_last_in_none():
    variants = [{"name": name} for name in ("A", "B", "A'")]
    orders = [[variant["name"] for variant in opening_order(variants, session)] for session in range(4)]
    assert orders == [["A", "B", "A'", "A"], ["B", "A'", "A", "B"], ["A'", "A", "B", "A'"], ["A", "B", "A'", "A"]]
    assert opening_order(variants[:1], 2) == variants[:1]


def test_what_is_opened_to_be_the_last_is_never_timed():
    timed = []

    class Counted:
        def __init__(self, path, threads):
            self.calls = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            timed.append(self.calls)

        def infer(self, feeds):
            return {"logits": np.zeros(1)}

        def time_ns(self, feeds, samples):
            self.calls += samples
            return [1_000_000] * samples

    run_schedule(schedule(warmup={"calls": 1, "seconds": 0.0}), {"clockwork": Counted})
    assert timed[0] == 0, "closed first: opened last"
    assert len(timed) == 4
    assert min(timed[1:]) > 0


@pytest.mark.slow
def test_warm_up_meets_both_minima():
    for call_ns, calls in ((2_000_000, 500), (400_000_000, 10)):
        facts = run_schedule(schedule(blocks=1), opener([], {"a": call_ns, "b": call_ns}))["variants"]["A"]
        assert facts["warmup_calls"] == calls
        assert facts["warmup_seconds"] >= 1.0
        assert facts["call_ns"] == pytest.approx(call_ns, rel=1e-3)


def test_all_variants_of_a_block_see_the_same_inputs_in_the_same_order_and_blocks_rotate():
    log = []
    run_schedule(schedule(warmup={"calls": 1, "seconds": 0.0}), opener(log, {"a": 10_000_000, "b": 10_000_000}))
    slots = [entry[2] for entry in log if len(entry) == 3][3:]
    blocks = [slots[i : i + 3] for i in range(0, 30, 3)]
    assert all(len(set(block)) == 1 for block in blocks)
    assert blocks[1][0] == blocks[0][0][1:] + blocks[0][0][:1]
    assert blocks[8] == blocks[0]


def test_a_variant_that_fails_or_overflows_is_named():
    for bad in (np.nan, np.inf):
        with pytest.raises(VariantError, match=r"A \(a\).*'logits'.*not finite"):
            run_schedule(schedule(session=0), opener([], {"a": 1, "b": 1}, output=bad))
    with pytest.raises(VariantError, match=r"B \(b\) does not run on clockwork"):
        run_schedule(schedule(), opener([], {"a": 1}))


def test_a_schedule_that_cannot_be_followed_is_refused():
    with pytest.raises(ValueError, match="schema"):
        run_schedule(schedule(schema="slimvit.bench.schedule/9"), {})
    with pytest.raises(ValueError, match="clockwork"):
        run_schedule(schedule())


def test_a_runtime_that_cannot_do_as_asked_is_unavailable_and_not_a_bad_file():
    """The file is good; so this is no reason to fail whoever made it."""

    def refuses(path, threads):
        raise errors.WorkloadRefused("clockwork", "was asked for 2 threads and runs with 1")

    with pytest.raises(WorkloadRefused, match="runs with 1"):
        run_schedule(schedule(), {"clockwork": refuses})
    with pytest.raises(WorkloadRefused, match="4096 threads are more than the"):
        run_schedule(schedule(threads=4096), opener([], {"a": 1, "b": 1}))


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000", "cpu.stat": "usage_usec 3\nnr_throttled 7\n"}, (1.5, 7)),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "200000 100000"}, (0.5, 0)),
        (
            "0::/a/b",
            {
                "a/cpu.max": "50000 100000",
                "a/cpu.stat": "nr_throttled 2\n",
                "a/b/cpu.max": "200000 100000",
                "a/b/cpu.stat": "nr_throttled 5\n",
            },
            (0.5, 7),
        ),
        (
            "5:cpu,cpuacct:/docker/1\n1:memory:/",
            {"cpu,cpuacct/cpu.cfs_quota_us": "100000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            (1.0, 0),
        ),
        (
            "5:cpuacct,cpu:/docker/1",
            {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"},
            (1.0, 0),
        ),
        ("5:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_time_that_a_container_may_take_is_part_of_the_machine(tmp_path, monkeypatch, own, files, quota):
    """Kind: docker run --cpus=1, where two threads stop each other in the middle of calls."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(device_runner, "CGROUPS", str(tmp_path))
    monkeypatch.setattr(device_runner, "OWN_CGROUPS", str(tmp_path / "own"))
    assert device_runner.cpu_quota() == quota
    seen = fingerprint(1)
    assert (seen["machine"].get("cpu_quota"), seen["state"].get("quota_stops")) == (quota or (None, None))
    if quota is not None:
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        assert device_runner.usable_cores() == math.ceil(quota[0])
        words = f"more than the {math.ceil(quota[0])} core.*container may take the time of {quota[0]:g} core"
        with pytest.raises(WorkloadRefused, match=words):
            device_runner.pin(None, math.ceil(quota[0]) + 1)


def test_the_result_is_written_whole_or_not_at_all(tmp_path, capsys):
    (tmp_path / "schedule.json").write_text(json.dumps(schedule(blocks=2)))
    argv = [str(tmp_path / "schedule.json"), str(tmp_path / "out.json")]
    assert main(argv, opener([], {"a": 1000, "b": 1000}, output=np.nan)) == 3
    assert "not finite" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["schedule.json"]
    assert main(argv, opener([], {"a": 10**7, "b": 10**7})) == 0
    assert "progress 1.000 block 2/2" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out.json").read_text())["blocks"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "schedule.json"]


def test_a_result_that_cannot_be_written_is_a_matter_of_storage(tmp_path, capsys):
    (tmp_path / "schedule.json").write_text(json.dumps(schedule(blocks=2)))
    argv = [str(tmp_path / "schedule.json"), str(tmp_path / "absent" / "out.json")]
    assert main(argv, opener([], {"a": 10**7, "b": 10**7})) == device_runner.EXIT_STORAGE
    assert capsys.readouterr().err.splitlines()[-1] == f"cannot write {argv[1]}: No such file or directory"


def test_a_runtime_that_cannot_be_imported_is_not_the_files_fault(tmp_path, monkeypatch, capsys):
    (tmp_path / "schedule.json").write_text(json.dumps(schedule(blocks=2)))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    runners = {"clockwork": device_runner.OrtRunner}
    assert (
        main([str(tmp_path / "schedule.json"), str(tmp_path / "out.json")], runners) == device_runner.EXIT_UNAVAILABLE
    )
    assert "-m pip install numpy onnxruntime" in capsys.readouterr().err


def test_a_missing_runtime_is_named_as_its_own(tmp_path, monkeypatch, capsys):
    """Kind: a board for .tflite files that is told to install ONNX Runtime."""
    told = schedule(blocks=2)
    for variant in told["variants"]:
        variant["runtime"] = "litert-cpu"
    (tmp_path / "schedule.json").write_text(json.dumps(told))
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.delitem(sys.modules, "ai_edge_litert.interpreter", raising=False)
    assert main([str(tmp_path / "schedule.json"), str(tmp_path / "out.json")]) == device_runner.EXIT_UNAVAILABLE
    assert "-m pip install numpy ai_edge_litert" in capsys.readouterr().err


def test_gpus_are_in_the_fingerprint_where_nvidia_smi_answers(tmp_path, monkeypatch):
    assert not {"gpus", "visible_gpus"} & fingerprint(1)["machine"].keys() or shutil.which("nvidia-smi")
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\ncase $1 in *driver*) echo 'GPU A, 570.1, 350.00 W'; echo 'GPU B, 570.1, 300.00 W';; "
        "*) echo '1980 MHz, 2619 MHz, 34, 71.26 W, 0x0000000000000000'; echo; esac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = fingerprint(1)
    assert [gpu["name"] for gpu in found["machine"]["gpus"]] == ["GPU A", "GPU B"]
    assert found["machine"]["gpus"][1]["power.limit"] == "300.00 W"
    assert found["machine"]["visible_gpus"] == "1"
    assert found["state"]["gpus"][0]["clocks.sm"] == "1980 MHz"
    assert "GPU A (driver 570.1)" in describe_machine(found["machine"])
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "gpus" not in fingerprint(1)["machine"]


def test_the_fingerprint_separates_what_must_not_change():
    one, two = fingerprint(2), fingerprint(2)
    assert one["machine"] == two["machine"]
    assert one["machine"]["threads"] == 2
    assert one["machine"]["cpu"]
    assert one["machine"]["runtimes"]["numpy"] == np.__version__
    known = {"frequency_mhz", "load_average", "throttle_count", "cpu_seconds"}
    assert known <= set(one["state"]) <= known | {"gpus", "throttled_now"}


BOARD = {
    "/proc/cpuinfo": "\n\n".join(
        f"processor\t: {core}\nFeatures\t: asimddp\nCPU implementer\t: 0x41\nCPU part\t: {part}"
        for core, part in enumerate(("0xd05", "0xd05", "0xd0b"))
    ),
    **{
        f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq": khz
        for core, khz in enumerate(("1800000", "1700000", "2400000"))
    },
}
"""A board with two small cores and a large one."""


@pytest.mark.parametrize(
    ("cores", "mhz", "cpu"),
    [
        ({0, 1}, 1800, "cpu 0x41 0xd05"),
        ({2}, 2400, "cpu 0x41 0xd0b"),
        ({1, 2}, 2400, "cpu 0x41 0xd05 and cpu 0x41 0xd0b"),
    ],
)
def test_the_processor_and_its_clock_are_those_of_the_cores_that_may_be_used(cores, mhz, cpu, monkeypatch):
    """Kind: a board of big and little cores, where one kind is measured and the other at rest."""
    monkeypatch.setattr(device_runner, "_read", BOARD.get)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    found = fingerprint(1)
    assert (found["state"]["frequency_mhz"], found["machine"]["cpu"]) == (mhz, cpu)


def test_a_mac_is_known_by_its_processor(tmp_path, monkeypatch):
    """Kind: tables whose hardware is "arm", whichever Apple's chip it was."""
    (tmp_path / "sysctl").write_text("#!/bin/sh\n[ \"$*\" = '-n machdep.cpu.brand_string' ] && echo 'Apple M2 Pro'\n")
    (tmp_path / "sysctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(device_runner, "_read", lambda _: None)
    monkeypatch.setattr(device_runner.platform, "system", lambda: "Darwin")
    assert device_runner.cpu_model() == "Apple M2 Pro"


@pytest.mark.parametrize("soc", ["soc", "soc@107c000000"])
def test_a_raspberry_pi_tells_what_its_firmware_holds_back_wherever_that_lies(soc, tmp_path, monkeypatch):
    """Kind: a Raspberry Pi 5, whose firmware lies elsewhere than that of those before."""
    (tmp_path / soc / f"{soc}:firmware").mkdir(parents=True)
    (tmp_path / soc / f"{soc}:firmware" / "get_throttled").write_text("50005\n")
    monkeypatch.setattr(device_runner, "PLATFORM", str(tmp_path))
    assert fingerprint(1)["state"]["throttled_now"] == 5


def test_a_load_that_the_system_does_not_tell_is_unknown(monkeypatch):
    """Kind: Android, whose programs may not read it."""

    def untold():
        raise OSError("Load averages are unobtainable")

    monkeypatch.setattr(os, "getloadavg", untold)
    assert fingerprint(1)["state"]["load_average"] is None


def test_outputs_that_are_no_numbers_are_finite(tmp_path):
    """Kind: files that give the names of classes beside the scores."""
    names = np.array(["cat", "dog"], object)
    runners = opener([], {"a": 10**7, "b": 10**7}, output=names[:, None])
    assert run_schedule(schedule(blocks=2), runners)["variants"]["A"]["outputs"] == [[2, 3]]


def test_what_a_runners_own_process_does_is_not_that_of_others():
    """Kind: a runtime in a process of its own, whose work would be taken for that of others who disturb the measurement."""
    busy = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ntime.sleep(60)"
    before = cpu_seconds()["own"]
    child = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE)
    runner = SimpleNamespace(pid=child.pid)
    try:
        child.stdout.readline()
        assert cpu_seconds()["own"] - before < 0.4 <= cpu_seconds([runner])["own"] - before
        own = device_runner._peak_bytes(object())
        assert device_runner._peak_bytes(runner) > own == device_runner._memory_bytes("VmHWM")
    finally:
        child.kill()
        child.communicate()
    assert device_runner._process_seconds(str(child.pid)) == 0


def test_runners_tell_of_runtimes_that_are_no_modules_here():
    elsewhere = SimpleNamespace(versions={"node": "20.1.0"})
    runtimes = fingerprint(1, [elsewhere, object()])["machine"]["runtimes"]
    assert runtimes == {**fingerprint(1)["machine"]["runtimes"], "node": "20.1.0"}
