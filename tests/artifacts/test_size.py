import onnx
import pytest

from toolchain.artifacts.size import artifact_files, artifact_size_bytes
from toolchain.errors import ArtifactError, StorageError


def with_external_data(source, path, location):
    onnx.save(onnx.load(source), path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def test_external_data_counts_and_neighbours_do_not(stack, tmp_path):
    plain = stack(tmp_path / "plain.onnx")
    assert artifact_size_bytes(plain) == plain.stat().st_size
    split = with_external_data(plain, tmp_path / "split.onnx", "split.data")
    (tmp_path / "unrelated.bin").write_bytes(b"x" * 1000)
    assert artifact_files(split) == [tmp_path / "split.data", split]
    assert artifact_size_bytes(split) == split.stat().st_size + (tmp_path / "split.data").stat().st_size
    assert artifact_size_bytes(split) > 4 * 96 * 96 * 4


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
    assert artifact_files(tmp_path / "outer.onnx") == [tmp_path / "branch.data", tmp_path / "outer.onnx"]


def test_missing_and_escaping_external_data_is_refused(stack, tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    split = with_external_data(stack(tmp_path / "plain.onnx"), folder / "split.onnx", "split.data")
    (folder / "split.data").rename(tmp_path / "split.data")
    with pytest.raises(ArtifactError, match=r"split\.data"):
        artifact_size_bytes(split)
    model = onnx.load(split, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../split.data"
    onnx.save(model, split)
    with pytest.raises(ArtifactError, match=r"\.\./split\.data"):
        artifact_size_bytes(split)


def test_a_folder_is_all_of_its_files(tmp_path):
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "a").write_bytes(b"123")
    (tmp_path / "model" / "sub" / "b").write_bytes(b"4567")
    assert artifact_size_bytes(tmp_path / "model") == 7


def test_what_is_no_artifact_is_refused(stack, tmp_path):
    with pytest.raises(StorageError):
        artifact_size_bytes(tmp_path / "absent.onnx")
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(stack(tmp_path / "plain.onnx").read_bytes()[:5000])
    with pytest.raises(ArtifactError):
        artifact_size_bytes(truncated)
    truncated.write_bytes(b"")
    with pytest.raises(ArtifactError):
        artifact_size_bytes(truncated)


def test_truncated_external_data_is_refused(stack, tmp_path):
    """Kind: a file that is not whole. Cut off, it is smaller, and would pass a budget of bytes."""
    split = with_external_data(stack(tmp_path / "plain.onnx"), tmp_path / "split.onnx", "split.data")
    data = tmp_path / "split.data"
    whole = data.stat().st_size
    assert artifact_size_bytes(split) == split.stat().st_size + whole
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"has {whole - 1:,} bytes, and split.onnx reads {whole:,} of it"):
        artifact_size_bytes(split)
