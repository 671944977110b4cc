"""Verifying a record: an honest one passes, a changed byte anywhere fails, and lies that the server signs itself are found."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from record_fixtures import ROUNDS, Scene
from torch import Tensor

from pathfed_common import digest, model
from pathfed_common.encoder import weights
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.plan import AdaptersPlan, AggregationPlan, DinoPlan, EncoderPlan, Plan
from pathfed_common.provenance import record
from pathfed_common.provenance.documents import SiteCard, seal_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.record import AbsentSite, AdmittedSite, Manifest, RoundRecord
from pathfed_common.provenance.record_reader import TrustedKeys
from pathfed_common.provenance.statement import UpdateStatement
from pathfed_common.provenance.verify import Verdict, read_trust, verify_record

Write = Callable[[dict[str, bytes]], Path]
OTHER = digest.of_bytes(b"other")


def _refused(verdict: Verdict, code: ErrorCode, where: str | None = None) -> ProvenanceError:
    with pytest.raises(ProvenanceError) as caught:
        verdict.require()
    matching = [finding for finding in verdict.findings if finding.code == code and where in (None, finding.where)]
    assert matching, [str(finding) for finding in verdict.findings]
    assert not verdict.consistent
    assert not verdict.identities_proven
    return caught.value


def _in_round(index: int, site: str, **change: Any) -> Callable[[UpdateStatement], UpdateStatement]:
    return lambda value: replace(value, **change) if (value.round_index, value.site) == (index, site) else value


def test_honest_record_verifies(scene: Any, write: Write) -> None:
    verdict = verify_record(write(scene.files()), scene.trusted)
    verdict.require(identities=True)
    assert (verdict.run, verdict.plan, verdict.server_key, verdict.rounds) == ("run-1", scene.plan.digest, scene.server.public, 3)
    assert [(site.site, site.rounds, site.key, site.key_trusted) for site in verdict.sites] == [
        (name, rounds, scene.keys[name].public, True) for name, rounds in (("a", 3), ("b", 3), ("c", 2))
    ]
    for site in verdict.sites:
        assert site.epsilon_stated == pytest.approx(site.epsilon_recomputed, abs=1e-9)
        assert site.epsilon_recomputed > 0.1
        assert site.codes == (digest.of_bytes(b"code"),)
    assert verdict.delta == 1e-6
    assert not verdict.aggregation_proven
    assert verdict.notes == ("aggregation not proven: 0 of 8 admitted updates are retained, and none was replayed",)


def test_without_trusted_keys_identities_are_unproven(scene: Any, write: Write) -> None:
    folder = write(scene.files())
    for trusted in (None, TrustedKeys(server=scene.server.public), TrustedKeys(sites=scene.trusted.sites)):
        verdict = verify_record(folder, trusted)
        verdict.require()
        assert not verdict.identities_proven
        with pytest.raises(ProvenanceError) as caught:
            verdict.require(identities=True)
        assert caught.value.code == ErrorCode.IDENTITY_UNPROVEN


def test_another_servers_or_sites_key_is_refused(scene: Any, write: Write) -> None:
    folder, stranger = write(scene.files()), SigningKey.generate().public
    _refused(verify_record(folder, replace(scene.trusted, server=stranger)), ErrorCode.RECORD_SIGNATURE, record.MANIFEST)
    trusted = replace(scene.trusted, sites={**scene.trusted.sites, "b": stranger})
    _refused(verify_record(folder, trusted), ErrorCode.RECORD_SIGNATURE, "sites/b.dsse")


def test_same_record_made_with_other_keys_is_refused_by_trust_alone(scene: Any, write: Write) -> None:
    impostor = replace(scene, server=SigningKey.generate(), keys={site: SigningKey.generate() for site in scene.keys})
    folder = write(impostor.files())
    assert verify_record(folder).consistent
    _refused(verify_record(folder, scene.trusted), ErrorCode.RECORD_SIGNATURE)


def test_a_change_of_any_byte_of_any_file_is_found(scene: Any, write: Write) -> None:
    files = scene.files()
    folder = write(files)

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def found(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(files)))
        place, bit = data.draw(st.integers(0, len(files[path]) - 1)), data.draw(st.integers(0, 7))
        changed = bytearray(files[path])
        changed[place] ^= 1 << bit
        (folder / path).write_bytes(changed)
        verdict = verify_record(folder)
        (folder / path).write_bytes(files[path])
        assert [finding.where for finding in verdict.findings] == [path]
        assert verdict.findings[0].code in (ErrorCode.RECORD_CHANGED, ErrorCode.RECORD_SIGNATURE)

    found()
    verify_record(folder).require()


def test_a_change_of_any_byte_of_the_manifest_is_found(scene: Any) -> None:
    data = scene.files()[record.MANIFEST]
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        with pytest.raises(ProvenanceError):
            Manifest.from_bytes(bytes(changed))


def test_cut_grown_empty_and_missing_files_are_found(scene: Any, write: Write) -> None:
    files = scene.files()
    folder = write(files)
    for path, data in files.items():
        if path == record.MANIFEST:
            continue
        for changed in (data[:-1], data + b"\n", data[1:], b""):
            (folder / path).write_bytes(changed)
            _refused(verify_record(folder), ErrorCode.RECORD_CHANGED, path)
        (folder / path).unlink()
        _refused(verify_record(folder), ErrorCode.RECORD_INCOMPLETE, path)
        (folder / path).write_bytes(data)
    verify_record(folder).require()


def test_a_link_in_place_of_a_file_is_refused(scene: Any, write: Write) -> None:
    folder = write(scene.files())
    original = folder / record.PLAN
    original.rename(folder / "elsewhere")
    original.symlink_to("elsewhere")
    _refused(verify_record(folder), ErrorCode.RECORD_INCOMPLETE, record.PLAN)


def test_missing_folder_is_incomplete_and_says_what_to_give(tmp_path: Path) -> None:
    error = _refused(verify_record(tmp_path / "nowhere"), ErrorCode.RECORD_INCOMPLETE, record.MANIFEST)
    assert "manifest.dsse" in str(error)


def test_unlisted_files_are_reported_and_do_no_harm(scene: Any, write: Write) -> None:
    verdict = verify_record(write({**scene.files(), "notes.txt": b"x", "statements/round-0002/c.dsse": b"junk"}), scene.trusted)
    verdict.require(identities=True)
    assert "not part of the record: notes.txt" in verdict.notes
    assert "not part of the record: statements/round-0002/c.dsse" in verdict.notes


@pytest.mark.parametrize(
    "path",
    [
        record.PLAN,
        record.SIGNED_PLAN,
        "sites/a.dsse",
        "approvals/a.dsse",
        "statements/round-0002/a.dsse",
        "rounds/round-0002.dsse",
        "states/round-0002.safetensors",
        record.ENCODER_CONFIG,
    ],
)
def test_a_file_dropped_from_record_and_manifest_is_missed(path: str, scene: Any, write: Write) -> None:
    files = scene.files(files=lambda made: {name: data for name, data in made.items() if name != path})
    _refused(verify_record(write(files), scene.trusted), ErrorCode.RECORD_INCOMPLETE)


def test_last_round_dropped_while_the_manifest_counts_it_or_not(scene: Any, write: Write) -> None:
    def without_last(made: dict[str, bytes]) -> dict[str, bytes]:
        return {name: data for name, data in made.items() if name != record.round_path(3)}

    _refused(verify_record(write(scene.files(files=without_last))), ErrorCode.RECORD_INCOMPLETE, record.round_path(3))
    files = scene.files(files=without_last, manifest=lambda listing: replace(listing, rounds=2))
    _refused(verify_record(write(files)), ErrorCode.RECORD_CHANGED, record.state_path(3))


def test_statements_swapped_between_rounds_or_sites_are_found(scene: Any, write: Write) -> None:
    def swapped(first: str, second: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
        return lambda made: {**made, first: made[second], second: made[first]}

    rounds = swapped(record.statement_path(1, "a"), record.statement_path(2, "a"))
    _refused(verify_record(write(scene.files(files=rounds))), ErrorCode.RECORD_CHANGED, record.statement_path(1, "a"))
    sites = swapped(record.statement_path(1, "a"), record.statement_path(1, "b"))
    _refused(verify_record(write(scene.files(files=sites))), ErrorCode.RECORD_SIGNATURE, record.statement_path(1, "a"))
    records = swapped(record.round_path(1), record.round_path(2))
    _refused(verify_record(write(scene.files(files=records))), ErrorCode.RECORD_CHANGED, record.round_path(1))


def test_a_statement_signed_by_another_site_or_the_server_is_refused(scene: Any, write: Write) -> None:
    for key in (scene.keys["b"], scene.server):

        def signed(own: SigningKey, value: UpdateStatement, key: SigningKey = key) -> SigningKey:
            return key if (value.round_index, value.site) == (2, "a") else own

        _refused(verify_record(write(scene.files(statement_key=signed))), ErrorCode.RECORD_SIGNATURE, record.statement_path(2, "a"))


def test_a_replaced_statement_is_found_even_when_its_site_signed_it(scene: Any, write: Write) -> None:
    honest = scene.files()
    where = record.statement_path(3, "a")
    value = UpdateStatement.from_envelope(honest[where], scene.keys["a"].public)
    other = replace(value, epsilon_total=1.5).to_envelope(scene.keys["a"])
    _refused(verify_record(write(scene.files(files=lambda made: {**made, where: other}))), ErrorCode.RECORD_CHANGED, where)


@pytest.mark.parametrize(
    "change",
    [
        {"run": "run-2"},
        {"plan": OTHER},
        {"base_state": OTHER},
        {"update": OTHER},
        {"update_bytes": 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_statement_for_something_else_is_found(change: dict[str, Any], scene: Any, write: Write) -> None:
    error = _refused(
        verify_record(write(scene.files(statement=_in_round(2, "b", **change)))), ErrorCode.RECORD_CHANGED, record.statement_path(2, "b")
    )
    assert next(iter(change)) in error.what


@pytest.mark.parametrize("field", ["sampling_rate", "noise_multiplier", "clip_norm", "steps", "delta"])
def test_a_privacy_event_other_than_the_plans_is_found(field: str, scene: Any, write: Write) -> None:
    def lied(value: UpdateStatement) -> UpdateStatement:
        if (value.round_index, value.site) != (2, "b"):
            return value
        changed = 2 if field == "steps" else getattr(value.privacy, field) * 0.5
        return replace(value, privacy=replace(value.privacy, **{field: changed}))

    _refused(verify_record(write(scene.files(statement=lied))), ErrorCode.RECORD_CHANGED, record.statement_path(2, "b"))


def test_understated_epsilon_is_found(scene: Any, write: Write) -> None:
    def understated(value: UpdateStatement) -> UpdateStatement:
        last = (value.round_index, value.site) == (3, "a")
        return replace(value, epsilon_plan=value.epsilon_plan - 1e-4) if last else value

    error = _refused(verify_record(write(scene.files(statement=understated))), ErrorCode.RECORD_CHANGED, record.statement_path(3, "a"))
    assert "understates" in error.what


def test_a_delta_that_changes_within_a_run_is_found(scene: Any, write: Write) -> None:
    """A larger delta makes a total look smaller; the ledger has one for its whole life."""
    changed = scene.files(statement=_in_round(2, "a", delta_total=1e-3))
    found = _refused(verify_record(write(changed)), ErrorCode.RECORD_CHANGED, record.statement_path(2, "a"))
    assert "delta changed" in found.what


def test_falling_epsilon_is_found_and_a_larger_one_is_the_sites_business(scene: Any, write: Write) -> None:
    fell = scene.files(statement=_in_round(2, "a", epsilon_plan=0.0))
    assert "fell" in _refused(verify_record(write(fell)), ErrorCode.RECORD_CHANGED, record.statement_path(2, "a")).what
    more = scene.files(statement=_in_round(3, "a", epsilon_plan=7.5))
    verdict = verify_record(write(more), scene.trusted)
    verdict.require(identities=True)
    assert verdict.sites[0].epsilon_stated == 7.5


@pytest.mark.parametrize(("index", "previous"), [(1, OTHER), (2, None), (2, OTHER), (3, None)])
def test_a_broken_chain_of_statements_is_found(index: int, previous: Any, scene: Any, write: Write) -> None:
    files = scene.files(statement=_in_round(index, "a", previous=previous))
    _refused(verify_record(write(files)), ErrorCode.STATEMENT_CHAIN, record.statement_path(index, "a"))


def test_a_statement_that_came_too_late_leaves_a_gap_that_is_told(scene: Any, write: Write) -> None:
    verdict = verify_record(write(scene.files(statement=_in_round(3, "c", previous=OTHER))), scene.trusted)
    verdict.require(identities=True)
    assert "c: the statement of round 3 follows one that did not count and is not in the record" in verdict.notes
    denied = scene.files(statement=_in_round(3, "c", previous=None))
    _refused(verify_record(write(denied)), ErrorCode.STATEMENT_CHAIN, record.statement_path(3, "c"))


@pytest.mark.parametrize("code", ["PF564", "PF565"])
def test_a_site_asked_by_an_attempt_that_failed_and_left_out_of_the_next_leaves_a_gap(code: str, scene: Any, write: Write) -> None:
    """It chained a statement then, which is in no record: the round counted without it."""
    left = _rounds(2, lambda value: {"silent": (), "excluded": (AbsentSite(site=SiteName("c"), code=code),)})
    verdict = verify_record(write(scene.files(statement=_in_round(3, "c", previous=OTHER), round_record=left)))
    assert verdict.findings == ()
    assert "c: the statement of round 3 follows one that did not count and is not in the record" in verdict.notes


def test_an_update_that_an_operator_released_is_told(scene: Any, write: Write) -> None:
    released = _rounds(1, lambda value: {"admitted": (replace(value.admitted[0], released="PF508"), *value.admitted[1:])})
    verdict = verify_record(write(scene.files(round_record=released)))
    assert verdict.findings == ()
    assert "a: the update of round 1 was refused (PF508), and an operator let it count" in verdict.notes


@pytest.mark.parametrize("at_most", [0, 2, 3])
def test_a_round_that_passed_over_a_site_whose_turn_it_was_is_found(at_most: int, scene: Any, write: Write) -> None:
    scene.plan = scene.plan.model_copy(update={"rounds": scene.plan.rounds.model_copy(update={"ask_at_most": at_most})})
    passed = {"silent": (), "excluded": (AbsentSite(site=SiteName("c"), code="PF562"),)}
    verdict = verify_record(write(scene.files(round_record=_rounds(2, lambda value: passed if at_most != 2 else {}))))
    _refused(verdict, ErrorCode.RECORD_CHANGED, record.round_path(2))


def _rounds(index: int, change: Callable[[RoundRecord], dict[str, Any]]) -> Callable[[RoundRecord], RoundRecord]:
    return lambda value: replace(value, **change(value)) if value.round_index == index else value


def _weights(value: RoundRecord) -> dict[str, Any]:
    first, second, *others = value.admitted
    return {"admitted": (replace(first, weight=second.weight), replace(second, weight=first.weight), *others)}


def _unasked(value: RoundRecord) -> dict[str, Any]:
    first = value.admitted[0]
    extra = AdmittedSite(site="d", update=OTHER, update_bytes=1, statement=OTHER, weight=first.weight, rounding=0.0)  # type: ignore[arg-type]
    return {"admitted": (*value.admitted, extra)}


@pytest.mark.parametrize(
    "change",
    [
        lambda value: {"run": "run-2"},
        lambda value: {"plan": OTHER},
        lambda value: {"base_state": OTHER},
        lambda value: {"next_state": OTHER},
        lambda value: {"previous": OTHER},
        lambda value: {"previous": None},
        lambda value: {"round_index": 3},
        lambda value: {"admitted": value.admitted[:1]},
        lambda value: {"admitted": ()},
        _weights,
    ],
    ids=["run", "plan", "base", "next", "previous", "no-previous", "index", "dropped", "nobody", "weights"],
)
def test_a_round_record_that_disagrees_is_found(change: Any, scene: Any, write: Write) -> None:
    files = scene.files(round_record=_rounds(2, change))
    _refused(verify_record(write(files)), ErrorCode.RECORD_CHANGED)


def test_an_invented_participant_is_found(scene: Any, write: Write) -> None:
    verdict = verify_record(write(scene.files(round_record=_rounds(2, _unasked))))
    _refused(verdict, ErrorCode.RECORD_INCOMPLETE, record.statement_path(2, "d"))
    _refused(verdict, ErrorCode.RECORD_INCOMPLETE, record.approval_path("d"))


def test_an_admitted_site_called_silent_leaves_its_statement_over(scene: Any, write: Write) -> None:
    def silenced(value: RoundRecord) -> dict[str, Any]:
        return {"admitted": value.admitted[:2], "silent": (AbsentSite(site="c", code="PF515"),)}  # type: ignore[arg-type]

    _refused(verify_record(write(scene.files(round_record=_rounds(3, silenced)))), ErrorCode.RECORD_CHANGED, record.statement_path(3, "c"))


def test_too_few_updates_for_the_quorum_are_found(scene: Any, write: Write) -> None:
    strict = replace(scene, plan=scene.plan.model_copy(update={"rounds": scene.plan.rounds.model_copy(update={"quorum": 3})}))
    error = _refused(verify_record(write(strict.files())), ErrorCode.RECORD_CHANGED, record.round_path(2))
    assert "quorum" in error.what


def test_more_rounds_than_the_plan_has_are_found(scene: Any, write: Write) -> None:
    short = replace(scene, plan=scene.plan.model_copy(update={"rounds": scene.plan.rounds.model_copy(update={"count": 2})}))
    assert "more rounds" in _refused(verify_record(write(short.files())), ErrorCode.RECORD_CHANGED, "rounds").what


def test_an_approval_of_another_plan_or_of_fewer_patients_is_found(scene: Any, write: Write) -> None:
    other = scene.files(approval=lambda value: replace(value, plan=OTHER) if value.site == "a" else value)
    _refused(verify_record(write(other)), ErrorCode.RECORD_CHANGED, "approvals/a.dsse")
    fewer = scene.files(approval=lambda value: replace(value, declared_patients=20) if value.site == "a" else value)
    _refused(verify_record(write(fewer)), ErrorCode.RECORD_CHANGED, record.statement_path(1, "a"))
    impossible = scene.files(approval=lambda value: replace(value, declared_patients=2) if value.site == "a" else value)
    _refused(verify_record(write(impossible)), ErrorCode.RECORD_CHANGED, "approvals/a.dsse")


def test_another_plan_than_the_signed_or_the_approved_one_is_found(scene: Any, write: Write) -> None:
    cheaper = scene.plan.model_copy(update={"privacy": scene.plan.privacy.model_copy(update={"noise_multiplier": 0.5})})
    files = scene.files(files=lambda made: {**made, record.PLAN: cheaper.canonical_bytes()})
    _refused(verify_record(write(files)), ErrorCode.RECORD_CHANGED, record.PLAN)
    loose = scene.files(files=lambda made: {**made, record.PLAN: json.dumps(json.loads(made[record.PLAN])).encode()})
    _refused(verify_record(write(loose)), ErrorCode.RECORD_CHANGED, record.PLAN)


def test_another_plan_signed_by_the_server_is_not_what_sites_approved(scene: Any, write: Write) -> None:
    other = scene.plan.model_copy(update={"privacy": scene.plan.privacy.model_copy(update={"loss_bound": 4.0})})
    forged = replace(scene, plan=other).files(approval=lambda value: replace(value, plan=scene.plan.digest))
    _refused(verify_record(write(forged)), ErrorCode.RECORD_CHANGED, "approvals/a.dsse")


def test_a_signed_plan_other_than_the_readable_one_is_found(scene: Any, write: Write) -> None:
    other = scene.plan.model_copy(update={"privacy": scene.plan.privacy.model_copy(update={"loss_bound": 4.0})})
    files = scene.files(files=lambda made: {**made, record.SIGNED_PLAN: seal_plan(other, scene.server)})
    _refused(verify_record(write(files)), ErrorCode.RECORD_CHANGED, record.PLAN)


def test_a_manifest_that_names_another_plan_is_found(scene: Any, write: Write) -> None:
    files = scene.files(manifest=lambda listing: replace(listing, plan=OTHER))
    _refused(verify_record(write(files)), ErrorCode.RECORD_CHANGED, record.PLAN)


def test_a_size_that_is_not_the_files_is_found(scene: Any, write: Write) -> None:
    def grown(listing: Manifest) -> Manifest:
        first, *others = listing.files
        return replace(listing, files=(replace(first, size=first.size + 1), *others))

    _refused(verify_record(write(scene.files(manifest=grown))), ErrorCode.RECORD_CHANGED, "approvals/a.dsse")


def test_a_document_in_another_sites_place_is_found(scene: Any, write: Write) -> None:
    key = scene.keys["a"]
    card = SiteCard(site=SiteName("d"), evidence_key=key.public, flower_key="ssh").to_bytes(key)
    _refused(verify_record(write(scene.files(files=lambda made: {**made, "sites/a.dsse": card}))), ErrorCode.RECORD_CHANGED, "sites/a.dsse")
    approved = scene.files(approval=lambda value: replace(value, site="b") if value.site == "a" else value)
    _refused(verify_record(write(approved)), ErrorCode.RECORD_CHANGED, "approvals/a.dsse")
    where = record.statement_path(2, "a")
    honest = UpdateStatement.from_envelope(scene.files()[where], key.public)
    moved = replace(honest, site=SiteName("b")).to_envelope(key)
    _refused(verify_record(write(scene.files(files=lambda made: {**made, where: moved}))), ErrorCode.RECORD_CHANGED, where)


def test_a_changed_state_is_found_although_the_manifest_lists_it(scene: Any, write: Write) -> None:
    def poisoned(made: dict[str, bytes]) -> dict[str, bytes]:
        state = weights.load(made[record.state_path(1)])
        state["encoder.norm.bias"][0] += 1
        return {**made, record.state_path(1): weights.dump(state, {})}

    _refused(verify_record(write(scene.files(files=poisoned))), ErrorCode.RECORD_CHANGED, record.round_path(1))


def test_a_state_of_another_model_is_found(scene: Any, write: Write) -> None:
    def smaller(state: dict[str, Any], index: int) -> dict[str, Any]:
        return {name: tensor for name, tensor in state.items() if index != 2 or name != "head.mask_token"}

    _refused(verify_record(write(scene.files(state=smaller))), ErrorCode.RECORD_CHANGED, record.state_path(2))


def test_an_encoder_other_than_the_last_states_is_found(scene: Any, write: Write) -> None:
    def with_encoder(change: Callable[[dict[str, Any]], object]) -> dict[str, bytes]:
        def changed(made: dict[str, bytes]) -> dict[str, bytes]:
            encoder = weights.load(made[record.ENCODER])
            change(encoder)
            return {**made, record.ENCODER: weights.dump(encoder, {"format": "pt"})}

        files: dict[str, bytes] = scene.files(files=changed)
        return files

    one_bit = with_encoder(lambda encoder: encoder["norm.bias"].view(dtype=torch.int32)[0].bitwise_xor_(1))
    error = _refused(verify_record(write(one_bit)), ErrorCode.RECORD_CHANGED, record.ENCODER)
    assert error.value == "norm.bias"
    _refused(verify_record(write(with_encoder(lambda encoder: encoder.pop("norm.bias")))), ErrorCode.RECORD_CHANGED, record.ENCODER)
    config = scene.files(files=lambda made: {**made, record.ENCODER_CONFIG: made[record.ENCODER_CONFIG] + b" "})
    _refused(verify_record(write(config)), ErrorCode.RECORD_CHANGED, record.ENCODER_CONFIG)


def test_of_a_run_with_a_teacher_the_teachers_encoder_is_released_and_no_other(scene: Any, write: Write) -> None:
    objective = DinoPlan(local_crop_px=16, head_dim=16, bottleneck_dim=8, prototypes=16)
    scene.plan = Plan.model_validate(scene.plan.model_dump() | {"objective": objective, "encoder": scene.plan.encoder})
    verdict = verify_record(write(scene.files()), scene.trusted)
    assert verdict.findings == ()
    assert verdict.identities_proven

    def students(made: dict[str, bytes]) -> dict[str, bytes]:
        state = weights.load(made[record.state_path(3)])
        encoder = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
        return {**made, record.ENCODER: weights.dump(encoder, {"format": "pt"})}

    error = _refused(verify_record(write(scene.files(files=students))), ErrorCode.RECORD_CHANGED, record.ENCODER)
    assert error.what == "the exported encoder is not the last state's"


def _averaged(scene: Any) -> Any:
    plan = scene.plan
    return replace(scene, plan=plan.model_copy(update={"server_optimiser": plan.server_optimiser.model_copy(update={"ema": 0.9})}))


def test_a_released_average_is_bound_by_the_last_rounds_record(scene: Any, write: Write) -> None:
    averaged = _averaged(scene)
    assert verify_record(write(averaged.files()), averaged.trusted).findings == ()
    others = {"the last state's": scene.files()[record.ENCODER], "another round's": averaged._average(2)}
    for data in others.values():
        crooked = averaged.files(files=lambda made, data=data: made | {record.ENCODER: data})
        _refused(verify_record(write(crooked)), ErrorCode.RECORD_CHANGED, record.ENCODER)


@pytest.mark.parametrize("ema", [False, True])
def test_a_round_names_an_average_just_where_the_plan_releases_one(ema: bool, scene: Any, write: Write) -> None:
    made = _averaged(scene) if ema else scene
    lie = None if ema else digest.of_bytes(b"average")
    crooked = made.files(round_record=lambda found: replace(found, average=lie) if found.round_index == 2 else found)
    _refused(verify_record(write(crooked)), ErrorCode.RECORD_CHANGED, record.round_path(2))


@pytest.mark.parametrize("rule", ["mean", "norm_weighted"])
def test_a_weights_factor_is_for_the_rule_that_gives_one(rule: str, scene: Any, write: Write) -> None:
    plan = scene.plan
    made = replace(
        scene,
        plan=plan.model_copy(update={"aggregation": AggregationPlan.model_validate({"rule": rule})}),
        factors={(1, "b"): 0.5},
    )
    verdict = verify_record(write(made.files()))
    if rule == "norm_weighted":
        assert verdict.findings == ()
    else:
        _refused(verdict, ErrorCode.RECORD_CHANGED, record.round_path(1))


def test_a_record_before_the_encoder_is_exported_verifies_and_says_so(scene: Any, write: Write) -> None:
    files = scene.files(files=lambda made: {name: data for name, data in made.items() if not name.startswith("encoder/")})
    verdict = verify_record(write(files), scene.trusted)
    verdict.require(identities=True)
    assert "no encoder is exported: the run is not finished" in verdict.notes


def test_retained_updates_are_checked_against_the_statements(scene: Any, write: Write) -> None:
    verdict = verify_record(write(scene.files(retain=True)), scene.trusted)
    verdict.require(identities=True)
    assert "aggregation not proven: 8 of 8 admitted updates are retained, and none was replayed" in verdict.notes
    where = record.update_path(2, "a")
    files = scene.files(retain=True, files=lambda made: {**made, where: b"another update"})
    _refused(verify_record(write(files)), ErrorCode.RECORD_CHANGED, where)


def test_replies_that_did_not_wait_for_their_slot_are_told(scene: Any, write: Write) -> None:
    verdict = verify_record(write(scene.files(statement=_in_round(2, "a", reply_slot_s=None))), scene.trusted)
    verdict.require(identities=True)
    assert "a: replies did not wait for the plan's time slots in 1 round(s)" in verdict.notes


def test_all_faults_are_told_not_the_first_alone(scene: Any, write: Write) -> None:
    files = scene.files()
    changed = {path: data[:-1] for path, data in files.items() if path.startswith("statements/")}
    verdict = verify_record(write({**files, **changed}))
    assert sorted(finding.where or "" for finding in verdict.findings) == sorted(changed)


def test_trusted_keys_are_read_strictly() -> None:
    key = SigningKey.generate().public
    text = key.to_text()
    assert read_trust(json.dumps({"server": text, "sites": {"a": text}}), where="t") == TrustedKeys(server=key, sites={"a": key})
    assert read_trust("{}", where="t") == TrustedKeys()
    for bad in (
        "",
        "[]",
        '{"a": "ed25519:x"}',
        json.dumps({"server": text[:-1]}),
        json.dumps({"sites": [text]}),
        json.dumps({"sites": {"A B": text}}),
    ):
        with pytest.raises(ProvenanceError) as caught:
            read_trust(bad, where="t")
        assert caught.value.code == ErrorCode.IDENTITY_UNPROVEN


@pytest.fixture
def adapted(scene: Scene) -> Scene:
    """A run that trained adapters beside an encoder that kept its weights."""
    encoder = EncoderPlan(adapters=AdaptersPlan(rank=2, scale=0.5))
    return Scene(scene.plan.model_copy(update={"encoder": encoder}))


def test_a_run_of_adapters_verifies_with_the_merged_encoder(adapted: Scene, write: Write) -> None:
    verdict = verify_record(write(adapted.files()), adapted.trusted)
    verdict.require(identities=True)
    assert verdict.first_state_proven


def test_a_frozen_tensor_that_changed_is_found_in_whatever_state(adapted: Scene, write: Write) -> None:
    def changed(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        return tensors if index != 2 else {**tensors, "encoder.norm.bias": tensors["encoder.norm.bias"] + 1e-6}

    _refused(verify_record(write(adapted.files(state=changed))), ErrorCode.RECORD_CHANGED, record.state_path(2))


def test_an_encoder_without_its_adapters_is_not_the_released_one(adapted: Scene, write: Write) -> None:
    def unmerged(files: dict[str, bytes]) -> dict[str, bytes]:
        names = model.encoder_spec(adapted.plan).shapes()
        last = weights.load(files[record.state_path(ROUNDS)])
        return files | {record.ENCODER: weights.dump({name: last[f"encoder.{name}"] for name in names}, {"format": "pt"})}

    _refused(verify_record(write(adapted.files(files=unmerged))), ErrorCode.RECORD_CHANGED, record.ENCODER)


def test_adapters_of_the_first_state_are_drawn_from_the_seed(adapted: Scene, write: Write) -> None:
    def other(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        name = "encoder.blocks.0.attn.qkv.lora_a.weight"
        return tensors if index else {**tensors, name: tensors[name] * 1.5}

    _refused(verify_record(write(adapted.files(state=other))), ErrorCode.FIRST_STATE, record.state_path(0))
