"""`pathfed plan privacy`: what a plan costs a patient round by round, and what it would need for a target epsilon."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pathfed_common import files
from pathfed_common.errors import ErrorCode, HostError, PlanError, PrivacyError, ProvenanceError
from pathfed_common.plan import Plan, load_plan, plan_from_bytes
from pathfed_common.privacy.planning import (
    Answer,
    Cost,
    epsilon_by_round,
    fewest_patients,
    least_noise,
    most_expected_patients,
    most_rounds,
)
from pathfed_common.provenance import dsse
from pathfed_common.provenance.documents import PLAN_TYPE

#: A patient may be in the cohorts of so many sites, and nobody's ledger knows.
SITES = (1, 2, 3)
#: Rounds in a table for people.
ROWS = 11
_MOST_DELTA = 1e-3  # as in a plan
_QUESTIONS: dict[str, Callable[[Cost, float], Answer]] = {
    "noise_multiplier": least_noise,
    "expected_patients": most_expected_patients,
    "rounds": most_rounds,
    "patients": fewest_patients,
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked about a plan.

    Attributes:
        patients: N, the declared number of patients of a site.
        target: the target epsilon; the plan's own limit if None.
        delta: where epsilon is stated; the plan's own if None.
        at_sites: in how many cohorts a patient may be who shall be within the target.
        most_rounds: epsilon is computed for so many rounds at most.
    """

    patients: int | None
    target: float | None = None
    delta: float | None = None
    at_sites: int = 1
    most_rounds: int


@dataclass(frozen=True, kw_only=True)
class PrivacyReport:
    """What a plan costs, and what it would need.

    Attributes:
        plan: the plan.
        cost: of the whole run, for a patient of one site.
        target: epsilon.
        at_sites: the sites that the target is for.
        rounds: the rounds that were computed, ascending, with the first and the last.
        epsilons: by number of sites, for each of `rounds`.
        needed: each of the four numbers, if it alone were changed; an error where none within bounds would do.
    """

    plan: Plan
    cost: Cost
    target: float
    at_sites: int
    rounds: tuple[int, ...]
    epsilons: dict[int, list[float]]
    needed: dict[str, Answer | PrivacyError]

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it. An epsilon beyond floating point is null."""
        return {
            **self.figures(),
            "rounds": [
                {"round": index, **{_column(sites): _finite(self.epsilons[sites][place]) for sites in SITES}}
                for place, index in enumerate(self.rounds)
            ],
            "needed": {name: self._needed(name) for name in _QUESTIONS},
        }

    def figures(self) -> dict[str, Any]:
        """What was asked, of which plan."""
        return {
            "plan": self.plan.digest,
            "name": self.plan.name,
            "patients": self.cost.patients,
            "expected_patients": self.cost.expected_patients,
            "sampling_rate": self.cost.expected_patients / self.cost.patients,
            "noise_multiplier": self.cost.noise_multiplier,
            "planned_rounds": self.cost.rounds,
            "steps_a_round": self.cost.steps,
            "delta": self.cost.delta,
            "epsilon_limit": self.plan.privacy.epsilon_limit,
            "target_epsilon": self.target,
            "at_sites": self.at_sites,
        }

    def table(self) -> list[dict[str, object]]:
        """Epsilon by round, for people."""
        columns = {sites: f"epsilon at {sites} site{'s' * (sites > 1)}" for sites in SITES}
        shown = [place - 1 for place in spread_rounds(len(self.rounds), ROWS)]
        return [
            {"round": self.rounds[place], **{columns[sites]: f"{self.epsilons[sites][place]:.4f}" for sites in SITES}} for place in shown
        ]

    def needs(self) -> list[dict[str, object]]:
        """What would meet the target, for people."""
        now = {
            "noise_multiplier": ("sigma, at least", self.cost.noise_multiplier),
            "expected_patients": ("B, at most", self.cost.expected_patients),
            "rounds": ("rounds, at most", self.cost.rounds),
            "patients": ("N, at least", self.cost.patients),
        }
        rows: list[dict[str, object]] = []
        for name, (words, value) in now.items():
            found = self.needed[name]
            told = ("none", found.code.value) if isinstance(found, PrivacyError) else (f"{found.value:g}", f"{found.epsilon:.4f}")
            rows.append({"if only this changed": words, "planned": f"{value:g}", "needed": told[0], "epsilon then": told[1]})
        return rows

    def _needed(self, name: str) -> dict[str, object]:
        found = self.needed[name]
        if isinstance(found, PrivacyError):
            return {"value": None, "epsilon": None, "code": found.code.value}
        return {"value": found.value, "epsilon": found.epsilon, "code": None}


def read_any_plan(file: Path) -> Plan:
    """A plan from TOML, or from the signed file that sites get. No signature is checked: nothing is approved or published here.

    Raises:
        PlanError: PF1xx, what is wrong with it.
        HostError: PF904, it cannot be read.
    """
    data = files.read_given(file)
    if data.lstrip().startswith(b"{"):
        try:
            envelope = dsse.parse(data, where=str(file))
        except ProvenanceError as error:
            raise PlanError(ErrorCode.PLAN_NOT_AUTHENTIC, error.what, where=file) from None
        if envelope.payload_type != PLAN_TYPE:
            raise PlanError(ErrorCode.PLAN_NOT_AUTHENTIC, "it holds no plan", where=file, value=envelope.payload_type)
        return plan_from_bytes(envelope.payload, where=str(file))
    try:
        return load_plan(data.decode("utf-8"), where=file)
    except UnicodeDecodeError as error:
        raise PlanError(ErrorCode.PLAN_UNREADABLE, f"not UTF-8 text: {error}", where=file) from None


def privacy_report(plan: Plan, asked: Asked) -> PrivacyReport:
    """Compute all of it; some seconds.

    Raises:
        PlanError: PF105, the plan expects more patients a step than the site declares.
        PrivacyError: PF311, no sigma within the plan's bounds meets the target.
        HostError: PF905, something asked is missing or out of bounds.
    """
    target = plan.privacy.epsilon_limit if asked.target is None else asked.target
    delta = plan.privacy.delta if asked.delta is None else asked.delta
    patients = _checked(asked.patients, target, delta)
    plan.sampling_rate(patients)
    cost = Cost(
        expected_patients=plan.privacy.expected_patients,
        patients=patients,
        noise_multiplier=plan.privacy.noise_multiplier,
        rounds=plan.rounds.count,
        steps=plan.rounds.steps,
        sites=1,
        delta=delta,
    )
    aimed = replace(cost, sites=asked.at_sites)
    needed = {name: _asked(question, aimed, target) for name, question in _QUESTIONS.items()}
    if isinstance(needed["noise_multiplier"], PrivacyError):
        raise needed["noise_multiplier"]
    rounds = spread_rounds(plan.rounds.count, asked.most_rounds)
    return PrivacyReport(
        plan=plan,
        cost=cost,
        target=target,
        at_sites=asked.at_sites,
        rounds=rounds,
        epsilons={sites: epsilon_by_round(replace(cost, sites=sites), rounds) for sites in SITES},
        needed=needed,
    )


def spread_rounds(count: int, most: int) -> tuple[int, ...]:
    """All rounds where there are at most `most` (at least 2), else that many, evenly spread, with the first and the last."""
    if count <= most:
        return tuple(range(1, count + 1))
    return tuple(sorted({1 + round(place * (count - 1) / (most - 1)) for place in range(most)}))


def _asked(question: Callable[[Cost, float], Answer], cost: Cost, target: float) -> Answer | PrivacyError:
    try:
        return question(cost, target)
    except PrivacyError as error:
        return error


def _checked(patients: int | None, target: float, delta: float) -> int:
    """N, once all options are within bounds."""
    if patients is None:
        raise _option("the number of patients is missing; it sets the sampling rate", "--patients", None, "give --patients N, as declared")
    if patients < 1:
        raise _option("the number of patients must be at least 1", "--patients", patients, "give the number that a site declares")
    if not 0 < target < math.inf:
        raise _option("the target epsilon must be finite and above 0", "--target-epsilon", target, "give one of about 1 to 10")
    if not 0 < delta <= _MOST_DELTA:
        raise _option(f"delta must be above 0 and at most {_MOST_DELTA:g}", "--delta", delta, "give one well below one in the patients")
    return patients


def _option(what: str, where: str, value: object, remedy: str) -> HostError:
    return HostError(ErrorCode.SETTINGS_INVALID, what, where=where, value=value, remedy=remedy)


def _column(sites: int) -> str:
    return f"epsilon_at_{sites}_sites"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
