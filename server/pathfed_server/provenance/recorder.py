"""Writes the record of a run, round by round; `pathfed_common.provenance.verify` checks it.

At every instant the folder holds a record that verifies: files are written first, whole or not at all, and the signed manifest that lists
them last. A round recorded again (its commit did not happen) is first taken off the manifest, then written anew.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pathfed_common import digest, files, model
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.part_file import file_digest, file_pieces
from pathfed_common.plan import Plan, plan_from_bytes
from pathfed_common.provenance import record
from pathfed_common.provenance.documents import SiteCard, seal_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.record import AbsentSite, AdmittedSite, FileEntry, Manifest, RoundRecord, ServerTimes
from pathfed_common.units import UtcSeconds
from pathfed_server.rounds.released import average_digest, released_chunks
from pathfed_server.rounds.state import Candidate, Participation, ParticipationState, RoundResult

_ABSENT = {
    "refused": ParticipationState.REFUSED,
    "silent": ParticipationState.SILENT,
    "excluded": ParticipationState.EXCLUDED,
}


class Recorder:
    """Implements the round loop's `RunRecorder` on a folder."""

    def __init__(self, folder: Path, key: SigningKey, cards: Mapping[SiteName, bytes], *, retain_updates: bool = False) -> None:
        """Take a folder; nothing is written yet.

        Args:
            folder: where the record goes; made when it is not there.
            key: the server's evidence key.
            cards: the signed card of every site in the run; looked at when it is needed, as sites may join.
            retain_updates: also keep the admitted updates.
        """
        self._folder, self._key, self._cards, self._retain = folder, key, cards, retain_updates
        self._manifest: Manifest | None = None

    def begin(self, *, run: RunName, plan: Plan, candidates: Sequence[Candidate], initial_state: Path) -> None:
        """Open the record, or take it up again.

        Raises:
            ProvenanceError: PF601, the folder holds another run's, plan's, server's or initial state's record; PF605, a site has no card.
            HostError: the disk is full or the folder cannot be written.
        """
        found = self._manifest = self._read_manifest()
        if found is not None and (found.run, found.plan, found.server_key) != (run, plan.digest, self._key.public):
            raise ProvenanceError(ErrorCode.RECORD_CHANGED, "the folder holds another run's record", where=self._folder, value=found.run)
        state = self._place(record.state_path(0), initial_state)
        entries = [state, self._write(record.PLAN, plan.canonical_bytes()), self._write(record.SIGNED_PLAN, seal_plan(plan, self._key))]
        for candidate in candidates:
            entries += self._site(candidate.site, candidate.approval)
        rounds = 0 if found is None else found.rounds
        earlier = () if found is None else found.files
        self._publish(Manifest(run=run, plan=plan.digest, server_key=self._key.public, rounds=rounds, files=_merged(earlier, entries)))

    def record_round(
        self,
        *,
        result: RoundResult,
        statements: Mapping[SiteName, bytes],
        approvals: Mapping[SiteName, bytes],
        updates: Mapping[SiteName, Path],
        state: Path,
    ) -> None:
        """Record a round before it is committed; called again for the same round, the later call replaces the earlier.

        Raises:
            ProvenanceError: PF605, an earlier round is not recorded, or an admitted site has no card.
            HostError: the disk is full or the folder cannot be written.
        """
        index = result.round_index
        manifest = self._taken_back(index)
        if manifest.rounds != index - 1:
            raise ProvenanceError(
                ErrorCode.RECORD_INCOMPLETE,
                "an earlier round is not recorded",
                where=self._folder,
                value=f"{manifest.rounds} of {index - 1}",
            )
        entries = [self._place(record.state_path(index), state)]
        for site, statement in statements.items():
            entries += [self._write(record.statement_path(index, site), statement), *self._site(site, approvals[site])]
            if self._retain:
                entries.append(self._place(record.update_path(index, site), updates[site]))
        document = _round_record(result, previous=self._previous(index))
        entries.append(self._write(record.round_path(index), document.to_bytes(self._key)))
        self._publish(replace(manifest, rounds=index, files=_merged(manifest.files, entries)))

    def finish(self, *, run: RunName, rounds: int, state: Path, state_digest: Digest, optimiser: Path) -> None:
        """Close the record: export the encoder of the last state, or the running average where the plan releases that.

        Raises:
            ProvenanceError: PF605, the record is another run's or has other rounds; PF601, `state` is not its last state, or the average in
                `optimiser` not the last round's.
            HostError: the disk is full or the folder cannot be written.
        """
        manifest = self._current()
        if (manifest.run, manifest.rounds) != (run, rounds):
            raise ProvenanceError(
                ErrorCode.RECORD_INCOMPLETE, "not all rounds are recorded", where=self._folder, value=f"{manifest.rounds} of {rounds}"
            )
        last = manifest.entry(record.state_path(rounds))
        if last is None or last.digest != state_digest or _entry(last.path, state) != last:
            raise ProvenanceError(ErrorCode.RECORD_CHANGED, "the state is not the record's last", where=state, value=state_digest)
        plan = plan_from_bytes((self._folder / record.PLAN).read_bytes(), where=record.PLAN)
        due = average_digest(plan, state=state, optimiser=optimiser)
        recorded = RoundRecord.from_bytes((self._folder / record.round_path(rounds)).read_bytes(), self._key.public).average
        if due != recorded:
            raise ProvenanceError(ErrorCode.RECORD_CHANGED, "the average is not the last round's", where=optimiser, value=due)
        entries = [
            self._write(record.ENCODER, released_chunks(plan, state=state, optimiser=optimiser)),
            self._write(record.ENCODER_CONFIG, digest.canonical(model.timm_config(plan))),
        ]
        self._publish(replace(manifest, rounds=rounds, files=_merged(manifest.files, entries)))

    def _taken_back(self, index: int) -> Manifest:
        """The manifest without round `index` and what follows it, signed and in place before any of their files changes."""
        manifest = self._current()
        kept = tuple(entry for entry in manifest.files if not entry.path.startswith("encoder/") and (_round_of(entry.path) or 0) < index)
        if kept != manifest.files:
            manifest = replace(manifest, rounds=min(manifest.rounds, index - 1), files=kept)
            self._publish(manifest)
        for place in ("statements", "updates"):
            # Left over from the earlier recording, perhaps of sites that are not admitted this time.
            for path in (self._folder / place / f"round-{index:04d}").glob("*"):
                path.unlink()
        return manifest

    def _site(self, site: SiteName, approval: bytes | None) -> Iterator[FileEntry]:
        if site not in self._cards:
            raise ProvenanceError(ErrorCode.RECORD_INCOMPLETE, "the site's card is not at hand", where=record.card_path(site), value=site)
        yield self._card(site)
        if approval is not None:
            yield self._write(record.approval_path(site), approval)

    def _card(self, site: SiteName) -> FileEntry:
        """The site's card. A recorded one stays where only the Flower node key is new: statements rest on the evidence key."""
        place, card = record.card_path(site), self._cards[site]
        listed = None if self._manifest is None else self._manifest.entry(place)
        if listed is not None:
            before = SiteCard.from_bytes((self._folder / place).read_bytes(), where=place)
            if before.evidence_key == SiteCard.from_bytes(card, where=place).evidence_key:
                return listed
        return self._write(place, card)

    def _previous(self, index: int) -> Digest | None:
        return None if index == 1 else digest.of_bytes((self._folder / record.round_path(index - 1)).read_bytes())

    def _current(self) -> Manifest:
        if self._manifest is None:
            self._manifest = self._read_manifest()
        if self._manifest is None:
            raise ProvenanceError(ErrorCode.RECORD_INCOMPLETE, "the record was never begun", where=self._folder)
        return self._manifest

    def _read_manifest(self) -> Manifest | None:
        path = self._folder / record.MANIFEST
        return Manifest.from_bytes(path.read_bytes(), where=str(path)) if path.exists() else None

    def _publish(self, manifest: Manifest) -> None:
        path = self._made(record.MANIFEST)
        data = manifest.to_bytes(self._key)
        if not path.exists() or path.read_bytes() != data:
            files.write_atomic(path, data)
        self._manifest = manifest

    def _write(self, place: str, data: bytes | Iterator[bytes]) -> FileEntry:
        path = self._made(place)
        if isinstance(data, bytes):
            entry = FileEntry(path=place, digest=digest.of_bytes(data), size=len(data))
            if self._there(entry):
                return entry
        files.write_atomic(path, data)
        return _entry(place, path)

    def _place(self, place: str, source: Path) -> FileEntry:
        """Bring a large file in: as a second name for the same bytes where the file system allows it, else as a copy."""
        path, entry = self._made(place), _entry(place, source)
        if self._there(entry):
            return entry
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            os.link(source, part)
            os.replace(part, path)
            files.sync_folder(path.parent)
        except OSError:
            # Another file system, or one without links. A full disk shows again below, with its code.
            part.unlink(missing_ok=True)
            files.write_atomic(path, file_pieces(source))
        return entry

    def _there(self, entry: FileEntry) -> bool:
        """Whether the record holds this file already. Another file there is refused: replaced, it would contradict the manifest."""
        listed = None if self._manifest is None else self._manifest.entry(entry.path)
        if listed is not None and listed != entry:
            raise ProvenanceError(
                ErrorCode.RECORD_CHANGED, "the record already holds another file there", where=entry.path, value=entry.digest
            )
        return listed is not None and (self._folder / entry.path).exists()

    def _made(self, place: str) -> Path:
        path = self._folder / place
        try:
            files.make_folder(path.parent)
        except OSError as error:
            raise files.disk_error(error, path) from error
        return path


def _round_record(result: RoundResult, *, previous: Digest | None) -> RoundRecord:
    by_state = {state: [part for part in result.participations if part.state is state] for state in ParticipationState}
    if by_state[ParticipationState.OFFERED]:
        raise ValueError("a round that counts has no site still offered")
    absent = {
        name: tuple(AbsentSite(site=part.site, code=part.code or "") for part in sorted(by_state[state], key=lambda part: part.site))
        for name, state in _ABSENT.items()
    }
    times = result.times
    return RoundRecord(
        run=result.run,
        round_index=result.round_index,
        plan=result.plan,
        base_state=result.base_state,
        next_state=result.checkpoint.state,
        average=result.average,
        previous=previous,
        admitted=tuple(_admitted(part, result) for part in sorted(by_state[ParticipationState.ADMITTED], key=lambda part: part.site)),
        offered_at=UtcSeconds(result.offered_at),
        deadline=UtcSeconds(result.deadline),
        committed_at=UtcSeconds(result.committed_at),
        times=ServerTimes(
            exchange_s=times.exchange_s,
            transfer_s=times.transfer_s,
            admission_s=times.admission_s,
            aggregation_s=times.aggregation_s,
            step_s=times.step_s,
        ),
        **absent,
    )


def _admitted(part: Participation, result: RoundResult) -> AdmittedSite:
    if part.update is None or part.update_bytes is None or part.statement is None or part.rounding is None:
        raise ValueError(f"{part.site} is admitted without update, statement or rounding")
    return AdmittedSite(
        site=part.site,
        update=part.update,
        update_bytes=part.update_bytes,
        statement=part.statement,
        weight=result.weights[part.site],
        factor=result.factors.get(part.site, 1.0),
        rounding=part.rounding,
        released=part.released,
    )


def _entry(place: str, path: Path) -> FileEntry:
    return FileEntry(path=place, digest=file_digest(path), size=path.stat().st_size)


def _merged(earlier: Sequence[FileEntry], later: Sequence[FileEntry]) -> tuple[FileEntry, ...]:
    return tuple(sorted({entry.path: entry for entry in (*earlier, *later)}.values(), key=lambda entry: entry.path))


def _round_of(place: str) -> int | None:
    found = re.match(r"(?:rounds|states|statements|updates)/round-([0-9]+)", place)
    return None if found is None else int(found[1])
