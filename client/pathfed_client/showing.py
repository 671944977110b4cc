"""What a site shows of itself, to its own people: where it stands, and its ledger.

Heavy libraries are imported by the function that needs them, as in `app`.
"""

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathfed_client.app import open_ledger, open_store
from pathfed_client.home import SiteHome
from pathfed_client.io.site_store import SiteStore
from pathfed_common.plan import CohortPlan
from pathfed_common.provenance.documents import open_plan

if TYPE_CHECKING:
    from pathfed_client.budget.ledger import Ledger


def status(home: SiteHome) -> dict[str, Any]:
    """Where the site stands, for its own eyes."""
    from pathfed_client.cohort.withdrawal import WithdrawnKind
    from pathfed_client.io import site_cohort

    with closing(open_store(home)) as store:
        plans = []
        for approval in store.approvals():
            plan = open_plan(approval.signed_plan, home.server_card.evidence_key)
            summary = site_cohort.summary(store, plan.cohort, home.pseudonym_key)
            plans.append(
                {
                    "plan": plan.name,
                    "digest": approval.plan,
                    "state": approval.state.value,
                    "declared_patients": approval.declared_patients,
                    "patients": summary.patients,
                    "tiles": summary.tiles,
                    "slides": {state.value: count for state, count in summary.slides.items()},
                    "reasons": {code.value: count for code, count in summary.reasons.items()},
                }
            )
        withdrawn = [one.kind for one in store.withdrawn()]
        alarms = store.alarms()
        spent = open_ledger(home, store).spent().epsilon
        control = _control_state(home, store)
        rounds = json.loads(store.facts().get("outcomes", "[]"))
    policy, stopped = home.policy, home.stop_switch.stop()
    return {
        "site": home.name,
        "stopped": home.stop_switch.is_on,
        "stopped_at": None if stopped is None else stopped.at,
        "stopped_for": None if stopped is None else stopped.reason or None,
        "server": home.server_card.fleet_address,
        "epsilon_spent": spent,
        "epsilon_left": max(0.0, policy.max_epsilon - spent),
        "delta": policy.delta,
        "withdrawn_patients": withdrawn.count(WithdrawnKind.PATIENT),
        "withdrawn_slides": withdrawn.count(WithdrawnKind.PATH),
        "control": control,
        "rounds": rounds,
        "alarms": [{"at": alarm.at, "code": alarm.code.value, "about": alarm.subject, "what": alarm.detail} for alarm in alarms],
        "plans": plans,
    }


def _control_state(home: SiteHome, store: SiteStore) -> dict[str, Any]:
    """How the site stands with the control plane."""
    if not home.enrolled:
        return {"enrolled": False}
    from pathfed_client.control.certificates import certificate_times

    facts, leaves = store.facts(), store.own_leaves()
    head = home.log_head.read() if home.log_head.exists() else None
    return {
        "enrolled": True,
        "certificate_until_at": certificate_times(home.certificate_file.read_bytes())[1],
        "answered_at": float(facts["agent_at"]) if "agent_at" in facts else None,
        "code": facts.get("agent_code") or None,
        "suspended": bool(facts.get("suspended")),
        "words_waiting": len(store.words(waiting=True)),
        "plans_received": len(store.received_plans()),
        "log_cosigned": 0 if head is None else head.size,
        "receipts": sum(leaf.receipt is not None for leaf in leaves),
        "receipts_waiting": sum(leaf.receipt is None for leaf in leaves),
    }


@dataclass(frozen=True, kw_only=True)
class Glance:
    """A site's figures for a live view: cheap, and nothing verified.

    Attributes:
        slides: slides looked at.
        usable: slides with tiles and a patient.
        patients: patients with a usable tile.
        epsilon_total: what the last ledger entry says.
    """

    slides: int
    usable: int
    patients: int
    epsilon_total: float


def glance(home: SiteHome, cohort: CohortPlan) -> Glance:
    """Look at a site's database."""
    from pathfed_client.budget.ledger import last_charge
    from pathfed_client.io import site_cohort
    from pathfed_client.io.site_records import SlideStatus

    with closing(open_store(home)) as store:
        summary = site_cohort.summary(store, cohort, home.pseudonym_key)
        last = last_charge(store)
    return Glance(
        slides=sum(summary.slides.values()),
        usable=summary.slides.get(SlideStatus.USABLE, 0),
        patients=summary.patients,
        epsilon_total=0.0 if last is None else last.epsilon_total,
    )


def ledger_report(home: SiteHome, store: SiteStore) -> dict[str, Any]:
    """The ledger, checked as before a charge, with epsilon as the last entry states it (`Ledger.stated`).

    Raises:
        PrivacyError: PF304, the ledger is damaged; PF305, a test shows more than the last entry states; PF308 to PF310, see `open_ledger`.
    """
    ledger = open_ledger(home, store)
    entries = ledger.entries()
    return {
        **_ledger_figures(home, ledger, ledger.stated(entries)),
        "entries": [
            {
                "sequence": entry.sequence,
                "run": entry.run,
                "round": entry.round_index,
                "plan": entry.plan,
                "rate": entry.event.sampling_rate,
                "sigma": entry.event.noise_multiplier,
                "steps": entry.event.steps,
                "epsilon_plan": entry.epsilon_plan,
                "epsilon_total": entry.epsilon_total,
                "at": entry.at,
            }
            for entry in entries
        ],
    }


def verify_ledger(home: SiteHome, store: SiteStore, heads: Path | None = None) -> dict[str, Any]:
    """Check all that can be checked of the ledger: every signature, chain, times, witnesses, heads from outside, three accountants.

    Args:
        home: the site.
        store: its database.
        heads: a file of heads, or a run's record whose statements of this site name some; see `io.outside_heads`.

    Raises:
        PrivacyError: PF304, PF308 to PF310, as `ledger_report`; PF305, the accountants contradict each other.
        HostError: PF905, `heads` names no head of this site, or is not such a file; PF904, it cannot be read.
    """
    from pathfed_client.io.ledger_head import site_ledger
    from pathfed_client.io.outside_heads import OutsideHeads
    from pathfed_common.privacy.accounting import check_accountants, prv_estimate, rdp_epsilon

    outside = () if heads is None else (OutsideHeads.read(heads, home.name, home.evidence_keys),)
    ledger = site_ledger(store, home.evidence_key, home.policy, home.run_secrets, witnesses=outside, former=home.former_keys)
    entries = ledger.verify()
    events, delta = [entry.event for entry in entries], home.policy.delta
    bracket = prv_estimate(events, delta)
    return {
        **_ledger_figures(home, ledger, check_accountants(events, delta)),
        "epsilon_rdp_bound": rdp_epsilon(events, delta),
        "epsilon_prv": None if bracket is None else list(bracket),
        "releases": len(entries),
        "statements_compared": len(store.stated_heads()),
        "heads_compared": sum(len(witness.heads()) for witness in outside),
    }


def _ledger_figures(home: SiteHome, ledger: "Ledger", epsilon: float) -> dict[str, Any]:
    return {
        "site": home.name,
        "head": ledger.head,
        "delta": home.policy.delta,
        "epsilon": epsilon,
        "max_epsilon": home.policy.max_epsilon,
    }
