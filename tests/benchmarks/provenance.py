"""What evidence costs: an update signed, logged, proven and co-signed; a release of 1,000 rounds of 50 sites verified; its size.

    .venv/bin/python tests/benchmarks/provenance.py [--quick]

Everything is real: signed statements, the log in a SQLite database with its triggers, the keeper that serves it, sites that judge before
they co-sign, a bundle on the disk, and `verify_release` with every key known. The encoder is a toy (170 kB), so that what is measured is
evidence and not tensors; the first state is not drawn again, which costs what drawing the model costs. Every site declares another number
of patients, so that epsilon is composed for 50 mechanisms. `--quick` has 40 rounds, and its time is scaled to 1,000.

All times are CPU seconds of one process on one thread, which on a machine with nothing else to do are seconds; `commit_wall_ms` alone has
the disk's flush in it. Verification is one process, one thread.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from record_fixtures import sample_statement, small_plan, small_preset
from release_fixtures import contents_of
from tests.benchmarks._harness import Target, arguments, finish, machine, tell

from pathfed_common import digest, model
from pathfed_common.digest import Digest
from pathfed_common.encoder import weights
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import Plan
from pathfed_common.privacy import accounting
from pathfed_common.privacy.accounting import PrivacyEvent, composed_epsilon
from pathfed_common.provenance import record, release
from pathfed_common.provenance.documents import Approval, SiteCard, seal_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import cosign_checkpoint, origin_of
from pathfed_common.provenance.log_leaves import (
    AnyLeaf,
    EncoderCommitted,
    PlanApproved,
    PlanPublished,
    Released,
    SiteAdmitted,
    StatementLogged,
)
from pathfed_common.provenance.log_witness import Head, PlacedProof, judge
from pathfed_common.provenance.merkle import leaf_hash
from pathfed_common.provenance.model_signature import ModelKey, SignedModel, sign_model
from pathfed_common.provenance.note import Note
from pathfed_common.provenance.record import AdmittedSite, FileEntry, Manifest, RoundRecord, ServerTimes
from pathfed_common.provenance.record_reader import TrustedKeys
from pathfed_common.provenance.release import HistoryListing, ListedFile, Release
from pathfed_common.provenance.release_card import make_card
from pathfed_common.provenance.release_readme import readme
from pathfed_common.provenance.release_verify import verify_release
from pathfed_common.provenance.statement import Privacy
from pathfed_common.units import UtcSeconds
from pathfed_server.db.log_store import append_leaves
from pathfed_server.db.sql_store import SqlStore, migrate
from pathfed_server.provenance.log_keeper import LogFile, LogKeeper

ROUNDS, QUICK_ROUNDS, SITES = 1000, 40, 50
RUN = RunName("run-1")
ORIGIN = origin_of("bench")
AT = UtcSeconds(1.7e9)
#: Rounds for which every site judges and co-signs one by one; the rest of the log is co-signed at its end.
COSIGNED_ROUNDS = 10

_TARGETS = {"verify_1000_rounds_s": Target("<", 60.0)}

Files = dict[str, bytes]


class World:
    """Keys, a plan, and what is signed with them."""

    def __init__(self, rounds: int) -> None:
        small = small_plan()
        budget = {"epsilon_limit": 500.0, "noise_multiplier": 2.0}
        self.plan: Plan = small.model_copy(
            update={
                "rounds": small.rounds.model_copy(update={"count": rounds, "quorum": SITES}),
                "privacy": small.privacy.model_copy(update=budget),
                "site_weights": {},
            }
        )
        self.rounds = rounds
        self.server = SigningKey.generate()
        self.sites = [SiteName(f"hospital-{index:02d}") for index in range(SITES)]
        self.keys = {site: SigningKey.generate() for site in self.sites}
        self.patients = {site: 400 + 10 * index for index, site in enumerate(self.sites)}
        self.epsilons = self.compose()

    @property
    def trusted(self) -> TrustedKeys:
        return TrustedKeys(server=self.server.public, sites={site: key.public for site, key in self.keys.items()})

    def compose(self) -> dict[SiteName, float]:
        """Every site's epsilon at the end."""
        privacy = self.plan.privacy
        found = {}
        for site in self.sites:
            rate = self.plan.sampling_rate(self.patients[site])
            event = PrivacyEvent(sampling_rate=rate, noise_multiplier=privacy.noise_multiplier, steps=self.rounds)
            found[site] = composed_epsilon([event], privacy.delta)
        return found

    def statement(self, index: int, site: SiteName, base: Digest, previous: Digest | None) -> bytes:
        privacy = self.plan.privacy
        value = sample_statement(
            site=site,
            run=RUN,
            round_index=index,
            plan=self.plan.digest,
            base_state=base,
            update=_update(index, site),
            update_bytes=1000,
            privacy=Privacy(
                sampling_rate=self.plan.sampling_rate(self.patients[site]),
                noise_multiplier=privacy.noise_multiplier,
                clip_norm=privacy.clip_norm,
                steps=1,
                delta=privacy.delta,
            ),
            epsilon_plan=self.epsilons[site],
            previous=previous,
        )
        return value.to_envelope(self.keys[site])


def _update(index: int, site: SiteName) -> Digest:
    return digest.of_value(["update", index, site])


def _state_digest(index: int) -> Digest:
    return digest.of_value(["state", index])


def make_record(world: World, cost: dict[str, float]) -> Files:
    """The record's files, in memory; of the states, the first and the last."""
    plan = world.plan
    made: Files = {record.PLAN: plan.canonical_bytes(), record.SIGNED_PLAN: seal_plan(plan, world.server)}
    for site in world.sites:
        key = world.keys[site]
        made[record.card_path(site)] = SiteCard(site=site, evidence_key=key.public, flower_key=f"ssh {site}").to_bytes(key)
        given = Approval(site=site, plan=plan.digest, declared_patients=world.patients[site], reply_slots=True, approved_at=AT)
        made[record.approval_path(site)] = given.to_bytes(key)
    first = model.initial_state(plan)
    ends = {0: weights.dump(first, {}), world.rounds: weights.dump({name: tensor + 1 for name, tensor in first.items()}, {})}
    made |= {record.state_path(index): data for index, data in ends.items()}
    states = [digest.of_bytes(ends[index]) if index in ends else _state_digest(index) for index in range(world.rounds + 1)]
    _make_rounds(world, states, made, cost)
    last = weights.load(ends[world.rounds])
    prefix = model.released_prefix(plan)
    encoder = {name.removeprefix(prefix): tensor for name, tensor in last.items() if name.startswith(prefix)}
    made[record.ENCODER] = weights.dump(encoder, {"format": "pt"})
    made[record.ENCODER_CONFIG] = digest.canonical(model.timm_config(plan))
    inner = [FileEntry(path=record.state_path(index), digest=states[index], size=len(ends[0])) for index in range(1, world.rounds)]
    entries = [*inner, *(FileEntry(path=path, digest=digest.of_bytes(data), size=len(data)) for path, data in made.items())]
    ordered = tuple(sorted(entries, key=lambda entry: entry.path))
    listing = Manifest(run=RUN, plan=plan.digest, server_key=world.server.public, rounds=world.rounds, files=ordered)
    return {**made, record.MANIFEST: listing.to_bytes(world.server)}


def _make_rounds(world: World, states: list[Digest], made: Files, cost: dict[str, float]) -> None:
    previous: Digest | None = None
    last: dict[SiteName, Digest] = {}
    signing = 0.0
    for index in range(1, world.rounds + 1):
        admitted = []
        for site in world.sites:
            began = time.process_time()
            envelope = world.statement(index, site, states[index - 1], last.get(site))
            signing += time.process_time() - began
            last[site] = digest.of_bytes(envelope)
            made[record.statement_path(index, site)] = envelope
            update = _update(index, site)
            admitted.append(AdmittedSite(site=site, update=update, update_bytes=1000, statement=last[site], weight=1 / SITES, rounding=0.0))
        value = _round_record(world, index, states, previous, tuple(admitted))
        made[record.round_path(index)] = value.to_bytes(world.server)
        previous = digest.of_bytes(made[record.round_path(index)])
    cost["sign_statement_ms"] = 1000 * signing / (world.rounds * SITES)


def _round_record(
    world: World, index: int, states: list[Digest], previous: Digest | None, admitted: tuple[AdmittedSite, ...]
) -> RoundRecord:
    return RoundRecord(
        run=RUN,
        round_index=index,
        plan=world.plan.digest,
        base_state=states[index - 1],
        next_state=states[index],
        previous=previous,
        admitted=admitted,
        refused=(),
        silent=(),
        excluded=(),
        offered_at=AT,
        deadline=AT,
        committed_at=AT,
        times=ServerTimes(exchange_s=20.0, transfer_s=1.0, admission_s=0.5, aggregation_s=0.1, step_s=0.1),
    )


def before_rounds(world: World, made: Files) -> list[AnyLeaf]:
    """Leaves up to the first state."""
    admitted = [SiteAdmitted(site=site, evidence_key=world.keys[site].public, at=AT) for site in world.sites]
    approved = [
        PlanApproved(site=site, plan=world.plan.digest, approval=digest.of_bytes(made[record.approval_path(site)])) for site in world.sites
    ]
    first = EncoderCommitted(run=RUN, round_index=0, state=digest.of_bytes(made[record.state_path(0)]))
    return [*admitted, PlanPublished(plan=world.plan.digest), *approved, first]


def round_leaves(world: World, made: Files, index: int) -> list[AnyLeaf]:
    """Leaves of one round's commit."""
    statements = [
        StatementLogged(site=site, run=RUN, round_index=index, statement=digest.of_bytes(made[record.statement_path(index, site)]))
        for site in world.sites
    ]
    place = record.state_path(index)
    state = digest.of_bytes(made[place]) if place in made else _state_digest(index)
    return [*statements, EncoderCommitted(run=RUN, round_index=index, state=state)]


class Log:
    """A log in a database, and sites that watch it."""

    def __init__(self, world: World, folder: Path) -> None:
        url = f"sqlite:///{folder / 'log.db'}"
        migrate(url)
        self.world, self.store = world, SqlStore(url).open()
        self.keeper = LogKeeper(self.store, world.server, ORIGIN, least_interval_s=0.0)
        self.heads: dict[SiteName, Head] = {}
        for site in world.sites:
            key = world.keys[site].public.to_text()
            self.store.add_site(site, evidence_key=key, flower_key=f"ssh {site}", at=AT)

    def append(self, leaves: list[AnyLeaf]) -> tuple[float, float]:
        """Append in one transaction: CPU seconds and seconds."""
        began, wall = time.process_time(), time.perf_counter()
        with self.store._write() as connection:
            append_leaves(connection, leaves)
        return time.process_time() - began, time.perf_counter() - wall

    def witness(self, site: SiteName, own: Iterable[bytes]) -> dict[str, float]:
        """A site fetches, judges and cosigns the latest checkpoint: CPU seconds of each part, server's and site's."""
        head = self.heads.get(site)
        clock = _Clock()
        served = self.keeper.checkpoint(head.size if head else 0)
        spent = {"serve": clock()}
        leaves = list(own)
        found = {leaf: self.keeper.inclusion(leaf_hash(leaf), served.size) for leaf in leaves}
        spent["prove"] = clock()
        proofs = {leaf: PlacedProof(one.index, one.proof) for leaf, one in found.items()}
        signed = Note.from_bytes(served.note)
        judged = judge(signed, self.keeper.key, last=head, consistency=served.consistency, own=leaves, proofs=proofs)
        if judged.checkpoint is None:
            raise RuntimeError(f"refused: {judged.refusal}")
        line = cosign_checkpoint(judged.checkpoint, site, self.world.keys[site], at=int(AT)).to_line().encode()
        spent["judge_and_cosign"] = clock()
        self.keeper.cosign(site, served.size, line)
        spent["take_cosignature"] = clock()
        self.heads[site] = judged.head
        return spent


class _Clock:
    """CPU seconds since the last call."""

    def __init__(self) -> None:
        self._last = time.process_time()

    def __call__(self) -> float:
        before, self._last = self._last, time.process_time()
        return self._last - before


def keep_log(world: World, made: Files, log: Log, cost: dict[str, float]) -> None:
    """Log every round; in the last ones every site co-signs each."""
    # The admissions are in already: adding the sites logged them.
    log.append(before_rounds(world, made)[SITES:])
    for site in world.sites:
        log.witness(site, ())
    commits: list[tuple[float, float]] = []
    witnessed: list[dict[str, float]] = []
    for index in range(1, world.rounds + 1):
        leaves = round_leaves(world, made, index)
        commits.append(log.append(leaves))
        if index > world.rounds - COSIGNED_ROUNDS:
            witnessed += [log.witness(site, [leaf.to_bytes()]) for site, leaf in zip(world.sites, leaves[:-1], strict=True)]
    cost["log_round_ms"] = 1000 * statistics.median(cpu for cpu, _ in commits)
    cost["commit_wall_ms"] = 1000 * statistics.median(wall for _, wall in commits)
    for name in witnessed[0]:
        cost[f"{name}_ms"] = 1000 * statistics.median(one[name] for one in witnessed)


def make_bundle(world: World, made: Files, log: Log) -> Iterator[tuple[str, bytes]]:
    """The bundle's files, by path."""
    model_key = ModelKey.generate()
    card = make_card(contents_of(made))
    small: Files = {release.CARD: card.to_bytes(), release.README: readme(card), release.MODEL_KEY: model_key.public_pem}
    encoder = {**small, **{path: made[path] for path in (record.ENCODER, record.ENCODER_CONFIG)}}
    prefix = release.ENCODER_FOLDER
    digests = {path.removeprefix(prefix): digest.of_bytes(data) for path, data in encoder.items() if path.startswith(prefix)}
    small[release.MODEL_SIGNATURE] = sign_model(SignedModel(RUN, digests), model_key)
    listing = Release(
        server_key=world.server.public,
        run=RUN,
        plan=world.plan.digest,
        record=digest.of_bytes(made[record.MANIFEST]),
        encoder=digest.of_bytes(made[record.ENCODER]),
        log_origin=ORIGIN,
        log_key=world.server.public,
        files=tuple(ListedFile.of(path, data) for path, data in sorted(small.items())),
    )
    small[release.RELEASE] = listing.to_bytes(world.server)
    log.append([Released(run=RUN, release=digest.of_bytes(small[release.RELEASE]))])
    for site in world.sites:
        log.witness(site, ())
    logged = _log_files(log.keeper.file())
    files = tuple(ListedFile.of(path, data) for path, data in sorted(logged.items()))
    due = HistoryListing(server_key=world.server.public, release=digest.of_bytes(small[release.RELEASE]), files=files)
    yield from {**made, **small, **logged, release.HISTORY: due.to_bytes(world.server)}.items()


def _log_files(found: LogFile) -> Files:
    made = {release.LEAVES: release.join_leaves(found.leaves)}
    for signed in found.notes:
        made[release.checkpoint_path(int(signed.text.split("\n")[1]))] = signed.to_bytes()
    return made


def forget() -> None:
    """Empty the accountant's caches, so that nothing composed before is found again."""
    for cached in vars(accounting).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    """Build, log, bundle, verify; the figures."""
    cost: dict[str, float] = {}
    world = World(rounds)
    made = make_record(world, cost)
    tell(f"{rounds * SITES} statements are signed")
    log = Log(world, folder)
    keep_log(world, made, log, cost)
    tell("they are logged")
    sizes: dict[str, int] = {}
    for path, data in make_bundle(world, made, log):
        place = folder / "bundle" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        part = path.split("/")[0]
        sizes[part] = sizes.get(part, 0) + len(data)
    log.store.close()
    del made
    tell("the bundle is written")
    forget()
    began = time.process_time()
    world.compose()
    epsilons_s = time.process_time() - began
    forget()
    began, wall = time.process_time(), time.perf_counter()
    verdict = verify_release(folder / "bundle", world.trusted, redraw=False)
    verify_s, verify_wall_s = time.process_time() - began, time.perf_counter() - wall
    if verdict.findings or not verdict.identities_proven:
        raise RuntimeError(f"the bundle does not verify: {verdict.findings[:3]}")
    tensors = sizes.pop("states") + sizes.pop("encoder")
    return {
        **{name: round(value, 3) for name, value in cost.items()},
        "rounds": rounds,
        "sites": SITES,
        "verify_s": round(verify_s, 2),
        "verify_wall_s": round(verify_wall_s, 2),
        "epsilons_s": round(epsilons_s, 2),
        # Composing epsilons takes as long for 40 rounds as for 1,000; all else is in proportion.
        "verify_1000_rounds_s": round(epsilons_s + (verify_s - epsilons_s) * ROUNDS / rounds, 2),
        "record_mb": round(sum(sizes.values()) / 1e6, 2),
        "tensors_mb": round(tensors / 1e6, 2),
        "bytes_per_update": round(sum(sizes.values()) / (rounds * SITES)),
        "parts_mb": {name: round(size / 1e6, 2) for name, size in sorted(sizes.items()) if size > 100_000},
    }


def main() -> int:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    before = machine()
    with small_preset(), tempfile.TemporaryDirectory(prefix="pathfed-bench-") as place:
        figures = measure(QUICK_ROUNDS if options.quick else ROUNDS, Path(place))
    return finish("provenance", {**figures, "machine": before}, _TARGETS)


if __name__ == "__main__":
    sys.exit(main())
