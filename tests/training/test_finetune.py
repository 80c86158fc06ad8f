"""Recovery: what it learns from, that it cannot make a model worse, and that it says what it found."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from builders import VARIANTS, dense_model, random_plan, variant
from PIL import Image
from sweeps import swept
from torch import nn

from toolchain.data import open_source
from toolchain.data.splits import Images
from toolchain.data.transforms import Wanted
from toolchain.errors import DataError, ModelError, RecipeError
from toolchain.likelihood import CATEGORICAL
from toolchain.model import run_stage
from toolchain.pipeline.job import prepare
from toolchain.progress import Nobody, Progress
from toolchain.recipe import FinetuneSection, Recipe, TrainSection
from toolchain.surgery.mask import mask_model
from toolchain.training import stages
from toolchain.training.distill import distillation, imitation
from toolchain.training.evaluate import accuracy, divergence
from toolchain.training.loop import FitConfig, fit
from toolchain.training.stages import Finetune, Train

DIGITS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
DROPS = {"drop_path_rate": 0.4, "proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_rate": 0.3}
GENTLE = FinetuneSection(epochs=1, lr=1e-3, batch_size=64)
HARMFUL = FinetuneSection(epochs=1, lr=3.0, batch_size=64)


def digits(train=640):
    source = open_source("digits", Wanted((1, 8, 8), {}))
    source.splits["train"].positions = source.splits["train"].positions[:train]
    return source


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Heard(Nobody):
    """Who keeps every share that is reported."""

    def __init__(self):
        self.shares = []

    def at(self, share, text):
        self.shares.append(share)


@pytest.fixture(scope="module")
def dense():
    """A model that knows the digits a little."""
    return run_stage(
        Train(TrainSection(epochs=4, lr=3e-3, batch_size=64), digits(1600)), dense_model(**DIGITS)
    ).artifact


@pytest.fixture(scope="module")
def masked(dense):
    return mask_model(dense, copy.deepcopy(dense.module), random_plan(dense, low_rank=False, share=0.8))


def without_labels(section):
    return section.model_copy(update={"labels": False})


def same(a, b):
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(value.equal(theirs[name]) for name, value in mine.items())


class Raising(torch.Tensor):
    """Labels that nobody may look at."""

    def __getitem__(self, index):
        raise AssertionError("a label was read")

    def __int__(self):
        raise AssertionError("a label was read")


class Unreadable(Images):
    """Images whose labels raise when they are read."""

    @property
    def labels(self):
        raise AssertionError("a label was read")

    def __getitem__(self, index):
        raise AssertionError("a label was read")

    def take(self, indices):
        raise AssertionError("not needed here")


def with_labels(source, relabel):
    """The source with every label put through a function."""
    changed = {
        name: Images(images._load, relabel(images._all_labels), images.positions)
        for name, images in source.splits.items()
    }
    return replace(source, splits=changed)


# What it learns from


def test_without_labels_the_student_nears_its_teacher(dense, masked):
    source = digits()
    made = run_stage(Finetune(without_labels(GENTLE), source, dense), masked).artifact
    found = made.provenance["finetuned"]
    validation = source.split("validation")
    assert found == {
        "data": source.identity,
        "loss": "imitation",
        "judged_by": "divergence",
        "images": len(validation),
        "before": pytest.approx(divergence(masked.module, dense.module, CATEGORICAL, validation)),
        "after": pytest.approx(divergence(made.module, dense.module, CATEGORICAL, validation)),
        "kept": "after",
    }
    assert found["after"] < 0.5 * found["before"]
    assert accuracy(made.module, validation).wrong < accuracy(masked.module, validation).wrong
    assert not made.module.training


@pytest.mark.parametrize("how", ["garbage", "unreadable"])
def test_without_labels_no_label_is_read(dense, masked, how):
    source = digits(200)
    plain = run_stage(Finetune(without_labels(GENTLE), source, dense), masked).artifact
    if how == "garbage":
        changed = with_labels(source, lambda labels: (labels * 7 + 3) % 10)
    else:
        splits = {
            name: Unreadable(images._load, images._all_labels, images.positions)
            for name, images in source.splits.items()
        }
        for images in splits.values():
            images._all_labels = images._all_labels.as_subclass(Raising)
        changed = replace(source, splits=splits)
        with pytest.raises(AssertionError, match="a label was read"):
            run_stage(Finetune(GENTLE, changed, dense), masked)
    other = run_stage(Finetune(without_labels(GENTLE), changed, dense), masked).artifact
    assert same(plain.module, other.module)
    assert plain.provenance == other.provenance


def test_with_labels_they_matter(dense, masked):
    source = digits(200)
    made = [
        run_stage(Finetune(GENTLE, with_labels(source, relabel), dense), masked).artifact
        for relabel in (lambda labels: labels, lambda labels: (labels * 7 + 3) % 10)
    ]
    assert not same(made[0].module, made[1].module)
    assert made[0].provenance["finetuned"]["loss"] == "distillation"


def test_images_without_labels_are_enough(tmp_path, dense, masked):
    generator = torch.Generator().manual_seed(0)
    for index in range(60):
        pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{index}.png")
    source = open_source(f"images:{tmp_path}", Wanted((1, 8, 8), {"mean": (0.5,), "std": (0.5,)}))
    assert (len(source.split("train")), len(source.split("validation"))) == (42, 6)
    watcher = Heard()
    section = GENTLE.model_copy(update={"epochs": 3, "batch_size": 16})
    made = run_stage(Finetune(section, source, dense, progress=Progress(watcher)), masked).artifact
    assert watcher.shares == pytest.approx([step / 9 for step in range(1, 10)]), "42 images in batches of 16: 3 steps"
    found = made.provenance["finetuned"]
    assert (found["loss"], found["judged_by"], found["images"]) == ("imitation", "divergence", 6)
    assert found["kept"] == "after"
    assert found["after"] < found["before"]


def test_nothing_to_learn_from_is_said(dense, masked, tmp_path):
    unlabelled = replace(digits(), num_classes=None)
    alone = GENTLE.model_copy(update={"distill": False})
    with pytest.raises(DataError, match=r"distill = false needs labels.*'digits' has none.*finetune.distill = true"):
        run_stage(Finetune(alone, unlabelled, dense), masked)
    noise = open_source("none", Wanted((1, 8, 8), {"mean": (0.5,), "std": (0.5,)}))
    with pytest.raises(DataError, match="needs real images"):
        run_stage(Finetune(GENTLE, noise, dense), masked)
    raw = {"model": {"name": "x"}, "budget": {"params": 0.5}, "finetune": {"labels": False, "distill": False}}
    with pytest.raises(RecipeError, match=r"finetune: labels = false leaves only the dense model.*distill = true"):
        Recipe.from_dict(raw)
    for index in range(8):
        Image.new("L", (8, 8), index).save(tmp_path / f"{index}.png")
    job = {
        "model": {"name": "vit_tiny_patch16_224", "kwargs": {**DIGITS, "num_classes": 1000}},
        "data": {"source": f"images:{tmp_path}"},
        "budget": {"params": 0.6},
        "finetune": {"epochs": 1, "distill": False},
    }
    with pytest.raises(DataError, match=r"finetune.distill = true"):
        prepare(Recipe.from_dict(job), shapes_only=False, fetch=False)


def test_classes_must_match_only_where_labels_are_read(dense, masked):
    source = replace(digits(100), num_classes=7)
    with pytest.raises(ModelError, match="10 classes"):
        Finetune(GENTLE, source, dense).requires(masked)
    Finetune(without_labels(GENTLE), source, dense).requires(masked)


# It cannot make a model worse


@pytest.mark.parametrize("labels", [True, False])
def test_a_harmful_training_is_thrown_away(dense, masked, labels, caplog):
    section = HARMFUL if labels else without_labels(HARMFUL)
    made = run_stage(Finetune(section, digits(), dense), masked).artifact
    found = made.provenance["finetuned"]
    assert found["kept"] == "before"
    assert found["after"] > found["before"]
    assert found["judged_by"] == ("errors" if labels else "divergence")
    assert same(made.module, masked.module)
    assert "fine-tuning made validation worse" in caplog.text
    if labels:
        assert found["before"] == accuracy(masked.module, digits().split("validation")).wrong


@pytest.fixture
def diverging(monkeypatch):
    """Says how far a model is from its parent, before and after."""

    def by(*values):
        left = iter(values)
        monkeypatch.setattr(stages, "divergence", lambda *_: next(left))

    return by


def test_a_model_that_is_not_a_number_is_thrown_away(dense, masked, diverging):
    diverging(0.5, math.nan)
    made = run_stage(Finetune(without_labels(GENTLE), digits(100), dense), masked).artifact
    found = made.provenance["finetuned"]
    assert (found["before"], found["after"], found["kept"]) == (0.5, None, "before")
    assert same(made.module, masked.module)


def test_of_two_that_are_as_good_the_trained_one_is_kept(dense, masked, diverging):
    diverging(0.5, 0.5)
    made = run_stage(Finetune(without_labels(GENTLE), digits(100), dense), masked).artifact
    assert made.provenance["finetuned"]["kept"] == "after"
    assert not same(made.module, masked.module)


# How it trains


def test_it_trains_to_the_average_with_warm_up_and_clipping(dense, masked):
    source = digits(300)
    section = GENTLE.model_copy(update={"epochs": 2})
    made = run_stage(Finetune(section, source, dense, seed=4), masked).artifact
    steps = 2 * math.ceil(300 / 64)
    config = FitConfig(2, 1e-3, 64, warmup_epochs=0.2, ema_decay=1 - 4 / steps, grad_clip=1.0, drop=False, seed=4)
    for change, equal in (({}, True), ({"ema_decay": None}, False), ({"warmup_epochs": 0.0}, False)):
        module = copy.deepcopy(masked.module)
        module.get_submodule("patch_embed").requires_grad_(False)
        loss = distillation(copy.deepcopy(dense.module), CATEGORICAL)
        fit(module, source.split("train"), config=replace(config, **change), loss=loss)
        assert same(made.module, module) is equal, change


def test_the_patch_embedding_alone_stays_as_it_is_and_can_be_trained_again(dense, masked):
    made = Finetune(GENTLE, digits(), dense)(masked).artifact
    before, after = dict(masked.module.named_parameters()), dict(made.module.named_parameters())
    still = {name for name, value in after.items() if value.equal(before[name])}
    assert still == {name for name in after if name.startswith("patch_embed.")} != set()
    assert {name for name, value in after.items() if not value.requires_grad} == {
        name for name, value in before.items() if not value.requires_grad
    }


def test_what_stays_as_it_is_can_be_said(dense, masked):
    before = dict(masked.module.named_parameters())
    for frozen in ((), ("patch_embed", "blocks")):
        made = Finetune(GENTLE, digits(), dense, frozen=frozen)(masked).artifact
        still = {name for name, value in made.module.named_parameters() if value.equal(before[name])}
        assert still == {name for name in before if name.partition(".")[0] in frozen}


@pytest.mark.parametrize("other", [{"depth": 3}, {"num_classes": 7}, {"embed_dim": 24}])
def test_a_teacher_of_another_shape_is_refused(masked, other):
    """Of one with more blocks, the features of a block in the middle would be taught, without a word."""
    teacher = dense_model(**{**DIGITS, **other})
    with pytest.raises(ModelError, match="the teacher is another model than the one that was compressed"):
        Finetune(without_labels(GENTLE), digits(100), teacher).requires(masked)


@pytest.mark.parametrize("labels", [True, False])
def test_neither_dropout_nor_drop_path_acts(dense, labels):
    section = GENTLE if labels else without_labels(GENTLE)
    outcomes = []
    for kwargs in (DIGITS, {**DIGITS, **DROPS}):
        model = dense_model(**kwargs)
        model.module.load_state_dict(dense.module.state_dict())
        masked = mask_model(model, copy.deepcopy(model.module), random_plan(model, low_rank=False))
        made = run_stage(Finetune(section, digits(200), model), masked).artifact
        assert made.provenance["finetuned"]["kept"] == "after"
        outcomes.append(made.module)
    rates = [getattr(module, "drop_prob", getattr(module, "p", 0)) for module in outcomes[1].modules()]
    assert max(rates) == pytest.approx(0.4), "the second model does have something to drop"
    assert same(*outcomes)


# The loss without labels


def normalised(tokens):
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("case", swept(VARIANTS))
def test_the_loss_is_its_formula_for_every_form(case):
    teacher, student = variant(case, 0), variant(case, 1)
    block, tokens = teacher.family.blocks(teacher.module)[-1].path, teacher.family.read_tokens(teacher.module)
    images = torch.randn(3, *teacher.preprocess.input_size, generator=torch.Generator().manual_seed(2))
    streams = []
    for model in (teacher.module, student.module):
        handle = model.get_submodule(block).register_forward_hook(lambda _m, _i, out: streams.append(out))
        model(images)
        handle.remove()
    with torch.no_grad():
        ours, theirs = student.module(images).double() / 3, teacher.module(images).double() / 3
    p, q = theirs.softmax(1), ours.softmax(1)
    soft = 9 * (p * (p / q).log()).sum(1).mean()
    features = (normalised(streams[1]) - normalised(streams[0]))[:, :tokens].square().mean()
    loss = imitation(teacher.module, CATEGORICAL, block, tokens, temperature=3.0)
    value = loss(student.module, images, torch.full((3,), -1))
    torch.testing.assert_close(value.double(), soft + features.double(), rtol=1e-4, atol=1e-6)
    assert min(soft.item(), features.item()) > 1e-3
    value.backward()
    assert all(parameter.grad is None for parameter in teacher.module.parameters())
    missing = [name for name, parameter in student.module.named_parameters() if parameter.grad is None]
    assert not missing, "a parameter without a gradient would stop training in several processes"
    assert not student.module.get_submodule(block)._forward_hooks
    assert loss(copy.deepcopy(teacher.module), images, torch.zeros(3)).item() < 1e-6


# How far a model is from its parent


class Table(nn.Module):
    """Logits that are looked up by the image's only value."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.drop = nn.Parameter(logits), nn.Dropout(0.9)

    def forward(self, images):
        assert not torch.is_grad_enabled()
        return self.drop(self.logits[images.flatten().long()])


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_divergence_is_its_formula(batch_size):
    first, second = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    images = Images(lambda position: torch.full((1, 1, 1), float(position)), [-1] * 5)
    model, teacher = Table(first).train(), Table(second)
    teacher.drop.eval()
    found = divergence(model, teacher, CATEGORICAL, images, batch_size=batch_size)
    p, q = second.double().softmax(1), first.double().softmax(1)
    assert found == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-6)
    assert found != pytest.approx(float((q * (q / p).log()).sum(1).mean()), rel=1e-2), "it has a direction"
    assert (model.training, model.drop.training, teacher.training, teacher.drop.training) == (True, True, True, False)
    with pytest.raises(DataError, match="empty"):
        divergence(model, teacher, CATEGORICAL, Images(lambda _: torch.zeros(1, 1, 1), []))
