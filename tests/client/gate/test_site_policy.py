import pytest
from pydantic import ValidationError

from pathfed_client.gate.site_policy import SitePolicy, check_hours, check_operators, check_plan
from pathfed_common.errors import HostError, PlanError, PrivacyError, TransportError
from pathfed_common.plan import load_plan
from pathfed_common.provenance import cosigned
from pathfed_common.provenance.documents import seal_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.settings import checked, read_settings, to_toml

PLAN = load_plan(
    """
name = "p"
[privacy]
expected_patients = 4
noise_multiplier = 1.0
clip_norm = 1.0
epsilon_limit = 8.0
[rounds]
count = 3
""",
    where="p",
)


@pytest.mark.parametrize(("epsilon", "allowed"), [(1.0, True), (5.0, True), (5.001, False), (float("inf"), False), (float("nan"), False)])
def test_a_plan_may_cost_what_the_policy_allows_and_no_more(epsilon, allowed):
    policy = SitePolicy(max_epsilon=5.0, delta=1e-6)
    if allowed:
        check_plan(policy, PLAN, 10, epsilon)
    else:
        with pytest.raises(PrivacyError, match=r"PF307.*max_epsilon"):
            check_plan(policy, PLAN, 10, epsilon)


def test_a_plan_that_expects_more_patients_than_declared_is_refused():
    with pytest.raises(PlanError, match="PF105"):
        check_plan(SitePolicy(max_epsilon=5.0, delta=1e-6), PLAN, 3, 1.0)


@pytest.mark.parametrize(
    "change", [{"max_epsilon": 0.0}, {"max_epsilon": 1e9}, {"delta": 0.0}, {"delta": 0.1}, {"threads": 0}, {"reply_slots": 1}, {"more": 1}]
)
def test_a_policy_out_of_bounds_is_refused(change):
    with pytest.raises(HostError, match="PF905"):
        checked(SitePolicy, {"max_epsilon": 5.0, "delta": 1e-6, **change})


def devices_policy(**given: object) -> SitePolicy:
    return SitePolicy.model_validate({"max_epsilon": 8.0, "delta": 1e-6, **given})


@pytest.mark.parametrize(
    ("given", "names_gpus"),
    [
        ({}, False),
        ({"device": "cpu", "devices": 4}, False),
        ({"device": "cuda"}, True),
        ({"device": "cuda:12"}, True),
        ({"devices": 2}, True),
    ],
)
def test_devices_that_may_be_missing_are_known_by_the_policy_alone(given, names_gpus) -> None:
    assert devices_policy(**given).names_gpus is names_gpus


@pytest.mark.parametrize(
    "given",
    [
        *({"device": word} for word in ("", "gpu", "CUDA", "cuda:", "cuda:01", "cuda:1000", "cuda:0\n", "cpu:0", " cpu", 0)),
        *({"devices": count} for count in (0, 65, 1.5, "2")),
        *({"device_memory_gb": size} for size in (0, -1.0, float("nan"), float("inf"))),
        {"sharding": "fsdp"},
    ],
)
def test_other_words_are_refused(given) -> None:
    with pytest.raises(ValidationError):
        devices_policy(**given)


SERVER, ANNA, BEN, CARLA = (SigningKey.generate() for _ in range(4))


def policy_of(**given: object) -> SitePolicy:
    return checked(SitePolicy, {"max_epsilon": 8.0, "delta": 1e-6, **given}, where="policy.toml")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("objectives", ["mae", "jepa"], "mae, dino"),
        ("objectives", [], "mae, dino"),
        ("encoders", ["vit_tiny"], "vit_tiny_patch16_224, vit_small_patch16_224"),
        ("max_parameters", 0, "greater than or equal to 1"),
        ("max_epsilon_per_plan", 0.0, "greater than 0"),
        ("hours", "19-7", '"HH:MM-HH:MM"'),
        ("weekends", "open", "'as_other_days', 'all_day' or 'never'"),
        ("time_zone", "Berlin", "Europe/Berlin"),
        ("operators", ["ed25519:abc"], "ed25519|base64"),
        ("operators", [ANNA.public.to_text()] * 2, "each key once"),
        ("operator_signatures", 1, "at most the number of keys in operators, 0"),
        ("operator_signatures", 0, "greater than or equal to 1"),
        ("second_person", "yes", "boolean"),
        ("memory_gb", 0.5, "greater than or equal to 1"),
        ("bandwidth_mbit_s", 0.4, "greater than or equal to 0.5"),
    ],
)
def test_every_key_is_checked_and_the_error_names_key_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(HostError, match=rf"PF905.*(?:{allowed}).*policy.toml, key {key}") as refused:
        policy_of(**{key: value})
    told = refused.value.render()
    assert all(str(part) in told for part in (value if isinstance(value, list) else [value]))


def test_a_policy_with_every_key_survives_its_file(tmp_path):
    policy = policy_of(
        objectives=["mae"],
        encoders=["vit_tiny_patch16_224"],
        max_parameters=10_000_000,
        max_epsilon_per_plan=2.0,
        hours="19:00-07:00",
        weekends="all_day",
        time_zone="Europe/Berlin",
        operators=[ANNA.public.to_text(), BEN.public.to_text()],
        operator_signatures=2,
        second_person=True,
        memory_gb=16.0,
        bandwidth_mbit_s=50.0,
    )
    (tmp_path / "policy.toml").write_text(to_toml(policy, "policy"))
    assert read_settings(SitePolicy, tmp_path / "policy.toml") == policy


def test_a_policy_of_before_there_were_these_keys_allows_what_it_allowed():
    check_plan(policy_of(), PLAN, 10, 8.0)
    check_operators(policy_of(), seal_plan(PLAN, SERVER))
    check_hours(policy_of(), 0.0)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"objectives": ["dino"]}, "objectives"),
        ({"encoders": ["vit_small_patch16_224", "vit_base_patch16_224"]}, "encoders"),
        ({"max_parameters": 5_000_000}, "max_parameters"),
        ({"max_epsilon_per_plan": 0.9}, "max_epsilon_per_plan"),
    ],
)
def test_what_the_policy_does_not_allow_is_refused_by_its_key(given, key):
    with pytest.raises(PrivacyError, match=rf"PF307.*policy.toml, key {key}"):
        check_plan(policy_of(**given), PLAN, 10, 1.0)


def test_what_the_policy_allows_passes():
    given = {"objectives": ["mae"], "encoders": ["vit_tiny_patch16_224"], "max_parameters": 6_000_000, "max_epsilon_per_plan": 1.0}
    check_plan(policy_of(**given), PLAN, 10, 1.0)


def test_only_signatures_of_the_named_operators_count_and_enough_of_them():
    signed = seal_plan(PLAN, SERVER)
    both = cosigned.cosign(cosigned.cosign(signed, ANNA), BEN)
    one = policy_of(operators=[ANNA.public.to_text(), BEN.public.to_text()])
    two = policy_of(operators=[ANNA.public.to_text(), BEN.public.to_text()], operator_signatures=2)
    for policy, plan in ((one, cosigned.cosign(signed, BEN)), (one, both), (two, both)):
        check_operators(policy, plan)
    for policy, plan in (
        (one, signed),
        (one, cosigned.cosign(signed, CARLA)),
        (two, cosigned.cosign(cosigned.cosign(signed, ANNA), CARLA)),
    ):
        with pytest.raises(PlanError, match=r"PF106.*operator_signatures"):
            check_operators(policy, plan)


def test_a_signature_over_another_plan_does_not_count():
    other = PLAN.model_copy(update={"name": "other"})
    foreign = cosigned.parse(cosigned.cosign(seal_plan(other, SERVER), ANNA)).signatures
    signed = cosigned.parse(seal_plan(PLAN, SERVER))
    forged = cosigned.Cosigned(signed.payload, signed.payload_type, {**foreign, **signed.signatures}).to_bytes()
    with pytest.raises(PlanError, match="PF106"):
        check_operators(policy_of(operators=[ANNA.public.to_text()]), forged)


def test_outside_the_hours_no_round_begins():
    policy = policy_of(hours="19:00-07:00", weekends="never")
    check_hours(policy, 22 * 3600.0)  # Thursday, 1970-01-01
    with pytest.raises(TransportError, match=r"PF441.*19:00-07:00"):
        check_hours(policy, 12 * 3600.0)
