"""What a plan trains: shapes, first weights, export."""

import json
from math import prod

import pytest
import torch

from pathfed_common import digest, model
from pathfed_common.encoder import weights
from pathfed_common.encoder.vit import VisionTransformer
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.plan import EncoderPlan, Plan, PrivacyPlan, RoundsPlan


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
