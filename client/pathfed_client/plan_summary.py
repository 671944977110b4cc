"""What a plan means for this hospital, in words and figures that a person can decide on: what is trained, what leaves, what it costs."""

from collections.abc import Mapping
from math import prod
from typing import Any

from pathfed_client.app import open_ledger, plan_epsilon
from pathfed_client.deciding import KnownPlan, known_plans
from pathfed_client.gate.site_policy import SitePolicy, check_operators, check_plan
from pathfed_client.gating import signed_by
from pathfed_client.home import SiteHome
from pathfed_client.io import site_cohort
from pathfed_client.io.site_records import ApprovalState
from pathfed_client.io.site_store import SiteStore
from pathfed_common.encoder.spec import preset
from pathfed_common.errors import PathfedError
from pathfed_common.plan import Plan
from pathfed_common.provenance import cosigned

#: Rounds after which the cost is shown; the first few and the last always are.
_MILESTONES = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000, 2000, 5000, 10_000, 100_000)
#: Sites at which one patient may have slides.
_SITES = (1, 2, 3)


def summarise(home: SiteHome, store: SiteStore, known: KnownPlan, declared_patients: int | None) -> dict[str, Any]:
    """All of it, as plain values.

    Args:
        home: the site.
        store: its database.
        known: the plan.
        declared_patients: what the site would declare; None: what it has declared, else the patients it has scanned under these rules.

    Raises:
        PlanError: PF105, the plan expects more patients a step than that.
        PrivacyError: PF304, PF308 to PF310, the ledger cannot be trusted.
    """
    plan = known.plan
    found = site_cohort.summary(store, plan.cohort, home.pseudonym_key).patients
    declared = declared_patients or (known.word.declared_patients if known.word else 0) or found
    return {
        "plan": plan.name,
        "digest": plan.digest,
        "state": known.state,
        "signatures": _signatures(home.policy, known.signed),
        "approvers": sorted(signed_by(home, store, plan.digest, declared)),
        "trained": _trained(plan),
        "cohort": {"rules": _rules(plan), "patients_here": found, "declared_patients": declared},
        "leaves": _leaves(plan),
        "cost": _cost(home, store, plan, declared) if declared else None,
        "refused_by_policy": _refusals(home.policy, known, declared),
        "changes": _changes(home, store, plan),
    }


def milestones(rounds: int) -> list[int]:
    """Rounds after which the cost is shown."""
    return [*(after for after in _MILESTONES if after < rounds), rounds]


def differences(before: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> list[dict[str, Any]]:
    """Keys whose values differ between two plans, dotted, in the order of the plan."""
    rows: list[dict[str, Any]] = []
    for key in (*now, *(key for key in before if key not in now)):
        old, new, name = before.get(key), now.get(key), f"{place}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            rows += differences(old, new, f"{name}.")
        elif old != new:
            rows.append({"key": name, "before": old, "now": new})
    return rows


def _signatures(policy: SitePolicy, signed: bytes) -> dict[str, Any]:
    found = cosigned.parse(signed).signed_by(policy.operator_keys)
    named = [key.to_text() for key in policy.operator_keys if key.key_id in found]
    return {"server": True, "operators": named, "operators_needed": policy.operators_needed}


def _trained(plan: Plan) -> dict[str, Any]:
    return {
        "encoder": plan.encoder.preset,
        "parameters": preset(plan.encoder.preset, img_size=plan.cohort.tile_px).parameters,
        "starts_from": plan.encoder.init_from or "random weights",
        "what_of_it": plan.encoder.part,
        "objective": plan.objective.name,
        "rounds": plan.rounds.count,
        "private_steps_a_round": plan.rounds.steps,
        "updates_become_one_by": plan.aggregation.rule,
        "round_deadline_s": plan.rounds.deadline_s,
        # What is charged may be left unused: a round that has enough waits for nobody else.
        "asked_at_most": plan.rounds.ask_at_most or None,
        "closed_with": plan.rounds.enough or None,
        "late_updates": plan.rounds.late,
        "precision": plan.compute.precision,
    }


def _rules(plan: Plan) -> dict[str, Any]:
    cohort = plan.cohort
    given = {"include": cohort.include.model_dump(exclude_defaults=True), "exclude": cohort.exclude.model_dump(exclude_defaults=True)}
    return {
        "tile_px": cohort.tile_px,
        "mpp": cohort.mpp,
        "tiles_per_patient": cohort.tiles_per_patient,
        **{k: v for k, v in given.items() if v},
    }


def _leaves(plan: Plan) -> dict[str, Any]:
    from pathfed_common.model import update_shapes
    from pathfed_common.wire_format import file_bytes

    shapes = update_shapes(plan)
    numbers = sum(prod(shape) for shape in shapes.values())
    size = file_bytes(shapes, plan.wire.dtype)
    return {
        "update_numbers": numbers,
        "number_type": plan.wire.dtype,
        "update_bytes_a_round": size,
        "update_bytes_a_run": size * plan.rounds.count,
        "clip_norm": plan.privacy.clip_norm,
        "noise_std": plan.privacy.noise_multiplier * plan.privacy.clip_norm,
        "noised_figures": ["sum of the drawn patients' losses", "number of drawn patients"],
        "reply_slot_s": plan.rounds.reply_slot_s,
    }


def _cost(home: SiteHome, store: SiteStore, plan: Plan, declared: int) -> dict[str, Any]:
    from pathfed_common.privacy.accounting import PrivacyEvent, composed_epsilon, multi_site_epsilon

    delta = home.policy.delta
    rate, noise, steps = plan.sampling_rate(declared), plan.privacy.noise_multiplier, plan.rounds.steps
    rows = []
    for after in milestones(plan.rounds.count):
        event = PrivacyEvent(sampling_rate=rate, noise_multiplier=noise, steps=after * steps)
        rows.append({"after_round": after, **{f"epsilon_at_{n}_sites": multi_site_epsilon(event, sites=n, delta=delta) for n in _SITES}})
    ledger = open_ledger(home, store)
    others = [entry.event for entry in ledger.entries() if entry.plan != plan.digest]
    whole = PrivacyEvent(sampling_rate=rate, noise_multiplier=noise, steps=plan.total_steps)
    return {
        "delta": delta,
        "sampling_rate": rate,
        "epsilon_after_round": rows,
        "epsilon_limit_of_plan": plan.privacy.epsilon_limit,
        "delta_of_plan": plan.privacy.delta,
        "epsilon_spent": ledger.spent().epsilon,
        "epsilon_with_this_plan": composed_epsilon([*others, whole], delta),
        "max_epsilon": home.policy.max_epsilon,
    }


def _refusals(policy: SitePolicy, known: KnownPlan, declared: int) -> list[dict[str, Any]]:
    """What stands against approving the plan under the policy as it is now."""
    found = []
    try:
        check_operators(policy, known.signed)
    except PathfedError as error:
        found.append(error)
    try:
        if declared:
            check_plan(policy, known.plan, declared, plan_epsilon(known.plan, declared, policy.delta))
    except PathfedError as error:
        found.append(error)
    return [{"code": one.code.value, "what": one.what, "where": one.where, "value": one.value} for one in found]


def _changes(home: SiteHome, store: SiteStore, plan: Plan) -> dict[str, Any] | None:
    """Against the plan that was approved last, beside this one; None where there is none."""
    approved = [
        one
        for one in known_plans(home, store)
        if one.word is not None and one.word.state is ApprovalState.APPROVED and one.plan.digest != plan.digest
    ]
    if not approved:
        return None
    last = max(approved, key=lambda one: one.word.at if one.word else 0.0).plan
    rows = differences(last.model_dump(mode="json"), plan.model_dump(mode="json"))
    return {"plan": last.name, "digest": last.digest, "keys": rows}
