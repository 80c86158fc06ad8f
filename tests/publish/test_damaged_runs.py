"""Kind: a run that is damaged, cut or edited by hand. It is refused in words, or where its manifest says the same pushed as it is."""

from __future__ import annotations

import shutil

import pytest
from damage import bytes_damaged, json_damaged

from toolchain.errors import SlimvitError
from toolchain.publish.folder import FolderDestination
from toolchain.publish.manifest import Manifest
from toolchain.publish.push import RECEIPT, push
from toolchain.publish.repository import repository
from toolchain.publish.sbom import sbom

SEEDS = range(16)


def faults(path, damaged, read):
    """(seed, error) of each damage that ends in anything but a refusal in words."""
    whole, found = path.read_bytes(), []
    for seed in SEEDS:
        path.write_bytes(damaged(whole, seed))
        try:
            read()
        except SlimvitError as error:
            if not str(error).strip():
                found.append((seed, "without words"))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            found.append((seed, repr(error)[:200]))
    path.write_bytes(whole)
    read()
    return found


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    return shutil.copytree(finished, tmp_path_factory.mktemp("damaged") / "run")


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("report.json", json_damaged),
        ("deploy/model.json", json_damaged),
        ("onnx/compressed.fp32.onnx", bytes_damaged),
        ("manifest.json", json_damaged),
        ("manifest.json", bytes_damaged),
    ],
)
def test_a_damaged_run_is_refused_in_words_or_pushed(run, name, damaged):
    assert faults(run / name, damaged, lambda: repository(run, "a/b")) == []


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("report.json", json_damaged),
        ("deploy/model.json", json_damaged),
        ("onnx/compressed.fp32.onnx", bytes_damaged),
    ],
)
def test_one_whose_manifest_lists_it_as_it_is_is_refused_in_words_or_pushed(run, relisted, name, damaged):
    assert faults(run / name, damaged, lambda: (relisted(run), repository(run, "a/b"))) == []


@pytest.mark.parametrize("damaged", [json_damaged, bytes_damaged])
def test_a_damaged_manifest_has_no_bill(run, damaged):
    assert faults(run / "manifest.json", damaged, lambda: (Manifest.load(run).require(run), sbom(run))) == []


@pytest.mark.parametrize("damaged", [json_damaged, bytes_damaged])
def test_a_damaged_receipt_is_no_licence_to_overwrite(run, tmp_path, damaged):
    files, place = repository(run, "a/b"), FolderDestination(tmp_path)
    push(files, place, tool="slimvit 0", message="")

    def again():
        push(files, place, tool="slimvit 0", message="")
        assert {path: content.digests.sha256 for path, content in files.items()} == {
            path: digests.sha256 for path, digests in place.there().items() if path != RECEIPT
        }

    assert faults(tmp_path / RECEIPT, damaged, again) == []
