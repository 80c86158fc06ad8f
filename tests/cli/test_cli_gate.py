"""slimvit gate: exit codes, files, accepts; and the GitHub Action's script, run as GitHub runs it."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from builders import write_classifier
from measuring import GateScript

from toolchain.artifacts import open_artifact
from toolchain.errors import ParityError
from toolchain.gate import GateConfig, GateResult, accepts_path, run_gate
from toolchain.gate.timing import Clock

ROOT = Path(__file__).resolve().parents[2]
FUTURE = (dt.datetime.now(dt.UTC) + dt.timedelta(30)).strftime("%Y-%m-%d")


@pytest.fixture
def gate(tmp_path):
    """Writes a gate.toml of one cell beside its files, and returns its path."""

    def write(budget="", relation="", digest="", **changes):
        folder = tmp_path / "gate"
        old = write_classifier(folder / "old.onnx")
        write_classifier(folder / "new.onnx", **changes)
        (folder / "gate.toml").write_text(
            f'[data]\nsource = "digits"\n[baseline.old]\npath = "old.onnx"\nsha256 = "{digest or open_artifact(old).sha256}"\n'
            f'[[cell]]\nname = "digits"\nartifact = "new.onnx"\nbaseline = "old"\n'
            f"budget = {{ {budget} }}\nrelation = {{ {relation} }}\n"
        )
        return folder / "gate.toml"

    return write


def test_a_gate_passes_and_prints_what_it_judged(command, gate):
    outcome = command("gate", "-c", gate('size = "1 MB"', "size = 0.0, accuracy = 0.0"))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1] == "pass: 3 checks in 1 cell (3 pass)"


def test_a_gate_says_that_an_artifact_is_its_baseline(command, gate):
    said = "The artifact of digits is its baseline, byte for byte"
    assert said in " ".join(command("gate", "-c", gate("", "size = 0.0")).out.split())
    assert said not in " ".join(command("gate", "-c", gate("", "size = 1.0", padding=1)).out.split())


@pytest.mark.slow
def test_a_gate_knows_which_pictures_the_run_of_its_files_had(command, finished, tmp_path):
    files = {name: finished.folder / "onnx" / f"{name}.fp32.onnx" for name in ("dense", "compressed")}
    (tmp_path / "gate.toml").write_text(
        f'[data]\nsource = "digits"\n[baseline.dense]\npath = "{files["dense"]}"\nsha256 = "{open_artifact(files["dense"]).sha256}"\n'
        f'[[cell]]\nname = "digits"\nartifact = "{files["compressed"]}"\nbaseline = "dense"\nrelation = {{ accuracy = 0.9 }}\n'
    )
    outcome = command("gate", "-c", tmp_path / "gate.toml", "--out", tmp_path / "out.json")
    assert outcome.code == 0, outcome.out
    (evidence,) = GateResult.load(tmp_path / "out.json").evidence
    for known in (evidence.artifact, evidence.baseline):
        assert known.pictures == known.pictures_of_run == finished.report["data"]["pictures"]["test"]


def test_a_gate_fails_and_writes_every_output(command, gate, tmp_path):
    names = ("out", "markdown", "junit", "github-benchmark", "bencher")
    files = [part for name in names for part in (f"--{name}", tmp_path / f"out.{name}")]
    outcome = command("gate", "-c", gate(relation="size = 0.0", padding=100), "--why", *files)
    assert (outcome.code, outcome.err) == (1, "")
    assert "blocks.9.extra" in outcome.out
    result = GateResult.load(tmp_path / "out.out")
    assert (result.verdict, result.cells[0].layers[0].layer) == ("fail", "blocks.9.extra")
    assert "blocks.9.extra" in (tmp_path / "out.markdown").read_text()
    assert "<failure" in (tmp_path / "out.junit").read_text()
    for name in ("github-benchmark", "bencher"):
        assert json.loads((tmp_path / f"out.{name}").read_text())


def test_a_gate_without_a_result_leaves_none_of_an_earlier_one(command, gate, tmp_path):
    """A report of yesterday that says pass would be shown beside the job that failed today."""
    files = {
        f"--{name}": tmp_path / f"out.{name}" for name in ("out", "markdown", "junit", "github-benchmark", "bencher")
    }
    path = gate("size = 1_000_000")
    call = ("gate", "-c", path, *(part for pair in files.items() for part in pair))
    assert command(*call).code == 0
    assert all(file.is_file() for file in files.values())
    path.with_name("old.onnx").unlink()
    assert command(*call).code == 6
    assert not any(file.exists() for file in files.values())


def test_json_alone_is_one_document_on_stdout(command, gate):
    for arguments in (("--json",), ("--json", "--why")):
        outcome = command("gate", "-c", gate(relation="size = 0.0"), *arguments)
        assert json.loads(outcome.out)["verdict"] == "pass"


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", 2, "always be green"),
        ("[[cell]]\nname = 'a'\nartifact = 'old.onnx'\n", 2, "checks nothing"),
        ("[[cell]]\nname = 'a'\nartifact = 'old.onnx'\nbudget = { siz = 1 }", 2, "did you mean"),
        ("[[cell]]\nname = 'a'\nartifact = 'gone.onnx'\nbudget = { size = 1 }", 74, "gone.onnx"),
    ],
)
def test_a_gate_that_cannot_judge_is_no_green_one(command, gate, text, code, words):
    path = gate()
    path.write_text(text)
    outcome = command("gate", "-c", path)
    assert (outcome.code, outcome.out) == (code, "")
    assert words in outcome.err


def test_a_baseline_that_is_another_file_ends_with_its_own_code(command, gate, tmp_path):
    outcome = command("gate", "-c", gate(relation="size = 0.0", digest="0" * 64), "--out", tmp_path / "out.json")
    assert outcome.code == 6
    assert "has sha256" in outcome.err
    assert not (tmp_path / "out.json").exists()


def test_a_gate_that_only_skips_has_failed(command, gate):
    path = gate(relation="latency = 0.05")
    path.write_text(path.read_text().replace("[[cell]]", '[[cell]]\ntarget = "nowhere"'))
    (path.parent / "targets.toml").write_text('[nowhere]\ntransport = "ssh"\nhost = "127.0.0.1"\nport = 1\n')
    outcome = command("gate", "-c", path)
    assert outcome.code == 1
    assert "skipped" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("fail: nothing was evaluated")


def accept(command, path, *options, expires=FUTURE, reason="we know"):
    return command("gate", "accept", "digits", "-c", path, "--reason", reason, "--expires", expires, *options)


def test_an_accept_turns_the_gate_green_for_just_this(command, gate):
    path = gate("params = 700, size = 3000", padding=100)
    outcome = accept(command, path)
    assert outcome.code == 0, outcome.err
    written = tomllib.loads(accepts_path(path).read_text())["accept"]
    assert [(entry["check"], entry["at_most"]) for entry in written][1] == ("budget.params", 750)
    assert written[0]["expires"] == dt.date.fromisoformat(FUTURE)
    green = command("gate", "-c", path)
    assert green.code == 0
    assert "2 accepted" in green.out
    gate("params = 700, size = 3000", padding=101)
    red = command("gate", "-c", path)
    assert red.code == 1
    assert "exceeded" in red.out
    gate("params = 700, size = 4000", padding=0)
    unused = command("gate", "-c", path)
    assert unused.code == 0
    assert unused.out.count("not needed any more") == 2


def test_wrong_images_are_accepted_of_the_images_that_they_were_counted_on(command, gate):
    path = gate(relation="accuracy = 0.0", swap=3)
    assert accept(command, path).code == 0
    assert command("gate", "-c", path).code == 0
    path.write_text(path.read_text().replace('source = "digits"', 'source = "digits"\nsplit = "validation"'))
    moved = command("gate", "-c", path)
    assert moved.code == 1
    assert "accepted for another baseline, other pictures or another workload" in " ".join(moved.out.split())


def test_one_check_can_be_accepted_alone(command, gate):
    path = gate("params = 700, size = 3000", padding=100)
    outcome = accept(command, path, "--check", "budget.size", "--json")
    assert [entry["check"] for entry in json.loads(outcome.out)["accepted"]] == ["budget.size"]
    assert command("gate", "-c", path).code == 1


def test_an_accept_that_expired_covers_nothing(command, gate):
    path = gate("params = 700", padding=100)
    assert accept(command, path).code == 0
    file = accepts_path(path)
    text = file.read_text().replace(FUTURE, "2020-02-02")
    file.write_text(text.replace(dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"), "2020-01-01"))
    outcome = command("gate", "-c", path)
    assert outcome.code == 1
    assert "expired" in outcome.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expires": "2020-01-01"}, "in the past"),
        ({"reason": " "}, "gives no reason"),
        ({"options": ("--check", "budget.nodes")}, "has no check"),
        ({"options": ("--check", "budget.size")}, "does not fail"),
        ({"options": ("--check", "relation.parity")}, "parity failure cannot be accepted"),
        ({"options": ("--check", "")}, "--check is empty, perhaps because a variable is not set"),
    ],
)
def test_what_cannot_be_accepted(command, gate, options, words):
    path = gate('size = "1 MB", params = 1', "parity = 'fp32'", noise=1e-3)
    extra = options.pop("options", ())
    outcome = accept(command, path, *extra, **options)
    assert outcome.code == 2
    assert words in outcome.err
    assert not accepts_path(path).exists()


def test_a_latency_is_accepted_from_a_result_of_ci(command, gate, tmp_path):
    path = gate(relation="latency = 0.05", budget='latency = "1 s"')
    slower, today = {"b": 0.2}, dt.date(2030, 1, 15)
    for name, script in (("slow", [slower, slower]), ("broken", [ParityError("they have other inputs")])):
        result = run_gate(GateConfig.load(path), tool="t", day=today, clock=Clock(GateScript(*script)))
        (tmp_path / f"{name}.json").write_text(json.dumps(result.to_dict()))
        if name == "slow":
            bound = result.cells[0].checks[1].hi
    outcome = accept(command, path, "--from", tmp_path / "slow.json")
    assert outcome.code == 0, outcome.err
    (entry,) = tomllib.loads(accepts_path(path).read_text())["accept"]
    assert (entry["check"], entry["workload"]) == ("relation.latency", "ort-cpu, batch 1, threads 1")
    assert bound <= entry["at_most"] < bound + 1e-4
    edited = json.loads((tmp_path / "slow.json").read_text())
    edited["cells"][0]["checks"][1]["hi"] = 2.0
    (tmp_path / "edited.json").write_text(json.dumps(edited))
    assert accept(command, path, "--from", tmp_path / "edited.json").code == 3
    outcome = accept(command, path, "--from", tmp_path / "broken.json")
    assert (outcome.code, "failed without a value: It was not measured: they have other inputs" in outcome.err) == (
        2,
        True,
    )


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("size = 3000", "size = 2000", "another budget.size than the gate asks for now"),
        ('name = "digits"', 'name = "letters"', "the result has no cell 'letters'; it is of another gate"),
        ("new.onnx", "other.onnx", "another artifact than"),
        ("[[cell]]", "[[cell]]\nbatch = 2", "another batch than"),
        ("[[cell]]", "[[cell]]\nthreads = 2", "another threads than"),
    ],
)
def test_a_result_of_another_gate_accepts_nothing(command, gate, tmp_path, before, after, words):
    path = gate("params = 700, size = 3000", padding=100)
    assert command("gate", "-c", path, "--out", tmp_path / "r.json").code == 1
    path.write_text(path.read_text().replace(before, after))
    cell = "letters" if "letters" in after else "digits"
    options = ["-c", path, "--from", tmp_path / "r.json", "--reason", "r", "--expires", FUTURE]
    outcome = command("gate", "accept", cell, *options)
    assert outcome.code == 2
    assert words in outcome.err
    assert not accepts_path(path).exists()


def test_a_result_against_another_file_of_the_baselines_name_accepts_nothing(command, gate, tmp_path):
    path = gate(relation="size = 0.0", padding=100)
    assert command("gate", "-c", path, "--out", tmp_path / "r.json").code == 1
    text = path.read_text()
    path.write_text(text.replace(tomllib.loads(text)["baseline"]["old"]["sha256"], "0" * 64))
    outcome = accept(command, path, "--from", tmp_path / "r.json")
    assert (outcome.code, "another sha256 of its baseline than" in outcome.err) == (2, True)


def test_a_recipe_is_no_gate_and_a_gate_no_recipe(command, gate, tmp_path):
    path, recipe = gate("size = 1"), tmp_path / "recipe.toml"
    recipe.write_text('[model]\nname = "x"\n')
    swapped = command("gate", "-c", recipe)
    assert (swapped.code, f"carry it out with `slimvit run {recipe}`" in swapped.err) == (2, True)
    swapped = command("run", path)
    assert (swapped.code, f"judge it with `slimvit gate --config {path}`" in swapped.err) == (2, True)


def test_options_before_a_sub_command_are_not_ignored(command, gate):
    outcome = command("gate", "-c", gate("size = 1"), "accept", "digits", "--reason", "x", "--expires", FUTURE)
    assert outcome.code == 2
    assert "stand behind it" in outcome.err


def test_the_digest_is_what_a_gate_names(command, gate):
    path = gate("size = 1").with_name("old.onnx")
    assert command("gate", "digest", path).out.strip() == open_artifact(path).sha256
    assert json.loads(command("gate", "digest", path, "--json").out)["sha256"] == open_artifact(path).sha256


# The GitHub Action


def action():
    return yaml.safe_load((ROOT / "action.yml").read_text())


def step(name):
    return next(step for step in action()["runs"]["steps"] if step["name"] == name)


def run_action(tmp_path, path):
    """The gate step as GitHub runs it: (exit code, outputs, summary)."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CONFIG": path.name,
        "WHY": "true",
        "FAIL_ON_INCONCLUSIVE": "true",
        "RESULTS": str(tmp_path / "results"),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }
    for name in ("output", "summary"):
        (tmp_path / name).write_text("")
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step("Run the gate")["run"]],
        cwd=path.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    outputs = dict(line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines())
    return done.returncode, outputs, (tmp_path / "summary").read_text()


@pytest.mark.slow
def test_the_action_shows_a_failure_and_fails(gate, tmp_path):
    """Kind: a checkout that brings a module called toolchain, which judges itself."""
    path = gate(relation="size = 0.0", padding=100)
    (path.parent / "toolchain").mkdir()
    (path.parent / "toolchain" / "__init__.py").write_text("")
    (path.parent / "toolchain" / "__main__.py").write_text("raise SystemExit(0)")
    code, outputs, summary = run_action(tmp_path, path)
    assert (code, outputs["exit-code"]) == (1, "1")
    assert summary.startswith("## slimvit gate: fail")
    assert "blocks.9.extra" in summary
    files = {file.name for file in Path(outputs["results"]).iterdir()}
    assert files == {f"gate.{n}" for n in ("json", "md", "junit.xml", "github-benchmark.json", "bencher.json", "log")}


def stubbed(tmp_path, gate_code, result="", **inputs):
    """The same step around a gate that ends with a code, writes no more than `result`, and says so."""
    script = step("Run the gate")["run"]
    assert script.count("python -P -m toolchain gate") == 1
    script = script.replace("python -P -m toolchain gate", "exit_with")
    files = {name: str(tmp_path / name) for name in ("RESULTS", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    stub = f"exit_with() {{ echo 'slimvit: error: a `reason`' >&2; printf '{result}' > \"$RESULTS/gate.json\"; return {gate_code}; }}\n"
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", stub + script],
        env={**os.environ, **files, "CONFIG": "x", "WHY": "", **inputs},
        capture_output=True,
        text=True,
    )


def test_the_action_tells_why_there_is_no_result(tmp_path):
    done = stubbed(tmp_path, 6, FAIL_ON_INCONCLUSIVE="true")
    assert done.returncode == 6
    assert "slimvit: error: a `reason`" in done.stderr
    assert (tmp_path / "GITHUB_OUTPUT").read_text().startswith("exit-code=6\n")
    summary = (tmp_path / "GITHUB_STEP_SUMMARY").read_text()
    assert summary.startswith("## slimvit gate: no result (exit code 6)")
    assert "a `reason`" in summary


@pytest.mark.parametrize(
    ("setting", "gate_code", "wanted"),
    [("false", 4, 0), ("true", 4, 4), ("false", 1, 1), ("true", 0, 0), ("", 4, 4), ("True", 4, 4)],
)
def test_the_action_can_let_doubt_pass_and_nothing_else(tmp_path, setting, gate_code, wanted):
    done = stubbed(tmp_path, gate_code, result="x", FAIL_ON_INCONCLUSIVE=setting)
    assert done.returncode == wanted, done.stderr
    assert ("::warning" in done.stdout) == (setting == "false" and gate_code == 4)


def test_the_action_installs_no_other_extras_than_it_was_given(tmp_path):
    """A target whose packages were left out would be skipped, and the job be green."""
    done = subprocess.run(
        ["/bin/bash", "-eo", "pipefail", "-c", step("Install slimvit")["run"]],
        env={
            "PATH": str(tmp_path),
            "REQUIREMENT": "slimvit==1",
            "EXTRAS": "openvino",
            "ACTION_PATH": "x",
            "TORCH_INDEX": "",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "slimvit (slimvit==1)" in done.stdout
    assert "add [openvino] behind the name" in done.stdout


def test_the_action_is_not_green_without_a_result(tmp_path):
    """Whatever ran in place of the gate, and ended well, judged nothing."""
    done = stubbed(tmp_path, 0, FAIL_ON_INCONCLUSIVE="true")
    assert done.returncode == 70
    assert "wrote no result" in done.stderr


def test_the_action_is_a_composite_action_whose_inputs_are_all_used():
    found = action()
    assert found["runs"]["using"] == "composite"
    text = json.dumps(found["runs"])
    assert [name for name in found["inputs"] if f"inputs.{name}" not in text] == []
    assert all(entry["description"] for entry in (*found["inputs"].values(), *found["outputs"].values()))
    for each in found["runs"]["steps"]:
        assert "${{" not in each.get("run", ""), "an input pasted into a script is an injection"
        assert ("run" in each) == (each.get("shell") == "bash")
        assert ("uses" in each) != ("run" in each)


def test_the_page_uses_inputs_that_exist():
    page = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
    workflow, *_ = page.split("```yaml\n")[1:]
    steps = yaml.safe_load(workflow.split("```")[0])["jobs"]["gate"]["steps"]
    (used,) = [each for each in steps if "slimvit" in each.get("uses", "")]
    assert used["with"].keys() <= action()["inputs"].keys()


def commented(tmp_path, listed, *, broken=False, text="## slimvit gate: pass\n"):
    """The comment step around a client of GitHub that notes what it is asked: (process, calls, body)."""
    (tmp_path / "gate.md").write_text(text)
    client = tmp_path / "bin" / "gh"
    client.parent.mkdir()
    client.write_text(
        f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n'
        f'{"echo no such right >&2; exit 1" if broken else ""}\ncase "$*" in *--paginate*) printf "{listed}" ;; esac\n'
    )
    client.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{client.parent}:{os.environ['PATH']}",
        "GH_REPO": "o/r",
        "NUMBER": "7",
        "COMMIT": "0123abc",
        "MARKER": "<!-- slimvit gate: a -->",
        "RUN": "https://example.org/run",
        "RESULTS": str(tmp_path),
    }
    script = step("Comment on the pull request")["run"]
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    done = subprocess.run(shell, env=environment, capture_output=True, text=True)
    return done, (tmp_path / "calls").read_text().splitlines(), (tmp_path / "comment.md").read_text()


@pytest.mark.parametrize(
    ("listed", "last"),
    [
        ("", "api --method POST repos/o/r/issues/7/comments"),
        ("31\\n32\\n", "api --method PATCH repos/o/r/issues/comments/31"),
    ],
)
def test_the_action_keeps_one_comment(tmp_path, listed, last):
    done, calls, body = commented(tmp_path, listed)
    assert done.returncode == 0, done.stderr
    assert len(calls) == 2
    assert calls[1].startswith(f"{last} -F body=@")
    assert (
        body
        == "<!-- slimvit gate: a -->\nOf 0123abc: [all results](https://example.org/run)\n\n## slimvit gate: pass\n"
    )


def test_a_comment_that_may_not_be_written_is_a_warning(tmp_path):
    done, calls, body = commented(tmp_path, "", broken=True, text="x" * 70_000)
    assert (done.returncode, len(calls)) == (0, 1)
    assert "::warning" in done.stdout
    assert "(no such right); does the job have the permission pull-requests: write?" in done.stdout
    assert len(body) < 65_536, "GitHub takes no longer one"
    assert "(cut off)" in body


def test_the_job_of_gitlab_is_one_that_slimvit_understands(command, gate, monkeypatch, tmp_path):
    page = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
    (block,) = [each.split("```")[0] for each in page.split("```yaml\n")[1:] if "reports:" in each.split("```")[0]]
    job = yaml.safe_load(block)["gate"]
    (line,) = job["script"]
    program, *arguments = line.split()
    assert program == "slimvit"
    monkeypatch.chdir(gate('size = "1 MB"').parent)
    assert command(*arguments).code == 0
    assert all(Path(name).is_file() for name in (*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]))


def test_a_baseline_that_the_job_built_has_no_digest(command, gate):
    path = gate(relation="size = 0.0")
    text = path.read_text()
    built = text.replace(text[text.index("sha256") : text.index("\n[[cell]]")], "built = true")
    path.write_text(built)
    assert command("gate", "-c", path).code == 0
    for neither in (built.replace("built = true", ""), text.replace("sha256", "built = true\nsha256")):
        path.write_text(neither)
        outcome = command("gate", "-c", path)
        assert outcome.code == 2
        assert "one of the two" in outcome.err
