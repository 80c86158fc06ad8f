"""The bill of materials says of a run what its manifest says, and CycloneDX's own tools read it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from importlib.metadata import version

import pytest

from toolchain.errors import ArtifactError, RecipeError, StorageError
from toolchain.publish.sbom import sbom


@pytest.fixture(scope="module")
def bill(finished):
    return json.loads(sbom(finished))


def of_type(bill, kind):
    return {component["name"]: component for component in bill["components"] if component["type"] == kind}


def test_every_file_of_the_run_is_in_it_with_its_digest(bill, finished):
    there = {
        path.relative_to(finished).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in finished.rglob("*")
        if path.is_file() and ".slimvit" not in path.parts
    }
    del there["manifest.json"]
    listed = {name: component["hashes"] for name, component in of_type(bill, "file").items()}
    assert listed == {name: [{"alg": "SHA-256", "content": digest}] for name, digest in there.items()}


def test_the_packages_that_wrote_them_are_in_it(bill):
    packages = of_type(bill, "library")
    assert packages["torch"]["purl"] == f"pkg:pypi/torch@{version('torch')}"
    assert {"slimvit", "timm", "onnx", "onnxruntime"} <= set(packages)
    depends = {each["ref"]: each.get("dependsOn", []) for each in bill["dependencies"]}
    assert "package:onnx" in depends["file:onnx/compressed.fp32.onnx"]
    assert "file:onnx/compressed.fp32.onnx" in depends["model"]


def test_the_model_is_what_it_is_about(bill, finished):
    about = bill["metadata"]["component"]
    report = json.loads((finished / "report.json").read_text())
    assert (about["type"], about["name"]) == ("machine-learning-model", "vit_tiny_patch16_224")
    facts = {each["name"]: each["value"] for each in about["properties"]}
    assert facts["slimvit:params"] == str(report["compressed"]["params"])
    assert facts["slimvit:recipe_digest"] == about["version"] == report["recipe_digest"]


def test_cyclonedx_reads_it_and_one_run_has_one_bill(bill, finished):
    from cyclonedx.model.bom import Bom
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator  # takes seconds to load

    text = sbom(finished)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert len(Bom.from_json(json.loads(text)).components) == len(bill["components"])
    assert json.loads(text) == bill


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


def test_altered_files_have_no_bill(copied):
    (copied / "plan.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"1 of \d+ files are missing or altered: plan\.json"):
        sbom(copied)


def test_without_the_package_it_is_told(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "cyclonedx.model.bom", None)
    with pytest.raises(RecipeError, match=r"pip install 'slimvit\[sbom\]'"):
        sbom(finished)


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(
        StorageError, match=r"is not the folder of a finished run: it has no manifest\.json; give the folder"
    ):
        sbom(tmp_path)
