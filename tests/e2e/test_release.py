"""What a release would hand out: wheel and sdist are built, the wheel is installed elsewhere, and it works from there.

Packages that it depends on are those of this environment, which a .pth file of the empty one leads to.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from recipes import tiny_recipe

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RECIPE = tiny_recipe("""[train]
epochs = 1
batch_size = 128

[budget]
params = 0.6

[bench]
targets = []
""")


def present():
    """Every file of the checkout that is or could be committed."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), the wheel built from the sdist, of a copy: a build writes into its folder."""
    root = tmp_path_factory.mktemp("release")
    for name in present():
        (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / "source" / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", root / "dist", root / "source"]
    result = subprocess.run(command, capture_output=True, text=True, env=clean())
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,), (sdist,) = (root / "dist").glob("*.whl"), (root / "dist").glob("*.tar.gz")
    return wheel, sdist


def clean():
    """This process's environment without what would lead to the checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The folder of an environment that holds the wheel alone."""
    root = tmp_path_factory.mktemp("installed") / "env"
    venv.create(root, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(root), "platbase": str(root)}))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", root / "bin/python", "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", built[0]], check=True, env=clean())
    (packages / "present.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    return root


@pytest.fixture(scope="module")
def slimvit(installed, tmp_path_factory):
    """Runs the installed command in an empty folder; its stdout."""
    work = tmp_path_factory.mktemp("work")

    def call(*arguments, program="slimvit"):
        env = {**clean(), "SLIMVIT_CACHE_DIR": str(work / "cache"), "OMP_NUM_THREADS": "1"}
        command = [installed / "bin" / program, *map(str, arguments)]
        result = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    call.work = work
    return call


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = zipfile.ZipFile(built[0]).namelist()
    about = f"slimvit-{PROJECT['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"toolchain", about}
    wanted = {name for name in present() if name.startswith("toolchain/")}
    assert {name for name in names if name.startswith("toolchain/")} == wanted
    assert f"{about}/licenses/LICENSE" in names


def test_its_metadata_are_those_of_the_project(built):
    with zipfile.ZipFile(built[0]) as wheel:
        text = wheel.read(f"slimvit-{PROJECT['version']}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert (metadata["Name"], metadata["Version"]) == ("slimvit", PROJECT["version"])
    assert metadata["License-Expression"] == PROJECT["license"]
    assert set(metadata.get_all("Classifier")) == set(PROJECT["classifiers"])
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in metadata.get_payload()


def test_the_sdist_can_be_built_from_and_read(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "toolchain/py.typed"} <= names


def test_what_runs_is_the_wheel_and_not_the_checkout(slimvit, installed):
    code = (
        "import toolchain, importlib.metadata as m; print(toolchain.__file__); print(m.distribution('slimvit')._path)"
    )
    places = [Path(line) for line in slimvit("-c", code, program="python").split()]
    assert all(place.is_relative_to(installed) for place in places), places


def test_it_says_its_version_and_its_verbs(slimvit):
    assert slimvit("--version") == f"slimvit {PROJECT['version']}\n"
    assert {"shrink", "run", "push", "gate"} <= set(slimvit("--help").split())


def test_init_writes_a_recipe(slimvit):
    slimvit("init", "vit_tiny_patch16_224", "--data", "none", "--out", "first.toml")
    assert 'name = "vit_tiny_patch16_224"' in (slimvit.work / "first.toml").read_text()
    assert (slimvit.work / "recipe.schema.json").is_file()


def test_a_run_writes_its_report_and_can_be_pushed(slimvit):
    (slimvit.work / "recipe.toml").write_text(RECIPE)
    slimvit("run", "recipe.toml", "--out", "run")
    assert "<html" in (slimvit.work / "run/report.html").read_text(), "the page's template is in the wheel"
    assert "all as listed" in slimvit("manifest", "verify", "run")
    slimvit("push", "run", "local-dir:pushed")
    assert (slimvit.work / "pushed/onnx/model.onnx").is_file()
