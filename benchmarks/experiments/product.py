"""What the tool itself makes of a dense model, whole: other ways are held against it, and begin with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from compressing import code_digest
from records import versions

from experiments.starts import Start, within
from toolchain.compress.stage import Compress, Weighing
from toolchain.files import digest_of, exclusive
from toolchain.model import MaskedModel, run_stage
from toolchain.surgery.replay import load_model, save_model


def compressed(begun: Start, params: float, work: Path, weigh: Callable[[], Weighing] | None = None) -> MaskedModel:
    """The model within a share of the parameters, made now unless it lies below `work`.

    Args:
        begun: the dense model.
        params: the share.
        work: where compressed models are kept.
        weigh: says what each width does to the outputs, if the model is to be made; without it the tool looks for itself.
    """
    source, section = begun.job.source, begun.job.recipe.compress.model_dump(mode="json")
    about = [begun.weights, source.digest, len(source.split("calibration")), params, section, versions(), code_digest()]
    folder = work / "experiments" / f"{begun.name}.{params:g}.{digest_of(*about)[:24]}"
    with exclusive(folder):
        if not folder.exists():
            dense = begun.job.dense
            dense = replace(dense, provenance={**dense.provenance, "weights_sha256": begun.weights})
            problem = replace(within(begun.job.problem, params), dense=dense)
            save_model(run_stage(Compress(source, weighing=weigh and weigh()), problem).artifact, folder)
    model = load_model(folder)
    assert isinstance(model, MaskedModel)
    return model
