"""The process that holds one ncnn model, runs it and times it: a crash or a deadlock of ncnn ends it alone.

Usage: `python -m toolchain.targets.ncnn.child`; it answers the messages of `wire` on standard input until that closes. What
libraries print goes to standard error.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from toolchain.on_device.runner import os_threads, time_calls_ns
from toolchain.targets.wire import Array, receive, send


class Model:
    """An ncnn.Net with its options, which are read back, and one extractor for each call."""

    def __init__(self, param: str, weights: str, threads: int, options: Mapping[str, bool | int]) -> None:
        import ncnn

        self._ncnn, self._before = ncnn, os_threads()
        self._net = ncnn.Net()
        wanted = {**options, "num_threads": threads}
        for name, value in wanted.items():
            setattr(self._net.opt, name, value)
        for path, code in ((param, self._net.load_param(param)), (weights, self._net.load_model(weights))):
            if code:
                raise ValueError(f"it cannot load {path} (code {code})")
        self.options = {name: getattr(self._net.opt, name) for name in wanted}
        self._outputs = self._net.output_names()

    @property
    def threads(self) -> int | None:
        """How many threads work on a call, after the first one; None where the system does not list them."""
        return 1 + os_threads() - self._before if self._before else None

    def call(self, samples: Mapping[str, Array]) -> list[Any]:
        """The outputs, as numpy sees ncnn's memory, in the order of `names`."""
        extractor = self._net.create_extractor()
        for name, sample in samples.items():
            if code := extractor.input(name, self._ncnn.Mat(sample)):
                raise ValueError(f"it does not take input {name!r} (code {code})")
        outputs = []
        for name in self._outputs:
            code, mat = extractor.extract(name)
            if code:
                raise ValueError(f"it gives no output {name!r} (code {code})")
            outputs.append(np.asarray(mat))
        return outputs

    def infer(self, samples: Mapping[str, Array]) -> dict[str, Array]:
        """Output name → array of its own."""
        return {name: np.array(array) for name, array in zip(self._outputs, self.call(samples), strict=True)}


def _sets(arrays: Mapping[str, Array], count: int) -> list[dict[str, Array]]:
    """The input sets of a timing, whose arrays are named "0/image", "1/image" and so on; writable, as ncnn wants them."""
    sets: list[dict[str, Array]] = [{} for _ in range(count)]
    for key, array in arrays.items():
        index, _, name = key.partition("/")
        sets[int(index)][name] = array.copy()
    return sets


def serve(requests: Any, answers: Any) -> None:
    """Answers requests until the stream closes."""
    model: Model | None = None
    while True:
        try:
            request, arrays = receive(requests)
        except EOFError:
            return
        try:
            if request["do"] == "open":
                model = Model(request["param"], request["weights"], request["threads"], request["options"])
                gc.collect()
                gc.disable()  # a collection inside a call would be charged to it
                send(answers, {"options": model.options})
                continue
            assert model is not None
            sets = _sets(arrays, request["sets"])
            if request["do"] == "infer":
                outputs = model.infer(sets[0])
                send(answers, {"threads": model.threads}, outputs)
            else:
                send(answers, {"times_ns": time_calls_ns(model.call, sets, request["samples"])})
        except Exception as error:  # noqa: BLE001  (it is told, and the session decides)
            send(
                answers,
                {"error": f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)},
            )


if __name__ == "__main__":
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, out)
