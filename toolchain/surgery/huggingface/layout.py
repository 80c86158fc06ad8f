"""The interface of a layout of transformers: the timm model that computes the same, and the names of its tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from toolchain.errors import ArtifactError, ModelError
from toolchain.foreign import first_line
from toolchain.outputs import Output
from toolchain.records import place_and_fault
from toolchain.settings import Positive
from toolchain.surgery.huggingface.names import Converted, Rules, convert
from toolchain.surgery.resampling import Resampling

CLASSIFIER = "ForImageClassification"
"""What the class of a model with a classifier has in its name."""
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""What transformers calls an activation → what timm does."""
OUTPUTS: Mapping[str, Output] = {"multi_label_classification": "multi-label", "regression": "regression"}
"""The problem_type of a config.json → what the outputs are."""
ROUND_EPS = 1e-5
"""Up to this value, a different epsilon of a norm makes no difference that matters."""
WHOLE = ("architectures", "id2label", "num_labels", "problem_type")
"""What the top of a config.json says, also of a model with two towers."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def pair(value: Any) -> Any:
    """One number as two."""
    return (value, value) if isinstance(value, int) else value


def _listed(value: Any) -> Any:
    return () if value is None else value


Size = Annotated[tuple[Positive, Positive], BeforeValidator(pair)]
"""(height, width); a config.json may hold one number for both."""


class Config(BaseModel):
    """What every config.json may say. A layout's own adds its keys, with the defaults that transformers has for them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    architectures: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    id2label: dict[int, object] | None = None
    num_labels: int | None = None
    problem_type: str | None = None
    image_size: Size = (224, 224)
    num_channels: Positive = 3

    @property
    def output(self) -> Output | None:
        """What its outputs are, where it says that they are no classes."""
        return OUTPUTS.get(self.problem_type or "")

    @property
    def classes(self) -> int:
        """How many classes the saved model tells apart; 0 if it has no classifier."""
        if not any(CLASSIFIER in name for name in self.architectures):
            return 0
        if self.id2label is not None:
            return len(self.id2label)
        return 2 if self.num_labels is None else self.num_labels  # what transformers leaves out

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of its classes in the order of the outputs; () if it has none, or only numbers them."""
        count, names = self.classes, self.id2label or {}
        if not count or set(names) != set(range(count)):
            return ()
        ordered = tuple(str(names[index]) for index in range(count))
        return () if ordered == tuple(f"LABEL_{index}" for index in range(count)) else ordered


class VitConfig(Config):
    """A config.json of a plain vision transformer."""

    hidden_size: Positive = 768
    num_hidden_layers: Positive = 12
    num_attention_heads: Positive = 12
    intermediate_size: Positive = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    patch_size: Size = (16, 16)
    qkv_bias: bool = True


@dataclass(frozen=True)
class Design:
    """A timm model that computes what a saved one does.

    Attributes:
        architecture: a name of timm's.
        kwargs: its keyword arguments.
        notes: one sentence for each way in which it is not quite the saved one.
    """

    architecture: str
    kwargs: Mapping[str, object]
    notes: tuple[str, ...] = ()


C = TypeVar("C", bound=Config)


class Layout(ABC, Generic[C]):
    """One model_type of transformers.

    Args:
        name: the model_type.
        inside: the key of config.json under which an image tower is described; "" where the whole is one.
        instead: a key whose table replaces that, if it is there.

    Attributes:
        config: what is read of config.json.
        rules: names of transformers → names of timm.
        normalisation: (mean, std) where the folder says none.
        processor: the image processors that go with it, as `CLASSES` calls them.
        resampling: how transformers brings its positions to another grid.
        any_size: whether transformers runs it on images of any size without being asked to, so that a processor decides.
    """

    config: type[C]
    rules: Rules
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = HALVES
    processor: str = "ViT"
    resampling: Resampling = Resampling(antialias=False)
    any_size: bool = False

    def __init__(self, name: str, inside: str = "", instead: str = "") -> None:
        self.name, self.inside, self.instead = name, inside, instead

    def parsed(self, raw: Mapping[str, Any]) -> C:
        """A config.json; raises ModelError if a value is of another type than transformers'."""
        values = dict(raw)
        if self.inside:
            inner = raw.get(self.instead) or raw.get(self.inside) or {}
            own = {key: value for key, value in inner.items() if key not in WHOLE}
            values = own | {key: raw[key] for key in WHOLE if key in raw}
        try:
            return self.config.model_validate(values)
        except ValidationError as error:
            where, what = place_and_fault(error)
            place = ".".join(filter(None, (self.inside, where.partition(".")[0])))
            raise ModelError(f"config.json of model_type {self.name!r} has a wrong {place}: {what}") from None

    @abstractmethod
    def design(self, config: C) -> Design:
        """The timm model of a config.json; raises ModelError if none computes the same."""

    def converted(self, tensors: Mapping[str, Tensor], config: C) -> Converted:
        """The tensors under timm's names; raises ArtifactError where one is not of this layout."""
        try:
            renamed = convert(tensors, self.rules)
            return Converted(self.finished(renamed.state, config), renamed.left_out)
        except (RuntimeError, LookupError, ValueError) as error:  # tensors of unexpected shapes
            raise ArtifactError(
                f"its tensors are not those of model_type {self.name!r}: {first_line(error)}"
            ) from error

    @abstractmethod
    def finished(self, state: dict[str, Tensor], config: C) -> dict[str, Tensor]:
        """What `rules` made of the tensors, with those put together or reshaped that timm keeps in another form."""

    def refusal(self, why: str) -> ModelError:
        """The error that says that no timm model computes what a config.json describes."""
        return ModelError(f"no timm model computes what this {self.name!r} does: {why}")

    def require_activation(self, activation: str, of_timm: str = "gelu") -> None:
        """Raises ModelError unless the activation is the one that timm's module has."""
        if ACTIVATIONS.get(activation) != of_timm:
            raise self.refusal(f"its activation is {activation!r}, and timm's module has {of_timm!r}")

    def norm_notes(self, eps: float, of_timm: float) -> tuple[str, ...]:
        """A sentence where timm's norms add another constant to the variance; raises ModelError where it matters."""
        if math.isclose(eps, of_timm):
            return ()
        if eps > ROUND_EPS:
            raise self.refusal(f"its layer_norm_eps is {eps:g}, and timm's {of_timm:g}")
        return (f"Norms add {of_timm:g} to the variance, as timm's do, and not {eps:g} as config.json says.",)


def vit_kwargs(config: VitConfig) -> dict[str, object]:
    """Keyword arguments that all of timm's vision transformers have."""
    return {
        "img_size": plain(config.image_size),
        "patch_size": plain(config.patch_size),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio(config.intermediate_size, config.hidden_size),
        "num_classes": config.classes,
    }


def plain(size: tuple[int, int]) -> int | list[int]:
    """One number for a square."""
    return size[0] if size[0] == size[1] else list(size)


def ratio(hidden: int, width: int) -> float:
    """The number by which timm multiplies `width`, rounding down, to come to `hidden`."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width
