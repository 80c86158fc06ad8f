import onnx
import pytest

from toolchain.artifacts import open_artifact
from toolchain.errors import ArtifactError, StorageError


def with_external_data(source, path, location):
    onnx.save(onnx.load(source), path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def test_external_data_counts_and_neighbours_do_not(stack, tmp_path):
    plain = stack(tmp_path / "plain.onnx")
    assert open_artifact(plain).size_bytes == plain.stat().st_size
    split = with_external_data(plain, tmp_path / "split.onnx", "split.data")
    (tmp_path / "unrelated.bin").write_bytes(b"x" * 1000)
    assert open_artifact(split).files == (tmp_path / "split.data", split)
    assert open_artifact(split).size_bytes == split.stat().st_size + (tmp_path / "split.data").stat().st_size
    assert open_artifact(split).size_bytes > 4 * 96 * 96 * 4


def test_weights_in_subgraphs_count(stack, tmp_path):
    inner = onnx.load(stack(tmp_path / "inner.onnx", layers=1)).graph
    tensor = inner.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="branch.data")
    (tmp_path / "branch.data").write_bytes(b"x" * 123)
    node = onnx.helper.make_node("If", ["condition"], ["logits"], then_branch=inner, else_branch=inner)
    outer = onnx.helper.make_graph([node], "outer", [], inner.output)
    onnx.save(onnx.helper.make_model(outer), tmp_path / "outer.onnx")
    assert open_artifact(tmp_path / "outer.onnx").files == (tmp_path / "branch.data", tmp_path / "outer.onnx")


def test_missing_and_escaping_external_data_is_refused(stack, tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    split = with_external_data(stack(tmp_path / "plain.onnx"), folder / "split.onnx", "split.data")
    (folder / "split.data").rename(tmp_path / "split.data")
    with pytest.raises(ArtifactError, match=r"split\.data"):
        _ = open_artifact(split).size_bytes
    model = onnx.load(split, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../split.data"
    onnx.save(model, split)
    with pytest.raises(ArtifactError, match=r"\.\./split\.data"):
        _ = open_artifact(split).size_bytes


def test_a_folder_is_all_of_its_files(tmp_path):
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "a").write_bytes(b"123")
    (tmp_path / "model" / "sub" / "b").write_bytes(b"4567")
    assert open_artifact(tmp_path / "model").size_bytes == 7


def test_what_is_no_artifact_is_refused(stack, tmp_path):
    with pytest.raises(StorageError):
        _ = open_artifact(tmp_path / "absent.onnx").size_bytes
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(stack(tmp_path / "plain.onnx").read_bytes()[:5000])
    with pytest.raises(ArtifactError):
        _ = open_artifact(truncated).size_bytes
    truncated.write_bytes(b"")
    with pytest.raises(ArtifactError):
        _ = open_artifact(truncated).size_bytes


def test_truncated_external_data_is_refused(stack, tmp_path):
    """Kind: a file that is not whole. Cut off, it is smaller, and would pass a budget of bytes."""
    split = with_external_data(stack(tmp_path / "plain.onnx"), tmp_path / "split.onnx", "split.data")
    data = tmp_path / "split.data"
    whole = data.stat().st_size
    assert open_artifact(split).size_bytes == split.stat().st_size + whole
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"has {whole - 1:,} bytes, and split.onnx reads {whole:,} of it"):
        _ = open_artifact(split).size_bytes
