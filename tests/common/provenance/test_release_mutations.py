"""Every field of every document of a bundle is changed, one at a time, and verification must fail each time.

For each field one of several other values is drawn with a seed, so that the module stays under a minute.

Two change it: a stranger who has no key, and the operator, who signs its own documents, both lists and the log's checkpoints again, but
has no site's key. What the operator can do without being found is to leave out co-signatures that a quorum does not need: that says
nothing false.
"""

import base64
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from record_fixtures import SITES, Scene, small_plan, small_preset, write_files
from release_fixtures import Files, ReleaseScene, checkpoint

from pathfed_common import digest
from pathfed_common.provenance import dsse, record, release
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.note import Note, NoteSignature
from pathfed_common.provenance.record import Manifest
from pathfed_common.provenance.release import HistoryListing, ListedFile, Release
from pathfed_common.provenance.release_verify import ReleaseVerdict, verify_release

_Place = tuple[Any, ...]

_STRANGER = SigningKey.generate()


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with small_preset():
        yield Scene(small_plan())


@pytest.fixture(scope="module")
def honest(scene: Scene) -> Files:
    return ReleaseScene(scene).files(evaluation=b'{"kNN": 0.9}')


@pytest.fixture
def verify(scene: Scene, honest: Files, tmp_path: Path) -> Callable[[Files], ReleaseVerdict]:
    """Verifies the honest bundle with some files changed, trusting every honest key. Only the changed files are written anew."""
    folder = write_files(tmp_path / "bundle", honest)

    def run(changed: Files) -> ReleaseVerdict:
        write_files(folder, changed)
        try:
            return verify_release(folder, scene.trusted, redraw=False)
        finally:
            write_files(folder, {path: honest[path] for path in changed if path in honest})
            for path in changed.keys() - honest.keys():
                (folder / path).unlink()

    assert not run({}).findings
    return run


# Walking and changing JSON.


def _leaves(value: Any, here: _Place = ()) -> Iterator[tuple[_Place, Any]]:
    """Every place of a JSON value that can be changed: its numbers, texts, flags, nulls, and its lists and objects as wholes."""
    yield here, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*here, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*here, index))


def _others(value: Any) -> list[Any]:
    """Other values of the same kind."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1]
        case float():
            return [value * 2 + 1, 1e308]
        case None:
            return ["x", digest.of_bytes(b"x"), 1]
        case str() if value.startswith("sha256:"):
            return [digest.of_bytes(b"x")]
        case str() if value.startswith("ed25519:"):
            return [_STRANGER.public.to_text()]
        case str():
            return [value + "x", "x"] if value else ["x"]
        case list() if value:
            return [value[:-1], [*value, value[-1]], value[::-1], []]
        case dict() if value:
            first = next(iter(value))
            return [{key: item for key, item in value.items() if key != first}, {**value, "x": 1}]
        case _:
            return [["x"]]


def _set(value: Any, place: _Place, new: Any) -> Any:
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = _set(value[place[0]], place[1:], new)
    return copy


def _mutations(value: Any) -> Iterator[tuple[_Place, Any]]:
    for place, found in _leaves(value):
        for new in _others(found):
            changed = _set(value, place, new)
            if changed != value:
                yield place, changed


def _payload(envelope: bytes) -> Any:
    return json.loads(dsse.parse(envelope).payload)


def _with_payload(envelope: bytes, payload: Any) -> bytes:
    """The envelope over another payload, its signature as it was."""
    raw = json.loads(envelope)
    return digest.canonical({**raw, "payload": base64.b64encode(digest.canonical(payload)).decode()})


def _resealed(envelope: bytes, payload: Any, key: SigningKey) -> bytes:
    return dsse.seal(digest.canonical(payload), dsse.parse(envelope).payload_type, key)


def _envelopes(files: Files) -> list[str]:
    return sorted(path for path in files if path.endswith(".dsse"))


# A stranger.


def test_every_field_of_every_envelope_is_bound(honest: Files, verify: Any) -> None:
    """Payload fields, and the envelope's own: what is signed by nobody else's key than before, or by a stranger's."""
    tried = 0
    for path in _envelopes(honest):
        outer, inner = json.loads(honest[path]), _payload(honest[path])
        changed = [digest.canonical(value) for value in _one_a_field(outer, path)]
        changed += [_with_payload(honest[path], value) for value in _one_a_field(inner, path)]
        changed += [_resealed(honest[path], inner, _STRANGER)]
        for data in changed:
            tried += 1
            assert verify({path: data}).findings, path
    assert tried > 500


def test_every_field_of_every_other_json_file_is_bound(honest: Files, verify: Any) -> None:
    for path in (record.PLAN, record.ENCODER_CONFIG, release.CARD, release.MODEL_SIGNATURE, release.EVALUATION):
        for data in map(digest.canonical, _one_a_field(json.loads(honest[path]), path)):
            if data != honest[path]:
                assert verify({path: data}).findings, path


def test_any_byte_of_any_file_is_bound(honest: Files, verify: Any) -> None:
    """Seeded places in each file: flipped, left out, doubled, cut off there, and one more at the end."""
    for path, data in honest.items():
        draw = random.Random(path)
        places = {0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(2))}
        changed = [data + b"\n", b""]
        for place in sorted(places):
            flipped = bytes([data[place] ^ (1 << draw.randrange(8))])
            changed += [data[:place] + flipped + data[place + 1 :], data[:place] + data[place + 1 :], data[:place]]
        for other in changed:
            if other != data:
                assert verify({path: other}).findings, path


def test_every_leaf_line_and_every_line_of_a_checkpoint_is_bound(honest: Files, verify: Any) -> None:
    for path in (path for path in honest if path.startswith("log/")):
        lines = honest[path].splitlines(keepends=True)
        for index in range(len(lines)):
            without = lines[:index] + lines[index + 1 :]
            doubled = lines[: index + 1] + lines[index:]
            for changed in (without, doubled, lines[:index] + lines[index:][::-1]):
                if changed != lines:
                    assert verify({path: b"".join(changed)}).findings, (path, index)


# The operator: signs its own documents and both lists again.


def test_an_operator_who_signs_its_lists_again_is_found(scene: Scene, honest: Files, verify: Any) -> None:
    """Every field of every document, with all that the server signs made to fit; the log stays what the sites have co-signed."""
    tried = 0
    for path in _envelopes(honest):
        if path in (release.RELEASE, release.HISTORY):
            continue
        key = _signer(scene, path)
        inner = _payload(honest[path])
        for value in _one_a_field(inner, f"operator {path}"):
            data = _resealed(honest[path], value, scene.server) if key is scene.server else _with_payload(honest[path], value)
            tried += 1
            assert verify(_relisted(scene, honest, {path: data})).findings, path
    for path in (release.CARD, release.README, release.EVALUATION, release.MODEL_KEY, release.MODEL_SIGNATURE, record.PLAN):
        assert verify(_relisted(scene, honest, {path: honest[path][:-1]})).findings, path
    assert tried > 250


def test_an_operator_who_changes_the_log_is_found(scene: Scene, honest: Files, verify: Any) -> None:
    """Fields of every leaf: under the old checkpoints, and under new ones of the log with the sites' old lines, or without."""
    leaves = release.split_leaves(honest[release.LEAVES])
    lines = Note.from_bytes(honest[release.checkpoint_path(len(leaves))]).signatures[1:]
    for index, leaf in enumerate(leaves):
        for value in _one_a_field(json.loads(leaf), f"leaf {index}"):
            changed = [*leaves[:index], digest.canonical(value), *leaves[index + 1 :]]
            joined = {release.LEAVES: release.join_leaves(changed)}
            assert verify(_relogged(scene, honest, joined)).findings, (index, value)
            for kept in ((), lines):
                fresh = {release.checkpoint_path(size): _signed(scene, changed[:size], kept) for size in (len(SITES), len(leaves))}
                assert verify(_relogged(scene, honest, {**joined, **fresh})).findings, (index, value)


def _signed(scene: Scene, leaves: list[bytes], lines: tuple[NoteSignature, ...]) -> bytes:
    signed = checkpoint(leaves, scene, ())
    for line in lines:
        signed = signed.with_signature(line)
    return signed.to_bytes()


def test_an_operator_who_changes_its_lists_is_found(scene: Scene, honest: Files, verify: Any) -> None:
    for path in (release.RELEASE, release.HISTORY):
        for _, value in _mutations(_payload(honest[path])):
            data = _resealed(honest[path], value, scene.server)
            changed = {path: data}
            if path == release.RELEASE:
                changed |= _relogged(scene, {**honest, path: data}, {})
            assert verify(changed).findings, (path, value)


def _signer(scene: Scene, path: str) -> SigningKey:
    site = Path(path).stem
    return scene.keys[site] if path.startswith(("sites/", "approvals/", "statements/")) else scene.server


def _relisted(scene: Scene, honest: Files, changed: Files) -> Files:
    """The changed files, with the record's manifest, the release and the log's list made to fit and signed by the server."""
    files = {**honest, **changed}
    if record.MANIFEST not in changed:
        manifest = Manifest.from_bytes(honest[record.MANIFEST])
        entries = [
            replace(entry, digest=digest.of_bytes(files[entry.path]), size=len(files[entry.path])) if entry.path in changed else entry
            for entry in manifest.files
        ]
        files[record.MANIFEST] = replace(manifest, files=tuple(entries)).to_bytes(scene.server)
    found = Release.from_bytes(honest[release.RELEASE], where="")
    listed = tuple(ListedFile.of(entry.path, files[entry.path]) for entry in found.files)
    files[release.RELEASE] = replace(found, record=digest.of_bytes(files[record.MANIFEST]), files=listed).to_bytes(scene.server)
    files |= _relogged(scene, files, {})
    return {path: data for path, data in files.items() if honest.get(path) != data}


def _relogged(scene: Scene, honest: Files, changed: Files) -> Files:
    """The changed files of the log, with its list made to fit."""
    files = {path: data for path, data in {**honest, **changed}.items() if path.startswith("log/")}
    listed = tuple(ListedFile.of(path, data) for path, data in sorted(files.items()))
    due = HistoryListing(server_key=scene.server.public, release=digest.of_bytes(honest[release.RELEASE]), files=listed)
    return {**changed, release.HISTORY: due.to_bytes(scene.server)}


def _one_a_field(value: Any, seed: str) -> list[Any]:
    """For every place of a JSON value, the whole value with something else there."""
    draw = random.Random(seed)
    by_place: dict[_Place, list[Any]] = {}
    for place, changed in _mutations(value):
        by_place.setdefault(place, []).append(changed)
    return [draw.choice(options) for options in by_place.values()]
