"""The parts of GPU timing that are ours: names of modes, order of a call, units, waiting. CUDA is stood in for here;
the tests that need a real one are marked gpu."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from toolchain.errors import RecipeError
from toolchain.targets import get_target, gpu
from toolchain.targets.mode import EVERY_MODE, Mode

NO_GPU = gpu.no_gpu()
needs_gpu = pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))


def test_a_mode_names_what_a_sample_holds_in_one_order():
    assert [mode.suffix for mode in EVERY_MODE] == ["", "+graph", "+graph+transfers"]


def test_a_target_has_the_mode_of_its_name():
    assert get_target("trt+graph").mode == Mode(graph=True)
    assert get_target("ort-cuda+graph+transfers").mode == Mode(graph=True, transfers=True)
    assert get_target("trt").mode == Mode()
    for wrong in ("trt+transfers+graph", "trt+graphs"):
        with pytest.raises(RecipeError, match=r"has no mode .*there are trt\+graph, trt\+graph\+transfers"):
            get_target(wrong)
    with pytest.raises(RecipeError, match="there are none"):
        get_target("ort-cpu+graph")


class FakeCuda:
    """Stands in for the few names of torch.cuda that the clock uses, and logs the order in which they are called."""

    def __init__(self):
        self.log, self.now, self.free = [], 0.0, 1000

    def Stream(self):  # noqa: N802 - torch's name
        return SimpleNamespace(synchronize=lambda: self.log.append("sync"))

    def stream(self, _):
        return nullcontext()

    def mem_get_info(self):
        return self.free, 2000

    def Event(self, *, enable_timing=False, blocking=False):  # noqa: N802
        made = SimpleNamespace(at=None, blocking=blocking)

        def record(stream):
            made.at = self.now
            self.log.append("record" if enable_timing else "end")

        made.record = record
        made.synchronize = lambda: self.log.append("wait" if blocking else "wait without blocking")
        return made


class Doubling(gpu.GpuRunner):
    """A runner whose "device" is the host: 3000 s a call by its clock, 1000 s where a graph is replayed."""

    def __init__(self, mode, cuda):
        super().__init__(mode, cuda)
        self.cuda, self.launched = cuda, 0

    def pinned(self, tensor):
        return tensor

    def launch(self, feeds):
        self.launched += 1
        inputs = {"x": torch.from_numpy(feeds["x"].copy())}
        outputs = {"y": torch.empty_like(inputs["x"], device="cpu", pin_memory=False)}

        def run(kind, took):
            self.cuda.log.append(kind)
            self.cuda.now += took
            outputs["y"].copy_(2 * inputs["x"])

        return SimpleNamespace(
            inputs=inputs,
            outputs=outputs,
            enqueue=lambda: run("enqueue", 3e6),
            captured=lambda: lambda: run("replay", 1e6),
        )


@pytest.fixture
def cuda():
    return FakeCuda()


FEEDS = [{"x": np.full(4, value, np.float32)} for value in (1, 2, 3)]


@pytest.mark.parametrize(
    ("mode", "one_call"),
    [
        (Mode(), ["enqueue", "end", "wait"]),
        (Mode(graph=True), ["replay", "end", "wait"]),
    ],
)
def test_what_one_sample_holds(mode, one_call, cuda):
    with Doubling(mode, cuda) as runner:
        times = runner.time_ns(FEEDS, 4)
        after = cuda.log.index("sync")
        assert cuda.log[after + 1 :] == one_call * 4
    assert len(times) == 4
    assert all(0 < time < 10**12 for time in times), "the host's clock, on which nothing takes so long"


def test_transfers_are_within_the_sample_and_only_then(cuda):
    for transfers in (True, False):
        with Doubling(Mode(transfers=transfers), cuda) as runner:
            runner.time_ns(FEEDS, 3)
            calls = [made for _, made in runner._calls.values()]
            for feed, call in zip(FEEDS, calls, strict=True):
                assert bool(call._host_in) is bool(call._host_out) is transfers
                if transfers:
                    np.testing.assert_array_equal(call._host_out["y"], 2 * feed["x"], "the result came back")
                    call.launched.inputs["x"].zero_()
                    call()
                    np.testing.assert_array_equal(call._host_out["y"], 2 * feed["x"], "the input went there again")


def test_feeds_are_prepared_once_for_as_long_as_they_are_used(cuda):
    with Doubling(Mode(graph=True), cuda) as runner:
        runner.time_ns(FEEDS, 3)
        runner.time_ns(FEEDS[1:] + FEEDS[:1], 3)  # as blocks rotate them
        assert runner.launched == 3
        runner.time_ns(FEEDS[:1], 3)
        assert len(runner._calls) == 1, "what is no longer fed is let go"


def test_infer_gives_arrays_of_its_own(cuda):
    with Doubling(Mode(), cuda) as runner:
        np.testing.assert_array_equal(runner.infer(FEEDS[1])["y"], [4, 4, 4, 4])


def test_device_memory_is_what_went_since_the_runner_was_entered(cuda):
    with Doubling(Mode(), cuda) as runner:
        assert runner.device_bytes() is None
        cuda.free = 300
        assert runner.device_bytes() == 700
        cuda.free = 1200  # another process ended
        assert runner.device_bytes() is None


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", EVERY_MODE, ids=lambda mode: mode.suffix or "plain")
def test_every_mode_on_a_real_gpu(mode):
    class Products(gpu.GpuRunner):
        """Products that take about a millisecond on a large GPU."""

        def launch(self, feeds):
            x = torch.from_numpy(feeds["x"]).to("cuda")
            y = torch.empty_like(x)

            def enqueue():
                for _ in range(8):
                    torch.matmul(x, x, out=y)

            return SimpleNamespace(
                inputs={"x": x}, outputs={"y": y}, enqueue=enqueue, captured=lambda: gpu.capture(enqueue, self._stream)
            )

    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((1024, 1024)).astype(np.float32)} for _ in range(2)]
    with Products(mode) as runner:
        got = runner.infer(feeds[1])["y"]
        times = runner.time_ns(feeds, 10)
        np.testing.assert_allclose(runner.infer(feeds[1])["y"], got, rtol=1e-6)
    expected = feeds[1]["x"] @ feeds[1]["x"]
    assert np.abs(got - expected).max() <= 2e-2 * np.abs(expected).max()
    assert len(times) == 10
    assert min(times) > 0
