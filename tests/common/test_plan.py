import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pathfed_common import digest
from pathfed_common.cohort_rules import ATTRIBUTES
from pathfed_common.encoder.spec import preset, preset_names
from pathfed_common.errors import ErrorCode, PlanError
from pathfed_common.plan import EncoderPlan, MaePlan, Plan, load_plan, plan_from_bytes
from pathfed_local import plans

SHIPPED = sorted(Path(plans.__file__).parent.glob("*.toml"))
LEAST = """
name = "least"
[privacy]
expected_patients = 4
noise_multiplier = 1.0
clip_norm = 1.0
epsilon_limit = 8.0
[rounds]
count = 3
"""


def written(value: Any) -> str:
    """A value, or a table of them, in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {literal(item)}" for key, item in value.items()) + "}"
    return literal(value)


def toml(**changes: Any) -> str:
    """The smallest plan with keys set by their dotted name (`privacy__delta`), as TOML."""
    raw = tomllib.loads(LEAST)
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    lines = [f"{key} = {literal(value)}" for key, value in raw.items() if not isinstance(value, dict)]
    for section, keys in raw.items():
        if isinstance(keys, dict):
            lines += [f"[{section}]", *(f"{key} = {written(value)}" for key, value in keys.items())]
    return "\n".join(lines)


def literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(literal(inner) for inner in value) + "]"
    return json.dumps(value) if isinstance(value, bool | str) else repr(value)


def refusal(text: str) -> PlanError:
    with pytest.raises(PlanError) as caught:
        load_plan(text, where="plan.toml")
    return caught.value


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_shipped_plans_load_and_name_only_keys_that_exist(path):
    plan = load_plan(path.read_text(encoding="utf-8"), where=path)
    assert plan.privacy.unit == "patient"
    assert plan_from_bytes(plan.canonical_bytes(), where="again") == plan


def test_there_are_plans_to_ship():
    assert [path.name for path in SHIPPED] == ["consortium.toml", "demo.toml", "demo_dino.toml", "simulation.toml"]
    assert {plans.demo_plan("mae"), plans.demo_plan("dino")} < set(SHIPPED)


POSITIVE = st.floats(min_value=1e-9, allow_nan=False, allow_infinity=False)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True),
        "encoder__init_seed": st.integers(0, 2**63 - 1),
        "objective__mask_ratio": st.floats(0.25, 0.95),
        "objective__decoder_depth": st.integers(1, 16),
        "objective__normalise_target": st.booleans(),
        "cohort__mpp": st.floats(0.1, 8) | st.integers(1, 8),
        "cohort__mpp_tolerance": st.floats(0, 0.5) | st.just(-0.0),
        "cohort__tile_px": st.sampled_from([32, 64, 224, 512]),
        "cohort__tissue_share": st.floats(0, 1),
        "cohort__quality__folds": st.booleans(),
        "cohort__quality__fold_darkness": st.floats(1.2, 10) | st.integers(2, 10),
        "privacy__expected_patients": st.floats(1, 1e7) | st.integers(1, 10**7),
        "privacy__noise_multiplier": st.floats(1e-6, 64.0),
        "privacy__delta": st.floats(1e-300, 1e-3),
        "privacy__epsilon_limit": POSITIVE,
        "rounds__count": st.integers(1, 10**6),
        "rounds__deadline_s": st.floats(100, 1000),
        "server_optimiser__name": st.sampled_from(["sgd", "nesterov", "adamw"]),
        "server_optimiser__ema": st.floats(0, 1, exclude_max=True),
        "aggregation__rule": st.sampled_from(["mean", "norm_weighted"]),
        "aggregation__trim": st.integers(1, 1000),
        "server_optimiser__weight_decay": st.floats(0, 1, exclude_max=True) | st.just(-0.0),
        "compute__engine": st.sampled_from(["auto", "serial", "book_keeping"]),
        "compute__compile": st.booleans(),
        "wire__dtype": st.sampled_from(["float32", "bfloat16", "int8"]),
        "site_weights__site-a": POSITIVE | st.integers(1, 9),
    },
)


@settings(max_examples=50)
@given(CHANGES)
def test_a_plan_comes_back_from_its_canonical_bytes_with_an_equal_digest(changes):
    plan = load_plan(toml(**changes), where="plan.toml")
    again = plan_from_bytes(plan.canonical_bytes(), where="bytes")
    assert again == plan
    assert again.digest == plan.digest == digest.of_bytes(plan.canonical_bytes())


@settings(max_examples=40)
@given(CHANGES, CHANGES)
@example({"server_optimiser__weight_decay": -0.0}, {"server_optimiser__weight_decay": 0.0})
@example({"privacy__expected_patients": 5}, {"privacy__expected_patients": 5.0})
def test_plans_are_equal_exactly_when_their_digests_are(left, right):
    a, b = load_plan(toml(**left), where="a"), load_plan(toml(**right), where="b")
    assert (a == b) == (a.digest == b.digest)


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if name == "objective":
            # Another objective has other keys: tests/common/objectives holds them against its model.
            kind = MaePlan
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}__")
        else:
            yield prefix + name


#: Another valid value of every key but those that have one value only.
OTHER = {
    "name": "other",
    "encoder__preset": "vit_base_patch16_224",
    "encoder__init_seed": 1,
    "encoder__init_from": "sha256:" + "0" * 64,
    "objective__mask_ratio": 0.5,
    "objective__decoder_dim": 64,
    "objective__decoder_depth": 1,
    "objective__decoder_heads": 2,
    "objective__normalise_target": False,
    "cohort__mpp": 1.0,
    "cohort__mpp_tolerance": 0.2,
    "cohort__tile_px": 64,
    "cohort__play_px": 0,
    "cohort__tiles_per_patient": 5,
    "cohort__tissue_share": 0.5,
    **{f"cohort__{table}__{name}": ["x"] for table in ("include", "exclude") for name in ATTRIBUTES},
    "cohort__include__acquired_from": "2015-01-01",
    "cohort__include__acquired_until": "2015-01-01",
    "cohort__tile_weights": [{"attribute": "organ", "value": "x", "weight": 2.0}],
    "cohort__quality__pen_marks": False,
    "cohort__quality__folds": False,
    "cohort__quality__fold_darkness": 2.2,
    "cohort__quality__artefact_share": 0.2,
    "cohort__quality__min_sharpness": 0.3,
    "cohort__quality__sharp_share": 0.5,
    "cohort__quality__flat_share": 0.5,
    "augmentation__flips": False,
    "augmentation__quarter_turns": False,
    "augmentation__hed_jitter": 0.05,
    "privacy__expected_patients": 5.0,
    "privacy__noise_multiplier": 1.1,
    "privacy__clip_norm": 1.1,
    "privacy__figure_share": 0.4,
    "privacy__loss_bound": 1.1,
    "privacy__delta": 1e-7,
    "privacy__epsilon_limit": 8.1,
    "rounds__count": 4,
    "rounds__steps": 2,
    "rounds__local_learning_rate": 0.2,
    "rounds__deadline_s": 601,
    "rounds__quorum": 3,
    "rounds__ask_at_most": 5,
    "rounds__enough": 4,
    "rounds__late": "same_base",
    "rounds__reply_slot_s": 6,
    "server_optimiser__name": "sgd",
    "server_optimiser__learning_rate": 2e-3,
    "server_optimiser__momentum": 0.8,
    "server_optimiser__beta2": 0.9,
    "server_optimiser__epsilon": 1e-7,
    "server_optimiser__weight_decay": 0.1,
    "server_optimiser__ema": 0.99,
    "aggregation__rule": "norm_weighted",
    "aggregation__trim": 2,
    "compute__engine": "serial",
    "compute__precision": "bfloat16",
    "compute__activation_checkpointing": True,
    "compute__compile": True,
    "encoder__freeze_blocks": 2,
    "encoder__adapters__rank": 4,
    "encoder__adapters__scale": 2.0,
    "wire__dtype": "bfloat16",
    "site_weights__site-a": 2.0,
}
ONE_VALUE = {"version", "objective__name", "privacy__unit"}


def test_every_key_changed_changes_the_digest():
    assert set(keys(Plan)) == {key if not key.startswith("site_weights") else "site_weights" for key in OTHER} | ONE_VALUE
    digests = [load_plan(toml(**{key: value}), where=key).digest for key, value in OTHER.items()]
    digests.append(load_plan(LEAST, where="least").digest)
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    "section",
    [
        "",
        "encoder",
        "encoder__adapters",
        "objective",
        "cohort",
        "cohort__quality",
        "privacy",
        "compute",
        "rounds",
        "aggregation",
        "server_optimiser",
        "wire",
    ],
)
def test_an_unknown_key_is_named(section):
    error = refusal(toml(**{f"{section}__sigma" if section else "sigma": 3}))
    assert error.code is ErrorCode.PLAN_UNKNOWN_KEY
    assert error.where is not None
    assert error.where.endswith("sigma")
    assert error.value == "3"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 1),
        ("privacy__noise_multiplier", "1.0"),
        ("privacy__noise_multiplier", True),
        ("rounds__count", 3.0),
        ("rounds__count", "3"),
        ("rounds__count", True),
        ("objective__normalise_target", 1),
        ("privacy", 3),
        ("site_weights", [1]),
        ("site_weights__site-a", "2"),
    ],
)
def test_a_wrong_type_is_named_with_its_value(key, value):
    error = refusal(toml(**{key: value}))
    assert error.code is ErrorCode.PLAN_WRONG_TYPE
    assert error.where == f"plan.toml, key {key.replace('__', '.')}"
    assert error.value == repr(value)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rounds__ask_at_most": 1}, "rounds.ask_at_most must be 0 or at least rounds.quorum, got 1 and 2"),
        ({"rounds__enough": 1}, "rounds.enough must be 0 or at least rounds.quorum, got 1 and 2"),
        ({"rounds__ask_at_most": 3, "rounds__enough": 4}, "rounds.enough must be at most rounds.ask_at_most, got 4 and 3"),
    ],
)
def test_a_round_that_could_never_count_is_refused(keys, named):
    assert named in refusal(toml(**keys)).what


@pytest.mark.parametrize("key", ["name", "privacy", "rounds"])
def test_a_missing_key_is_named(key):
    raw = {name: value for name, value in tomllib.loads(LEAST).items() if name != key}
    with pytest.raises(PlanError, match=rf"PF103: the key is required .*key {key}"):
        plan_from_bytes(digest.canonical(raw), where="plan")


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("privacy__noise_multiplier", 0, "greater than 0"),
        ("privacy__noise_multiplier", -1.0, "greater than 0"),
        ("privacy__noise_multiplier", float("nan"), "finite"),
        ("privacy__noise_multiplier", 64.5, "less than or equal to 64"),
        ("privacy__clip_norm", 1e7, "1000000"),
        ("privacy__clip_norm", float("inf"), "finite"),
        ("privacy__epsilon_limit", float("inf"), "finite"),
        ("privacy__epsilon_limit", 0.0, "greater than 0"),
        ("encoder__freeze_blocks", -1, "greater than or equal to 0"),
        ("encoder__adapters__rank", 257, "256"),
        ("encoder__adapters__scale", 0.0, "0.001"),
        ("privacy__delta", 0.0, "greater than 0"),
        ("privacy__delta", 0.5, "0.001"),
        ("privacy__expected_patients", 0.5, "1"),
        ("privacy__figure_share", 1.0, "less than 1"),
        ("privacy__unit", "tile", "patient"),
        ("objective__name", "contrastive", "mae"),
        ("objective__mask_ratio", 0.0, "0.1"),
        ("objective__decoder_dim", 33, "multiple of 32"),
        ("encoder__preset", "vit_huge", "vit_tiny"),
        ("encoder__init_seed", -1, "0"),
        ("encoder__init_from", "uni2.safetensors", "sha256"),
        ("encoder__init_from", "sha256:" + "A" * 64, "sha256"),
        ("cohort__tile_px", 16, "32"),
        ("cohort__mpp", 0.0, "0.1"),
        ("rounds__count", 0, "1"),
        ("rounds__quorum", 0, "1"),
        ("rounds__deadline_s", 1.0, "5"),
        ("rounds__ask_at_most", -1, "0"),
        ("rounds__enough", 10_001, "10000"),
        ("rounds__late", "always", "discard"),
        ("server_optimiser__momentum", 1.0, "less than 1"),
        ("server_optimiser__ema", 1.0, "less than 1"),
        ("aggregation__rule", "median", "trimmed_mean"),
        ("aggregation__trim", 0, "1"),
        ("aggregation__trim", 1001, "1000"),
        ("wire__dtype", "float16", "bfloat16"),
        ("version", 2, "1"),
        ("name", "Not A Name", "pattern"),
        ("site_weights__site-a", 0.0, "greater than 0"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_value_and_bound(key, value, bound):
    error = refusal(toml(**{key: value}))
    assert error.code is ErrorCode.PLAN_OUT_OF_BOUNDS
    assert error.where == f"plan.toml, key {key.replace('__', '.')}"
    assert error.value == repr(value)
    assert bound in error.what


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"objective__decoder_dim": 64, "objective__decoder_heads": 5}, ("objective.decoder_dim", "64", "objective.decoder_heads", "5")),
        ({"cohort__tile_px": 100}, ("cohort.tile_px", "100", "16")),
        ({"cohort__tile_px": 64, "encoder__preset": "vit_huge_patch14_reg4_224"}, ("cohort.tile_px", "64", "patch size 14")),
        (
            {"cohort__tile_px": 42, "encoder__preset": "vit_huge_patch14_reg4_224", "objective__mask_ratio": 0.1},
            ("objective.mask_ratio", "0.1", "9 patches"),
        ),
        ({"cohort__tile_px": 32, "objective__mask_ratio": 0.1}, ("objective.mask_ratio", "0.1", "4 patches")),
        ({"rounds__reply_slot_s": 700.0}, ("rounds.reply_slot_s", "700.0", "rounds.deadline_s", "600")),
        (
            {"aggregation__rule": "trimmed_mean", "rounds__quorum": 4, "aggregation__trim": 2},
            ("rounds.quorum", "aggregation.trim", "4", "2"),
        ),
        ({"objective__name": "dino", "server_optimiser__ema": 0.5}, ("server_optimiser.ema", "teacher", "0.5")),
        ({"server_optimiser__name": "nesterov", "server_optimiser__momentum": 0.0}, ("server_optimiser.momentum", "nesterov", "0")),
        ({"site_weights__Site_A": 2.0}, ("site", "'Site_A'")),
    ],
)
def test_an_impossible_combination_is_named_with_its_values(changes, named):
    error = refusal(toml(**changes))
    assert error.code is ErrorCode.PLAN_IMPOSSIBLE
    assert all(word in error.what for word in named)


def test_a_plan_takes_every_preset_with_tiles_that_its_patches_divide():
    for name in preset_names():
        spec = preset(name)
        plan = load_plan(toml(encoder__preset=name, cohort__tile_px=7 * spec.patch_size), where="plan.toml")
        assert plan.encoder.preset == name
    assert set(get_args(EncoderPlan.model_fields["preset"].annotation)) == set(preset_names())


def test_several_faults_are_counted():
    assert "(and 1 more)" in refusal(toml(privacy__noise_multiplier=0, rounds__count=0)).what


@pytest.mark.parametrize("text", ["name = ", "= 3", "[a\n", 'name = "a"\nname = "b"', "\x00"])
def test_what_is_no_toml_is_unreadable(text):
    assert refusal(text).code is ErrorCode.PLAN_UNREADABLE


def test_bytes_that_are_not_canonical_name_no_plan():
    data = load_plan(LEAST, where="least").canonical_bytes()
    for other in (data + b"\n", json.dumps(json.loads(data)).encode(), data.replace(b'"version":1', b'"version":1,"version":1')):
        with pytest.raises(PlanError, match="PF106"):
            plan_from_bytes(other, where="bytes")
    with pytest.raises(PlanError, match="PF101"):
        plan_from_bytes(data[:-1], where="bytes")
    with pytest.raises(PlanError, match="PF103"):
        plan_from_bytes(b"[1]", where="bytes")


@given(st.integers(1, 10**6))
def test_the_sampling_rate_is_expected_over_declared_patients(declared):
    plan = load_plan(LEAST, where="least")
    if declared < 4:
        with pytest.raises(PlanError, match=rf"PF105.*4 > {declared}"):
            plan.sampling_rate(declared)
    else:
        assert plan.sampling_rate(declared) == 4 / declared <= 1


@pytest.mark.parametrize("declared", [0, -5])
def test_a_site_without_patients_cannot_take_part(declared):
    with pytest.raises(PlanError, match="PF105"):
        load_plan(LEAST, where="least").sampling_rate(declared)


def test_total_steps_are_those_of_all_rounds():
    assert load_plan(toml(rounds__count=5, rounds__steps=3), where="steps").total_steps == 15
