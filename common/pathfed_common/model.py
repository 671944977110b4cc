"""What a plan trains: the model, its first weights, and the encoder that comes out of it.

A *base state* is all that a round starts from, float32: tensors named ``encoder.<timm name>`` and ``head.<name>``, and where the objective
has a teacher its tensors, ``teacher.<name of the tensor that it follows>``. An encoder's adapters are beside the layers that they belong
to, ``encoder.<layer>.lora_a.weight`` and ``lora_b``. An *update* holds the trained tensors alone (`trained`); the *released encoder* is
the encoder, or the teacher's, with its adapters merged into the weights (`released_encoder`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, cast

import torch
from torch import Tensor

from pathfed_common import digest
from pathfed_common.encoder import adapters as lora
from pathfed_common.encoder.adapters import Adapters
from pathfed_common.encoder.spec import PIXEL_MEAN, PIXEL_STD, EncoderSpec, Shape, preset
from pathfed_common.encoder.vit import VisionTransformer
from pathfed_common.objectives import dino, mae
from pathfed_common.objectives.objective import ObjectiveModule
from pathfed_common.plan import Plan

#: What an encoder tensor's name in a base state starts with.
ENCODER_PREFIX = "encoder."
#: What a teacher's tensor's name starts with; it is never trained, but follows the trained tensor that the rest of the name names.
TEACHER_PREFIX = "teacher."
#: What an encoder has before its first block, as its names begin.
_BEFORE_BLOCKS = ("cls_token", "reg_token", "pos_embed", "patch_embed.")


def encoder_spec(plan: Plan) -> EncoderSpec:
    """The plan's encoder, for tiles of the plan's size."""
    return preset(plan.encoder.preset, img_size=plan.cohort.tile_px)


@dataclass(frozen=True)
class _Kind:
    """How an objective is built, from (spec, its plan's settings, seed), and what it holds, from (spec, settings)."""

    build: Callable[[EncoderSpec, dict[str, Any], int], ObjectiveModule]
    shapes: Callable[[EncoderSpec, dict[str, Any]], dict[str, Shape]]


#: Every objective, by the name that plans give it.
_OBJECTIVES = {
    "mae": _Kind(lambda spec, s, seed: mae.MaskedAutoencoder(spec, seed=seed, **s), lambda spec, s: mae.state_shapes(spec, **s)),
    "dino": _Kind(
        lambda spec, s, seed: dino.SelfDistillation(spec, dino.DinoSettings(**s), seed=seed),
        lambda spec, s: dino.state_shapes(spec, dino.DinoSettings(**s)),
    ),
}


def build_model(plan: Plan) -> ObjectiveModule:
    """The plan's model with its first weights, on the CPU; what the plan does not train asks for no gradient.

    Never touches torch's global generator. Adapters are drawn from a generator of their own, so that all else is drawn as without them.
    """
    objective = plan.objective
    built = _OBJECTIVES[objective.name].build(encoder_spec(plan), objective.settings(), plan.encoder.init_seed)
    adapters = adapters_of(plan)
    if adapters is not None:
        for prefix in encoder_prefixes(plan):  # a teacher begins as a copy
            encoder = cast(VisionTransformer, built.get_submodule(prefix.removesuffix(".")))
            lora.attach(encoder, adapters, torch.Generator().manual_seed(_adapter_seed(plan)))
    is_trained = trained(plan)
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(is_trained(name))
    return built


def _adapter_seed(plan: Plan) -> int:
    """Another public seed than the one that all else is drawn from."""
    return int(digest.of_value(["adapters", plan.encoder.init_seed])[-15:], 16)


def adapters_of(plan: Plan) -> Adapters | None:
    """The plan's adapters, or None without."""
    encoder = plan.encoder
    if not encoder.adapters.rank:
        return None
    return Adapters(rank=encoder.adapters.rank, scale=encoder.adapters.scale, first_block=encoder.freeze_blocks)


def initial_state(plan: Plan, encoder: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The first base state: drawn from `encoder.init_seed`, the same each time with the same torch release.

    Args:
        plan: the plan.
        encoder: the weights that the plan's `encoder.init_from` names, by timm's names, float32; given just when the plan names some. They
            stand in the place of the encoder's random ones; everything else is drawn as without them. That they have the plan's digest is
            for the caller to check. Each tensor is asked for once, so that a mapping may read them from a file one by one.

    Raises:
        ValueError: weights for a plan that names none, none for one that does, or other names, shapes or types than the plan's encoder's.
    """
    if (encoder is not None) != bool(plan.encoder.init_from):
        raise ValueError(f"encoder.init_from is {plan.encoder.init_from!r}, and weights were {'not ' if encoder is None else ''}given")
    state = {name: tensor.detach() for name, tensor in build_model(plan).state_dict().items()}
    if encoder is None:
        return state
    shapes = encoder_spec(plan).shapes()
    if set(encoder) != set(shapes):
        raise ValueError(f"weights for the encoder have other names than it: {sorted(set(encoder) ^ set(shapes))[:8]}")
    for name, shape in shapes.items():
        tensor = encoder[name]
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise ValueError(f"weights {name!r} must be float32 {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        for prefix in encoder_prefixes(plan):  # a teacher begins as a copy
            state[prefix + name].copy_(tensor)
    return state


def state_shapes(plan: Plan) -> dict[str, Shape]:
    """Shape of every tensor of the plan's base states, by name."""
    spec, adapters = encoder_spec(plan), adapters_of(plan)
    shapes = _OBJECTIVES[plan.objective.name].shapes(spec, plan.objective.settings())
    beside = {} if adapters is None else lora.adapter_shapes(spec, adapters)
    return shapes | {prefix + name: shape for prefix in encoder_prefixes(plan) for name, shape in beside.items()}


def trained(plan: Plan) -> Callable[[str], bool]:
    """Whether the plan trains a base state's tensor of that name, so that it is in every update. It gives a function of the name.

    | tensor | is trained |
    | --- | --- |
    | of the head | always |
    | of a teacher | never; it follows what is trained, and keeps every bit of what is not |
    | of an adapter | always |
    | of the encoder | not with adapters; else unless `encoder.freeze_blocks` counts it among what keeps its weights |
    """
    encoder = plan.encoder
    first = tuple(f"blocks.{index}." for index in range(encoder.freeze_blocks))
    kept = (*_BEFORE_BLOCKS, *first) if encoder.freeze_blocks else ()

    def is_trained(name: str) -> bool:
        if not name.startswith(ENCODER_PREFIX):
            return not name.startswith(TEACHER_PREFIX)
        if encoder.adapters.rank:
            return lora.is_adapter(name)
        return not name.removeprefix(ENCODER_PREFIX).startswith(kept)

    return is_trained


def update_shapes(plan: Plan) -> dict[str, Shape]:
    """Shape of every tensor of the plan's updates, by name: the trained ones."""
    is_trained = trained(plan)
    return {name: shape for name, shape in state_shapes(plan).items() if is_trained(name)}


def noise_norm(plan: Plan) -> float:
    """Root of the expected squared L2 norm of the noise in one site's update: sigma C / B in each number, over the root of the steps."""
    privacy, count = plan.privacy, sum(prod(shape) for shape in update_shapes(plan).values())
    return privacy.noise_multiplier * privacy.clip_norm / privacy.expected_patients * sqrt(count / plan.rounds.steps)


def released_prefix(plan: Plan) -> str:
    """What the names of the released encoder's tensors start with in a base state: the teacher's where there is one, as DINOv2 does."""
    return TEACHER_PREFIX + ENCODER_PREFIX if plan.objective.teacher else ENCODER_PREFIX


def encoder_prefixes(plan: Plan) -> tuple[str, ...]:
    """What the names of each encoder in a base state start with."""
    return tuple(sorted({ENCODER_PREFIX, released_prefix(plan)}))


def timm_config(plan: Plan) -> dict[str, object]:
    """The exported encoder's config.json, as timm reads it: see `timm_config_of`."""
    return timm_config_of(encoder_spec(plan), mpp=plan.cohort.mpp)


def timm_config_of(spec: EncoderSpec, *, mpp: float) -> dict[str, object]:
    """config.json of an encoder trained at `mpp` um/px.

    With `model.safetensors` beside it in a folder, ``timm.create_model("local-dir:<folder>", pretrained=True)`` gives the encoder; so does
    ``timm.create_model(config["architecture"], **config["model_args"])`` followed by a strict `load_state_dict`.
    """
    return {
        "architecture": spec.architecture,
        "num_classes": 0,
        "num_features": spec.embed_dim,
        "global_pool": "token",
        "model_args": spec.timm_args(),
        "mean": list(PIXEL_MEAN),
        "std": list(PIXEL_STD),
        "mpp": mpp,
        "pretrained_cfg": {
            "input_size": [3, spec.img_size, spec.img_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(PIXEL_MEAN),
            "std": list(PIXEL_STD),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
