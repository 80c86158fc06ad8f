"""Pairs, timed by the real harness: recorded once, tied to their files, again where the machine left doubt about them."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from benching import Short, carry_out
from builders import dense_model, write_stack
from engine import Bench
from kinds import KINDS
from kinds.pair import comparison_of, outcome_of
from pages.speed import overview
from pages.speed import page as speed_page
from records import Record, Results
from shapes import Shape
from suite import HERE, Suite

from toolchain.artifacts import open_artifact
from toolchain.errors import RecipeError
from toolchain.export.onnx_graph import export_onnx
from toolchain.measure.samples import BLOCKS

RESULTS = Results(HERE / "results")
SHAPES = """\
title = "Two shapes"
page = "speed"

[models]
tiny = { name = "deit_tiny_patch16_224", macs = 1e9 }

[forms.joint50]
compress = { method = "joint" }
budget = { params = 0.5 }

[[cells]]
kind = "pair"
model = ["tiny"]
batch = [4]
pairs = [["dense fp32", "joint50 fp32"]]
"""
PAIR = "tiny.dense-fp32--joint50-fp32.ort-cpu.b4.t1"


@pytest.fixture
def shapes(tmp_path):
    """The folder of a suite of one pair of shapes, with stacks of matmuls in the place of its files."""
    (tmp_path / "shapes.toml").write_text(SHAPES)
    (tmp_path / "work" / "shapes").mkdir(parents=True)
    for form, layers in (("dense", 6), ("joint50", 2)):
        write_stack(tmp_path / "work" / "shapes" / f"tiny.{form}.fp32.onnx", layers=layers)
    return tmp_path


def record(root, suite="shapes", name=PAIR):
    found = Results(root / "results").read(suite, name)
    assert found is not None
    return found


def rewrite(root, **result):
    found = record(root)
    Results(root / "results").save(dataclasses.replace(found, result={**found.result, **result}))


def is_done(root):
    suite = Suite.load(root / "shapes.toml")
    return Bench(suite, Results(root / "results"), root / "work").is_done(suite.cells[0])


@pytest.fixture
def timed(shapes, made_up):
    """The folder with a record of made-up samples of the files that are there: B takes half of A's time."""
    suite = Suite.load(shapes / "shapes.toml")
    recorded(shapes, suite, made_up(b=np.log(0.5)))
    return shapes


def recorded(root, suite, comparison):
    bench, (cell,) = Bench(suite, Results(root / "results"), root / "work"), suite.cells
    kind = KINDS["pair"]
    sizes = [path.stat().st_size for path in kind.files(cell, bench)]
    facts = {
        name: facts.model_copy(update={"size_bytes": size})
        for (name, facts), size in zip(comparison.artifacts.items(), sizes, strict=True)
    }
    outcome = outcome_of(comparison.model_copy(update={"artifacts": facts}), kind.definition_of(cell))
    key = kind.key(cell, bench)
    parts = (outcome.definition, outcome.result, outcome.machine)
    bench.results.save(Record(suite.name, cell.name, "pair", key, *parts))


class TestRecords:
    def test_a_pair_is_timed_once_and_its_page_follows(self, shapes):
        harness = Short()
        assert carry_out(shapes / "shapes.toml", harness=harness) == 0
        assert harness.timed == [["tiny.dense.fp32.onnx", "tiny.joint50.fp32.onnx"]]
        found = record(shapes)
        assert (found.machine["threads"], found.definition["batch"], found.versions["tool"][:7]) == (1, 4, "slimvit")
        suite, results = Suite.load(shapes / "shapes.toml"), Results(shapes / "results")
        page = speed_page(suite, results)["README.md"]
        assert f"| {comparison_of(found).verdict} |" in page
        assert "have not been measured" not in page
        assert speed_page(suite, Results(shapes / "elsewhere")) == {}

    def test_a_valid_record_of_these_files_is_left_as_it_is(self, timed):
        harness = Short()
        assert carry_out(timed / "shapes.toml", harness=harness) == 0
        assert harness.timed == []

    def test_an_edited_result_is_timed_again(self, timed):
        rewrite(timed, verdict="pass")
        assert not is_done(timed)

    def test_a_pair_that_came_out_invalid_is_timed_again(self, shapes, made_up):
        recorded(shapes, Suite.load(shapes / "shapes.toml"), made_up(control=0.2))
        assert record(shapes).result["verdict"] == "invalid"
        assert not is_done(shapes)

    def test_other_files_are_timed_again(self, timed):
        assert is_done(timed)
        write_stack(timed / "work" / "shapes" / "tiny.joint50.fp32.onnx", layers=3)
        assert not is_done(timed)

    def test_weights_of_another_processor_are_the_same_file(self, timed):
        """Their last bits differ, and with them the digest; latency does not depend on them."""
        path = timed / "work" / "shapes" / "tiny.joint50.fp32.onnx"
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
        assert is_done(timed)

    def test_another_form_target_or_batch_has_another_key_and_a_longer_look_has_not(self, timed, tmp_path):
        text = (timed / "shapes.toml").read_text()
        for old, new, same in (
            ("params = 0.5", "params = 0.4", False),
            ("pairs =", "looks = 1\npairs =", True),
            ("batch = [4]", "batch = [4]\ntarget = ['ort-cpu']", True),
        ):
            (timed / "shapes.toml").write_text(text.replace(old, new, 1))
            assert is_done(timed) == same, new

    def test_a_dry_run_times_nothing_and_says_how_long_it_would_take(self, shapes, capsys):
        harness = Short()
        assert carry_out(shapes / "shapes.toml", "--dry-run", harness=harness) == 0
        assert "0 of 1 cells are recorded; the rest is predicted to take 0.0" in capsys.readouterr().out
        assert harness.timed == []

    def test_what_this_machine_cannot_time_is_left_out_and_said(self, shapes, capsys):
        """No machine has both a GPU of this kind and this suite's target."""
        text = (shapes / "shapes.toml").read_text().replace("batch = [4]", 'batch = [4]\ntarget = ["trt"]')
        (shapes / "shapes.toml").write_text(text)
        if not KINDS["pair"].unavailable(Suite.load(shapes / "shapes.toml").cells[0]):
            pytest.skip("this machine has TensorRT and a GPU")
        assert carry_out(shapes / "shapes.toml") == 0
        out = capsys.readouterr().out
        assert "1 cells are left out: target 'trt' is unavailable" in out
        assert "0 of 0 cells are recorded" in out


@pytest.mark.parametrize("row", ["absent", "sweep-lr.lr0.001"])
def test_a_row_that_is_none_or_always_trained_is_refused(suite_file, row):
    with suite_file.open("a") as file:
        file.write(f'\n[[cells]]\nkind = "pair"\npairs = [["dense", "{row}"]]\n')
    with pytest.raises(RecipeError, match="has no cell without training"):
        Suite.load(suite_file)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"joint50 fp32"', '"joint51 fp32"', "no form; known: dense, joint50"),
        ('model = ["tiny"]', 'model = ["small"]', "no model; known: tiny"),
        ("batch = [4]", "batches = [4]", "batches"),
    ],
)
def test_a_suite_that_times_what_it_does_not_have_is_refused(tmp_path, old, new, said):
    (tmp_path / "shapes.toml").write_text(SHAPES.replace(old, new))
    with pytest.raises(RecipeError, match=re.escape(said)):
        Suite.load(tmp_path / "shapes.toml")


class TestTheRecordedSuite:
    @pytest.fixture
    def speed(self):
        return Suite.load(HERE / "suites" / "speed.toml")

    def comparison(self, name):
        found = RESULTS.read("speed", name)
        assert found is not None
        return comparison_of(found)

    def test_the_overview_says_what_was_verified_or_why_not_and_on_which_kind_of_cpu(self, speed):
        names = (
            "small.dense-fp32--joint50-fp32.ort-cpu.b1.t1",
            "small.dense-fp32--dense-int8-dynamic.openvino-cpu.b8.t1",
            "small.dense-fp32--dense-int8-dynamic.ort-cpu.b1.t1",
            "small.dense-fp32--tiny-fp32.ort-cpu.b1.t1",
        )
        by_name = {cell.name: cell for cell in speed.cells}
        pairs = [(by_name[name], self.comparison(name)) for name in names]
        absent = dataclasses.replace(by_name[names[0]], model="tiny", batch=4)
        text = overview(speed, [*pairs[:2], (absent, None), *pairs[2:]])
        head, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
        assert head == "| Model | B | ort b1 t1 | openvino b8 t1 | ort b4 t1 |"
        (said,) = re.findall(r"≥ (\d\.\d\d) ", rows[0])
        assert 0 <= pairs[0][1].verified_speedup_at_least - float(said) < 0.01, "rounded down"
        tiles = ["amx_int8" in comparison.environment["flags"] for _, comparison in pairs[1:3]]
        marks = [" †" if each else "" for each in tiles]
        assert any(tiles), "int8 on a CPU with AMX says so"
        (int8,) = re.findall(r"≥ \d\.\d\d", rows[1])
        assert rows == [
            f"| deit_small_patch16_224 | `joint50 fp32` | ≥ {said} |  |  |",
            f"| deit_small_patch16_224 | `dense int8-dynamic` | {int8}{marks[1]} | regressed{marks[0]} |  |",
            "| deit_tiny_patch16_224 | `joint50 fp32` |  |  | not measured |",
        ]

    def test_calls_that_are_long_get_half_of_the_blocks(self, speed):
        blocks = {cell.name: cell.blocks for cell in speed.cells}
        assert blocks["small.dense-fp32--joint50-fp32.ort-cpu.b1.t1"] == BLOCKS
        assert blocks["tiny.dense-fp32--joint50-fp32.ort-cpu.b8.t1"] == BLOCKS // 2
        assert blocks["small.dense-fp32--joint50-fp32.ort-cpu.b8.t2"] == BLOCKS // 2
        assert blocks["base.dense-fp32--joint50-fp32.openvino-cpu.b1.t1"] == BLOCKS // 2
        assert blocks["small.dense-fp16--joint50-fp16.ort-cuda.b64.t1"] == BLOCKS

    def test_the_suite_is_what_was_asked_for(self, speed):
        names = [cell.name for cell in speed.cells]
        assert len(names) == len(set(names))
        for model in ("tiny", "small"):
            for form, precision, target, batch, threads in (
                ("split50", "fp32", "ort-cpu", 1, 1),
                ("joint50", "int8-dynamic", "openvino-cpu", 8, 2),
                ("joint30", "fp32", "openvino-cpu", 1, 2),
                ("dense", "int8-dynamic", "ort-cpu", 8, 1),
            ):
                assert f"{model}.dense-fp32--{form}-{precision}.{target}.b{batch}.t{threads}" in names
        assert all(cell.batch == cell.threads == 1 for cell in speed.cells if cell.model == "base")

    @pytest.mark.parametrize("threads", [1, 2])
    def test_half_of_deit_s_is_as_fast_as_promised(self, threads):
        """Verified over the dense file in fp32; the promise is for one thread."""
        found = self.comparison(f"small.dense-fp32--joint50-fp32.ort-cpu.b1.t{threads}")
        assert found.verdict == "improved"
        assert found.verified_speedup_at_least >= (1.75 if threads == 1 else 1.5)


class TestShapes:
    @pytest.mark.slow
    def test_int8_files_are_made_from_the_fp32_ones(self, tmp_path):
        whole, size = tmp_path / "tiny.dense.fp32.onnx", (3, 32, 32)
        module = dense_model(num_classes=7, img_size=32, patch_size=16, embed_dim=48, depth=2).module
        export_onnx(module, whole, input_size=size, opset=20, metadata={}, simplify=True)
        path = Shape("tiny", "deit_tiny_patch16_224", "dense", {}, "int8-dynamic").file(tmp_path)
        assert open_artifact(path).precision.name == "int8-dynamic"
        assert path.stat().st_size < 0.7 * whole.stat().st_size
        assert {each.name for each in tmp_path.iterdir()} == {whole.name, path.name}

    @pytest.mark.slow
    @pytest.mark.parametrize("form", ["split50", "joint30"])
    def test_the_models_are_what_their_names_say(self, tmp_path, form):
        import onnx

        forms = {"dense": {}, **Suite.load(HERE / "suites" / "speed.toml").file.forms}
        made = (Shape("tiny", "deit_tiny_patch16_224", each, forms[each], "fp32") for each in ("dense", form))
        dense, small = (onnx.load(shape.file(tmp_path)) for shape in made)
        params = [int({p.key: p.value for p in each.metadata_props}["params"]) for each in (dense, small)]
        assert params[1] / params[0] == pytest.approx(0.3 if form == "joint30" else 0.5, abs=0.01)
        sizes = [sum(np.prod(tensor.dims) for tensor in each.graph.initializer) for each in (dense, small)]
        assert sizes[1] / sizes[0] == pytest.approx(params[1] / params[0], abs=0.01)
