import json
import os
import time

import psutil
import pytest

from toolchain.devices import kept
from toolchain.devices.kept import KeptSessions
from toolchain.errors import ParityError, StorageError, TargetUnavailable
from toolchain.files import user_cache
from toolchain.progress import SILENT


class Counting:
    """A measurer whose sessions fail from the given one on."""

    def __init__(self, fails_at=99, error=None):
        self.ran, self.fails_at, self.error = [], fails_at, error or TargetUnavailable("pi", "gone")

    def run(self, schedule, progress):
        if schedule["session"] >= self.fails_at:
            raise self.error
        self.ran.append(schedule["session"])
        return {"session": schedule["session"], "drawn": os.urandom(4).hex()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / kept.FOLDER


@pytest.fixture
def measure(stack, tmp_path):
    model = stack(tmp_path / "m.onnx")

    def run(measurer, device="pi", sessions=3, **changes):
        variants = [{"name": "A", "path": str(model)}]
        with KeptSessions(measurer, device) as kept_sessions:
            return [kept_sessions.run({"session": i, "variants": variants, **changes}, SILENT) for i in range(sessions)]

    run.model = model
    return run


def cut_off(measure, **changes):
    lost = Counting(fails_at=2)
    with pytest.raises(TargetUnavailable):
        measure(lost, **changes)
    return lost


def test_a_comparison_that_was_cut_off_goes_on_where_it_stopped(measure, cache):
    assert cut_off(measure).ran == [0, 1]
    again = Counting()
    results = measure(again)
    assert again.ran == [2]
    assert [result["session"] for result in results] == [0, 1, 2]
    assert list(cache.iterdir()) == []


def written_by(cache, **writer):
    for path in cache.iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), **writer}))


def test_a_process_that_took_a_dead_ones_number_is_another(measure, cache):
    cut_off(measure)
    written_by(cache, writer=os.getppid(), began=psutil.Process(os.getppid()).create_time() - 3600)
    again = Counting()
    measure(again)
    assert again.ran == [2]


def test_a_comparison_that_ended_is_measured_afresh(measure, cache):
    first, second = measure(Counting()), measure(Counting())
    assert list(cache.iterdir()) == []
    assert all(a["drawn"] != b["drawn"] for a, b in zip(first, second, strict=True))


def test_ctrl_c_keeps_sessions_and_a_judgement_forgets_them(measure, cache, stack, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(Counting(fails_at=1, error=KeyboardInterrupt()))
    assert len(list(cache.iterdir())) == 1
    schedule = {"session": 0, "variants": [{"name": "A", "path": str(measure.model)}]}
    taken = Counting()
    with pytest.raises(ParityError), KeptSessions(taken, "pi") as measurer:  # noqa: PT012
        measurer.run(schedule, SILENT)
        raise ParityError("these sessions must not be taken up again")
    assert taken.ran == []
    assert list(cache.iterdir()) == []


def test_a_session_counts_for_its_schedule_its_artifacts_and_its_device_alone(measure, stack):
    cut_off(measure)
    for change in ({"device": "other"}, {"seed": 1}):
        other = Counting()
        measure(other, **change)
        assert other.ran == [0, 1, 2]
    stack(measure.model, layers=5)  # the same path, other content
    other = Counting()
    measure(other)
    assert other.ran == [0, 1, 2]


@pytest.mark.parametrize("fault", ["truncated", "no result", "old", "still running"])
def test_what_cannot_be_taken_up_is_measured_again(measure, cache, fault):
    cut_off(measure)
    for path in cache.iterdir():
        if fault == "truncated":
            path.write_text(path.read_text()[:20])
        elif fault == "no result":
            path.write_text(json.dumps({"writer": 1, "result": None}))
        elif fault == "old":
            os.utime(path, (time.time() - kept.MAX_AGE_S - 60,) * 2)
        else:
            written_by(cache, writer=os.getppid(), began=psutil.Process(os.getppid()).create_time())
    again = Counting()
    measure(again)
    assert again.ran == [0, 1, 2]


def test_a_cache_that_cannot_be_written_is_told_and_the_measurement_goes_on(measure, caplog):
    (user_cache() / kept.FOLDER).parent.mkdir(parents=True, exist_ok=True)
    (user_cache() / kept.FOLDER).write_text("a file where the folder should be")
    assert len(measure(Counting())) == 3
    assert "cannot write" in caplog.text


def test_what_is_asked_twice_is_measured_twice(measure):
    """A confirmation must not be shown the samples that it is to confirm."""
    schedule = {"session": 0, "variants": [{"name": "A", "path": str(measure.model)}]}
    counting = Counting()
    with KeptSessions(counting, "pi") as measurer:
        first, second = (measurer.run(schedule, SILENT) for _ in range(2))
    assert counting.ran == [0, 0]
    assert first["drawn"] != second["drawn"]


def test_a_result_that_cannot_be_written_costs_no_session(measure, cache):
    schedule = {"session": 0, "variants": [{"name": "A", "path": str(measure.model)}]}
    with pytest.raises(StorageError), KeptSessions(Counting(), "pi") as measurer:  # noqa: PT012
        measurer.run(schedule, SILENT)
        raise StorageError("no space left")
    again = Counting()
    measure(again)
    assert again.ran == [1, 2]


def test_cold_starts_are_never_taken_from_an_earlier_one(measure):
    class Cold:
        count = 0

        def run(self, schedule, progress):
            self.count += 1
            return {"open_ns": self.count}

    cold = Cold()
    with KeptSessions(cold, "pi") as measurer:
        found = [measurer.run({"variants": []}, SILENT) for _ in range(3)]
    assert [each["open_ns"] for each in found] == [1, 2, 3]


def test_a_session_that_failed_keeps_those_of_its_comparison_alone(measure, cache, stack, tmp_path):
    """As in a gate, which goes on with its next cell."""
    other = stack(tmp_path / "other.onnx", layers=5)
    flaky = Counting(fails_at=2)

    def schedule(path, session):
        return {"session": session, "blocks": 20 + session, "variants": [{"name": "A", "path": str(path)}]}

    with KeptSessions(flaky, "pi") as measurer:
        for session in range(2):
            measurer.run(schedule(other, session), SILENT)
        for session in range(2):
            measurer.run(schedule(measure.model, session), SILENT)
        with pytest.raises(TargetUnavailable):
            measurer.run(schedule(measure.model, 2), SILENT)
    assert len(list(cache.iterdir())) == 2
    again = Counting()
    with KeptSessions(again, "pi") as measurer:
        for path in (other, measure.model):
            for session in range(3):
                measurer.run(schedule(path, session), SILENT)
    assert again.ran == [0, 1, 2, 2]


def test_what_is_too_old_is_removed(measure, cache):
    cut_off(measure)
    for path in cache.iterdir():
        os.utime(path, (time.time() - kept.MAX_AGE_S - 60,) * 2)
    measure(Counting(), device="other")
    assert not list(cache.iterdir())


def test_two_targets_of_one_process_do_not_share_sessions(measure):
    schedule = {"session": 0, "variants": [{"name": "A", "path": str(measure.model)}]}
    first, second = Counting(), Counting()
    with KeptSessions(first, "this machine") as one, KeptSessions(second, "this machine") as two:
        drawn = [measurer.run(schedule, SILENT)["drawn"] for measurer in (one, two)]
    assert drawn[0] != drawn[1]
    assert (first.ran, second.ran) == ([0], [0])
