"""The repository keeps its word: links lead somewhere, recipes load, the README is complete, names are promises."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name

import architecture_map
import pytest
import timm

import toolchain
from toolchain.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted([*ROOT.glob("models/*/recipe*.toml"), *ROOT.glob("examples/recipes/*.toml")])
MAX_BYTES = 8_000_000

FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(
    r"\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=\"([^\"]+)\"", re.MULTILINE
)


def repository_files(root: Path) -> Iterator[Path]:
    """Every file but those below folders that .gitignore names."""
    lines = (root / ".gitignore").read_text(encoding="utf-8").split()
    ignored = [line.strip("/") for line in lines if line.endswith("/")] + [".git"]
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not any(fnmatch(name, pattern) for pattern in ignored)]
        yield from (Path(folder, name) for name in files)


FILES = sorted(repository_files(ROOT))
PAGES = [path for path in FILES if path.suffix == ".md"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def broken_links(page: Path) -> list[str]:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    targets = [next(filter(None, found)) for found in LINK.findall(text)]
    local = [target for target in targets if not re.match(r"[a-z]+:|#", target)]
    return [target for target in local if not (page.parent / target.partition("#")[0]).exists()]


def code_of(text: str) -> str:
    """The fenced blocks and inline code of a Markdown text."""
    fenced = [match.group(0) for match in FENCED.finditer(text)]
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", FENCED.sub("", text))])


def make_targets(text: str) -> set[str]:
    return {word for line in re.findall(r"\bmake((?: +[a-z][\w-]*)+)", code_of(text)) for word in line.split()}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_relative_links_lead_to_files(page):
    assert broken_links(page) == []


def test_the_link_check_notices(tmp_path):
    (tmp_path / "here.md").touch()
    page = tmp_path / "page.md"
    page.write_text(
        '[a](here.md#part) [b](gone.md) ![c](gone.png "title") <img src="gone.svg">\n[d]: gone.txt\n'
        "[e](https://example.org/x) [f](#part)\n```\n[g](in-code.md)\n```\n"
    )
    assert broken_links(page) == ["gone.md", "gone.png", "gone.svg", "gone.txt"]


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_loads_and_names_a_timm_model(path):
    recipe = Recipe.load(path)
    assert timm.is_model(recipe.model.name)
    assert recipe.model.name in (path.parent.name, path.stem) or recipe.train is not None
    for line in re.findall(r"^#\s+slimvit run (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        named, *options = line.split()
        assert ROOT / named == path, "the header's command runs another recipe"
        overrides = [value for flag, value in pairwise(options) if flag == "--set"]
        changed = Recipe.load(path, overrides)
        assert (changed.digest == recipe.digest) == (not overrides)


def test_the_shipped_recipes_are_there():
    assert {relative(path) for path in RECIPES} >= {
        "models/digits_vit/recipe.toml",
        "models/digits_vit/recipe.hybrid.toml",
        "models/digits_vit/recipe.vtp.toml",
        "examples/recipes/deit_small_patch16_224.toml",
        "examples/recipes/deit_base_patch16_224.toml",
        "models/fashion_mnist_vit/recipe.toml",
        "models/vit_small_patch14_dinov2/recipe.toml",
    }


def test_the_digits_recipes_share_their_dense_model():
    found = [Recipe.load(path) for path in sorted((ROOT / "models/digits_vit").glob("recipe*.toml"))]
    assert [each.compress.method for each in found] == ["hybrid", "joint", "vtp"]
    assert all((each.model, each.data, each.train) == (found[0].model, found[0].data, found[0].train) for each in found)


def test_the_map_of_the_house_is_todays():
    text = architecture_map.PAGE.read_text(encoding="utf-8")
    assert architecture_map.page(text) == text, "run `make docs`"
    modules = [path for path in FILES if path.suffix == ".py" and path.is_relative_to(ROOT / "toolchain")]
    assert [relative(path) for path in modules if not architecture_map.sentence(path)] == []
    documented = set(re.findall(r"\(\.\./(toolchain/[\w/]+\.py)\)", text))
    assert documented - {"toolchain/__init__.py"} == {relative(path) for path in modules if path.name != "__init__.py"}


def test_readme_lists_no_file_that_is_gone():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    mentioned = set(re.findall(r"(?<![\w/.-])[\w-]+(?:/[\w-]+)*\.py\b", readme))
    assert [name for name in mentioned if not (ROOT / name).exists() and not (ROOT / "toolchain" / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_make_targets_that_are_named_exist(page):
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", rules, re.MULTILINE))
    assert targets >= {"help", "demo", "test", "lint", "clean"}
    assert make_targets(page.read_text(encoding="utf-8")) <= targets


def test_readme_names_the_two_commands():
    assert make_targets((ROOT / "README.md").read_text(encoding="utf-8")) >= {"demo", "test"}
    assert make_targets("make sure of it, `make no-such`\n```\nmake test demo  # both\n```") == {
        "no-such",
        "test",
        "demo",
    }


def test_each_container_image_has_the_commands_that_build_and_run_it():
    text = code_of((ROOT / "docker/README.md").read_text(encoding="utf-8")).replace("\\\n", " ")
    images = sorted((ROOT / "docker").glob("*.Dockerfile"))
    assert images
    for image in images:
        (tag,) = re.findall(rf"docker build --file docker/{image.name} --tag (\S+) \.", text)
        runs = re.findall(rf"docker run .*?{tag}(.*)", text)
        assert any("slimvit run" in run for run in runs), f"no command runs a recipe in {tag}"
        assert any(not run.split("#")[0].strip() for run in runs), f"no command runs the tests in {tag}"
    for recipe in re.findall(r"models/\S+\.toml", text):
        assert (ROOT / recipe).is_file()


def test_no_large_file():
    assert {relative(path): size for path in FILES if (size := path.lstat().st_size) > MAX_BYTES} == {}


def test_the_changelog_opens_with_the_unreleased_or_current_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    _, top, *_ = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert re.match(rf"\[(Unreleased|{re.escape(version)})\]", top)
    assert re.search(r"^- \S", top, re.MULTILINE), "the top section says nothing"


def test_every_decision_is_in_the_index():
    index = (ROOT / "docs/adr/README.md").read_text(encoding="utf-8")
    pages = sorted((ROOT / "docs/adr").glob("[0-9]*.md"))
    assert pages
    assert [page.name for page in pages if f"({page.name})" not in index] == []


def test_public_api_is_what_was_promised():
    promised = (ROOT / "tests/public_api.txt").read_text(encoding="utf-8").split()
    assert sorted(toolchain.__all__) == promised
    assert all(hasattr(toolchain, name) for name in promised)


def attributes_that_are_gone(text: str) -> list[str]:
    """Dotted names below `toolchain` in a text that lead to no module, or to no name in one."""
    gone = []
    for name in re.findall(r"\btoolchain(?:\.\w+)+", text):
        try:
            resolve_name(name)
        except (ImportError, AttributeError):
            gone.append(name)
    return gone


def test_dotted_names_of_docstrings_and_pages_exist():
    sources = [path for path in FILES if path.suffix == ".py" and path.is_relative_to(ROOT / "toolchain")]
    texts = {relative(page): page.read_text(encoding="utf-8") for page in PAGES}
    for path in sources:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        texts[relative(path)] = "\n".join(
            node.value.value
            for node in nodes
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
    assert {name: gone for name, text in texts.items() if (gone := attributes_that_are_gone(text))} == {}
    assert attributes_that_are_gone("`toolchain.on_device.runner.fingerprint`, toolchain.targets.gone") == [
        "toolchain.targets.gone"
    ]
