from toolchain.bench.environment import Fingerprint, describe_machine, machine_changes


def test_only_the_machine_may_not_change():
    one = Fingerprint(machine={"cpu": "x", "governor": None}, state={"load_average": [0.1]})
    busy = Fingerprint(machine={"cpu": "x", "governor": None}, state={"load_average": [9.0]})
    slower = Fingerprint(machine={"cpu": "x", "governor": "powersave", "board": "b"}, state={})
    assert machine_changes([one, busy]) == []
    assert machine_changes([one, busy, slower]) == ["board None → 'b'", "governor None → 'powersave'"]


def test_the_hardware_line_names_cpu_cores_threads_and_runtime():
    machine = {
        "cpu": "Zen",
        "affinity": [0, 2],
        "cores": 8,
        "threads": 1,
        "runtimes": {"onnxruntime": "1.32", "numpy": "2"},
    }
    assert describe_machine(machine) == "Zen, 2 usable cores, 1 thread(s), onnxruntime 1.32"
