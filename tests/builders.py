"""Small models and plans that many tests share."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

from toolchain.artifacts.onnx_file import PREPROCESS
from toolchain.compress.choices import Choices, Costs
from toolchain.compress.method import Method
from toolchain.compress.problem import Problem, choices_for
from toolchain.compress.solver import Candidate
from toolchain.cost import RANK, LatencyTable, SavedLatency, Widths, trace
from toolchain.data import open_source
from toolchain.data.transforms import Preprocessing, Wanted
from toolchain.errors import TargetUnavailable
from toolchain.export.calls import stack_images
from toolchain.families import family_of
from toolchain.measure import samples as bench_samples
from toolchain.measure.comparison import Comparison
from toolchain.model import MaskedModel, Preprocess, TimmModel
from toolchain.on_device.runner import SESSION_SCHEMA, block_orders
from toolchain.plan import CompressionPlan, Keep, LowRank, ModelRef
from toolchain.recipe import BudgetSection, CompressSection
from toolchain.surgery.mask import mask_model
from toolchain.surgery.replay import create_dense, factorise_structure
from toolchain.targets import EngineBuild, Profiled, Refittable, TargetInfo

TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}

VIT: dict[str, dict[str, object]] = {
    "classic": {},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "layer scale": {"name": "deit3_small_patch16_224"},
    "registers": {"name": "vit_small_patch14_reg4_dinov2", "img_size": 28, "patch_size": 14},
    "average pooling": {"name": "vit_medium_patch16_gap_256"},
    "packed SwiGLU": {"name": "vit_giant_patch14_dinov2", "img_size": 28, "patch_size": 14},
    "q/k norm": {"qk_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "no proj bias": {"proj_bias": False},
}
"""Every form of timm's VisionTransformer, as changes of `TINY`."""

EVA: dict[str, dict[str, object]] = {
    "EVA": {"name": "eva_giant_patch14_224", "img_size": 28, "patch_size": 14},
    "EVA-02 small": {"name": "eva02_small_patch14_224", "img_size": 28, "patch_size": 14},
    "EVA-02 base": {"name": "eva02_base_patch14_224", "img_size": 28, "patch_size": 14},
    "DINOv3": {"name": "vit_small_patch16_dinov3"},
    "DINOv3 with biases": {"name": "vit_small_plus_patch16_dinov3_qkvb"},
    "RoPE-ViT": {"name": "vit_small_patch16_rope_224"},
    "RoPE-ViT mixed": {"name": "vit_small_patch16_rope_mixed_224"},
    "RoPE and registers": {"name": "vit_medium_patch16_rope_reg1_gap_256"},
    "dynamic size": {"name": "vit_small_patch16_rope_224", "dynamic_img_size": True},
    "grouped queries": {"name": "vit_base_patch16_sapiens2", "num_kv_heads": 1},
}
"""Every form of timm's Eva, as changes of `TINY`."""

TINY_SWIN = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": (2, 1),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": 7,
}

V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
SWIN: dict[str, dict[str, object]] = {
    "Swin": {"name": V1},
    "Swin, padded windows": {"name": V1, "img_size": 40},
    "Swin, windows as large as the grid": {"name": V1, "always_partition": True},
    "Swin, dynamic size": {"name": V1, "strict_img_size": False},
    "Swin, no qkv bias": {"name": V1, "qkv_bias": False},
    "Swin, narrow heads": {"name": V1, "head_dim": 8},
    "Swin, other windows in each stage": {"name": V1, "window_size": (4, 2)},
    "Swin V2": {"name": V2},
    "Swin V2, padded windows": {"name": V2, "img_size": 40},
    "Swin V2, dynamic size": {"name": V2, "strict_img_size": False},
    "Swin V2, no qkv bias": {"name": V2, "qkv_bias": False},
    "Swin V2, of smaller windows": {"name": V2, "pretrained_window_sizes": (2, 2)},
}
"""Every form of timm's Swin Transformer, as changes of `TINY_SWIN`."""

if not hasattr(timm.models.swin_transformer, "calc_stage_window_sizes"):
    del SWIN["Swin V2, padded windows"]  # timm before 1.0.31 cannot build it

VARIANTS = {
    **VIT,
    **SWIN,
    # Without the scale, a fresh head of this class hardly looks at what it is given.
    **{case: {**form, "head_init_scale": 7.0} for case, form in EVA.items() if timm.is_model(str(form["name"]))},
}
"""Every form of the plain blocks; some are younger than the oldest timm that is supported."""

FLEXIBLE = {"img_size": None, "pos_embed_grid_size": [2, 2]}
"""NaFlexVit's size is that of its grid of positions."""

BLOCKS: dict[str, dict[str, object]] = {
    "post-norm": {"name": "vit_base_patch16_rpn_224"},
    "parallel": {"name": "vit_small_patch16_18x2_224", "init_values": 0.1},
    "parallel scaling": {"name": "vit_pwee_patch16_reg1_gap_256", "qkv_bias": False},
    "parallel scaling, normed": {"name": "vit_base_patch16_xp_224"},
    "differential": {"name": "vit_dlittle_patch16_reg1_gap_256"},
    "differential, parallel": {"name": "vit_dpwee_patch16_reg1_gap_256"},
    "attention pool": {"name": "vit_base_patch16_siglip_224"},
    "attention pool over registers": {"name": "vit_so150m_patch16_reg4_map_256"},
    "refining pool": {"global_pool": "prr"},
    "EVA post-norm": {
        "name": "eva02_enormous_patch14_clip_224",
        "head_init_scale": 7.0,
        "img_size": 28,
        "patch_size": 14,
    },
    "PE": {"name": "vit_pe_core_base_patch16_224", "head_init_scale": 7.0},
    "EVA-02 CLIP": {"name": "eva02_base_patch16_clip_224", "head_init_scale": 7.0},
    "relative position MLP": {"name": "vit_relpos_base_patch16_224"},
    "relative position table, class token": {"name": "vit_relpos_base_patch16_cls_224", "rel_pos_type": "bias"},
    "shared relative positions": {"name": "vit_srelpos_medium_patch16_224"},
    "relative positions, post-norm": {"name": "vit_relpos_base_patch16_rpn_224"},
    "BEiT": {"name": "beit_base_patch16_224", "head_init_scale": 7.0},
    "BEiT shared": {
        "name": "beit_base_patch16_224",
        "head_init_scale": 7.0,
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
    },
    "NaFlex": {"name": "naflexvit_base_patch16_gap", **FLEXIBLE},
    "NaFlex pool": {"name": "naflexvit_base_patch16_siglip", **FLEXIBLE},
    "NaFlex rotary": {"name": "naflexvit_base_patch16_gap", "rope_type": "axial", **FLEXIBLE},
    "NaFlex gated": {"name": "naflexvit_base_patch16_gap", "attn_gated": True, **FLEXIBLE},
    "hybrid": {"name": "vit_tiny_r_s16_p8_224", "patch_size": 4},
    "BEiT-3": {"name": "beit3_base_patch16_224"},
    "AIMv2": {"name": "aimv2_large_patch14_224", "img_size": 28, "patch_size": 14},
}
"""Every other block and way out, as changes of `TINY`."""

NEWER = {
    "refining pool": hasattr(timm.layers, "AttentionPoolPrr"),
    "NaFlex gated": hasattr(timm.models.naflexvit.NaFlexVitCfg, "attn_gated"),
}
STRUCTURES = {
    **VARIANTS,
    **{
        case: form
        for case, form in BLOCKS.items()
        if timm.is_model(str(form.get("name", "vit_tiny_patch16_224"))) and NEWER.get(case, True)
    },
}
"""Every structure of every family."""

TWINS = [case for case in ("parallel scaling", "attention pool", "relative position MLP", "BEiT") if case in STRUCTURES]
"""One for each module of timm's that another takes the place of."""


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every bias, norm, LayerScale and table values that matter, so that no comparison is vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("gamma", "gamma_1", "gamma_2")):
                parameter.copy_(0.5 + 0.1 * noise)
            elif name.endswith(("norm1.weight", "norm2.weight")):
                parameter.copy_(1 + 0.1 * noise)  # zero in a fresh model with norms behind its branches
            elif parameter.ndim < 2 or name.endswith(("bias_table", "logit_scale", "fc1_g.weight")):
                parameter.add_(0.1 * noise)
    return module


def input_of(preprocessing: Preprocessing, picture: Image.Image) -> Tensor:
    """Model input float32 [C, H, W] of one picture."""
    return preprocessing.of_pixels(preprocessing.pixels_of(picture)[None])[0]


def dense_model(name: str = "vit_tiny_patch16_224", seed: int = 0, **kwargs: object) -> TimmModel:
    """A randomised dense model; without kwargs, two blocks of width 48."""
    ref = ModelRef(name=name, kwargs=dict(kwargs or TINY))
    torch.manual_seed(seed)
    module = randomise(create_dense(ref), seed)
    family = family_of(module, name)
    shape = family.input_size(module)
    preprocess = Preprocess(shape, (0.5,) * shape[0], (0.5,) * shape[0])
    return TimmModel(ref, module, family, tuple(family.unit_groups(module)), preprocess, {"weights": "random"})


def named(case: str) -> tuple[str, dict[str, object]]:
    """(timm's name, keyword arguments) of one of `STRUCTURES`, tiny."""
    kwargs = {**(TINY_SWIN if case in SWIN else TINY), **STRUCTURES[case]}
    return str(kwargs.pop("name", "vit_tiny_patch16_224")), kwargs


def variant(case: str, seed: int = 0) -> TimmModel:
    """One of `STRUCTURES`, tiny."""
    name, kwargs = named(case)
    return dense_model(name, seed, **kwargs)


def shallow(case: str, seed: int = 0) -> TimmModel:
    """One of `STRUCTURES` of a single block, which has the operators of all; of Swin all that it takes to shift windows."""
    name, kwargs = named(case)
    if "depth" in kwargs and case != "RoPE-ViT mixed":  # there, each block has rotations of its own
        kwargs["depth"] = 1
    return dense_model(name, seed, **kwargs)


def random_plan(model: TimmModel, seed: int = 0, *, low_rank: bool = True, share: float = 0.5) -> CompressionPlan:
    """A plan that removes about 1 − share of every unit and factorises every attention linear."""
    generator = torch.Generator().manual_seed(seed)
    keeps = []
    for group in model.groups:
        count = max(1, round(group.total * (share if group.sliceable else 0.9)))
        parts = tuple(
            tuple(sorted(torch.randperm(group.total, generator=generator)[:count].tolist()))
            for _ in range(group.partitions)
        )
        keeps.append(Keep(module=group.module, unit=group.unit, total=group.total, indices=parts))
    lows = []
    if low_rank:
        for item in model.family.factorizable(model.module):
            if item.kind == "attention":
                out, into = model.module.get_submodule(item.linear).weight.shape
                lows.append(
                    LowRank(module=item.linear, shape=(out, into), rank=max(1, int(share * out * into / (out + into))))
                )
    return CompressionPlan(model=model.ref, keeps=tuple(keeps), low_ranks=tuple(lows), provenance={"seed": seed})


def images(model: TimmModel, count: int = 3) -> Tensor:
    """Noise as a model takes it."""
    return torch.randn(count, *model.preprocess.input_size, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two outputs are as near as rounding leaves them."""
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(a.abs().max()))


def with_random_factors(model: TimmModel, plan: CompressionPlan) -> MaskedModel:
    """The masked model of a plan, whose pairs hold values that matter."""
    module = copy.deepcopy(model.module)
    factorise_structure(module, plan)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for low in plan.low_ranks:
            for parameter in module.get_submodule(low.module).parameters():
                parameter.normal_(0, 0.1, generator=generator)
    return mask_model(model, module, plan)


def in_two_processes(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What `torchrun --nproc_per_node 2 ARGUMENTS` ended with; on the CPU each has one thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launcher, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240
    )


def costs_of(model: TimmModel, tables: tuple[LatencyTable, ...] = ()) -> Costs:
    """What widths cost on a model."""
    return Costs(trace(model.module, model.family, model.preprocess.input_size), model.groups, tables)


def choices_of(
    model: TimmModel, section: CompressSection | None = None, multiples: dict[str, int] | None = None
) -> Choices:
    """What a section, the default one if it is absent, reduces on a model."""
    return choices_for(model, Method.of(section or CompressSection()), multiples or {})


def problem_of(
    model: TimmModel,
    section: CompressSection | None = None,
    budget: BudgetSection | None = None,
    multiples: dict[str, int] | None = None,
    tables: tuple[LatencyTable, ...] = (),
) -> Problem:
    """A model to be compressed, by the default method unless a section says otherwise."""
    problem = Problem.of(model, section or CompressSection(), budget or BudgetSection(), multiples or {})
    return problem.timed(tables)


def table_of(choices: Choices, seed: int = 0, target: str = "ort-cpu") -> LatencyTable:
    """Made-up latency, 4 ms dense. Four fifths of the time falls away at the narrowest: other shares than params or MACs, so that it binds elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    wholes = choices.chosen(Widths())
    weights = torch.rand(len(wholes), generator=generator)
    curves = []
    for (key, full), weight in zip(wholes.items(), (0.8 * weights / weights.sum()).tolist(), strict=True):
        whole = full
        if key[1] == RANK:
            out, into = choices.linears[key[0]]
            whole = -(-out * into // (out + into))
        curves.append(SavedLatency(members=(key,), points=((1, weight), (whole // 2, weight * 0.4), (whole, 0.0))))
    return LatencyTable(target=target, batch=1, threads=1, dense_ms=4.0, saved=tuple(curves))


def candidates_of(choices: Choices, seed: int = 0, shares: tuple[float, ...] = (0.25, 0.5, 0.75)) -> list[Candidate]:
    """Random damages that rise as a unit narrows."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for group in choices.groups:
        widths = sorted({choices.kept(group, share * group.total) for share in shares} - {group.total})
        drops = torch.rand(len(widths), generator=generator).sort(descending=True).values.tolist()
        found += [Candidate((group.module, group.unit), w, d) for w, d in zip(widths, drops, strict=True)]
        found.append(Candidate((group.module, group.unit), group.total, 0.0))
    for name, shape in choices.linears.items():
        ranks = sorted({choices.ranks(share)[name] for share in shares})
        drops = torch.rand(len(ranks), generator=generator).sort(descending=True).values.tolist()
        found += [Candidate((name, RANK), r, d) for r, d in zip(ranks, drops, strict=True)]
        found.append(Candidate((name, RANK), min(shape), 0.0))
    return found


def shapes_of(name: str) -> TimmModel:
    """A timm model on the meta device: shapes without weights."""
    ref = ModelRef(name=name)
    with torch.device("meta"):
        module = create_dense(ref)
    family = family_of(module, name)
    preprocess = Preprocess(family.input_size(module), (0.5,) * 3, (0.5,) * 3)
    return TimmModel(ref, module, family, tuple(family.unit_groups(module)), preprocess, {})


def write_stack(
    path: Path, *, width: int = 96, layers: int = 4, batch: int | str = "batch", scale: float = 1.0
) -> Path:
    """An ONNX file of `layers` square matmuls: its time grows with their number and nothing else."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((width, width)).astype(np.float32) * scale / width**0.5 for _ in range(layers)]
    names = ["image", *(f"hidden{i}" for i in range(layers - 1)), "logits"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [names[i], f"weight{i}"], [names[i + 1]]) for i in range(layers)],
        "stack",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, width])],
        [numpy_helper.from_array(weight, f"weight{i}") for i, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


DIGIT = Preprocess((1, 8, 8), (0.0,), (1.0,))


@cache
def _digit_templates() -> np.ndarray:
    """[64, 10]: the mean training image of each digit, centred; a linear classifier that is right eight times in ten."""
    source = open_source("digits", Wanted(DIGIT.input_size, {}, mean=DIGIT.mean, std=DIGIT.std, calibration_images=8))
    train = source.split("train")
    images = stack_images([train[index][0] for index in range(len(train))]).reshape(len(train), 64)
    means = np.stack([images[train.labels.numpy() == digit].mean(axis=0) for digit in range(10)], axis=1)
    return (means - means.mean(axis=1, keepdims=True)).astype(np.float32)


def write_classifier(
    path: Path, *, swap: int = 0, padding: int = 0, noise: float = 0.0, external: bool = False
) -> Path:
    """A digits classifier as slimvit exports one: image [batch, 1, 8, 8] → logits [batch, 10].

    Args:
        path: the file.
        swap: how many classes trade places, which costs their accuracy.
        padding: float32 numbers that are stored and not used.
        noise: of the weights; other logits, about the same accuracy.
        external: weights in a second file.
    """
    weight = _digit_templates() + noise * np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32)
    if swap:
        weight[:, :swap] = np.roll(weight[:, :swap], 1, axis=1)
    bias = -0.5 * (weight**2).sum(axis=0)
    tensors = {"head.weight": weight, "head.bias": bias, "shape": np.array([-1, 64])}
    if padding:
        tensors["blocks.9.extra.weight"] = np.ones(padding, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["image", "shape"], ["flat"]),
            helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["logits"]),
        ],
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(value.astype(value.dtype), name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.add(key=PREPROCESS, value=json.dumps(DIGIT.to_dict()))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=32)
    return path


NCNN = """7767517
5 5
Input in0 0 1 image 0=4 1=4 2=3
LayerNorm norm 1 1 image 1 0=4 1=1.000000e-6 2=1
Flatten flat 1 1 1 2
InnerProduct head 1 1 2 logits 0=5 1=1 2=240
Softmax soft 1 1 logits probabilities 0=0 1=1
"""
NCNN_TAGS = {"fp32": (0, 4), "fp16": (0x01306B47, 2), "int8": (0x000D4B38, 1)}
"""Precision → what stands before weights in a .bin, and the bytes of one."""


def write_ncnn(path: Path, precision: str = "fp32", text: str = NCNN, cut: int = 0) -> Path:
    """A .param and its .bin as ncnn has them: a norm of 4, and a linear of 48 × 5 whose weights are in `precision`.

    Args:
        path: the .param.
        precision: one of `NCNN_TAGS`.
        text: of the .param.
        cut: how many bytes the .bin lacks.
    """
    tag, width = NCNN_TAGS[precision]
    numbers = [np.ones(8, np.float32).tobytes(), struct.pack("<I", tag), bytes(240 * width)]
    content = b"".join([*numbers, np.ones(5, np.float32).tobytes()])
    path.write_text(text)
    path.with_suffix(".bin").write_bytes(content[: len(content) - cut])
    return path


class Refusing(Profiled, Refittable):
    """A target that is not there and says so in its probe alone; `reached` names what was done nevertheless.

    Args:
        name: of the target.
        runs: what the probe says of running; "" if the probe itself refuses.
    """

    measures, builds = True, ("FLOAT",)

    def __init__(self, name: str, runs: str = "") -> None:
        self.name, self._runs, self.reached = name, runs, []

    def probe(self) -> TargetInfo:
        if not self._runs:
            raise TargetUnavailable(self.name, "it is not there")
        return TargetInfo(self.name, "x", "1", "none", {"run": self._runs})

    def _build(self, onnx, *_):
        self.reached.append("build")
        return EngineBuild(onnx, {})

    def _open(self, *_):
        self.reached.append("open")

    def _refit(self, *_):
        self.reached.append("refit")

    def _node_times(self, *_):
        self.reached.append("node_times")


def few_sessions(**changes: object) -> bench_samples.Design:
    """Three sessions of 20 blocks: the fewest that say something, where Student's t is widest."""
    return bench_samples.Design.model_validate({"sessions": 3, "blocks": 20, "warmup_s": 1.0, "looks": 1, **changes})


def write_samples(
    *,
    b: float = 0.0,
    control: float = 0.0,
    noise: float = 0.002,
    session_shift: float = 0.0,
    design: bench_samples.Design | None = None,
    looks: int = 1,
    seed: int = 1,
    threads: int = 1,
    affinity: tuple[int, ...] = (0,),
) -> Comparison:
    """A comparison of `looks` looks whose true ln(B/A) is `b`, plus `session_shift` times the session's number."""
    design = design or few_sessions()
    rng = np.random.default_rng(seed)
    machine = {"cpu": "test", "threads": threads, "affinity": list(affinity), "runtimes": {"onnxruntime": "1"}}
    fingerprint = {"machine": machine, "state": {}}
    facts = {"outputs": [[1, 8]], "warmup_calls": 10, "warmup_seconds": 1.0, "call_ns": 1e6}
    sessions = []
    for session in range(design.sessions * looks):
        truth = {"A": 0.0, "B": b + session * session_shift, "A'": control}
        blocks = [
            {
                "order": order,
                "samples_ns": {
                    name: [round(1e7 * np.exp(truth[name] + noise * rng.standard_normal())) for _ in range(4)]
                    for name in order
                },
            }
            for order in block_orders(bench_samples.VARIANTS, design.blocks_of(session), design.seed, session)
        ]
        sessions.append(
            {
                "schema": SESSION_SCHEMA,
                "session": session,
                "fingerprint": {"before": fingerprint, "after": fingerprint},
                "variants": {name: {**facts, "calls_per_slot": 5, "discarded": 1} for name in bench_samples.VARIANTS},
                "blocks": blocks,
            }
        )
    raw = {
        "scenario": bench_samples.Scenario(target="ort-cpu", threads=threads, batch=1, inputs=()).model_dump(
            mode="json"
        ),
        "design": design.model_dump(mode="json"),
        "parity": "pass",
        "artifacts": {name: {"name": f"{name}.onnx", "size_bytes": 1, "sha256": name.lower()} for name in "AB"},
        "sessions": sessions,
    }
    return Comparison.model_validate_json(json.dumps(raw))
