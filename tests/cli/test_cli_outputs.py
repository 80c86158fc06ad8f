"""What an option says to write: never over what the verb reads, nor over a file of another kind, and told before any work."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import typer
from builders import write_classifier

from toolchain.cli import outputs
from toolchain.cli.main import _command, app
from toolchain.errors import RecipeError
from toolchain.files import write_json

WRITTEN = {"out", "markdown", "junit", "github_benchmark", "bencher"}
REFUSES_ITSELF = {("init", "out")}
"""`init` replaces no file at all."""


def leaves(command, name=""):
    """(words, command) of every verb."""
    below = getattr(command, "commands", {})
    if not below or (command.params and name == "gate"):
        yield name, command
    for word, each in below.items():
        yield from leaves(each, f"{name} {word}".strip())


def options():
    verbs = dict(leaves(typer.main.get_command(app)))
    return [(verb, each.name) for verb, command in verbs.items() for each in command.params if each.name in WRITTEN]


@pytest.mark.parametrize(("verb", "name"), options())
def test_every_output_is_held_apart_from_what_is_read(verb, name, tmp_path):
    command = dict(leaves(typer.main.get_command(app)))[verb]
    option = next(each for each in command.params if each.name == name)
    if (verb, name) in REFUSES_ITSELF:
        return
    context = command.make_context("slimvit", [], resilient_parsing=True)
    target = tmp_path / "new.onnx"
    assert option.process_value(context, str(target)) == target
    assert context.meta[outputs.NAMED] == {name: target}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with one file of every kind that a verb reads."""
    monkeypatch.chdir(tmp_path)
    write_classifier(tmp_path / "old.onnx")
    write_classifier(tmp_path / "new.onnx")
    (tmp_path / "gate.toml").write_text(
        '[[cell]]\nname = "c"\nartifact = "new.onnx"\nbudget = { size = "1 MB" }\n', encoding="utf-8"
    )
    (tmp_path / "result.json").write_text('{"schema":"slimvit.gate/2"}')
    (tmp_path / "report.json").write_text(json.dumps({"schema": "slimvit.report/2"}, indent=2))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "both.json").symlink_to(tmp_path / "result.json")
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("gate -c gate.toml --out gate.toml", 74, "another kind"),
        ("gate -c gate.toml --out new.onnx", 74, "another kind"),
        ("gate -c gate.toml --markdown new.onnx", 74, "another kind"),
        ("gate -c gate.toml --junit gate.toml", 74, "another kind"),
        ("gate -c gate.toml --bencher gate.toml", 74, "another kind"),
        ("gate -c gate.toml --github-benchmark report.json", 74, "another kind"),
        ("gate -c gate.toml --out x.json --junit x.json", 2, "--out x.json is also --junit, which is written as well"),
        ("gate -c gate.toml --out report.json", 74, "another kind"),
        ("gate -c gate.toml --out pictures", 74, "is a folder; name a file in it"),
        ("gate -c gate.toml --out gate.toml/x.json", 74, "gate.toml"),
        ("bench compare old.onnx new.onnx --out old.onnx", 74, "another kind"),
        ("bench pack old.onnx new.onnx --out new.onnx", 74, "another kind"),
        ("bench unpack result.json new.onnx --out result.json", 2, "is also RESULT, which is read"),
        ("bench unpack both.json new.onnx --out result.json", 2, "is also RESULT, which is read"),
        ("evaluate new.onnx --data digits --classes result.json --out ./result.json", 2, "is also --classes"),
        ("parity old.onnx new.onnx --out new.onnx", 74, "another kind"),
        ("export pictures --out gate.toml", 2, "does not end in .onnx"),
        ("manifest sbom . --out report.json", 74, "another kind"),
        ("split pictures --out pictures", 2, "is also FOLDER, which is read"),
        ("shrink vit_tiny_patch16_224 --data pictures --out pictures", 2, "is also --data, which is read"),
        ("shrink vit_tiny_patch16_224 --data images:pictures --out pictures", 2, "is also --data, which is read"),
        ("sweep gate.toml --set budget.params=0.5,0.4 --out gate.toml", 2, "is also RECIPE, which is read"),
    ],
)
def test_what_is_read_is_never_written_over(command, folder, line, code, words):
    before = contents(folder)
    outcome = command(*line.split())
    assert (outcome.code, outcome.out) == (code, "")
    assert words in outcome.err
    assert contents(folder) == before


def test_an_earlier_outcome_an_empty_file_and_a_device_are_replaced(command, folder):
    (folder / "empty.md").touch()
    for _ in range(2):
        outcome = command("gate", "-c", "gate.toml", "--out", "g.json", "--markdown", "empty.md", "--junit", os.devnull)
        assert outcome.code == 0, outcome.err
    assert json.loads((folder / "g.json").read_text())["verdict"] == "pass"
    assert (folder / "empty.md").read_bytes().startswith(outputs.MARKDOWN)


SIZE = {"file-size": {"value": 1.0}}
OTHERS = {
    "--bencher": [
        {"schema": "slimvit.report/2"},
        {"c": {"latency": {"value": 1.0}}},
        {"c": SIZE, "name": "x"},
        {"c": {**SIZE, "latency": {"value": 1.0, "unit": "ms"}}},
        {"c": {"file-size": {"value": "large"}}},
    ],
    "--github-benchmark": [
        [{"name": "c: size"}],
        [{"name": "c", "unit": "s", "value": 1.0, "extra": ""}],
        [{"name": "c: size", "unit": "bytes", "value": 1, "extra": "sha256 ab"}, 1],
    ],
}


@pytest.mark.parametrize(
    ("option", "content"), [(option, each) for option, others in OTHERS.items() for each in others]
)
def test_json_of_another_kind_that_begins_alike_is_not_replaced(command, folder, option, content):
    write_json(folder / "other.json", content)
    before = contents(folder)
    outcome = command("gate", "-c", "gate.toml", option, "other.json")
    assert (outcome.code, outcome.out) == (74, "")
    assert f"{option} other.json is not replaced: a file of another kind lies there; choose another name" in outcome.err
    assert contents(folder) == before


def test_what_only_begins_as_json_and_xml_of_another_kind_are_not_replaced(command, folder):
    (folder / "half.json").write_text('{\n  "c": {\n', encoding="utf-8")
    (folder / "other.xml").write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="pytest"/>\n', encoding="utf-8"
    )
    before = contents(folder)
    assert command("gate", "-c", "gate.toml", "--bencher", "half.json").code == 74
    assert command("gate", "-c", "gate.toml", "--junit", "other.xml").code == 74
    assert contents(folder) == before


def test_every_form_that_a_gate_writes_is_replaced_by_the_next(command, folder):
    forms = {
        "--markdown": "g.md",
        "--junit": "g.xml",
        "--bencher": "b.json",
        "--github-benchmark": "h.json",
        "--out": "g.json",
    }
    words = [word for pair in forms.items() for word in pair]
    for _ in range(2):
        outcome = command("gate", "-c", "gate.toml", *words)
        assert outcome.code == 0, outcome.err


@pytest.mark.slow
def test_pages_that_are_drawn_anew_are_listed_anew(command, finished, tmp_path):
    run = shutil.copytree(finished.folder, tmp_path / "run")
    (run / "report.html").write_text("of an earlier version")
    (run / "plan.json").write_text("{}")
    assert command("report", run).code == 0
    outcome = command("manifest", "verify", run)
    assert (outcome.code, "1 of" in outcome.err, "altered: plan.json; put" in outcome.err) == (3, True, True)
    (run / "manifest.json").write_text("{}")
    (run / "report.md").unlink()
    assert command("report", run).code == 0
    assert (run / "manifest.json").read_text() == "{}"


def test_home_begins_any_path(command, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    outcome = command("gate", "--config=~/gate.toml", "--out=~/g.json")
    assert outcome.code == 0, outcome.err
    assert (folder / "g.json").is_file()
    assert not (folder / "~").exists()
    assert command("bench", "verify", "~/g.json").code == 0


def test_a_home_folder_that_the_system_does_not_know_is_told_of_any_path(command):
    for line in ("inspect ~nobody-here/a", "init digits_vit --data ~nobody-here/a", "run ~nobody-here/a"):
        outcome = command(*line.split())
        assert outcome.code == 74, outcome.err
        assert "~nobody-here/a: the system names no home folder" in outcome.err


def test_commands_that_a_message_offers_can_be_pasted(command, folder):
    shutil.copy(folder / "gate.toml", folder / "-the gate.toml")
    outcome = command("plan", "--", "-the gate.toml")
    assert (outcome.code, "judge it with `slimvit gate --config './-the gate.toml'`" in outcome.err) == (2, True)


def test_a_folder_without_a_file_has_no_digest(command, folder):
    outcome = command("gate", "digest", "pictures")
    assert (outcome.code, "pictures is a folder without any file" in outcome.err) == (3, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init", "new.onnx", "--data", ""], "--data is empty, perhaps because a variable is not set; name a value\n"),
        (["shrink", "", "--data", "digits"], "MODEL is empty, perhaps because a variable is not set; name a value\n"),
        (["gate", "digest", ""], "PATH is empty, perhaps"),
        (
            ["run", "gate.toml", "--out", ""],
            "--out is empty, perhaps because a variable is not set; name a value, or leave it",
        ),
        (["bench", "verify", "result.json", ""], "FILE is empty, perhaps"),
        (["gate", "--markdown="], "--markdown is empty, perhaps"),
    ],
)
def test_an_empty_name_is_not_taken_for_the_current_folder(command, folder, words, message):
    before = contents(folder)
    outcome = command(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert contents(folder) == before


@pytest.mark.parametrize(("verb", "each"), [*leaves(_command())])
def test_no_option_and_no_argument_takes_an_empty_value(verb, each):
    """Kind: an option, of paths above all, that means something where a shell's variable is not set."""
    for parameter in (one for one in each.params if one.name not in outputs.MAY_BE_EMPTY):
        context = each.make_context("slimvit", [], resilient_parsing=True)
        context.set_parameter_source(parameter.name, type(context.get_parameter_source(parameter.name))["COMMANDLINE"])
        for value in ("", ["a", ""]):
            with pytest.raises(RecipeError, match="is empty, perhaps because a variable is not set; name a value"):
                parameter.process_value(context, value)


def test_a_run_is_not_set_beside_itself(command, folder):
    for words in (["pictures", "./pictures"], ["pictures", "other", folder / "pictures"]):
        outcome = command("report", *words)
        assert (outcome.code, outcome.out) == (2, "")
        assert f"{words[-1]} is named twice; name every run once".removeprefix("./") in outcome.err


def test_files_that_are_not_one_model_are_told_what_to_do_and_that_is_true(command, folder):
    write_classifier(folder / "new.onnx", swap=3)
    outcome = command("parity", "old.onnx", "new.onnx")
    assert outcome.code == 3
    assert outcome.err.endswith(
        "Make new.onnx again from old.onnx, or allow them to differ so far with --cosine-min.\n"
    )
    assert command("parity", "old.onnx", "new.onnx", "--cosine-min=-1").code == 0


def test_a_file_is_written_where_its_link_leads(command, folder):
    (folder / "there").mkdir()
    (folder / "g.json").symlink_to("there/g.json")
    for _ in range(2):
        assert command("gate", "-c", "gate.toml", "--out", "g.json").code == 0
    assert (folder / "g.json").is_symlink()
    assert json.loads((folder / "there" / "g.json").read_text())["verdict"] == "pass"


def test_the_ending_is_that_of_the_name_that_was_given_and_not_of_what_it_leads_to(tmp_path):
    (tmp_path / "latest.onnx").symlink_to(tmp_path / "ab12")
    context, parameter = SimpleNamespace(meta={}), SimpleNamespace(opts=["--out"], name="out")
    assert outputs.file(b"", ".onnx")(context, parameter, tmp_path / "latest.onnx") == tmp_path / "ab12"
    with pytest.raises(RecipeError, match=r"does not end in \.onnx"):
        outputs.file(b"", ".onnx")(context, parameter, tmp_path / "ab12")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_ends_no_command(command, folder, monkeypatch, encoding):
    kept = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(kept, encoding))
    assert command("parity", "new.onnx", "new.onnx", "--out", "r→é.json").code == 0
    assert "max |\\u0394|" in kept.getvalue().decode(encoding)


def test_a_folder_that_cannot_be_written_is_told_before_any_work(command, folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    outcome = command("bench", "compare", "old.onnx", "new.onnx", "--out", "x.json")
    assert (outcome.code, outcome.out) == (74, "")
    assert "read-only or belongs to another user; choose another folder" in outcome.err


@pytest.mark.parametrize(
    ("line", "help_of"),
    [
        ("gate gate.toml", "slimvit gate"),
        ("shrink", "slimvit shrink"),
        ("bench compare old.onnx", "slimvit bench compare"),
    ],
)
def test_a_wrong_command_line_names_the_help_of_its_verb(command, folder, line, help_of):
    outcome = command(*line.split())
    assert outcome.code == 2
    assert outcome.err.rstrip().endswith(f"See `{help_of} --help`.")
