"""The model card of a release: what it says, taken from nothing but the record's signed documents and the operator's evaluation. Pure.

A card is made again by whoever verifies a bundle and compared byte for byte. Epsilons are the one exception: another build of the
accountant rounds them otherwise, so the card's own are taken where they are within `consistency.EPSILON_SLACK` of those computed again.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from heapq import nlargest
from typing import Self

from pathfed_common import digest, model
from pathfed_common.cohort_rules import ATTRIBUTES
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import CohortPlan
from pathfed_common.privacy.accounting import composed_epsilon
from pathfed_common.provenance import record
from pathfed_common.provenance.consistency import EPSILON_SLACK, Contents, events_by_site, recomputed_epsilons, statements_by_site
from pathfed_common.provenance.values import Value, decode_value

CARD_VERSION = 1
#: A patient known to this many sites: what they spent together is stated.
OVERLAPS = (1, 2, 3)
_MOST_FIGURES = 100
_LONGEST_NAME = 100


@dataclass(frozen=True, kw_only=True)
class CardSite(Value):
    """A site as the card shows it.

    Attributes:
        name: as it agreed to be named, or "site 2, not named".
        named: whether it agreed.
        declared_patients: the lower bound of its cohort that it declared.
        rounds: rounds in which its update counted.
        epsilon: what its recorded releases cost a patient, at the plan's delta; None beyond floating point.
        epsilon_stated: the plan's epsilon in its last statement.
        codes: digests of the code it stated to run.
    """

    name: str
    named: bool
    declared_patients: int
    rounds: int
    epsilon: float | None
    epsilon_stated: float
    codes: tuple[Digest, ...]


@dataclass(frozen=True, kw_only=True)
class Overlap(Value):
    """Epsilon, at the plan's delta, of a patient known to so many of the sites, whichever they are; None beyond floating point."""

    sites: int
    epsilon: float | None


@dataclass(frozen=True, kw_only=True)
class Figure(Value):
    """A figure of the operator's evaluation, as it was given."""

    name: str
    value: str

    def _check(self) -> None:
        if not 1 <= len(self.name) <= _LONGEST_NAME or any(letter in "|\n\r" for letter in self.name + self.value):
            raise ValueError(f"a figure has a name of 1 to {_LONGEST_NAME} characters and no line breaks or bars, got {self.name[:120]!r}")


@dataclass(frozen=True, kw_only=True)
class Card(Value):
    """A release's card.

    Attributes:
        version: of the card's form.
        run: the run.
        plan: digest of the plan.
        plan_name: what the plan is called.
        encoder: digest of the encoder's weights.
        preset: shape of the encoder.
        init_from: digest of the checkpoint that it started from; empty for random weights.
        part: what of the encoder was trained.
        objective: how.
        data: sentences about the data, in the plan's public terms.
        rounds: rounds.
        steps: private steps of a site in a round.
        rule: how a round's updates became one, as plans call it.
        trim: values left out at each end, where the rule is "trimmed_mean"; else 0.
        average: share of itself that the released running average kept in a round; 0 where the last state's encoder is released.
        expected_patients: B.
        noise_multiplier: sigma.
        clip_norm: C.
        delta: where epsilons are stated.
        epsilon_limit: the most that the plan's releases may cost a patient of one site.
        sites: the sites whose updates count, those that agreed to be named first.
        overlaps: epsilon for patients of several sites.
        unslotted: rounds and sites whose reply did not wait for a time slot.
        wire: number type in which updates travelled.
        rounding_share: its rounding's largest bound in any update that counts, as a share of the noise in it; both as L2 norms.
        evaluation: the operator's figures; nothing here checks them.
    """

    version: int
    run: RunName
    plan: Digest
    plan_name: str
    encoder: Digest
    preset: str
    init_from: str
    part: str
    objective: str
    data: tuple[str, ...]
    rounds: int
    steps: int
    rule: str
    trim: int
    average: float
    expected_patients: float
    noise_multiplier: float
    clip_norm: float
    delta: float
    epsilon_limit: float
    sites: tuple[CardSite, ...]
    overlaps: tuple[Overlap, ...]
    unslotted: int
    wire: str
    rounding_share: float
    evaluation: tuple[Figure, ...]

    def to_bytes(self) -> bytes:
        """`encoder/card.json`."""
        return digest.canonical(self.plain())

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Self:
        """Read a card back.

        Raises:
            ProvenanceError: PF601, not a card of this version.
        """
        return decode_value(cls, data, where)


def read_evaluation(data: bytes, *, where: str) -> tuple[Figure, ...]:
    """Read the operator's evaluation: a JSON object of figures, shown in its order.

    Raises:
        ProvenanceError: PF624, it is not.
    """
    try:
        raw = json.loads(data.decode("utf-8"))
        if not isinstance(raw, dict) or not 1 <= len(raw) <= _MOST_FIGURES:
            raise ValueError(f"an object with 1 to {_MOST_FIGURES} figures is expected")
        if not all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in raw.values()):
            raise ValueError("every figure is a number or a text")
        return tuple(Figure(name=name, value=str(value)) for name, value in raw.items())
    except (ValueError, RecursionError) as error:
        raise ProvenanceError(ErrorCode.EVALUATION_UNREADABLE, f"not an evaluation: {error}", where=where) from None


def make_card(contents: Contents, evaluation: tuple[Figure, ...] = ()) -> Card:
    """The card of a finished run.

    Raises:
        ProvenanceError: PF605, the record has no exported encoder.
    """
    plan, manifest = contents.plan, contents.manifest
    encoder = manifest.entry(record.ENCODER)
    if encoder is None:
        raise ProvenanceError(ErrorCode.RECORD_INCOMPLETE, "the record has no exported encoder", where=record.ENCODER)
    return Card(
        version=CARD_VERSION,
        run=manifest.run,
        plan=manifest.plan,
        plan_name=plan.name,
        encoder=encoder.digest,
        preset=plan.encoder.preset,
        init_from=plan.encoder.init_from,
        part=plan.encoder.part,
        objective=f"{plan.objective.name}: {plan.objective.summary}",
        data=_data(plan.cohort),
        rounds=manifest.rounds,
        steps=plan.rounds.steps,
        rule=plan.aggregation.rule,
        trim=plan.aggregation.trim if plan.aggregation.rule == "trimmed_mean" else 0,
        average=plan.server_optimiser.ema,
        expected_patients=plan.privacy.expected_patients,
        noise_multiplier=plan.privacy.noise_multiplier,
        clip_norm=plan.privacy.clip_norm,
        delta=plan.privacy.delta,
        epsilon_limit=plan.privacy.epsilon_limit,
        sites=_sites(contents),
        overlaps=_overlaps(contents),
        unslotted=sum(sealed.statement.reply_slot_s != plan.rounds.reply_slot_s for sealed in contents.statements.values()),
        wire=plan.wire.dtype,
        rounding_share=_largest_rounding(contents) / model.noise_norm(plan),
        evaluation=evaluation,
    )


def card_differences(found: Card, due: Card) -> list[str]:
    """Names of the fields in which a card differs from the one made again, epsilons within their slack apart."""
    with_due = replace(
        found,
        sites=tuple(
            replace(site, epsilon=_near(site.epsilon, wanted.epsilon)) for site, wanted in zip(found.sites, due.sites, strict=False)
        )
        + found.sites[len(due.sites) :],
        overlaps=tuple(
            replace(overlap, epsilon=_near(overlap.epsilon, wanted.epsilon))
            for overlap, wanted in zip(found.overlaps, due.overlaps, strict=False)
        )
        + found.overlaps[len(due.overlaps) :],
    )
    ours, theirs = with_due.plain(), due.plain()
    return [name for name in ours if ours[name] != theirs[name]]


def _near(found: float | None, due: float | None) -> float | None:
    return due if found is not None and due is not None and abs(found - due) <= EPSILON_SLACK else found


def _sites(contents: Contents) -> tuple[CardSite, ...]:
    epsilons, given = recomputed_epsilons(contents), statements_by_site(contents)
    names = card_names(contents, list(given))
    rows = []
    for site, name in names.items():
        statements = [sealed.statement for sealed in given[site]]
        approval = contents.approvals[site]
        rows.append(
            CardSite(
                name=name,
                named=bool(approval.named_as),
                declared_patients=approval.declared_patients,
                rounds=len(statements),
                epsilon=_finite(epsilons[site]),
                epsilon_stated=statements[-1].epsilon_plan,
                codes=tuple(sorted({statement.code for statement in statements})),
            )
        )
    return tuple(rows)


def card_names(contents: Contents, sites: list[SiteName]) -> Mapping[SiteName, str]:
    """What each site is called on the card: first those that agreed to be named, then the others, in order of their names."""
    named = {site: contents.approvals[site].named_as for site in sites if contents.approvals[site].named_as}
    others = [site for site in sites if site not in named]
    return {**named, **{site: f"site {index}, not named" for index, site in enumerate(others, start=len(named) + 1)}}


def _largest_rounding(contents: Contents) -> float:
    return max((site.rounding for found, _ in contents.rounds for site in found.admitted), default=0.0)


def _overlaps(contents: Contents) -> tuple[Overlap, ...]:
    """For the patient of any h sites, the dearest h of them count. Equal sites cost the same, so their order does not."""
    events = events_by_site(contents)
    epsilons, delta = recomputed_epsilons(contents), contents.plan.privacy.delta
    rows = []
    for sites in OVERLAPS:
        if sites <= len(events):
            dearest = nlargest(sites, events, key=lambda site: epsilons[site])
            spent = composed_epsilon([event for site in dearest for event in events[site]], delta)
            rows.append(Overlap(sites=sites, epsilon=_finite(spent)))
    return tuple(rows)


def _data(cohort: CohortPlan) -> tuple[str, ...]:
    told = [
        f"Tiles of {cohort.tile_px} x {cohort.tile_px} pixels at {cohort.mpp:g} um/px from bright-field whole-slide images, "
        f"each with at least {cohort.tissue_share:.0%} tissue; {cohort.tiles_per_patient} tiles for each patient drawn."
    ]
    for word, rules in (("with", cohort.include), ("without", cohort.exclude)):
        for attribute in ATTRIBUTES:
            values = getattr(rules, attribute)
            if values:
                told.append(f"Only slides {word} {attribute.replace('_', ' ')} {', '.join(values)}.")
    if cohort.include.acquired_from or cohort.include.acquired_until:
        told.append(f"Only slides acquired {_days(cohort)}.")
    if cohort.tile_weights:
        told.append(f"Tiles are weighted by {len(cohort.tile_weights)} public rules of the plan.")
    return tuple(told)


def _days(cohort: CohortPlan) -> str:
    ends = (("from", cohort.include.acquired_from), ("until", cohort.include.acquired_until))
    return " ".join(f"{word} {day}" for word, day in ends if day)


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None
