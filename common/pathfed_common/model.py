"""What a plan trains: the model, its first weights, and the encoder that comes out of it.

A *base state* is all that a round starts from, float32: tensors named ``encoder.<timm name>`` and ``head.<name>``, and where the objective
has a teacher its tensors, ``teacher.<name of the tensor that it follows>``. An *update* holds the trained tensors alone (`trained`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from pathfed_common.encoder.spec import PIXEL_MEAN, PIXEL_STD, EncoderSpec, Shape, preset
from pathfed_common.objectives import dino, mae
from pathfed_common.objectives.objective import ObjectiveModule
from pathfed_common.plan import Plan

#: What an encoder tensor's name in a base state starts with.
ENCODER_PREFIX = "encoder."
#: What a teacher's tensor's name starts with; it is never trained, but follows the trained tensor that the rest of the name names.
TEACHER_PREFIX = "teacher."


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
    """The plan's model with its first weights, on the CPU. Never touches torch's global generator."""
    objective = plan.objective
    return _OBJECTIVES[objective.name].build(encoder_spec(plan), objective.settings(), plan.encoder.init_seed)


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
        for prefix in {ENCODER_PREFIX, released_prefix(plan)}:  # a teacher begins as a copy
            state[prefix + name].copy_(tensor)
    return state


def state_shapes(plan: Plan) -> dict[str, Shape]:
    """Shape of every tensor of the plan's base states, by name."""
    return _OBJECTIVES[plan.objective.name].shapes(encoder_spec(plan), plan.objective.settings())


def trained(plan: Plan) -> Callable[[str], bool]:
    """Whether the plan trains a base state's tensor of that name, so that it is in every update; else it is a teacher's."""
    return lambda name: not name.startswith(TEACHER_PREFIX)


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
