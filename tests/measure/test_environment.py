import subprocess
import sys
import time

import pytest

from toolchain.measure.environment import (
    Fingerprint,
    cores_of_others,
    describe_machine,
    machine_changes,
    slowed,
)
from toolchain.on_device.runner import fingerprint


def test_only_the_machine_may_not_change():
    one = Fingerprint(machine={"cpu": "x", "governor": None}, state={"load_average": [0.1]})
    busy = Fingerprint(machine={"cpu": "x", "governor": None}, state={"load_average": [9.0]})
    slower = Fingerprint(machine={"cpu": "x", "governor": "powersave", "board": "b"}, state={})
    assert machine_changes([one, busy]) == []
    assert machine_changes([one, busy, slower]) == ["board None → 'b'", "governor None → 'powersave'"]


def test_a_device_that_slowed_itself_down_is_told():
    def sessions(**values):
        rows = [{name: each[index] for name, each in values.items()} for index in range(4)]
        prints = [Fingerprint(machine={}, state=row) for row in rows]
        return [(prints[0], prints[1]), (prints[2], prints[3])]

    assert slowed(sessions(frequency_mhz=[600, 2400, 700, 2300], throttle_count=[5, 5, 5, 5])) == []
    assert slowed(sessions(frequency_mhz=[None] * 4, throttle_count=[None] * 4)) == []
    assert slowed(sessions(throttle_count=[5, 5, 6, 8])) == ["it was throttled 3 times for its heat"]
    assert slowed(sessions(frequency_mhz=[2400, 2400, 2400, 1500])) == ["its clock was between 1500 and 2400 MHz"]
    assert slowed(sessions(throttled_now=[0, 0, 4, 0])) == ["its firmware held it back for heat or low voltage"]

    assert slowed(sessions(quota_stops=[1, 1, 7, 7])) == []
    assert slowed(sessions(quota_stops=[1, 3, 7, 8])) == ["the limit of its container stopped it 3 times"]
    assert slowed(sessions(quota_stops=[1, 1, 7, 8])) == ["the limit of its container stopped it once"]

    def gpu(*bits):
        return slowed(sessions(gpus=[[{"clocks_throttle_reasons.active": each}] for each in bits]))

    assert gpu("0x0000000000000001", "0x0000000000000000", "[N/A]", "0x0000000000000002") == []
    assert gpu("0x0000000000000001", "0x0000000000000044", "0x0", "0x0000000000000020") == [
        "its GPU was held back by its power limit and heat"
    ]


def test_what_other_processes_used_is_the_mean_over_all_sessions():
    def at(everyone, own, clock):
        state = {"cpu_seconds": {"everyone": everyone, "own": own, "clock": clock}}
        return Fingerprint(machine={}, state=state)

    quiet, busy = (at(100, 5, 50), at(110, 15, 60)), (at(200, 0, 90), at(240, 10, 110))
    assert cores_of_others([quiet]) == 0.0
    assert cores_of_others([busy]) == 1.5
    assert cores_of_others([quiet, busy]) == 1.0
    unknown = Fingerprint(machine={}, state={"cpu_seconds": None})
    assert cores_of_others([quiet, (unknown, unknown)]) is None
    assert cores_of_others([(Fingerprint(machine={}, state={}),) * 2]) is None, "as stored by earlier versions"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the seconds of all processes")
def test_a_process_that_works_beside_is_seen():
    def prints(seconds):
        before = Fingerprint(**fingerprint(1))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return before, Fingerprint(**fingerprint(1))

    before, after = (each.state["cpu_seconds"] for each in prints(0.5))
    own, everyone, clock = (after[name] - before[name] for name in ("own", "everyone", "clock"))
    assert 0.1 < own <= everyone + 0.1
    assert clock >= 0.5
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(0.5)
        assert cores_of_others([prints(1.0)]) > 0.3
        other.kill()


def test_the_hardware_line_names_cpu_cores_threads_and_runtime():
    machine = {
        "cpu": "Zen",
        "affinity": [0, 2],
        "cores": 8,
        "threads": 1,
        "runtimes": {"onnxruntime": "1.32", "numpy": "2"},
    }
    assert describe_machine(machine) == "Zen, 2 usable cores, 1 thread(s), onnxruntime 1.32"
    limited = {**machine, "cpu_quota": 1.5}
    assert describe_machine(limited) == "Zen, 2 usable cores, limited to 1.5 cores, 1 thread(s), onnxruntime 1.32"
