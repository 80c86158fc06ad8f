import subprocess
import sys
import textwrap

import numpy as np
import onnx
import pytest
from builders import write_stack
from onnx import TensorProto, helper

from toolchain.errors import ArtifactError, RecipeError
from toolchain.targets import TARGETS, get_target
from toolchain.targets.ort import ORT_CPU


@pytest.fixture
def doubling(tmp_path):
    node = helper.make_node("Add", ["image", "image"], ["logits"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("image", "logits")]
    graph = helper.make_graph([node], "doubling", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "doubling.onnx")
    return tmp_path / "doubling.onnx"


def test_a_file_that_does_not_load_is_refused(doubling, tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(doubling.read_bytes()[:-9])
    for path in (bad, tmp_path / "absent.onnx"):
        with pytest.raises(ArtifactError, match=path.name), ORT_CPU.open(path, 1):
            pass


def test_a_runner_infers_and_times_with_the_asked_threads(doubling):
    feeds = [{"image": np.full((2, 3), i, dtype=np.float32)} for i in range(3)]
    with ORT_CPU.open(doubling, threads=2) as runner:
        np.testing.assert_array_equal(runner.infer(feeds[2])["logits"], np.full((2, 3), 4))
        times = runner.time_ns(feeds, 7)
        options = runner._session.get_session_options()
    assert (len(times), min(times) > 0) == (7, True)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


def test_threads_rest_between_calls(tmp_path):
    """They would take cores from the model that is timed next; in a process of its own, where nothing else is at work."""
    code = f"""
        import time
        import numpy as np
        from toolchain.on_device.runner import OrtRunner
        with OrtRunner({str(write_stack(tmp_path / "stack.onnx", width=256))!r}, 2) as runner:
            (tensor,) = runner._session.get_inputs()
            feeds = [{{tensor.name: np.ones([64, *tensor.shape[1:]], dtype=np.float32)}}]
            spent = []
            for _ in range(5):
                runner.time_ns(feeds, 20)
                start = time.process_time()
                time.sleep(0.05)
                spent.append(time.process_time() - start)
            print(min(spent))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.005


def test_the_probe_names_runtime_and_device():
    info = ORT_CPU.probe()
    assert (info.target, info.runtime) == ("ort-cpu", "onnxruntime")
    assert info.version
    assert info.device
    assert ORT_CPU.profile.multiples == {"mlp_hidden": 4, "head_dim": 4, "rank": 4}


def test_the_table_knows_every_target_by_its_name():
    assert set(TARGETS) >= {"ort-cpu", "eager", "trt", "trt-rtx"}
    for name, target in TARGETS.items():
        assert get_target(name) is target
        assert target.name == name
    with pytest.raises(RecipeError, match="did you mean 'trt-rtx'"):
        get_target("trt_rtx")
    with pytest.raises(RecipeError, match=r"known: .*eager"):
        get_target("zzz")
