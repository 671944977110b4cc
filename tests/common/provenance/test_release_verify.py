"""Verifying a bundle: an honest one is proven, and lies that the server signs itself are found with their codes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from record_fixtures import SITES, Scene, write_files
from release_fixtures import Files, ReleaseScene, checkpoint

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance import record, release
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_leaves import (
    AnyLeaf,
    EncoderCommitted,
    PlanApproved,
    PlanDecided,
    PlanPublished,
    Released,
    SiteAdmitted,
    SiteRevoked,
    StatementLogged,
    rotate_key,
)
from pathfed_common.provenance.model_signature import ModelKey
from pathfed_common.provenance.note import Note
from pathfed_common.provenance.record_reader import TrustedKeys
from pathfed_common.provenance.release_card import Card, card_differences, read_evaluation
from pathfed_common.provenance.release_readme import readme
from pathfed_common.provenance.release_verify import ReleaseVerdict, verify_release
from pathfed_common.units import UtcSeconds

OTHER = digest.of_bytes(b"other")
AT = UtcSeconds(1.7e9)

Leaves = list[AnyLeaf]


@pytest.fixture
def bundle(scene: Scene) -> ReleaseScene:
    return ReleaseScene(scene)


@pytest.fixture
def verified(scene: Scene, tmp_path: Path) -> Callable[[Files], ReleaseVerdict]:
    """Writes files and verifies them with all keys known."""
    return lambda files: verify_release(write_files(tmp_path / "bundle", files), scene.trusted, redraw=False)


def _found(verdict: ReleaseVerdict, code: ErrorCode, what: str = "") -> ProvenanceError:
    matching = [finding for finding in verdict.findings if finding.code is code and what in finding.what]
    assert matching, [str(finding) for finding in verdict.findings]
    assert not verdict.identities_proven
    assert not verdict.aggregation_proven
    return matching[0]


def test_an_honest_bundle_is_proven_but_for_the_aggregation(bundle: ReleaseScene, scene: Scene, verified: Any) -> None:
    verdict = verified(bundle.files())
    assert verdict.findings == ()
    assert verdict.identities_proven
    assert not verdict.aggregation_proven
    assert verdict.release.run == "run-1"
    assert verdict.release.encoder == verdict.card.encoder
    assert verdict.enrolled == verdict.cosigned == frozenset(SITES)
    assert verdict.leaves == 20
    assert [site.site for site in verdict.record.sites] == SITES


def test_a_bundle_has_no_updates_and_no_inner_states(bundle: ReleaseScene) -> None:
    files = bundle.files(retain=True)
    assert [path for path in files if path.startswith("states/")] == [record.state_path(0), record.state_path(3)]
    assert not any(path.startswith("updates/") for path in files)


def test_a_replay_decides_about_the_aggregation(bundle: ReleaseScene, scene: Scene, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "bundle", bundle.files())
    assert verify_release(folder, scene.trusted, replay=lambda place, contents: iter(())).aggregation_proven

    def differs(place: Path, contents: Any) -> Iterator[ProvenanceError]:
        yield ProvenanceError(ErrorCode.REPLAY_DIFFERS, "another state")

    verdict = verify_release(folder, scene.trusted, replay=differs)
    _found(verdict, ErrorCode.REPLAY_DIFFERS)


def test_without_all_keys_identities_are_unproven(bundle: ReleaseScene, scene: Scene, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "bundle", bundle.files())
    some = {site: key for site, key in scene.trusted.sites.items() if site != "c"}
    for trusted in (
        None,
        TrustedKeys(server=scene.server.public),
        TrustedKeys(sites=scene.trusted.sites),
        replace(scene.trusted, sites=some),
    ):
        verdict = verify_release(folder, trusted, redraw=False)
        assert verdict.findings == ()
        assert not verdict.identities_proven


def test_an_impostors_bundle_is_refused_by_trust_alone(scene: Scene, tmp_path: Path) -> None:
    impostor = replace(scene, server=SigningKey.generate(), keys={site: SigningKey.generate() for site in scene.keys})
    folder = write_files(tmp_path / "bundle", ReleaseScene(impostor).files())
    assert not verify_release(folder, redraw=False).findings
    _found(verify_release(folder, scene.trusted, redraw=False), ErrorCode.RECORD_SIGNATURE)
    _found(verify_release(folder, TrustedKeys(sites={"b": scene.keys["b"].public}), redraw=False), ErrorCode.RECORD_SIGNATURE)


# Quorum.


def test_without_a_quorum_nothing_is_verified_and_the_missing_are_named(bundle: ReleaseScene, verified: Any) -> None:
    error = _found(verified(bundle.files(cosigners=SITES[:1])), ErrorCode.QUORUM_MISSING)
    assert error.value == "1 of 3; missing: b, c"


def test_the_operators_own_lines_count_for_nothing(bundle: ReleaseScene, scene: Scene, verified: Any) -> None:
    def own(files: Files) -> Files:
        last = max(path for path in files if path.startswith("log/checkpoints/"))
        leaves = release.split_leaves(files[release.LEAVES])
        crooked = replace(scene, keys=dict.fromkeys(SITES, scene.server))
        signed = Note.from_bytes(files[last])
        for line in checkpoint(leaves, crooked, SITES).signatures[1:]:
            signed = signed.with_signature(line)
        return {**files, last: signed.to_bytes()}

    _found(verified(bundle.files(cosigners=SITES[:1], history=own)), ErrorCode.QUORUM_MISSING)


def test_a_quorum_of_unknown_sites_proves_no_identity(bundle: ReleaseScene, scene: Scene, verified: Any, tmp_path: Path) -> None:
    """The operator admits a majority of its own: all holds together, but not for a reader who knows the sites' keys."""
    own = {SiteName(f"z{index}"): SigningKey.generate() for index in range(4)}
    scene.keys.update({str(site): key for site, key in own.items()})

    def stuffed(leaves: Leaves) -> Leaves:
        return [*leaves[:-1], *(SiteAdmitted(site=site, evidence_key=key.public, at=AT) for site, key in own.items()), leaves[-1]]

    def cosigned(files: Files) -> Files:
        leaves = release.split_leaves(files[release.LEAVES])
        sizes = range(20, 25)
        return files | {
            release.checkpoint_path(n): checkpoint(leaves[:n], scene, [*SITES, *own] if n < 24 else own).to_bytes() for n in sizes
        }

    trusted = TrustedKeys(server=scene.server.public, sites={site: scene.keys[site].public for site in SITES})
    verdict = verified(bundle.files(leaves=stuffed, history=cosigned))
    assert verdict.findings == ()
    assert verdict.identities_proven
    verdict = verify_release(tmp_path / "bundle", trusted, redraw=False)
    assert verdict.findings == ()
    assert not verdict.identities_proven
    assert not verdict.cosigned


# The log against the record.


def _where(leaves: Leaves, kind: type, site: str | None = None, index: int | None = None) -> int:
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, kind) and site in (None, getattr(leaf, "site", None)) and index in (None, getattr(leaf, "round_index", None)):
            return place
    raise AssertionError("no such leaf")


def _without(*wanted: Any) -> Callable[[Leaves], Leaves]:
    def change(leaves: Leaves) -> Leaves:
        place = _where(leaves, *wanted)
        return [*leaves[:place], *leaves[place + 1 :]]

    return change


def _moved(to: int, *wanted: Any) -> Callable[[Leaves], Leaves]:
    """The leaf moved by so many places."""

    def change(leaves: Leaves) -> Leaves:
        place = _where(leaves, *wanted)
        leaf = leaves.pop(place)
        leaves.insert(place + to, leaf)
        return leaves

    return change


def _replaced(change: Callable[[Any], Any], *wanted: Any) -> Callable[[Leaves], Leaves]:
    def changed(leaves: Leaves) -> Leaves:
        place = _where(leaves, *wanted)
        return [*leaves[:place], change(leaves[place]), *leaves[place + 1 :]]

    return changed


def _inserted(leaf: AnyLeaf, before: Any) -> Callable[[Leaves], Leaves]:
    def changed(leaves: Leaves) -> Leaves:
        place = _where(leaves, *before)
        return [*leaves[:place], leaf, *leaves[place:]]

    return changed


STATEMENT = StatementLogged(site=SiteName("c"), run=RunName("run-1"), round_index=2, statement=OTHER)


@pytest.mark.parametrize(
    ("leaves", "what"),
    [
        pytest.param(_without(StatementLogged, "b", 2), "no leaf of this statement", id="an update that was never logged"),
        pytest.param(_inserted(STATEMENT, (EncoderCommitted, None, 2)), "the record does not have", id="a logged update dropped"),
        pytest.param(_moved(5, StatementLogged, "a", 1), "between the states", id="back-dated: logged after its round"),
        pytest.param(_moved(-3, StatementLogged, "a", 2), "between the states", id="logged before its round"),
        pytest.param(_replaced(lambda leaf: replace(leaf, round_index=3), StatementLogged, "a", 2), "does not", id="another round's"),
        pytest.param(_replaced(lambda leaf: replace(leaf, statement=OTHER), StatementLogged, "a", 2), "does not have", id="another one"),
        pytest.param(lambda leaves: [*leaves[:9], leaves[8], *leaves[9:]], "already", id="logged twice"),
        pytest.param(_without(EncoderCommitted, None, 2), "out of order", id="a state left out"),
        pytest.param(_without(EncoderCommitted, None, 3), "does not have all states", id="the last state left out"),
        pytest.param(_replaced(lambda leaf: replace(leaf, state=OTHER), EncoderCommitted, None, 2), "not the record's", id="another state"),
        pytest.param(_moved(-3, Released), "before the run's last state", id="released early"),
        pytest.param(_without(Released), "no leaf of this release", id="not released"),
        pytest.param(_replaced(lambda leaf: replace(leaf, release=OTHER), Released), "no leaf of this release", id="another release"),
        pytest.param(_replaced(lambda leaf: replace(leaf, run=RunName("run-2")), Released), "no leaf of this", id="another run's release"),
        pytest.param(_without(PlanApproved, "b"), "had not approved", id="no approval"),
        pytest.param(_moved(5, PlanApproved, "b"), "had not approved", id="approved afterwards"),
        pytest.param(_replaced(lambda leaf: replace(leaf, approval=OTHER), PlanApproved, "b"), "had not approved", id="another approval"),
        pytest.param(_replaced(lambda leaf: replace(leaf, plan=OTHER), PlanApproved, "b"), "had not approved", id="another plan approved"),
        pytest.param(_without(PlanPublished), "before it was published", id="never published"),
        pytest.param(_moved(2, PlanPublished), "before it was published", id="published after its approval"),
        pytest.param(
            _inserted(PlanDecided(site=SiteName("b"), plan=OTHER, decision=OTHER), (EncoderCommitted, None, 0)), "", id="(harmless)"
        ),
    ],
)
def test_a_log_that_tells_another_story_is_found(leaves: Any, what: str, bundle: ReleaseScene, verified: Any) -> None:
    verdict = verified(bundle.files(leaves=leaves))
    if what:
        _found(verdict, ErrorCode.LOG_DISAGREES, what)
    else:
        assert verdict.findings == ()


def test_an_approval_taken_back_ends_with_the_round_that_was_on_its_way(bundle: ReleaseScene, scene: Scene, verified: Any) -> None:
    taken_back = PlanDecided(site=SiteName("b"), plan=scene.plan.digest, decision=OTHER)
    late = verified(bundle.files(leaves=_inserted(taken_back, (StatementLogged, "a", 3))))
    assert late.findings == ()
    early = verified(bundle.files(leaves=_inserted(taken_back, (StatementLogged, "a", 2))))
    assert _found(early, ErrorCode.LOG_DISAGREES, "had not approved").value == "round 3, b"


def test_a_revoked_sites_update_is_found(bundle: ReleaseScene, verified: Any) -> None:
    revoked = SiteRevoked(site=SiteName("b"), at=AT)
    verdict = verified(bundle.files(leaves=_inserted(revoked, (EncoderCommitted, None, 1)), cosigners=(SITES[0], SITES[2])))
    assert _found(verdict, ErrorCode.LOG_DISAGREES, "not the site's in the log").value == "round 2, b"


def test_a_site_admitted_with_another_key_is_found(bundle: ReleaseScene, scene: Scene, verified: Any) -> None:
    other = SigningKey.generate()
    change = _replaced(lambda leaf: replace(leaf, evidence_key=other.public), SiteAdmitted, "b")
    _found(verified(bundle.files(leaves=change)), ErrorCode.LOG_DISAGREES, "not the site's in the log")


def test_trust_follows_a_key_that_was_handed_over_and_back_to_the_one_before(bundle: ReleaseScene, scene: Scene, tmp_path: Path) -> None:
    new, old = SigningKey.generate(), scene.keys["b"]
    rotated = rotate_key(SiteName("b"), old, new, AT)
    files = bundle.files(leaves=lambda leaves: [*leaves[:-1], rotated, leaves[-1]], cosigners=(SITES[0], SITES[2]))
    folder = write_files(tmp_path / "bundle", files)
    for key in (old, new):
        trusted = replace(scene.trusted, sites={**scene.trusted.sites, "b": key.public})
        verdict = verify_release(folder, trusted, redraw=False)
        assert verdict.findings == ()
        assert verdict.identities_proven
    forged = replace(rotated, old_signature=rotated.new_signature)
    files = bundle.files(leaves=lambda leaves: [*leaves[:-1], forged, leaves[-1]], cosigners=(SITES[0], SITES[2]))
    _found(verify_release(write_files(tmp_path / "forged", files), scene.trusted, redraw=False), ErrorCode.RECORD_SIGNATURE)


# A forked log; parts of another run.


def test_a_fork_has_no_quorum_where_sites_keep_to_the_rules(bundle: ReleaseScene, scene: Scene, verified: Any) -> None:
    """a and b have cosigned a history with another statement of c; only c cosigns this one, and the others' lines do not move over."""

    def forked(files: Files) -> Files:
        last = max(path for path in files if path.startswith("log/checkpoints/"))
        leaves = release.split_leaves(files[release.LEAVES])
        elsewhere = [*leaves[:-1], StatementLogged(site=SiteName("c"), run=RunName("x"), round_index=1, statement=OTHER).to_bytes()]
        signed = Note.from_bytes(files[last])
        for line in checkpoint(elsewhere, scene, SITES[:2]).signatures[1:]:
            signed = signed.with_signature(line)
        return {**files, last: signed.to_bytes()}

    _found(verified(bundle.files(cosigners=SITES[2:], history=forked)), ErrorCode.RECORD_SIGNATURE)
    _found(verified(bundle.files(cosigners=SITES[2:])), ErrorCode.QUORUM_MISSING)


def test_a_checkpoint_of_other_leaves_is_found(bundle: ReleaseScene, scene: Scene, verified: Any) -> None:
    def forked(files: Files) -> Files:
        leaves = release.split_leaves(files[release.LEAVES])
        return {**files, release.checkpoint_path(10): checkpoint(leaves[1:11], scene, SITES).to_bytes()}

    _found(verified(bundle.files(history=forked)), ErrorCode.RECORD_CHANGED, "not of these leaves")


def test_a_log_of_another_consortium_or_key_is_found(bundle: ReleaseScene, verified: Any) -> None:
    _found(verified(bundle.files(signed=lambda value: replace(value, log_origin="elsewhere"))), ErrorCode.RECORD_SIGNATURE)
    other = SigningKey.generate().public
    _found(verified(bundle.files(signed=lambda value: replace(value, log_key=other))), ErrorCode.RECORD_SIGNATURE)


@pytest.mark.parametrize("field", ["run", "plan", "encoder", "record"])
def test_a_release_that_names_something_else_is_found(field: str, bundle: ReleaseScene, verified: Any) -> None:
    value: Any = "run-2" if field == "run" else OTHER
    change: dict[str, Any] = {field: value}
    _found(verified(bundle.files(signed=lambda made: replace(made, **change))), ErrorCode.RECORD_CHANGED)


def test_statements_of_a_foreign_run_are_found(bundle: ReleaseScene, verified: Any) -> None:
    foreign = bundle.files(statement=lambda value: replace(value, run="run-2") if (value.round_index, value.site) == (2, "b") else value)
    _found(verified(foreign), ErrorCode.RECORD_CHANGED, "run is not")


def test_an_unfinished_run_is_no_release(bundle: ReleaseScene, scene: Scene, verified: Any) -> None:
    scene.plan = scene.plan.model_copy(update={"rounds": scene.plan.rounds.model_copy(update={"count": 4})})
    _found(verified(bundle.files()), ErrorCode.RUN_UNFINISHED)


# Files, signature, card.


def test_an_extra_a_missing_and_a_linked_file_are_found(bundle: ReleaseScene, scene: Scene, tmp_path: Path) -> None:
    files = bundle.files()
    folder = write_files(tmp_path / "bundle", {**files, "notes.txt": b"", "states/round-0001.safetensors": b""})
    where = {finding.where for finding in verify_release(folder, scene.trusted).findings}
    assert where == {"notes.txt", "states/round-0001.safetensors"}
    for path in files:
        folder = write_files(tmp_path / path.replace("/", "-"), {place: data for place, data in files.items() if place != path})
        verdict = verify_release(folder, scene.trusted, redraw=False)
        assert verdict.findings[0].code in (ErrorCode.BUNDLE_FILES, ErrorCode.RECORD_INCOMPLETE), path
        assert verdict.findings[0].where == path
    folder = write_files(tmp_path / "linked", files)
    (folder / release.MODEL_KEY).rename(tmp_path / "key")
    (folder / release.MODEL_KEY).symlink_to(tmp_path / "key")
    _found(verify_release(folder, scene.trusted), ErrorCode.BUNDLE_FILES, "not a file of its own")


def test_a_model_signature_over_other_files_or_by_another_key_is_found(bundle: ReleaseScene, scene: Scene, verified: Any) -> None:
    other = ReleaseScene(scene, model_key=ModelKey.generate()).files()
    swapped = bundle.files(parts=lambda made: {**made, release.MODEL_KEY: other[release.MODEL_KEY]})
    _found(verified(swapped), ErrorCode.MODEL_SIGNATURE)
    both = {path: other[path] for path in (release.MODEL_KEY, release.MODEL_SIGNATURE)}
    assert verified(bundle.files(parts=lambda made: {**made, **both})).findings == ()
    older = ReleaseScene(scene).files(evaluation=b'{"a": 1}')
    stale = {path: older[path] for path in (release.MODEL_KEY, release.MODEL_SIGNATURE)}
    _found(verified(bundle.files(parts=lambda made: {**made, **stale})), ErrorCode.MODEL_SIGNATURE, "other files")


def _card(change: Callable[[Card], Card]) -> Callable[[Files], Files]:
    def changed(made: Files) -> Files:
        card = change(Card.from_bytes(made[release.CARD], where="card"))
        return {**made, release.CARD: card.to_bytes(), release.README: readme(card)}

    return changed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epsilon_limit", 1.0),
        ("rounds", 99),
        ("sites", ()),
        ("overlaps", ()),
        ("data", ("Everything.",)),
        ("objective", "magic"),
        ("unslotted", 1),
        ("wire", "int8"),
        ("rounding_share", 0.5),
        ("encoder", OTHER),
    ],
)
def test_a_card_that_says_something_else_is_found(field: str, value: Any, bundle: ReleaseScene, verified: Any) -> None:
    verdict = verified(bundle.files(parts=_card(lambda card: replace(card, **{field: value}))))
    _found(verdict, ErrorCode.MODEL_CARD, f"{field} is not")


def test_a_smaller_epsilon_on_the_card_is_found_and_rounding_is_not(bundle: ReleaseScene, verified: Any) -> None:
    def less(by: float) -> Callable[[Card], Card]:
        def changed(card: Card) -> Card:
            first, *others = card.sites
            assert first.epsilon is not None
            return replace(card, sites=(replace(first, epsilon=first.epsilon - by), *others))

        return changed

    _found(verified(bundle.files(parts=_card(less(1e-3)))), ErrorCode.MODEL_CARD, "sites is not")
    changed = verified(bundle.files(parts=_card(less(1e-9))))
    assert [finding.code for finding in changed.findings] == [ErrorCode.MODEL_SIGNATURE]  # the card was signed as it was


def test_a_card_with_figures_beyond_printing_is_a_finding_and_no_crash(bundle: ReleaseScene, verified: Any) -> None:
    def huge(made: Files) -> Files:
        card = Card.from_bytes(made[release.CARD], where="card")
        return {**made, release.CARD: replace(card, sites=(replace(card.sites[0], epsilon=1e308), *card.sites[1:])).to_bytes()}

    _found(verified(bundle.files(parts=huge)), ErrorCode.MODEL_CARD, "sites is not")


def test_a_page_that_says_more_than_its_card_is_found(bundle: ReleaseScene, verified: Any) -> None:
    changed = bundle.files(parts=lambda made: {**made, release.README: made[release.README] + b"\nApproved by everybody.\n"})
    _found(verified(changed), ErrorCode.MODEL_CARD, "the page")


def test_sites_are_named_where_they_agreed_and_counted_where_not(bundle: ReleaseScene, scene: Scene, verified: Any) -> None:
    def agreed(value: Any) -> Any:
        return replace(value, named_as="St Elsewhere (North)") if value.site == "b" else value

    files = bundle.files(approval=agreed)
    assert verified(files).findings == ()
    card = Card.from_bytes(files[release.CARD], where="card")
    assert [(site.name, site.named) for site in card.sites] == [
        ("St Elsewhere (North)", True),
        ("site 2, not named", False),
        ("site 3, not named", False),
    ]
    page = files[release.README].decode()
    assert "Hospitals: St Elsewhere (North); 2 that did not agree to be named." in page
    for site in ("| a |", "| c |"):
        assert site not in page


def test_the_card_states_what_a_patient_of_several_sites_has_spent(bundle: ReleaseScene) -> None:
    card = Card.from_bytes(bundle.files()[release.CARD], where="card")
    epsilons = [row.epsilon for row in card.overlaps]
    assert [row.sites for row in card.overlaps] == [1, 2, 3]
    assert epsilons[0] == max(site.epsilon or 0 for site in card.sites)
    assert epsilons == sorted(epsilons, key=lambda value: value or 0)


def test_an_epsilon_above_the_approved_limit_is_found(bundle: ReleaseScene, scene: Scene, verified: Any) -> None:
    more = bundle.files(statement=lambda value: replace(value, epsilon_plan=8.5) if (value.round_index, value.site) == (3, "a") else value)
    _found(verified(more), ErrorCode.EPSILON_EXCEEDED)
    scene.plan = scene.plan.model_copy(update={"privacy": scene.plan.privacy.model_copy(update={"epsilon_limit": 2.0})})
    assert [finding.where for finding in verified(bundle.files()).findings] == [
        "statements/round-0003/a.dsse",
        "statements/round-0003/b.dsse",
        "statements/round-0003/c.dsse",
    ]


def test_an_evaluation_is_shown_and_bound(bundle: ReleaseScene, verified: Any) -> None:
    files = bundle.files(evaluation=b'{"kNN, held-out hospital": 0.91, "note": "stain changed"}')
    assert verified(files).findings == ()
    assert b"| kNN, held-out hospital | 0.91 |" in files[release.README]
    other = bundle.files(evaluation=b'{"kNN": 0.91}', parts=lambda made: {**made, release.EVALUATION: b'{"kNN": 0.99}'})
    _found(verified(other), ErrorCode.MODEL_CARD, "evaluation is not")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"a": null}', b'{"a": true}', b'{"a|b": 1}', b'{"": 1}', b'{"a": "x\\ny"}', b"\xff"])
def test_what_is_no_evaluation_is_refused(data: bytes) -> None:
    with pytest.raises(ProvenanceError) as caught:
        read_evaluation(data, where="evaluation.json")
    assert caught.value.code is ErrorCode.EVALUATION_UNREADABLE


def test_a_card_is_read_back_and_compared_field_by_field(bundle: ReleaseScene) -> None:
    card = Card.from_bytes(bundle.files()[release.CARD], where="card")
    assert json.loads(card.to_bytes())["run"] == "run-1"
    assert card_differences(card, card) == []
    assert card_differences(replace(card, sites=card.sites[:1]), card) == ["sites"]
    assert card_differences(card, replace(card, sites=card.sites[:1])) == ["sites"]


def test_leaves_are_split_as_they_were_joined() -> None:
    leaves = [b'{"a":1}', b"{}"]
    assert release.split_leaves(release.join_leaves(leaves)) == leaves
    assert release.split_leaves(b"") == []
    assert release.split_leaves(b"{}") == [b"{}\n"]
