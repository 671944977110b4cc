"""What a plan trains: shapes, first weights, export."""

import json
from math import prod

import pytest
import torch
from record_fixtures import Held

from pathfed_common import digest, model
from pathfed_common.encoder import weights
from pathfed_common.encoder.vit import VisionTransformer
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.plan import AdaptersPlan, EncoderPlan, Plan, PrivacyPlan, RoundsPlan
from pathfed_common.released_encoder import ReleasedEncoder


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.set_num_threads(1)
    base = Plan(
        name="tiny",
        encoder=EncoderPlan(init_seed=11),
        privacy=PrivacyPlan(expected_patients=4, noise_multiplier=1.0, clip_norm=1.0, epsilon_limit=8.0),
        rounds=RoundsPlan(count=2),
    )
    return base.model_copy(update={"cohort": base.cohort.model_copy(update={"tile_px": 64})})


def test_initial_state_has_the_plans_shapes_and_is_float32(plan: Plan) -> None:
    state = model.initial_state(plan)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == model.state_shapes(plan)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_initial_state_depends_on_the_plans_seed_alone(plan: Plan) -> None:
    first = weights.dump(model.initial_state(plan), {})
    torch.rand(3)  # another state of torch's own generator must not matter
    before = torch.get_rng_state()
    assert weights.dump(model.initial_state(plan), {}) == first
    assert torch.equal(torch.get_rng_state(), before)
    other = plan.model_copy(update={"encoder": EncoderPlan(init_seed=12)})
    assert digest.of_bytes(weights.dump(model.initial_state(other), {})) != digest.of_bytes(first)


def test_state_loads_strictly_into_the_plans_model_and_its_encoder_into_a_bare_one(plan: Plan) -> None:
    state = weights.load(weights.dump(model.initial_state(plan), {}))
    model.build_model(plan).load_state_dict(state, strict=True)
    encoder = VisionTransformer(model.encoder_spec(plan))
    part = {name.removeprefix(model.ENCODER_PREFIX): tensor for name, tensor in state.items() if name.startswith(model.ENCODER_PREFIX)}
    encoder.load_state_dict(part, strict=True)
    assert encoder.spec.img_size == 64


def test_weights_to_start_from_are_taken_where_the_plan_names_some_and_nowhere_else(plan: Plan) -> None:
    named = plan.model_copy(update={"encoder": EncoderPlan(init_seed=11, init_from="sha256:" + "0" * 64)})
    given = dict(VisionTransformer(model.encoder_spec(plan), generator=torch.Generator().manual_seed(99)).state_dict())
    state, random = model.initial_state(named, given), model.initial_state(plan)
    assert list(state) == list(random)
    for name, tensor in state.items():
        assert torch.equal(tensor, given.get(name.removeprefix(model.ENCODER_PREFIX), random[name]))
    with pytest.raises(ValueError, match="weights were not given"):
        model.initial_state(named)
    with pytest.raises(ValueError, match="weights were given"):
        model.initial_state(plan, given)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_weights_that_are_not_the_plans_encoders_are_refused(plan: Plan, change: str) -> None:
    named = plan.model_copy(update={"encoder": EncoderPlan(init_from="sha256:" + "0" * 64)})
    given = dict(VisionTransformer(model.encoder_spec(plan)).state_dict())
    if change == "missing":
        del given["norm.bias"]
    else:
        other = {"extra": torch.zeros(1), "shape": torch.zeros(3), "dtype": torch.zeros(192, dtype=torch.float64)}
        given["head.bias" if change == "extra" else "norm.bias"] = other[change]
    with pytest.raises(ValueError, match=r"head\.bias|norm\.bias"):
        model.initial_state(named, given)


def test_objectives_settings_reach_the_model(plan: Plan) -> None:
    objective = plan.objective.model_copy(update={"mask_ratio": 0.5, "decoder_dim": 64, "decoder_depth": 3, "normalise_target": False})
    changed = plan.model_copy(update={"objective": objective})
    built = model.build_model(changed)
    assert isinstance(built, MaskedAutoencoder)
    assert (built.visible, built.normalise_target, len(built.head.blocks)) == (8, False, 3)
    assert {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == model.state_shapes(changed)


def test_timm_config_is_json_with_the_public_constants(plan: Plan) -> None:
    config = json.loads(json.dumps(model.timm_config(plan)))
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"] == {"img_size": 64, "num_classes": 0}
    assert config["mean"] == [0.485, 0.456, 0.406]
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]


def test_size_of_the_smallest_presets_base_state_is_known(plan: Plan) -> None:
    whole = plan.model_copy(update={"cohort": plan.cohort.model_copy(update={"tile_px": 224})})
    sizes = {name: prod(shape) for name, shape in model.state_shapes(whole).items()}
    # timm's vit_tiny_patch16_224 without its classifier has 5,524,416 parameters.
    assert sum(size for name, size in sizes.items() if name.startswith("encoder.")) == 5_524_416
    block = 12 * 128**2 + 13 * 128
    assert sum(size for name, size in sizes.items() if name.startswith("head.")) == 2 * block + 128 + 193 * 128 + 2 * 128 + 129 * 768


PARTS = {
    "freeze": EncoderPlan(init_seed=11, freeze_blocks=3),
    "adapters": EncoderPlan(init_seed=11, adapters=AdaptersPlan(rank=2)),
    "last adapters": EncoderPlan(init_seed=11, freeze_blocks=10, adapters=AdaptersPlan(rank=2, scale=0.5)),
}


@pytest.fixture(params=[(part, objective) for part in PARTS for objective in ("mae", "dino")], ids="-".join)
def partly(request: pytest.FixtureRequest, plan: Plan) -> Plan:
    """A plan that trains a part of the encoder."""
    part, objective = request.param
    small = {"name": "dino", "local_crop_px": 32, "head_dim": 16, "bottleneck_dim": 8, "prototypes": 16}
    raw = plan.model_dump(mode="json") | ({"objective": small} if objective == "dino" else {})
    return Plan.model_validate(raw).model_copy(update={"encoder": PARTS[part]})


def test_a_partly_trained_model_asks_for_gradients_of_exactly_what_updates_hold(partly: Plan) -> None:
    built = model.build_model(partly)
    shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    assert shapes == model.state_shapes(partly)
    asked = {name: tuple(parameter.shape) for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert asked == model.update_shapes(partly)
    encoder = {name.removeprefix("encoder.") for name in asked if name.startswith("encoder.")}
    if partly.encoder.adapters.rank:
        assert len(encoder) == 8 * (12 - partly.encoder.freeze_blocks)
        assert all(".lora_" in name for name in encoder)
    else:
        assert encoder == {name for name in model.encoder_spec(partly).shapes() if name.startswith(("blocks.", "norm."))} - {
            f"blocks.{index}.{name}" for index in range(3) for name in model.encoder_spec(partly).block_shapes()
        }
    assert {name for name in asked if name.startswith("head.")} == {name for name in shapes if name.startswith("head.")}


def test_a_partly_trained_start_is_that_of_the_whole_and_releases_the_same_encoder(partly: Plan) -> None:
    whole = partly.model_copy(update={"encoder": EncoderPlan(init_seed=11)})
    start, plain = model.initial_state(partly), model.initial_state(whole)
    assert all(torch.equal(start[name], tensor) for name, tensor in plain.items())
    prefix = model.released_prefix(partly)
    released = ReleasedEncoder(partly, Held(start))
    for name, shape in released.shapes.items():
        assert torch.equal(released.read(name, 0, prod(shape)).view(shape), plain[prefix + name])
    for name in start.keys() - plain.keys():
        assert start[name].any() == ("lora_a" in name)
        if name.startswith("teacher."):
            assert torch.equal(start[name], start[name.removeprefix("teacher.")])


def test_weights_to_start_from_stand_under_adapters(partly: Plan) -> None:
    named = partly.model_copy(update={"encoder": partly.encoder.model_copy(update={"init_from": "sha256:" + "0" * 64})})
    given = dict(VisionTransformer(model.encoder_spec(plan=partly), generator=torch.Generator().manual_seed(99)).state_dict())
    state, drawn = model.initial_state(named, given), model.initial_state(partly)
    for prefix in model.encoder_prefixes(partly):
        assert all(torch.equal(state[prefix + name], tensor) for name, tensor in given.items())
    assert all(torch.equal(state[name], drawn[name]) for name in state if ".lora_" in name or name.startswith("head."))


def test_an_adapter_moves_the_weight_beside_it_in_the_release_and_no_other(partly: Plan) -> None:
    state = model.initial_state(partly)
    prefix = model.released_prefix(partly)
    b = f"{prefix}blocks.11.mlp.fc1.lora_b.weight"
    if not partly.encoder.adapters.rank:
        assert b not in state
        return
    state[b] += 0.5
    released = ReleasedEncoder(partly, Held(state))
    moved = [
        name
        for name, shape in released.shapes.items()
        if not torch.equal(released.read(name, 0, prod(shape)), state[prefix + name].flatten())
    ]
    assert moved == ["blocks.11.mlp.fc1.weight"]
    whole = released.read(moved[0], 0, 768 * 192)
    assert torch.equal(released.read(moved[0], 5, 1000), whole[5:1000])


def test_updates_of_adapters_are_small() -> None:
    raw = {
        "name": "x",
        "privacy": {"expected_patients": 4.0, "noise_multiplier": 1.0, "clip_norm": 1.0, "epsilon_limit": 8.0},
        "rounds": {"count": 2},
        "encoder": {"preset": "vit_large_patch16_224", "adapters": {"rank": 8}},
    }
    shapes = model.update_shapes(Plan.model_validate(raw))
    encoder = sum(prod(shape) for name, shape in shapes.items() if name.startswith("encoder."))
    assert encoder == 24 * 8 * ((1024 + 3072) + (1024 + 1024) + (1024 + 4096) + (4096 + 1024))
    assert Plan.model_validate(raw).encoder.part.startswith("adapters of rank 8 alone;")
    assert encoder < 0.011 * model.encoder_spec(Plan.model_validate(raw)).parameters


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ({"freeze_blocks": 12}, "must leave one of the encoder's 12 blocks"),
        ({"adapters": {"rank": 192}}, "must be below the encoder's width 192"),
    ],
)
def test_an_encoder_with_nothing_to_train_and_adapters_as_wide_as_it_are_refused(plan: Plan, encoder: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan.model_validate(plan.model_dump(mode="json") | {"encoder": encoder})
