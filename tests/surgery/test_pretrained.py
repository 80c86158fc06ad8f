"""Weights of a hub or of a folder that stands for one: what timm would start at random, or change, without a word."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from builders import randomise
from huggingface_hub import constants
from safetensors.torch import save_file

from toolchain.cli.main import main
from toolchain.errors import ArtifactError, DataError, ModelError, StorageError
from toolchain.model import Preprocess, TimmModel
from toolchain.pipeline.job import begin, prepare
from toolchain.pipeline.stages.dense import dense_inputs
from toolchain.recipe import ModelSection, Recipe
from toolchain.surgery import hub
from toolchain.surgery.load import Loaded, load_dense
from toolchain.surgery.replay import load_model

ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def make_hub(path: Path, name: str = ARCHITECTURE, seed: int = 0, config: object = None, **changes: object) -> Path:
    """A folder as timm writes one: 7 classes, 3 channels, a mean and a crop that are no default."""
    arguments = {**ARGUMENTS, "num_classes": 7, **changes}
    torch.manual_seed(seed)
    module = randomise(timm.create_model(name, **arguments), seed)
    path.mkdir(exist_ok=True)
    save_file(module.state_dict(), path / "model.safetensors", {"format": "pt"})
    side = module.patch_embed.img_size
    cfg = {
        "input_size": [module.in_chans, *side],
        "mean": [0.1] * module.in_chans,
        "std": [0.2] * module.in_chans,
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        "num_classes": module.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "fixed_input_size": True,
    }
    described = {
        "architecture": name,
        "num_classes": module.num_classes,
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": cfg,
    }
    (path / "config.json").write_text(json.dumps(config or described))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_hub(tmp_path / "hub")


def section(folder: Path, **kwargs: object) -> ModelSection:
    return ModelSection(name=f"local-dir:{folder}", kwargs=kwargs)


def recipe(folder: Path, source: str = "none", **sections: object) -> Recipe:
    given = {"model": {"name": f"local-dir:{folder}"}, "data": {"source": source}, "compress": {"method": "none"}}
    return Recipe.from_dict({**given, **sections})


def notes(loaded: Loaded) -> list[str]:
    return list(loaded.provenance.get("notes", ()))


def state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_folder_is_loaded_whole_and_silently(folder, caplog):
    loaded = load_dense(section(folder))
    assert all(torch.equal(tensor, state(folder)[name]) for name, tensor in loaded.module.state_dict().items())
    assert loaded.provenance["weights"] == "pretrained"
    assert not notes(loaded)
    assert not caplog.messages


def test_inspect_describes_a_folder_of_timms(folder, capsys):
    """Kind: a folder that is a model to `shrink` and none to `inspect`, or nothing but its bytes."""
    torch.save(state(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", str(folder), "--json"])
    facts = json.loads(capsys.readouterr().out)
    ref = load_dense(section(folder)).ref
    assert (facts["kind"], facts["name"], facts["kwargs"]) == ("checkpoint", ref.name, ref.kwargs)
    assert facts["classes"] == ref.kwargs["num_classes"]


# A part that was never trained


def test_a_classifier_at_random_is_refused_with_the_ways_out(folder):
    """Kind: a part that was never trained. timm drops a classifier of other classes and starts a new one at random."""
    with pytest.raises(ModelError) as caught:
        load_dense(section(folder, num_classes=10))
    text = str(caught.value)
    assert text.startswith("the pretrained weights have 7 classes and the model 10, so its classifier would be random.")
    for way in ("Take num_classes out of model.kwargs", '"images:PATH"', "data.classes", "[train]", "model.checkpoint"):
        assert way in text


@pytest.mark.usefixtures("no_hub")
def test_a_classifier_at_random_is_refused_before_anything_is_fetched():
    with pytest.raises(ModelError, match="have 1000 classes and the model 10"):
        load_dense(ModelSection(name="deit_tiny_patch16_224", kwargs={"num_classes": 10}))
    with pytest.raises(
        ModelError,
        match=r"have no classifier and the model 10, so .* random\. model\.kwargs\.num_classes = 0 gives features",
    ):
        load_dense(ModelSection(name="vit_small_patch14_dinov2", kwargs={"num_classes": 10}))


@pytest.mark.parametrize("verb", ["load", "run", "plan"])
def test_every_verb_refuses_it(folder, tmp_path, capsys, verb):
    text = '[model]\nname = "local-dir:hub"\nkwargs = { num_classes = 10 }\n[data]\nsource = "images:."\n[compress]\nmethod = "none"\n'
    (tmp_path / "recipe.toml").write_text(text)
    arguments = {"load": ["-o", str(tmp_path / "m")], "run": ["--dry-run"], "plan": []}[verb]
    with pytest.raises(SystemExit) as ended:
        main([verb, str(tmp_path / "recipe.toml"), *arguments])
    assert ended.value.code == 2
    assert "its classifier would be random" in capsys.readouterr().err


def test_a_config_that_hides_it_is_seen_through(folder):
    """The tensors count, and not what stands beside them: a config of 10 classes over a classifier of 7."""
    raw = json.loads((folder / "config.json").read_text())
    raw["num_classes"] = raw["pretrained_cfg"]["num_classes"] = 10
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="have 7 classes and the model 10"):
        load_dense(section(folder))


def test_with_train_it_starts_untrained_and_says_so(folder, caplog):
    loaded = load_dense(section(folder, num_classes=10), may_be_untrained=True)
    assert notes(loaded) == [
        "The classifier started untrained: the pretrained weights have nothing for it (7 classes, the model 10)."
    ]
    assert caplog.messages == notes(loaded)
    stored = state(folder)
    assert torch.equal(loaded.module.blocks[1].mlp.fc1.weight, stored["blocks.1.mlp.fc1.weight"])
    assert torch.isfinite(loaded.module.head.weight).all()
    again = load_dense(section(folder, num_classes=10), may_be_untrained=True)
    assert torch.equal(loaded.module.head.weight, again.module.head.weight)
    other = load_dense(section(folder, num_classes=10), may_be_untrained=True, seed=1)
    assert not torch.equal(loaded.module.head.weight, other.module.head.weight)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"global_pool": "avg"}, r"lack 2 tensors \(fc_norm\..*hold 2 tensors \(norm\..*global_pool = \"token\""),
        ({"global_pool": "avg", "num_classes": 10}, "have 7 classes and the model 10|lack 4 tensors"),
        ({"init_values": 0.1}, r"lack 4 tensors \(blocks\.0\.ls1\.gamma.*LayerScale no"),
        ({"qk_norm": True}, r"lack 8 tensors \(blocks\.0\.attn\.q_norm"),
        ({"depth": 3}, r"lack 12 tensors \(blocks\.2\..*depth 2 .the model: 3.*model\.kwargs\.depth = 2"),
        ({"depth": 1}, r"hold 12 tensors \(blocks\.1\..*model\.kwargs\.depth = 2"),
        ({"qkv_bias": False}, r"hold 2 tensors \(blocks\.0\.attn\.qkv\.bias"),
        ({"reg_tokens": 2}, "reg_token"),
        ({"class_token": False, "global_pool": "avg"}, "class token yes"),
        ({"embed_dim": 64}, r"embed_dim 32 \(the model: 64\)"),
        ({"mlp_ratio": 2.0}, r"MLP width 128 \(the model: 64\)"),
    ],
)
def test_any_part_that_would_be_random_or_dropped_is_refused_by_name(folder, kwargs, words):
    """Kind: a part that was never trained. A keyword argument may add a layer that the weights have nothing for."""
    with pytest.raises(ModelError, match=words):
        load_dense(section(folder, **kwargs))


def test_without_a_classifier_that_of_the_weights_is_left_out_and_told(folder):
    loaded = load_dense(section(folder, num_classes=0))
    assert loaded.ref.output == "features"
    assert isinstance(loaded.module.head, torch.nn.Identity)
    (note,) = notes(loaded)
    assert note.startswith("Of the pretrained weights, 2 tensors (head.bias, head.weight) were left out")


def test_other_channels_are_told(folder):
    """Kind: resampling. timm sums a patch embedding's weights, or repeats them, for other channels."""
    loaded = load_dense(section(folder, in_chans=1))
    (note,) = notes(loaded)
    assert note == (
        "The patch embedding of the pretrained weights reads 3 channels and the model 1: timm summed its weights."
    )
    kernel = state(folder)["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert torch.allclose(loaded.module.patch_embed.proj.weight, kernel)


def test_more_channels_are_told_or_refused(tmp_path):
    """Newer versions of timm repeat the weights of one channel; to the others they stay at random."""
    folder = make_hub(tmp_path / "hub", in_chans=1)
    try:
        (note,) = notes(load_dense(section(folder, in_chans=3)))
    except ModelError as error:
        assert "lack patch_embed.proj.weight" in str(error)  # noqa: PT017 - which of both depends on timm's version
    else:
        assert "reads 1 channel and the model 3: timm repeated and scaled its weights" in note


# Sizes


def test_another_image_size_is_told(folder, caplog):
    (note,) = notes(load_dense(section(folder, img_size=32)))
    assert note.startswith("The position embeddings of the pretrained weights were resampled from a grid of 4×4 to 8×8")
    assert "from images of 16×16 to 32×32 pixels" in note
    assert caplog.messages == [note]


def test_a_wide_grid_is_known_from_the_config(tmp_path):
    """Kind: a table that is taken for a square's. A folder says for which images it is: 2×8 becomes 4×4 and not 4×4 again."""
    folder = make_hub(tmp_path / "hub", img_size=[8, 32])
    (note,) = notes(load_dense(section(folder, img_size=16)))
    assert "from a grid of 2×8 to 4×4, that is from images of 8×32 to 16×16 pixels" in note
    assert not notes(load_dense(section(folder)))


def test_without_positions_another_size_is_told_too(tmp_path):
    """Rotations have no table: nothing is resampled, and the model still sees another size than it was trained on."""
    name = "vit_small_patch16_rope_224"
    folder = make_hub(tmp_path / "hub", name, embed_dim=32)
    (note,) = notes(load_dense(section(folder, img_size=32)))
    assert note == "The pretrained weights were made for images of 16×16 pixels; the model's are 32×32."


def test_another_patch_size_is_refused_unless_asked_for(folder):
    with pytest.raises(ModelError, match="the pretrained weights have patches of 4×4 pixels, the model 8×8"):
        load_dense(section(folder, patch_size=8))
    model = section(folder, patch_size=8).model_copy(update={"resample_patches": True})
    assert [note for note in notes(load_dense(model)) if "patch embedding" in note]


def test_other_widths_are_told_in_the_plural_and_before_the_patches(folder):
    """Kind: a refusal of one thing that hides another; and one that speaks of weights as of a single thing."""
    with pytest.raises(ModelError) as caught:
        load_dense(section(folder, patch_size=8, embed_dim=64))
    text = str(caught.value)
    assert text.startswith("the pretrained weights do not fit the model: they have embed_dim 32 (the model: 64)")
    assert "patch_size = 4" in text


def test_a_classifier_beside_a_folders_prefix_is_taken_or_named(folder):
    plain = state(folder)
    body = {f"backbone.{name}": tensor for name, tensor in plain.items() if not name.startswith("head.")}
    (folder / "model.safetensors").unlink()
    torch.save({**body, "head.weight": plain["head.weight"], "head.bias": plain["head.bias"]}, folder / "model.pth")
    loaded = load_dense(section(folder))
    assert torch.equal(loaded.module.head.weight, plain["head.weight"])
    assert ["beside the prefix 'backbone.' were taken too" in note for note in notes(loaded)] == [True]


# Model folders that stand alone


def test_a_model_folder_opens_without_the_place_that_it_came_from(folder, tmp_path):
    """Kind: a record that names a place. What is written opens elsewhere, offline, with the same preprocessing."""
    start = begin(recipe(folder))
    from toolchain.surgery.replay import save_model

    save_model(start.dense, tmp_path / "m")
    shutil.rmtree(folder)
    again = load_model(tmp_path / "m")
    assert isinstance(again, TimmModel)
    assert again.ref.name == ARCHITECTURE
    assert again.ref == start.dense.ref
    image = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(start.dense.module(image), again.module(image))
    assert str(tmp_path) not in (tmp_path / "m" / "model.json").read_text()
    assert again.provenance["pretrained"] == "local-dir"
    assert len(again.provenance["weights_sha256"]) == 64


def test_another_config_of_the_same_weights_is_another_model(folder):
    """Kind: an answer from before. What a folder says of the architecture counts for what is resumed and cached."""
    before = dense_inputs(begin(recipe(folder)))
    described = json.loads((folder / "config.json").read_text())
    described["model_args"]["num_heads"] = 4
    (folder / "config.json").write_text(json.dumps(described))
    after = dense_inputs(begin(recipe(folder)))
    assert before != after
    assert before == [*after[:1], before[1], *after[2:]], "nothing else tells them apart"


def test_preprocessing_is_that_of_the_folder(folder, tmp_path):
    (tmp_path / "images").mkdir()
    from PIL import Image

    for index in range(12):
        Image.new("RGB", (20, 20), (20 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    start = begin(recipe(folder, f"images:{tmp_path / 'images'}"))
    assert start.dense.preprocess == Preprocess((3, 16, 16), (0.1,) * 3, (0.2,) * 3, "bilinear", 0.8, "center")


def test_what_a_config_implies_is_written_down(tmp_path):
    """A config.json of timm's older form, whose channels, classes, size and pooling are in pretrained_cfg alone."""
    folder = make_hub(tmp_path / "hub", in_chans=1, global_pool="avg")
    raw = json.loads((folder / "config.json").read_text())
    old = {**raw["pretrained_cfg"], "architecture": ARCHITECTURE, "num_features": 32, "global_pool": "avg"}
    (folder / "config.json").write_text(json.dumps(old))
    kwargs = {key: value for key, value in ARGUMENTS.items() if key != "img_size"}
    loaded = load_dense(section(folder, **kwargs))
    assert loaded.ref.kwargs == {**kwargs, "img_size": [16, 16], "in_chans": 1, "num_classes": 7, "global_pool": "avg"}
    assert not notes(loaded)


def test_a_recipe_finds_the_folder_from_where_it_lies_and_its_digest_does_not(folder, tmp_path):
    text = '[model]\nname = "local-dir:hub"\n[budget]\nparams = 0.5\n'
    (tmp_path / "recipe.toml").write_text(text)
    loaded = Recipe.load(tmp_path / "recipe.toml")
    assert loaded.model.name == f"local-dir:{folder.resolve()}"
    moved = loaded.model_copy(update={"model": loaded.model.model_copy(update={"name": "local-dir:/elsewhere"})})
    assert moved.digest == loaded.digest
    assert loaded.digest != loaded.model_copy(update={"model": ModelSection(name="hf-hub:a/b")}).digest


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "llama"},
            r"of model_type 'llama', which is not supported; known: vit, vit_mae, deit, .*, swin, swinv2$",
        ),
        ({"architectures": ["ViT"]}, r"names no timm architecture \(it is one of transformers\)"),
        ({"a": 1}, "names no timm architecture$"),
        ([1], "is not a table"),
    ],
)
def test_a_folder_of_another_library(tmp_path, config, words):
    with pytest.raises(ModelError, match=words):
        load_dense(section(make_hub(tmp_path / "hub", config=config)))


def test_a_folder_that_lacks_a_file(tmp_path, folder):
    with pytest.raises(StorageError, match=r"cannot read .*config\.json"):
        load_dense(section(tmp_path / "nothing"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(StorageError, match=r"holds no weights; expected model\.safetensors"):
        load_dense(section(folder))
    for name in ("a.pth", "b.pth"):
        torch.save({}, folder / name)
    with pytest.raises(StorageError, match=r"holds several weights \(a\.pth, b\.pth\)"):
        load_dense(section(folder))
    (folder / "b.pth").unlink()
    with pytest.raises(ArtifactError, match="holds no tensors"):
        load_dense(section(folder))


def test_a_choice_among_a_folders_weights_is_told(folder):
    plain = state(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model": {k: v + 1 for k, v in plain.items()}, "model_ema": plain}, folder / "pytorch_model.bin")
    loaded = load_dense(section(folder))
    assert torch.equal(loaded.module.head.weight, plain["head.weight"])
    assert ["those under 'model_ema' were taken" in note for note in notes(loaded)] == [True]


def test_an_unknown_source():
    with pytest.raises(
        ModelError, match="has the unknown source 'zoo'; known: hf://ORG/NAME, hf-hub:ORG/NAME, local-dir:PATH"
    ):
        load_dense(ModelSection(name="zoo:a"))


# The network


@pytest.fixture
def closed_port() -> Iterator[str]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_hub(monkeypatch, tmp_path, closed_port, no_proxy):
    """Nothing answers where the hub is, and its cache is an empty folder; further settings of its client may be given."""

    def be(**settings):
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)

    be(ENDPOINT=closed_port, HF_HUB_CACHE=str(tmp_path / "cache"))
    return be


@pytest.mark.usefixtures("no_hub")
def test_a_missing_network_is_told_at_once():
    """Kind: a wait that says nothing. The hub's own client tries for most of a minute."""
    began = time.monotonic()
    for name in ("deit_tiny_patch16_224", "hf-hub:a/b"):
        with pytest.raises(
            ModelError, match=r"cannot be fetched: 127\.0\.0\.1 cannot be reached, .*set model\.checkpoint"
        ):
            load_dense(ModelSection(name=name))
    assert time.monotonic() - began < 3 * hub.REACH_S


def test_offline_is_told_as_such(no_hub):
    no_hub(HF_HUB_OFFLINE=True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        load_dense(ModelSection(name="deit_tiny_patch16_224"))


@pytest.mark.usefixtures("no_hub")
def test_without_a_network_the_cache_is_enough(tmp_path, folder):
    repository, commit = tmp_path / "cache" / "models--org--name", "0" * 40
    cached = Path(shutil.copytree(folder, repository / "snapshots" / commit))
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    loaded = load_dense(ModelSection(name="hf-hub:org/name@v1"))
    assert torch.equal(loaded.module.head.weight, state(folder)["head.weight"])
    assert loaded.provenance["pretrained"] == "hf-hub:org/name@v1"
    assert loaded.ref.name == ARCHITECTURE
    other = make_hub(tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", cached)
    changed = load_dense(ModelSection(name="hf-hub:org/name@v1"))
    assert changed.provenance["pretrained"] == loaded.provenance["pretrained"]
    assert changed.provenance["weights_sha256"] != loaded.provenance["weights_sha256"]


@pytest.mark.usefixtures("no_proxy")
def test_a_hub_that_answers_is_reached(closed_port):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        assert hub.reachable(f"http://127.0.0.1:{listening.getsockname()[1]}")
    assert not hub.reachable(closed_port)


def test_a_proxy_stands_for_the_hub(monkeypatch, closed_port):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listening.getsockname()[1]}")
        assert hub.reachable("https://hub.invalid")
    monkeypatch.setenv("https_proxy", closed_port)
    assert not hub.reachable("https://hub.invalid")


# What a verb does not use


def test_load_needs_no_budget(folder, tmp_path):
    """Kind: a section that a verb does not use. `load` writes the dense model, whatever is to become of it."""
    for budget in ({}, {"params": 0.01}, {"latency": {"trt": "1 ms"}}):
        asked = recipe(folder, compress={"method": "joint"}, budget=budget, bench={"targets": ["no-such-target"]})
        assert begin(asked).dense.ref.name == ARCHITECTURE
    (tmp_path / "recipe.toml").write_text('[model]\nname = "local-dir:hub"\n[data]\nsource = "none"\n')
    with pytest.raises(SystemExit) as ended:
        main(["load", str(tmp_path / "recipe.toml"), "-o", str(tmp_path / "m")])
    assert ended.value.code == 0
    with pytest.raises(Exception, match=r"\[budget\] is empty"):
        prepare(Recipe.load(tmp_path / "recipe.toml"))


def test_check_classes_names_the_harmless_ways(folder):
    with pytest.raises(ModelError, match=r"the model has 7 classes.*images:PATH.*data\.classes.*\[train\]"):
        begin(recipe(make_hub(folder, in_chans=1), "digits"))


def test_train_needs_labels(folder, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(12):
        Image.new("RGB", (20, 20), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    with pytest.raises(DataError, match="needs labels"):
        begin(recipe(folder, f"images:{tmp_path / 'images'}", train={"epochs": 1}))
