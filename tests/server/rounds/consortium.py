"""A whole consortium in memory around the real loop: real store (SQLite), real files, real signatures, tiny tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathfed_common import digest, wire_format
from pathfed_common.encoder import weights
from pathfed_common.files import write_atomic
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import Plan
from pathfed_common.privacy.randomness import KeyedRandom
from pathfed_common.protocol.messages import OFFER_TYPE, RoundOffer
from pathfed_common.provenance import dsse
from pathfed_common.provenance.documents import Approval, seal_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.statement import Figures, Privacy, UpdateStatement
from pathfed_common.units import UtcSeconds
from pathfed_server.db.rows import ApprovalRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.rounds.loop import run_rounds
from pathfed_server.rounds.ports import Consent, Offer, Reply, Sending
from pathfed_server.rounds.progress import Progress, RunOutcome
from pathfed_server.rounds.settings import RunSettings
from pathfed_server.rounds.state import Candidate, RoundResult

SHAPES = {"encoder.blocks.0.w": (16, 12), "encoder.norm": (32,), "head.bias": (5,)}
RUN = RunName("run-1")
DECLARED = 40
NAMES = tuple(SiteName(name) for name in ("a-hospital", "b-hospital", "c-hospital"))
#: Fixed keys, so that two consortia of one test sign the same bytes.
KEYS = {name: SigningKey.generate() for name in (*NAMES, SiteName("server"), SiteName("stranger"))}


def make_plan(*, rounds: int = 2, quorum: int = 2, steps: int = 1, wire: str = "float32", optimiser: str = "adamw", **extra: Any) -> Plan:
    return Plan.model_validate(
        {
            "name": "tiny",
            "privacy": {"expected_patients": 8.0, "noise_multiplier": 1.0, "clip_norm": 1.0, "epsilon_limit": 10.0},
            "rounds": {"count": rounds, "quorum": quorum, "steps": steps, "deadline_s": 60.0},
            "server_optimiser": {"name": optimiser, "learning_rate": 0.01},
            "wire": {"dtype": wire},
            **extra,
        }
    )


def initial_state() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


class FakeClock:
    """Time that moves only when it is told to."""

    def __init__(self) -> None:
        self.time = 1_795_460_000.25
        self.slept: list[float] = []

    def now(self) -> float:
        self.time += 0.001
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


@dataclass
class FakeRecorder:
    """Keeps what it is told, the later call for a round replacing the earlier."""

    begun: list[tuple[Plan, tuple[Candidate, ...], bytes]] = field(default_factory=list)
    rounds: dict[int, tuple[RoundResult, dict[SiteName, bytes], dict[SiteName, bytes]]] = field(default_factory=dict)
    finished: list[tuple[int, digest.Digest]] = field(default_factory=list)

    def begin(self, *, run: RunName, plan: Plan, candidates: Sequence[Candidate], initial_state: Path) -> None:
        self.begun.append((plan, tuple(candidates), initial_state.read_bytes()))

    def record_round(
        self,
        *,
        result: RoundResult,
        statements: Mapping[SiteName, bytes],
        approvals: Mapping[SiteName, bytes],
        updates: Mapping[SiteName, Path],
        state: Path,
    ) -> None:
        assert digest.of_bytes(state.read_bytes()) == result.checkpoint.state
        stated = {each.site: each.update for each in result.participations}
        assert all(digest.of_bytes(path.read_bytes()) == stated[site] for site, path in updates.items())
        self.rounds[result.round_index] = (result, dict(statements), dict(approvals))

    def finish(self, *, run: RunName, rounds: int, state: Path, state_digest: digest.Digest, optimiser: Path) -> None:
        assert digest.of_bytes(state.read_bytes()) == state_digest
        self.finished.append((rounds, state_digest))


@dataclass
class Answer:
    """What a site has made for one offer, before it is sent; hostile sites change it."""

    offer: RoundOffer
    statement: UpdateStatement
    update: bytes
    key: SigningKey

    def reply(self, folder: Path, received_at: float) -> Reply:
        path = folder / f"{self.offer.site}.part"
        write_atomic(path, self.update)
        envelope = self.statement.to_envelope(self.key)
        return Reply(site=self.offer.site, code=None, statement=envelope, update=path, received_at=received_at, transfer_s=0.25)

    def signed_again(self, update: bytes) -> "Answer":
        """The same with other bytes, truthfully stated."""
        stated = replace(self.statement, update=digest.of_bytes(update), update_bytes=len(update))
        return replace(self, update=update, statement=stated)


def honest_update(plan: Plan, offer: RoundOffer) -> dict[str, Tensor]:
    """As many drawn patients as expected, each clipped, plus noise; the same for the same offer."""
    mechanism = plan.mechanism(DECLARED)
    seed = digest.of_value([offer.site, offer.round_index, offer.base_state, offer.plan])
    random = torch.Generator().manual_seed(int(seed[-12:], 16))
    update = {}
    for name in sorted(SHAPES):
        noise = torch.randn(SHAPES[name], generator=random) * mechanism.gradient_std / plan.rounds.steps**0.5
        update[name] = noise + 0.01
    return update


def travelling(plan: Plan, tensors: Mapping[str, Tensor]) -> bytes:
    """The update's file as a site writes it, with the same coins each time."""
    return b"".join(wire_format.chunks(tensors, plan.wire.dtype, KeyedRandom(bytes(32), {"purpose": "test"})))


def honest_answer(plan: Plan, offer: RoundOffer, previous: digest.Digest | None = None) -> Answer:
    mechanism, steps = plan.mechanism(DECLARED), plan.rounds.steps
    update = travelling(plan, honest_update(plan, offer))
    statement = UpdateStatement(
        site=offer.site,
        run=offer.run,
        round_index=offer.round_index,
        plan=offer.plan,
        base_state=offer.base_state,
        update=digest.of_bytes(update),
        update_bytes=len(update),
        privacy=Privacy(
            sampling_rate=mechanism.sampling_rate,
            noise_multiplier=mechanism.noise_multiplier,
            clip_norm=mechanism.clip_norm,
            steps=steps,
            delta=plan.privacy.delta,
        ),
        epsilon_plan=0.5 * offer.round_index,
        epsilon_total=0.75 * offer.round_index,
        delta_total=1e-6,
        ledger_head=digest.of_value(["ledger", offer.site, offer.round_index]),
        code=digest.of_bytes(b"code"),
        figures=Figures(
            loss_sum=6.5, loss_sum_std=mechanism.loss_sum_std * steps**0.5, patients=8.1, patients_std=mechanism.patients_std * steps**0.5
        ),
        reply_slot_s=5.0,
        manifest_commitment=digest.of_bytes(b"commitment"),
        previous=previous,
        issued_at=UtcSeconds(1_795_460_000.0),
    )
    return Answer(offer, statement, update, KEYS[offer.site])


#: What a site does instead of sending its honest answer; None: nothing comes.
Conduct = Callable[[Answer, Path, float], list[Reply]]


def send(answer: Answer, folder: Path, at: float) -> list[Reply]:
    return [answer.reply(folder, at)]


@dataclass
class FakeSites:
    """Sites that check their offers and answer, each in its own way."""

    plan: Plan
    clock: FakeClock
    conduct: dict[SiteName, Conduct] = field(default_factory=dict)
    arrival: Callable[[list[Offer]], list[Offer]] = list
    asked: list[tuple[SiteName, int]] = field(default_factory=list)

    def exchange(self, offers: Sequence[Offer], spool: Path, *, withheld: Consent, sending: Sending) -> Iterator[Reply]:
        for sent in self.arrival(list(offers)):
            code = withheld(sent.site)
            if code is not None:
                yield Reply(site=sent.site, code=code, statement=None, update=None, received_at=self.clock.now(), transfer_s=0.0)
                continue
            sending(sent.site)
            payload = dsse.open_envelope(sent.envelope, payload_type=OFFER_TYPE, keys=KEYS[SiteName("server")].public)
            offer = RoundOffer.from_bytes(payload)
            # The bulk plane gives what lies in the home: the state after the round before.
            base = (spool.parents[2] / "states" / f"round-{offer.round_index - 1:06d}.safetensors").read_bytes()
            assert (offer.site, offer.base_state, offer.base_state_bytes) == (sent.site, digest.of_bytes(base), len(base))
            assert (offer.plan, offer.run, offer.deadline) == (self.plan.digest, RUN, sent.deadline)
            self.asked.append((offer.site, offer.round_index))
            yield from self.conduct.get(offer.site, send)(honest_answer(self.plan, offer), spool, self.clock.now())


@dataclass
class Consortium:
    """A server home with its database, and the sites."""

    home: Path
    store: SqlStore
    plan: Plan
    clock: FakeClock
    sites: FakeSites
    recorder: FakeRecorder
    told: list[Progress] = field(default_factory=list)

    def settings(self, **changes: Any) -> RunSettings:
        made = RunSettings(
            run=RUN, plan=self.plan, shapes=SHAPES, initial_state=initial_state, key=KEYS[SiteName("server")], home=self.home
        )
        return replace(made, **changes)

    def drive(self, **changes: Any) -> RunOutcome:
        return run_rounds(
            self.settings(**changes),
            sites=self.sites,
            store=self.store,
            recorder=self.recorder,
            clock=self.clock,
            progress=self.told.append,
        )

    def final_state(self) -> dict[str, Tensor]:
        return weights.load((self.home / self.store.checkpoints(RUN)[-1].state_path).read_bytes())

    def codes(self, round_index: int) -> dict[SiteName, str | None]:
        return {each.site: each.code for each in self.store.participations(RUN, round_index)}


def _row(given: Approval, envelope: bytes) -> ApprovalRow:
    columns = {field.name for field in fields(ApprovalRow)}
    return ApprovalRow(**{name: value for name, value in vars(given).items() if name in columns}, envelope=envelope)


def found(home: Path, plan: Plan, sites: Sequence[SiteName], *, url: str | None = None) -> Consortium:
    """A consortium whose sites have all approved the plan, and one planned run. `home` holds a migrated server.db, or `url` names one."""
    store = SqlStore(url or f"sqlite:///{home}/server.db").open()
    clock = FakeClock()
    for name in sites:
        store.add_site(name, evidence_key=KEYS[name].public.to_text(), flower_key=f"flower {name}", at=clock.now())
    signed = seal_plan(plan, KEYS[SiteName("server")])
    store.add_plan(plan.digest, name=plan.name, canonical=plan.canonical_bytes(), signed=signed, at=clock.now())
    for name in sites:
        given = Approval(site=name, plan=plan.digest, declared_patients=DECLARED, reply_slots=True, approved_at=UtcSeconds(clock.now()))
        store.add_approval(_row(given, given.to_bytes(KEYS[name])), at=clock.now())
    store.create_run(RUN, plan_digest=plan.digest, sites=sites, at=clock.now())
    return Consortium(home, store, plan, clock, FakeSites(plan, clock), FakeRecorder())


#: The fixture `consortium`: makes a consortium in a folder of its own, each call another one.
Make = Callable[..., Consortium]
