"""The dense models that cells start from: trained here once, adopted from a folder, or shipped beside this file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records import recipe_digest

from toolchain.errors import ArtifactError, RecipeError
from toolchain.files import exclusive, read_json, sha256, write_json
from toolchain.model import MODEL_FILES, TimmModel
from toolchain.pipeline.job import Job, prepare
from toolchain.pipeline.stages.dense import trained
from toolchain.progress import SILENT, Progress
from toolchain.surgery.replay import load_model, save_model
from toolchain.training.evaluate import accuracy

if TYPE_CHECKING:
    from suite import Suite

RECORD = "reference.json"
SHIPPED = Path(__file__).resolve().parent / "references"


@dataclass(frozen=True)
class Ready:
    """A dense model on disk.

    Attributes:
        folder: holds model.safetensors, model.json and reference.json.
        facts: the content of reference.json.
    """

    folder: Path
    facts: dict[str, Any]

    @property
    def weights(self) -> Path:
        """The weights that a cell's recipe names as its checkpoint."""
        return self.folder / "model.safetensors"

    @property
    def weights_sha256(self) -> str:
        """What identifies the model."""
        return str(self.facts["weights_sha256"])


def find(suite: Suite, reference: str, seed: int, work: Path) -> Ready | None:
    """A reference that is there, in `work` or shipped; None if it has yet to be trained.

    Raises:
        ArtifactError: one is there under this name, and it is another model or was altered.
    """
    folders = (_folder(work, reference, seed), SHIPPED / _name(reference, seed))
    folder = next((each for each in folders if (each / RECORD).is_file()), None)
    if folder is None:
        return None
    facts = read_json(folder / RECORD)
    wanted = recipe_digest(suite.reference_recipe(reference, seed))
    if facts.get("recipe_sha256") != wanted:
        raise ArtifactError(f"{folder} was made for another recipe of {reference!r}; move it away to train it anew")
    ready = Ready(folder, facts)
    if (digest := sha256(ready.weights)) != ready.weights_sha256:
        raise ArtifactError(f"{ready.weights} has sha256 {digest[:12]}…, its record says {ready.weights_sha256[:12]}…")
    return ready


def get(suite: Suite, reference: str, seed: int, work: Path, progress: Progress = SILENT) -> Ready:
    """A reference, trained now if it is not there; an interrupted training goes on after its last epoch."""
    folder = _folder(work, reference, seed)
    with exclusive(folder):
        if (ready := find(suite, reference, seed, work)) is not None:
            return ready
        recipe = suite.reference_recipe(reference, seed)
        job, start = prepare(recipe), time.monotonic()
        checkpoint = folder.with_name(f"{folder.name}.training.safetensors")
        model = trained(job, checkpoint, recipe_digest(recipe), progress)
        save_model(model, folder)
        assert recipe.train is not None
        how = {"trained": "here", "epochs": recipe.train.epochs, "seconds": time.monotonic() - start}
        ready = _record(folder, job, model, how)
        checkpoint.unlink(missing_ok=True)
        return ready


def adopt(suite: Suite, name: str, folder: Path, work: Path) -> Ready:
    """A reference whose weights come from a model folder that the tool wrote elsewhere.

    What can be checked is: the same architecture and preprocessing, trained by the tool on the same content. The number
    of epochs is not in a model's provenance, so the record says that it was adopted.

    Raises:
        RecipeError: the suite has no such reference.
        ArtifactError: the model in the folder is not that one.
    """
    reference, _, seed = name.rpartition("_s")
    if (
        reference not in suite.file.references
        or not seed.isdigit()
        or int(seed) not in suite.file.references[reference].all_seeds
    ):
        known = [f"{each}_s{seed}" for each, reference in suite.file.references.items() for seed in reference.all_seeds]
        raise RecipeError(f"--adopt: {suite.name} has no reference {name!r}; known: {', '.join(known)}")
    job, model = prepare(suite.reference_recipe(reference, int(seed))), load_model(folder)
    facts: dict[str, tuple[Any, Any]] = {
        "stage": ("dense", model.stage),
        "model": (job.dense.ref.model_dump(mode="json"), model.ref.model_dump(mode="json")),
        "preprocessing": (job.dense.preprocess, model.preprocess),
        "training data": (job.source.identity, model.provenance.get("trained_on")),
    }
    for what, (wanted, got) in facts.items():
        if wanted != got:
            raise ArtifactError(f"{folder} cannot be adopted as {name}: its {what} is {got}, expected {wanted}")
    assert isinstance(model, TimmModel)
    target = _folder(work, reference, int(seed))
    with exclusive(target):
        if (target / RECORD).exists():
            raise ArtifactError(f"{target} holds a reference already; move it away to adopt another")
        save_model(model, target)
        return _record(target, job, model, {"trained": "adopted", "provenance": dict(model.provenance)})


def _record(folder: Path, job: Job, model: TimmModel, how: dict[str, Any]) -> Ready:
    counted = {name: accuracy(model.module, job.source.split(name)) for name in ("validation", "test")}
    facts = {
        "recipe_sha256": recipe_digest(job.recipe),
        "weights_sha256": sha256(folder / MODEL_FILES[1]),
        "data_sha256": job.source.digest,
        **{name: {"wrong": each.wrong, "total": each.total} for name, each in counted.items()},
        **how,
    }
    write_json(folder / RECORD, facts)
    return Ready(folder, facts)


def _name(reference: str, seed: int) -> str:
    return f"{reference}_s{seed}"


def _folder(work: Path, reference: str, seed: int) -> Path:
    return work / "references" / _name(reference, seed)
