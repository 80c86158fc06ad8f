"""Whether fitted tensors are exactly a model's, by name and shape: a head that it has not is noted, all else refused with what to do."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from toolchain.errors import ModelError
from toolchain.surgery.anatomy import BLOCK, EMBEDS, TRANSFORMERS, Anatomy, by, differences, others, remedy
from toolchain.surgery.origin import Fitted, Origin, left_out, some

CLASSIFIERS, POOLING = ("head", "head_dist"), ("attn_pool", "fc_norm")
PRETRAINING = re.compile(r"(decoder(_\w+)?|mask_token|(dino_|ibot_)head|head\.(mlp|last_layer))(\.|$)")
"""Parts that a model has while it learns from pictures alone, and no timm model keeps: MAE's decoder, DINO's head."""
REMADE = re.compile(r"\.parametrizations\.|\.(weight|bias)_(orig|mask|[guv])$")
"""Names of tensors that torch.nn.utils computes a weight from, to prune it or to norm it."""


def without_classifier(result: Fitted, module: nn.Module, origin: Origin) -> Fitted:
    """The tensors without a classifier, and a note, where the model has none; of one that gives tokens, without pooling too.

    Raises:
        ArtifactError, ModelError: it gives tokens, and the only norm after the blocks is that of the pooled vector.
    """
    gives_tokens = not module.num_classes and not getattr(module, "global_pool", None)
    if gives_tokens and "fc_norm" in (result.anatomy.norm or "") and "norm.weight" not in result.state:
        raise origin.misfit(
            f"{origin.word('its')} last norm (fc_norm) is that of the pooled vector, and tokens are read before pooling",
            'set model.output = "features", or use weights from before fine-tuning, whose norm is that of the tokens',
        )
    parts = (*CLASSIFIERS, *POOLING) if gives_tokens else () if module.num_classes else CLASSIFIERS
    extra = [name for name in result.state if name.partition(".")[0] in parts]
    if not extra or any(name in module.state_dict() for name in extra):
        return result
    what = "pooling" if any(name.startswith(POOLING) for name in extra) else "classifier"
    why = head_of_layers(extra) or f"the model has no {what}, and its outputs are features."
    note = f"Of {origin.what}, {left_out(extra)}: {why}"
    state = {name: tensor for name, tensor in result.state.items() if name not in extra}
    return replace(result, state=state, notes=(*result.notes, note))


def head_of_layers(names: Collection[str]) -> str:
    """A sentence on a head that is no single linear, as no timm model has it, and what to do; "" where there is none among tensors."""
    layers = {name.rpartition(".")[0] for name in names if name.startswith("head.") and not PRETRAINING.match(name)}
    if not layers - {"head", "head.fc"}:
        return ""
    do = "keep it, and put it behind the smaller model, whose features it takes as before"
    if len(layers) == 1:
        only = layers.pop()
        do = f"if it is a linear with dropout alone beside it, rename {only}.weight and {only}.bias to head.weight and head.bias; else {do}"
    return f"the head consists of several layers, which no timm model has, so that the outputs are the features that enter it; {do}."


def check_names(result: Fitted, module: nn.Module, origin: Origin) -> None:
    """Raises ArtifactError or ModelError unless the tensors are exactly the model's, by name and shape.

    Args:
        result: of `fitted`.
        module: the model.
        origin: where the tensors come from.
    """
    state, wanted = result.state, module.state_dict()
    missing, unknown = [n for n in wanted if n not in state], [n for n in state if n not in wanted]
    other = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
    if not (missing or unknown or other):
        return
    ignored = {"positions", *result.adapted, *origin.may_differ}
    unequal = differences(result.anatomy, result.model, ignored)
    count = result.anatomy.classes
    if set(unequal) == {"classes"} and count:
        raise ModelError(
            f"{origin.what} {origin.word('has')} {count} classes, the model {result.model.classes}; "
            f"set model.kwargs.num_classes = {count}"
        )
    it, has, its = origin.word("it"), origin.word("has"), origin.word("its")
    if not {"embed_dim", "depth"} & unequal.keys() and (why := _made_smaller(state, wanted)):
        raise origin.misfit(
            f"{it} {has} {why}, as a model that was made smaller",
            "use its dense weights (toolchain.load_model opens the folder of one that slimvit made)",
        )
    if unequal:
        texts = list(unequal.values())
        do = remedy(result.anatomy, result.model, ignored, keywords(module))
        if "classes" in unequal and not count:
            do += " for its features, or use weights that have a classifier"
        raise origin.misfit(f"{it} {has} {', '.join(texts[:4])}" + (", …" if len(texts) > 4 else ""), do)
    shared = len(wanted) - len(missing)
    if shared == 0 or result.anatomy == Anatomy():
        whose = others(list(state))
        names = f"{its} names are those of {whose}" if whose else f"{its} names are not timm's: {some(state)}"
        do = "set model.checkpoint to its folder, which holds config.json" if whose == TRANSFORMERS else ""
        raise origin.misfit(names, do or "save the state_dict of a timm model")
    parts = [
        *([f"{it} {origin.word('lacks')} {some(missing)}"] if missing else []),
        *([f"{it} also {has} {some(unknown)}"] if unknown else []),
        *([f"{other[0]} is {by(state[other[0]].shape)}, the model's {by(wanted[other[0]].shape)}"] if other else []),
    ]
    if (table := f"{EMBEDS}pos_embed") in other:
        do = f"set model.kwargs.pos_embed_grid_size = {list(state[table].shape[1:3])}"
    elif remade := [name for name in unknown if REMADE.search(name)]:
        do = f"{remade[0]} is a part of a weight: join them (torch.nn.utils: prune.remove, parametrize.remove_parametrizations), and save again"
    else:
        do = "set model.kwargs as it was trained with"
        do += ", or use a file with all of the model's weights" if missing else ""
        do += ", or take out of the file what the trained model does not compute with" if unknown else ""
    raise origin.misfit(", and ".join(parts), do)


def _made_smaller(state: Mapping[str, Tensor], wanted: Collection[str]) -> str:
    """What shows that blocks lost neurons, heads or rank: a linear that is two, or is not as wide as in other blocks; "" if nothing does."""
    shapes = dict[str, tuple[int, ...]]()
    for name, tensor in state.items():
        whole = name.replace(".down.", ".")
        if name.endswith(".down.weight") and whole in wanted and whole not in state:
            return f"{name} instead of {whole}"
        if found := BLOCK.search(name):
            usual = shapes.setdefault(name.replace(found[0], ".", 1), tuple(tensor.shape))
            if usual != tensor.shape:
                return f"blocks of different widths ({name} is {by(tensor.shape)}, and another {by(usual)})"
    return ""


def keywords(module: nn.Module) -> set[str]:
    """The keyword arguments of a model's architecture: advice that names another leads into the next refusal."""
    return {name for kind in type(module).__mro__ for name in inspect.signature(kind).parameters}
