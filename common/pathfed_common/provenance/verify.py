"""Check the record of a run offline, trusting nobody but the keys you give.

What holds when a record verifies:
    - Every file is byte for byte the one the server's manifest lists.
    - Server documents are signed by one server key; each site's approval and statements by the key in that site's card.
    - The plan is the one every admitted site approved, by its digest.
    - Each admitted update was stated by its site for this run, round, plan and base state, with the plan's privacy event; statements,
      round records and base states follow each other without a break.
    - The first state is the plan's: the encoder that `encoder.init_from` names, by its digest, and all else drawn from the plan's seed
      (`first_state`; the drawing can be left out, which the verdict then notes).
    - No site states a smaller epsilon for the plan than its recorded releases cost.
    - What the plan does not train has in every state the bits of the first.
    - The exported encoder is the last state's, bit for bit: its teacher's where the objective has one, and with its adapters merged. Where
      the plan releases a running average, it is the one that the last round's record names by its digest.

What does not follow:
    - Without trusted keys, whose keys these are: anyone can make a consistent record with keys of their own. The verdict then says
      `identities_proven = False`.
    - That the states, and a running average, are the aggregate of the updates: recomputing them needs the updates. The verdict says
      `aggregation_proven = False`.
    - That these are all rounds: the record as it stood after an earlier round is consistent, too. Compare the number of rounds.

This module, `first_state`, `state_files`, `record_reader` and the release's readers read files, through pathlib and `encoder.weights`;
nothing else of `provenance` does.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import RunName, SiteName, site_name
from pathfed_common.provenance import consistency, record
from pathfed_common.provenance.consistency import Contents
from pathfed_common.provenance.documents import SiteCard
from pathfed_common.provenance.first_state import FirstState, check_first_state
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.record import Manifest
from pathfed_common.provenance.record_reader import RecordReader, TrustedKeys, check_trusted, file_faults, read
from pathfed_common.provenance.state_files import exported_faults, frozen_faults, shape_faults


@dataclass(frozen=True, kw_only=True)
class SiteVerdict:
    """What the record proves of one site.

    Attributes:
        site: the site.
        key: the evidence key its statements are signed with.
        key_trusted: whether that is the key you gave for it.
        rounds: rounds in which its update counted.
        epsilon_stated: the plan's epsilon in its last statement, at the plan's delta.
        epsilon_recomputed: what its recorded releases cost at least.
        codes: digests of the code it ran.
    """

    site: SiteName
    key: VerifyKey
    key_trusted: bool
    rounds: int
    epsilon_stated: float
    epsilon_recomputed: float
    codes: tuple[Digest, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of a verification.

    Attributes:
        findings: everything that is wrong; empty for a record that verifies.
        notes: what is not wrong and worth knowing.
        identities_proven: whether the server's key and every admitted site's key are trusted ones.
        aggregation_proven: whether the states were recomputed from retained updates; not done by this version.
        first_state_proven: whether nothing is wrong and the first state's random weights were drawn again from the plan's seed.
        run: the run, or None without a readable manifest.
        plan: digest of its plan, likewise.
        server_key: the key that signed the record, likewise.
        rounds: rounds recorded.
        delta: the plan's delta, or None without a readable plan.
        sites: the admitted sites in order of their names; empty unless the documents could be read.
    """

    findings: tuple[ProvenanceError, ...]
    notes: tuple[str, ...] = ()
    identities_proven: bool = False
    aggregation_proven: bool = False
    first_state_proven: bool = False
    run: RunName | None = None
    plan: Digest | None = None
    server_key: VerifyKey | None = None
    rounds: int = 0
    delta: float | None = None
    sites: tuple[SiteVerdict, ...] = ()

    @property
    def consistent(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def require(self, *, identities: bool = False) -> None:
        """Raise unless the record verifies.

        Args:
            identities: also demand that identities are proven.

        Raises:
            ProvenanceError: the first finding; PF604 where identities are demanded and not proven.
        """
        if self.findings:
            raise self.findings[0]
        if identities and not self.identities_proven:
            raise ProvenanceError(
                ErrorCode.IDENTITY_UNPROVEN,
                "the record is consistent, but nothing shows whose keys signed it",
                remedy="give the keys you know, by name, with --trust",
            )


def read_trust(text: str, *, where: object) -> TrustedKeys:
    """Read trusted keys: JSON ``{"server": key text, "sites": {name: key text}}``, either of the two may be missing.

    Raises:
        ProvenanceError: PF604, not of that form.
    """
    try:
        raw = json.loads(text)
        if not isinstance(raw, dict) or not set(raw) <= {"server", "sites"} or not isinstance(raw.get("sites", {}), dict):
            raise ValueError("an object with 'server' and 'sites' is expected")
        server = raw.get("server")
        return TrustedKeys(
            server=None if server is None else VerifyKey.from_text(server),
            sites={site_name(name): VerifyKey.from_text(key) for name, key in raw.get("sites", {}).items()},
        )
    except ValueError as error:
        raise ProvenanceError(
            ErrorCode.IDENTITY_UNPROVEN,
            f"not a file of trusted keys: {error}",
            where=where,
            remedy='write {"server": "ed25519:...", "sites": {"<name>": "ed25519:..."}}',
        ) from None


def verify_record(folder: Path, trusted: TrustedKeys | None = None, *, redraw: bool = True) -> Verdict:
    """Check the record in a folder.

    Args:
        folder: the record.
        trusted: the keys you know; None for none.
        redraw: draw the first state's random weights again from the plan's seed, which takes as much memory as the model.

    Returns:
        The verdict. Faults of the record are findings in it, never exceptions.
    """
    examined = examine_record(folder, trusted, redraw=redraw)
    if examined.contents is None:
        return examined.verdict
    return replace(examined.verdict, notes=(*_notes(folder, examined.contents), *examined.verdict.notes))


@dataclass(frozen=True)
class Examined:
    """A record's verdict and, where they could be read, its documents."""

    verdict: Verdict
    contents: Contents | None = None


def examine_record(
    folder: Path, trusted: TrustedKeys | None = None, *, redraw: bool = True, thin: bool = False, manifest: Manifest | None = None
) -> Examined:
    """Check the record in a folder, and hand its documents on; see `verify_record`.

    Args:
        folder: the record.
        trusted: the keys you know; None for none.
        redraw: as of `verify_record`.
        thin: the files that `record.left_out` names may be absent, as in a release's bundle, and are not looked at.
        manifest: the record's manifest, where the caller has read it already; in a long run's record it lists many thousands of files.
    """
    trusted = trusted or TrustedKeys()
    try:
        manifest = manifest or Manifest.from_bytes(read(folder, record.MANIFEST))
        check_trusted(manifest.server_key, trusted.server, record.MANIFEST)
    except ProvenanceError as error:
        return Examined(Verdict(findings=(error,)))
    verdict = Verdict(findings=(), run=manifest.run, plan=manifest.plan, server_key=manifest.server_key, rounds=manifest.rounds)
    here = [entry for entry in manifest.files if not (thin and record.left_out(entry.path, manifest.rounds))]
    # All below rests on the files being the listed ones: a changed file is reported as that, not as what it then seems to say.
    changed = tuple(file_faults(folder, here))
    if changed:
        return Examined(replace(verdict, findings=changed))
    try:
        reader = RecordReader(folder, manifest, trusted)
        contents = reader.contents()
    except ProvenanceError as error:
        return Examined(replace(verdict, findings=(error,)))
    states = (0, manifest.rounds) if thin else range(manifest.rounds + 1)
    misshaped = tuple(shape_faults(folder, contents, states))
    first = FirstState(()) if misshaped else check_first_state(folder / record.state_path(0), contents.plan, redraw=redraw)
    findings = (
        *_content_faults(contents),
        *misshaped,
        *first.faults,
        *(() if misshaped else frozen_faults(folder, contents, states)),
        *exported_faults(folder, contents),
        *_retained_faults(contents),
    )
    sites = () if findings else _site_verdicts(contents, reader.cards, trusted)
    judged = replace(
        verdict,
        findings=findings,
        notes=(first.note,) if first.note else (),
        identities_proven=not findings and trusted.server is not None and all(site.key_trusted for site in sites),
        first_state_proven=redraw and not findings,
        delta=contents.plan.privacy.delta,
        sites=sites,
    )
    return Examined(judged, contents)


def _content_faults(contents: Contents) -> Iterator[ProvenanceError]:
    faults = [
        fault for check in (consistency.check_rounds, consistency.check_statements, consistency.check_chains) for fault in check(contents)
    ]
    # Composing what the documents above do not agree on would prove nothing, and costs seconds.
    yield from faults or consistency.check_epsilons(contents)


def _retained_faults(contents: Contents) -> Iterator[ProvenanceError]:
    """Retained updates are the stated ones; their bytes were checked against the manifest already."""
    for (index, site), sealed in contents.statements.items():
        entry = contents.manifest.entry(record.update_path(index, site))
        if entry is not None and entry.digest != sealed.statement.update:
            yield ProvenanceError(ErrorCode.RECORD_CHANGED, "a retained update is not the one its site stated", where=entry.path)


def _site_verdicts(contents: Contents, cards: Mapping[SiteName, SiteCard], trusted: TrustedKeys) -> tuple[SiteVerdict, ...]:
    verdicts = []
    by_site = consistency.statements_by_site(contents)
    for site, recomputed in consistency.recomputed_epsilons(contents).items():
        statements = [sealed.statement for sealed in by_site[site]]
        verdicts.append(
            SiteVerdict(
                site=site,
                key=cards[site].evidence_key,
                key_trusted=site in trusted.sites,
                rounds=len(statements),
                epsilon_stated=statements[-1].epsilon_plan,
                epsilon_recomputed=recomputed,
                codes=tuple(sorted({statement.code for statement in statements})),
            )
        )
    return tuple(verdicts)


def _notes(folder: Path, contents: Contents) -> Iterator[str]:
    listed = {entry.path for entry in contents.manifest.files} | {record.MANIFEST}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in listed:
            yield f"not part of the record: {name}"
    if record.ENCODER not in listed:
        yield "no encoder is exported: the run is not finished"
    for site, index in consistency.chain_gaps(contents):
        yield f"{site}: the statement of round {index} follows one that did not count and is not in the record"
    for site, index, code in consistency.released(contents):
        yield f"{site}: the update of round {index} was refused ({code}), and an operator let it count"
    for site, rounds in consistency.without_slots(contents).items():
        yield f"{site}: replies did not wait for the plan's time slots in {rounds} round(s)"
    retained = sum(entry.path.startswith("updates/") for entry in contents.manifest.files)
    yield f"aggregation not proven: {retained} of {len(contents.statements)} admitted updates are retained, and none was replayed"
