"""ncnn's files, read without ncnn: every byte has its layer, and what is not known is not guessed."""

import pytest
from builders import NCNN, NCNN_TAGS, write_ncnn

from toolchain.artifacts import open_artifact
from toolchain.artifacts.ncnn_format import read_layers, write_layers
from toolchain.errors import ArtifactError, StorageError


@pytest.mark.parametrize("precision", NCNN_TAGS)
def test_every_byte_has_its_layer(precision, tmp_path):
    model = open_artifact(write_ncnn(tmp_path / "m.param", precision))
    assert (model.name, model.precision.name, model.own_precision) == ("ncnn", precision, "")
    assert model.layers == {
        "norm": 32,
        "head": 4 + 240 * NCNN_TAGS[precision][1] + 20,
        "(graph)": model.path.stat().st_size,
    }
    assert sum(model.parts.values()) == model.size_bytes
    assert (model.params, model.nodes) == (8 + 240 + 5, 4)
    assert [(port.name, port.shape) for port in model.inputs] == [("image", (1, 3, 4, 4))]
    assert [port.name for port in model.outputs] == ["probabilities"]
    assert model.facts()["nodes"] == dict.fromkeys(("Input", "LayerNorm", "Flatten", "InnerProduct", "Softmax"), 1)
    assert [file.name for file in model.files] == ["m.bin", "m.param"]


def test_after_a_layer_that_is_not_known_nothing_is_guessed(tmp_path):
    model = open_artifact(write_ncnn(tmp_path / "m.param", text=NCNN.replace("Flatten", "LSTM")))
    assert model.layers == {
        "norm": 32,
        "(graph)": model.path.stat().st_size,
        "(file m.bin)": 4 + 960 + 20,
    }
    assert model.precision.name == ""


def test_what_is_written_is_read_again(tmp_path):
    layers = read_layers(write_ncnn(tmp_path / "m.param"))
    (tmp_path / "again.param").write_text(write_layers(layers))
    assert read_layers(tmp_path / "again.param") == layers


@pytest.mark.parametrize(("cut", "message"), [(4, "truncated"), (1000, "truncated")])
def test_a_truncated_bin_is_an_error(cut, message, tmp_path):
    with pytest.raises(ArtifactError, match=rf"m\.bin is {message}"):
        open_artifact(write_ncnn(tmp_path / "m.param", cut=cut)).parts  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-30], "damaged"),
        (lambda text: text.replace("5 5", "6 5"), "says 6 and 5"),
        (lambda text: text.replace("5 5", "five"), "damaged"),
        (lambda text: text.replace("1 1 image 1 0=4", "1 x image 1 0=4"), "damaged"),
    ],
)
def test_a_damaged_param_is_an_error(change, message, tmp_path):
    path = write_ncnn(tmp_path / "m.param")
    path.write_text(change(path.read_text()))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(path).nodes  # noqa: B018


def test_both_files_belong_to_it(tmp_path):
    path = write_ncnn(tmp_path / "m.param")
    path.with_suffix(".bin").unlink()
    with pytest.raises(StorageError, match=r"no file .*m\.bin"):
        open_artifact(path).size_bytes  # noqa: B018


def test_another_param_is_a_file(tmp_path):
    (tmp_path / "m.param").write_text("momentum: 0.9\n")
    assert open_artifact(tmp_path / "m.param").name == "file"
