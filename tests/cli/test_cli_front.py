"""What `slimvit` answers before any verb: its version, what could come next, and how little it loads for that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from typer.main import get_command

from toolchain.cli import app, main
from toolchain.cli.schema import SCHEMAS
from toolchain.errors import RecipeError
from toolchain.export.precisions import PRECISIONS
from toolchain.recipe import PRESETS, Recipe, override
from toolchain.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = """
import contextlib, io, json, os, sys
from toolchain.cli import app, main
import typer

def verbs(command, *words):
    yield words
    for name, below in getattr(command, "commands", {}).items():
        yield from verbs(below, *words, name)

def loaded():
    return {name.partition(".")[0] for name in sys.modules}

def answer(words, **asked):
    os.environ.update(asked)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main(words)
    except SystemExit as ended:
        assert not ended.code, (words, asked)

heavy, calls = {*json.loads(sys.argv[1])}, json.loads(sys.argv[2])
found = {"before any": sorted(loaded() & heavy)}
for words in [*calls, *([*verb, "--help"] for verb in verbs(typer.main.get_command(app)))]:
    answer(words)
    found[" ".join(words)] = sorted(loaded() & heavy)
for verb in verbs(typer.main.get_command(app)):
    for beginning in ("", "--"):
        words = ["slimvit", *verb, beginning]
        answer([], _SLIMVIT_COMPLETE="complete_bash", COMP_WORDS=" ".join(words), COMP_CWORD=str(len(words) - 1))
        found[" ".join(words)] = sorted(loaded() & heavy)
print(json.dumps(found))
"""
LIGHT = {"typer", "rich", "pydantic", "filelock"}
"""What is needed to read a command and to print a line; typer itself reads options with pydantic."""


def heavy_packages():
    """The import names of what slimvit and its extras require, but for `LIGHT`."""
    required = {re.match(r"[\w.-]+", line)[0].lower() for line in requires("slimvit")} - LIGHT - {"slimvit"}
    return sorted(
        name for name, owners in packages_distributions().items() if required & {each.lower() for each in owners}
    )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Command line → which heavy packages are loaded once it was answered; all are answered by one process."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "manifest.json").write_text('{"schema": "slimvit.manifest/1", "files": []}')
    calls = [["--version"], ["schema", "plan"], ["manifest", "verify", "."]]
    command = [sys.executable, "-c", ANSWERS, json.dumps(heavy_packages()), json.dumps(calls)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_nothing_heavy_is_loaded_to_answer(loaded):
    assert {"torch", "timm", "onnx", "onnxruntime", "numpy", "scipy"} <= {*heavy_packages()}
    assert {"--version", "--help", "gate accept --help", "bench pack --help", "slimvit bench ", "slimvit run --"} <= {
        *loaded
    }
    assert len(loaded) > 90, "every verb was asked"
    first = next(((words, names) for words, names in loaded.items() if names), None)
    assert first is None, "a file of toolchain/cli imports at its head what only a body needs"


def test_files_are_inspected_and_reports_drawn_without_torch(tmp_path):
    node = helper.make_node("Identity", ["image"], ["logits"])
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("image", "logits")]
    onnx.save(helper.make_model(helper.make_graph([node], "graph", ports[:1], ports[1:])), tmp_path / "model.onnx")
    lines = (
        "import sys, toolchain.report.files, toolchain.report.page",
        "from toolchain.cli import main",
        "try: main(['inspect', 'model.onnx', '--json'])",
        "except SystemExit as ended: assert not ended.code",
        "print({'torch', 'timm', 'onnxruntime'} & {*sys.modules})",
    )
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert '"sha256"' in ended.stdout
    assert ended.stdout.splitlines()[-1] == "set()"


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"slimvit {version('slimvit')}\n"


def asked(words):
    """How bash asks what could stand in place of the last of the words."""
    return {"_SLIMVIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}


@pytest.fixture
def told(monkeypatch, capsys, tmp_path):
    """What bash is told, in an empty folder and without settings of the user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def call(words):
        for name, value in asked(words).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main([])
        streams = capsys.readouterr()
        assert (ended.value.code, streams.err) == (0, "")
        return streams.out.split()

    return call


def test_a_shell_is_told_the_verbs_and_the_options(told):
    command = [sys.executable, "-m", "toolchain"]
    ended = subprocess.run(
        command, env={**os.environ, **asked("slimvit sw")}, capture_output=True, text=True, check=True
    )
    assert (ended.stdout.split(), ended.stderr) == (["sweep"], "")
    assert told("slimvit sw") == ["sweep"]
    assert {"--set", "--out"} <= {*told("slimvit run --")}


def test_a_shell_is_told_the_names_that_an_option_takes(told):
    assert told("slimvit export DIR --precision ") == ["fp32", *PRECISIONS]
    assert told("slimvit schema ") == [*SCHEMAS]
    assert told("slimvit evaluate FILE --split ca") == ["calibration"]
    assert told("slimvit evaluate FILE --classes imagenet-1") == ["imagenet-1k", "imagenet-12k"]
    assert told("slimvit engine FILE --hardware-compatible a") == ["ampere_plus"]


def test_a_shell_is_told_the_keys_of_a_recipe_and_what_they_may_be(told):
    every = told("slimvit run RECIPE --set ")
    assert {"model.name=", "budget.params=", "export.softmax=", "finetune.epochs=", "bench.targets="} <= {*every}
    assert "budget=" not in every, "a table is no key"
    assert told("slimvit sweep RECIPE --set budget.pa") == ["budget.params="]
    assert told("slimvit plan RECIPE --set compress.method=") == [f"compress.method={name}" for name in PRESETS]
    assert told("slimvit run RECIPE --set export.softmax=t") == ["export.softmax=true"]
    assert told("slimvit run RECIPE --set model.output=t") == ["model.output=tokens"]
    assert told("slimvit run RECIPE --set data.source=dig") == ["data.source=digits"]
    assert told("slimvit run RECIPE --set budget.params=") == told("slimvit run RECIPE --set budget.prams=") == []


def fault_of(text):
    """What is wrong with a recipe in which a key was set; "" if nothing is."""
    raw = {"model": {"name": "deit_tiny_patch16_224"}, "data": {"source": "digits"}}
    override(raw, text)
    try:
        Recipe.from_dict(raw)
    except RecipeError as error:
        return str(error)
    return ""


def test_every_key_that_a_shell_offers_is_one_that_a_recipe_takes(told):
    assert "unknown recipe key" in fault_of("budget.prams=no such value")
    faults = [fault_of(f"{offered}no such value") for offered in told("slimvit run RECIPE --set ")]
    assert [fault for fault in faults if "unknown" in fault] == []


def test_a_shell_is_told_the_cells_of_a_gate(told, tmp_path):
    assert told("slimvit gate accept ") == []
    (tmp_path / "gate.toml").write_text('[[cell]]\nname = "here"\n[[cell]]\nname = "there"\n')
    (tmp_path / "other.toml").write_text('[[cell]]\nname = "elsewhere"\n')
    assert told("slimvit gate accept ") == ["here", "there"]
    assert told("slimvit gate accept --config other.toml ") == ["elsewhere"]
    (tmp_path / "gate.toml").write_text("no toml")
    assert told("slimvit gate accept ") == []


def test_a_shell_is_told_the_targets_of_the_machine_and_of_the_file(told, tmp_path):
    (tmp_path / "targets.toml").write_text('[pi5]\ntransport = "ssh"\nhost = "pi5"\n')
    (tmp_path / "other.toml").write_text('[phone]\ntransport = "bundle"\n')
    assert told("slimvit bench compare A B --target ") == [*TARGETS, "pi5"]
    assert told("slimvit bench compare A B --targets other.toml --target p") == ["phone"]
    (tmp_path / "targets.toml").write_text("[pi5")
    assert told("slimvit bench run A --target ort-c") == ["ort-cpu", "ort-cuda"], "the verb will complain"


def test_a_shell_is_told_the_targets_that_build(told):
    assert told("slimvit engine FILE --target ") == [name for name in TARGETS if TARGETS[name].builds]
    assert told("slimvit refit ENGINE FILE --target ") == ["trt", "trt-rtx"]


def test_a_shell_is_told_models_and_sources_once_one_was_begun(told, tmp_path):
    assert "deit_tiny_patch16_224" in told("slimvit shrink deit_tiny")
    assert told("slimvit evaluate FILE --data d") == ["digits"]
    assert told("slimvit evaluate FILE --data i") == [], "those of a folder need its path"
    (tmp_path / "deit_of_mine").mkdir()
    for words in ("slimvit shrink ", "slimvit init MODEL --data ", "slimvit shrink ./deit", "slimvit shrink deit_"):
        assert told(words) == [], "the shell offers files"


def rows_of_the_commands_page():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `slimvit ([^`]+)`", text, re.MULTILINE)


@pytest.mark.parametrize("row", rows_of_the_commands_page())
def test_a_row_of_the_commands_page_is_a_command_line(row):
    """Kind: a page names an argument or an option that its command does not take."""
    command, words = get_command(app), row.split()
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    options = {name: param for param in command.params for name in param.opts if param.param_type_name == "option"}
    values = []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            assert word in options
            if not options[word].is_flag:
                words.pop(0)
        else:
            values.append(word)
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    assert sum(param.required for param in arguments) <= len(values) <= len(arguments)
