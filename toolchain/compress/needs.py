"""Requirements of a compression method; each criterion and each factorisation declares its own."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.data import DataSource
from toolchain.errors import DataError, RecipeError
from toolchain.model import TimmModel
from toolchain.outputs import WORDS
from toolchain.training.stages import require_classes, require_labels


@dataclass(frozen=True)
class Needs:
    """Requirements on the data and the model.

    Attributes:
        images: calibration images.
        classes: outputs that name classes; labels are read where there are any.
        training: it trains on real, labelled images.
    """

    images: bool = False
    classes: bool = False
    training: bool = False

    @property
    def reads_labels(self) -> bool:
        """Whether labels decide anything."""
        return self.classes or self.training

    def require(self, what: str, source: DataSource, dense: TimmModel) -> None:
        """Raises DataError, ModelError or RecipeError if a source or a model lacks one; `what` names the method in the message."""
        if self.training:
            require_classes(what, dense, "set compress.method = 'joint', which needs none")
            require_labels(source, what)
            source.check_classes(dense.label_classes, dense.class_names)
        if self.classes and dense.output != "logits":
            raise RecipeError(
                f"{what} follows the loss of classes, and the outputs are {WORDS[dense.output]}; use 'obs' or 'variance'"
            )
        if self.images and not len(source.split("calibration")):
            raise DataError(f"{what} needs calibration images")
