"""Whether a record's signed documents agree with each other. Pure: works on what `verify` has read, signatures already checked.

Each check yields what is wrong as a ProvenanceError, so that one fault does not hide another.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import fsum

from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, PlanError, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.plan import Plan
from pathfed_common.privacy.accounting import PrivacyEvent, composed_epsilon
from pathfed_common.provenance import record
from pathfed_common.provenance.documents import Approval
from pathfed_common.provenance.record import AdmittedSite, Manifest, RoundRecord
from pathfed_common.provenance.statement import Privacy, UpdateStatement
from pathfed_common.turns import whose_turn

#: A stated epsilon may be this much below the recomputed one, for rounding in another build of the accountant.
EPSILON_SLACK = 1e-6
_WEIGHT_SLACK = 1e-9
#: Reasons for which a site may be left out of the attempt at a round that counted, though an attempt before had asked it.
_ASKED_BEFORE = frozenset({ErrorCode.SITE_NOT_ASKED, ErrorCode.SITE_LEFT_RUN, ErrorCode.SITE_SUSPENDED})

Faults = Iterator[ProvenanceError]


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """A verified statement with the digest of its envelope."""

    statement: UpdateStatement
    envelope: Digest


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The verified documents of a record.

    Attributes:
        manifest: the manifest.
        plan: the plan.
        approvals: each site's approval.
        rounds: the round records, in order, and the digests of their envelopes.
        statements: statements by round index and site.
    """

    manifest: Manifest
    plan: Plan
    approvals: Mapping[SiteName, Approval]
    rounds: tuple[tuple[RoundRecord, Digest], ...]
    statements: Mapping[tuple[int, SiteName], Sealed]


def check_rounds(contents: Contents) -> Faults:
    """Round records against plan, manifest and each other: order, chain of states, quorum, public weights."""
    manifest, plan = contents.manifest, contents.plan
    state, previous = _state(manifest, 0), None
    if len(contents.rounds) > plan.rounds.count:
        yield _fault("there are more rounds than the plan has", "rounds", f"{len(contents.rounds)} > {plan.rounds.count}")
    counted = {record.round_path(index) for index in range(1, manifest.rounds + 1)} | {
        record.state_path(index) for index in range(manifest.rounds + 1)
    }
    for entry in manifest.files:
        if entry.path.startswith(("rounds/", "states/")) and entry.path not in counted:
            yield _fault("a round that the manifest does not count", entry.path, f"rounds {manifest.rounds}")
    for index, (found, envelope) in enumerate(contents.rounds, start=1):
        where = record.round_path(index)
        expected = {"run": manifest.run, "round_index": index, "plan": manifest.plan, "base_state": state, "previous": previous}
        expected["next_state"] = _state(manifest, index)
        yield from _differences(found, expected, where)
        if len(found.admitted) < plan.rounds.quorum:
            yield _fault("the round has fewer updates than the plan's quorum", where, f"{len(found.admitted)} < {plan.rounds.quorum}")
        yield from _check_weights(found, plan, where)
        yield from _check_turns(found, plan, where)
        if (found.average is None) == bool(plan.server_optimiser.ema):
            yield _fault("the round names a running average just when the plan has none", where, found.average)
        state, previous = found.next_state, envelope


def check_statements(contents: Contents) -> Faults:
    """Statements against the round records, the plan and the approvals: every admitted site has one, and it says the same."""
    admitted = {(found.round_index, site.site): (found, site) for found, _ in contents.rounds for site in found.admitted}
    for key in sorted(contents.statements.keys() - admitted.keys()):
        yield _fault("a statement of a site that was not admitted", record.statement_path(*key))
    for key, (found, site) in sorted(admitted.items(), key=lambda item: item[0]):
        where, sealed, approval = record.statement_path(*key), contents.statements.get(key), contents.approvals.get(key[1])
        if approval is None:
            yield _fault("an admitted site has not approved the plan", record.approval_path(key[1]), code=ErrorCode.RECORD_INCOMPLETE)
        if sealed is None:
            yield _fault("an admitted site's statement is missing", where, code=ErrorCode.RECORD_INCOMPLETE)
            continue
        yield from _check_statement(sealed, found, site, where)
        if approval is not None:
            yield from _check_against_plan(sealed.statement, contents.plan, approval, where)


def check_chains(contents: Contents) -> Faults:
    """Each site's statements name the one before."""
    for site in _sites(contents):
        for sealed, expected, gap in _links(contents, site):
            named = sealed.statement.previous
            if named != expected and (named is None or not gap):
                where = record.statement_path(sealed.statement.round_index, site)
                yield _fault("the statement does not follow the site's previous one", where, named, code=ErrorCode.STATEMENT_CHAIN)


def chain_gaps(contents: Contents) -> list[tuple[SiteName, int]]:
    """Sites and rounds whose statement follows one that is not in the record.

    A site chains every statement it makes. One that came too late or was refused is not recorded, so its successor names an envelope the
    record does not have: allowed where the site was asked in between and did not count, and worth knowing.
    """
    return [
        (site, sealed.statement.round_index)
        for site in _sites(contents)
        for sealed, expected, gap in _links(contents, site)
        if gap and sealed.statement.previous != expected
    ]


def without_slots(contents: Contents) -> dict[SiteName, int]:
    """In how many rounds a site's reply did not wait for the plan's time slot: its own policy allows that, and it is a side channel."""
    slot = contents.plan.rounds.reply_slot_s
    return dict(sorted(Counter(site for (_, site), sealed in contents.statements.items() if sealed.statement.reply_slot_s != slot).items()))


def released(contents: Contents) -> list[tuple[SiteName, int, str]]:
    """Sites and rounds whose update was refused with a code, and let count by an operator."""
    return [(site.site, found.round_index, site.released) for found, _ in contents.rounds for site in found.admitted if site.released]


def check_epsilons(contents: Contents) -> Faults:
    """A site's stated epsilons never fall; the last is at least what its releases cost, and within the limit it approved; delta is one."""
    limit = contents.plan.privacy.epsilon_limit
    by_site = statements_by_site(contents)
    for site, recomputed in recomputed_epsilons(contents).items():
        statements = [sealed.statement for sealed in by_site[site]]
        for first, later in pairwise(statements):
            where = record.statement_path(later.round_index, site)
            if later.delta_total != first.delta_total:
                yield _fault("the site's delta changed, which is fixed for its ledger", where, later.delta_total)
            if later.epsilon_plan < first.epsilon_plan - EPSILON_SLACK:
                yield _fault("the stated epsilon fell", where, f"{later.epsilon_plan} after {first.epsilon_plan}")
        last = statements[-1]
        where = record.statement_path(last.round_index, site)
        if last.epsilon_plan < recomputed - EPSILON_SLACK:
            yield _fault("the site understates its epsilon", where, f"{last.epsilon_plan}, recomputed {recomputed}")
        if max(last.epsilon_plan, recomputed) > limit + EPSILON_SLACK:
            value = f"stated {last.epsilon_plan}, recomputed {recomputed}, limit {limit}"
            yield _fault("the site's epsilon is above the limit that it approved", where, value, code=ErrorCode.EPSILON_EXCEEDED)


def recomputed_epsilons(contents: Contents) -> dict[SiteName, float]:
    """Epsilon of each site's recorded releases together, at the plan's delta."""
    return {site: composed_epsilon(events, contents.plan.privacy.delta) for site, events in events_by_site(contents).items()}


def events_by_site(contents: Contents) -> dict[SiteName, list[PrivacyEvent]]:
    """The privacy events of each site's recorded releases, by site and round."""
    return {site: [_event(sealed.statement.privacy) for sealed in given] for site, given in statements_by_site(contents).items()}


def statements_by_site(contents: Contents) -> dict[SiteName, list[Sealed]]:
    """Each site's statements, by site and round."""
    found: dict[SiteName, list[Sealed]] = {site: [] for site in _sites(contents)}
    for (_, site), sealed in sorted(contents.statements.items(), key=lambda item: item[0]):
        found[site].append(sealed)
    return found


def _check_weights(found: RoundRecord, plan: Plan, where: str) -> Faults:
    raw = [plan.site_weights.get(site.site, 1.0) for site in found.admitted]
    for site, weight in zip(found.admitted, raw, strict=True):
        share = weight / fsum(raw)
        if abs(site.weight - share) > _WEIGHT_SLACK:
            yield _fault("a site's weight is not the plan's", where, f"{site.site}: {site.weight}, plan {share}")
        if site.factor != 1 and plan.aggregation.rule != "norm_weighted":
            yield _fault("a site's weight has a factor that the plan's rule does not give", where, f"{site.site}: {site.factor}")


def _check_turns(found: RoundRecord, plan: Plan, where: str) -> Faults:
    """Where the plan asks fewer sites than could take part, the public rule says which (`turns`)."""
    asked = {entry.site for group in (found.admitted, found.refused, found.silent) for entry in group}
    passed = {entry.site for entry in found.excluded if entry.code == ErrorCode.SITE_NOT_ASKED}
    due = whose_turn(found.plan, found.run, found.round_index, asked | passed, plan.rounds.ask_at_most)
    if asked != due:
        yield _fault("the sites asked are not those whose turn it was", where, f"{sorted(asked ^ due)}")


def _check_statement(sealed: Sealed, found: RoundRecord, site: AdmittedSite, where: str) -> Faults:
    if sealed.envelope != site.statement:
        yield _fault("the statement is not the one the round record names", where, sealed.envelope)
    expected = {"site": site.site, "run": found.run, "round_index": found.round_index, "plan": found.plan, "base_state": found.base_state}
    yield from _differences(sealed.statement, {**expected, "update": site.update, "update_bytes": site.update_bytes}, where)


def _check_against_plan(statement: UpdateStatement, plan: Plan, approval: Approval, where: str) -> Faults:
    try:
        rate = plan.sampling_rate(approval.declared_patients)
    except PlanError as error:
        yield _fault(error.what, record.approval_path(approval.site), error.value)
        return
    privacy = plan.privacy
    expected = Privacy(
        sampling_rate=rate,
        noise_multiplier=privacy.noise_multiplier,
        clip_norm=privacy.clip_norm,
        steps=plan.rounds.steps,
        delta=privacy.delta,
    )
    yield from _differences(statement.privacy, expected.plain(), where)


def _links(contents: Contents, site: SiteName) -> Iterator[tuple[Sealed, Digest | None, bool]]:
    """Each recorded statement of a site, the envelope it should follow, and whether the site may have made others in between."""
    expected: Digest | None = None
    gap = False
    for found, _ in contents.rounds:
        sealed = contents.statements.get((found.round_index, site))
        if sealed is not None:
            yield sealed, expected, gap
            expected, gap = sealed.envelope, False
        else:
            asked = (*found.refused, *found.silent, *(entry for entry in found.excluded if entry.code in _ASKED_BEFORE))
            gap = gap or any(entry.site == site for entry in asked)


def _sites(contents: Contents) -> list[SiteName]:
    return sorted({site for _, site in contents.statements})


def _event(privacy: Privacy) -> PrivacyEvent:
    return PrivacyEvent(sampling_rate=privacy.sampling_rate, noise_multiplier=privacy.noise_multiplier, steps=privacy.steps)


def _state(manifest: Manifest, round_index: int) -> Digest | None:
    entry = manifest.entry(record.state_path(round_index))
    return None if entry is None else entry.digest


def _differences(value: object, expected: Mapping[str, object], where: str) -> Faults:
    for name, wanted in expected.items():
        if getattr(value, name) != wanted:
            yield _fault(f"{name} is not what the rest of the record says", where, f"{getattr(value, name)}, expected {wanted}")


def _fault(what: str, where: str, value: object = None, code: ErrorCode = ErrorCode.RECORD_CHANGED) -> ProvenanceError:
    return ProvenanceError(code, what, where=where, value=value)
