"""The recorder writes records that verify, at every instant, however often it is killed or asked again."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pathfed_common import digest, files, model
from pathfed_common.digest import Digest
from pathfed_common.encoder import weights
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import AdaptersPlan, CohortPlan, DinoPlan, EncoderPlan, MaePlan, Plan, PrivacyPlan, RoundsPlan, ServerOptimiserPlan
from pathfed_common.privacy.accounting import PrivacyEvent, composed_epsilon
from pathfed_common.provenance import record
from pathfed_common.provenance.documents import Approval, SiteCard
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.record import RoundRecord
from pathfed_common.provenance.record_reader import TrustedKeys
from pathfed_common.provenance.statement import Figures, Privacy, UpdateStatement
from pathfed_common.provenance.verify import Verdict, verify_record
from pathfed_common.units import UtcSeconds
from pathfed_server.provenance.recorder import Recorder
from pathfed_server.rounds.released import average_digest, released_chunks
from pathfed_server.rounds.state import Candidate, Checkpoint, Participation, ParticipationState, RoundResult, RoundTimes, SiteState

RUN = RunName("run-1")
ROUNDS = 2
_DIGEST = digest.of_bytes(b"anything")


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.set_num_threads(1)
    return Plan(
        name="real",
        objective=MaePlan(decoder_dim=32, decoder_depth=1),
        cohort=CohortPlan(tile_px=32),
        privacy=PrivacyPlan(expected_patients=4, noise_multiplier=1.0, clip_norm=1.0, epsilon_limit=8.0),
        rounds=RoundsPlan(count=ROUNDS, quorum=1),
    )


@pytest.fixture(scope="module")
def states(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Base states of the real smallest preset, 22 MB each."""
    folder = tmp_path_factory.mktemp("states")
    first = model.initial_state(plan)
    made = []
    for index in range(ROUNDS + 1):
        path = folder / f"{index}.safetensors"
        path.write_bytes(weights.dump({name: tensor + index for name, tensor in first.items()}, {}))
        made.append(path)
    return made


@dataclass
class World:
    """A server, its sites, and what they would say in each round."""

    plan: Plan
    states: list[Path]
    folder: Path
    updates: Path
    server: SigningKey = field(default_factory=SigningKey.generate)
    keys: dict[SiteName, SigningKey] = field(default_factory=lambda: {SiteName(name): SigningKey.generate() for name in ("a", "b")})
    statements: dict[tuple[int, SiteName], bytes] = field(default_factory=dict)
    average: Digest | None = None

    def recorder(self, *, retain: bool = False) -> Recorder:
        cards = {site: SiteCard(site=site, evidence_key=key.public, flower_key="ssh").to_bytes(key) for site, key in self.keys.items()}
        return Recorder(self.folder, self.server, cards, retain_updates=retain)

    def begin(self, recorder: Recorder, *, run: RunName = RUN) -> None:
        candidates = [
            Candidate(
                site=site,
                state=SiteState.ENROLLED,
                evidence_key=key.public.to_text(),
                declared_patients=40,
                reply_slots=True,
                approval=self.approval(site) if site == "a" else None,
            )
            for site, key in self.keys.items()
        ]
        recorder.begin(run=run, plan=self.plan, candidates=candidates, initial_state=self.states[0])

    def record_round(self, recorder: Recorder, index: int, sites: Sequence[str] = ("a", "b")) -> None:
        names = [SiteName(site) for site in sites]
        statements = {site: self.statement(index, site) for site in names}
        recorder.record_round(
            result=self.result(index, statements),
            statements=statements,
            approvals={site: self.approval(site) for site in names},
            updates={site: self.update(index, site) for site in names},
            state=self.states[index],
        )

    def finish(self, recorder: Recorder, optimiser: Path = Path("not-read")) -> None:
        recorder.finish(run=RUN, rounds=ROUNDS, state=self.states[ROUNDS], state_digest=self.digest(ROUNDS), optimiser=optimiser)

    def verify(self) -> Verdict:
        return verify_record(
            self.folder, TrustedKeys(server=self.server.public, sites={site: key.public for site, key in self.keys.items()})
        )

    def digest(self, index: int) -> Digest:
        return digest.of_bytes(self.states[index].read_bytes())

    def approval(self, site: SiteName) -> bytes:
        approval = Approval(site=site, plan=self.plan.digest, declared_patients=40, reply_slots=True, approved_at=UtcSeconds(1.7e9))
        return approval.to_bytes(self.keys[site])

    def update(self, index: int, site: SiteName) -> Path:
        path = self.updates / f"{site}-{index}"
        path.write_bytes(f"update {site} {index}".encode())
        return path

    def statement(self, index: int, site: SiteName) -> bytes:
        """The one statement a site makes for a round; asked again it sends the same bytes."""
        if (index, site) not in self.statements:
            self.statements[index, site] = self._statement(index, site).to_envelope(self.keys[site])
        return self.statements[index, site]

    def _statement(self, index: int, site: SiteName) -> UpdateStatement:
        update, privacy = self.update(index, site).read_bytes(), self.plan.privacy
        earlier = [number for number, name in self.statements if name == site and number < index]
        event = PrivacyEvent(sampling_rate=0.1, noise_multiplier=privacy.noise_multiplier, steps=len(earlier) + 1)
        return UpdateStatement(
            site=site,
            run=RUN,
            round_index=index,
            plan=self.plan.digest,
            base_state=self.digest(index - 1),
            update=digest.of_bytes(update),
            update_bytes=len(update),
            privacy=Privacy(
                sampling_rate=0.1, noise_multiplier=privacy.noise_multiplier, clip_norm=privacy.clip_norm, steps=1, delta=privacy.delta
            ),
            epsilon_plan=composed_epsilon([event], privacy.delta),
            epsilon_total=1.0,
            delta_total=1e-6,
            ledger_head=_DIGEST,
            code=_DIGEST,
            figures=Figures(loss_sum=1.0, loss_sum_std=1.0, patients=4.0, patients_std=1.0),
            reply_slot_s=self.plan.rounds.reply_slot_s,
            manifest_commitment=_DIGEST,
            previous=digest.of_bytes(self.statements[max(earlier), site]) if earlier else None,
            issued_at=UtcSeconds(1.7e9 + index),
        )

    def result(self, index: int, statements: dict[SiteName, bytes]) -> RoundResult:
        rows = [
            Participation(
                site=site,
                state=ParticipationState.ADMITTED if site in statements else ParticipationState.SILENT,
                code=None if site in statements else "PF515",
                update=digest.of_bytes(self.update(index, site).read_bytes()) if site in statements else None,
                update_bytes=len(self.update(index, site).read_bytes()) if site in statements else None,
                statement=digest.of_bytes(statements[site]) if site in statements else None,
                rounding=0.0 if site in statements else None,
            )
            for site in self.keys
        ]
        return RoundResult(
            run=RUN,
            attempt=1,
            round_index=index,
            plan=self.plan.digest,
            base_state=self.digest(index - 1),
            checkpoint=Checkpoint(
                round_index=index,
                state=self.digest(index),
                state_path="s",
                state_bytes=1,
                optimiser=_DIGEST,
                optimiser_path="o",
                optimiser_bytes=1,
            ),
            participations=tuple(rows),
            weights={site: 1 / len(statements) for site in statements},
            offered_at=1.7e9,
            deadline=1.7e9 + 600,
            committed_at=1.7e9 + 5,
            times=RoundTimes(exchange_s=4.0),
            average=self.average,
        )


@pytest.fixture
def world(plan: Plan, states: list[Path], tmp_path: Path) -> World:
    (tmp_path / "updates").mkdir()
    return World(plan, states, tmp_path / "record", tmp_path / "updates")


def test_a_whole_run_verifies_after_every_step(world: World) -> None:
    recorder = world.recorder()
    world.begin(recorder)
    assert (world.verify().consistent, world.verify().rounds) == (True, 0)
    world.record_round(recorder, 1)
    world.record_round(recorder, 2, ["a"])
    assert (world.verify().consistent, world.verify().rounds) == (True, 2)
    world.finish(recorder)
    verdict = world.verify()
    verdict.require(identities=True)
    assert [(site.site, site.rounds) for site in verdict.sites] == [("a", 2), ("b", 1)]
    assert verdict.notes == ("aggregation not proven: 0 of 3 admitted updates are retained, and none was replayed",)
    second = RoundRecord.from_bytes((world.folder / record.round_path(2)).read_bytes(), world.server.public)
    assert [(entry.site, entry.code) for entry in second.silent] == [("b", "PF515")]
    assert second.times.exchange_s == 4.0
    exported = weights.load((world.folder / record.ENCODER).read_bytes())
    assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == model.encoder_spec(world.plan).shapes()


def test_a_run_goes_on_after_a_site_changed_its_flower_node_key_and_not_after_another_evidence_key(world: World) -> None:
    recorder = world.recorder()
    world.begin(recorder)
    world.record_round(recorder, 1)
    cards = {site: SiteCard(site=site, evidence_key=key.public, flower_key="ssh, new").to_bytes(key) for site, key in world.keys.items()}
    world.record_round(Recorder(world.folder, world.server, cards), 2)
    world.verify().require(identities=True)
    stranger = SigningKey.generate()
    cards = {site: SiteCard(site=site, evidence_key=stranger.public, flower_key="ssh").to_bytes(stranger) for site in world.keys}
    with pytest.raises(ProvenanceError) as caught:
        world.record_round(Recorder(world.folder, world.server, cards), 2)
    assert caught.value.code is ErrorCode.RECORD_CHANGED
    world.verify().require()


DINO = DinoPlan(local_crop_px=32, head_dim=16, bottleneck_dim=8, prototypes=16)
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "whole": ({}, "encoder."),
    "teacher": ({"objective": DINO}, "teacher.encoder."),
    "average": ({"server_optimiser": ServerOptimiserPlan(ema=0.9)}, "ema.encoder."),
}


@pytest.mark.parametrize("encoder", [EncoderPlan(), EncoderPlan(adapters=AdaptersPlan(rank=2, scale=0.5))], ids=["whole", "adapters"])
@pytest.mark.parametrize("what", CHANGES)
def test_the_released_encoder_is_the_plans_bit_for_bit(plan: Plan, what: str, encoder: EncoderPlan, tmp_path: Path) -> None:
    """The state's; the teacher's where there is one; the running average of what is trained; each with its adapters merged."""
    changes, prefix = CHANGES[what]
    made = plan.model_copy(update={"encoder": encoder, **changes})
    random = torch.Generator().manual_seed(1)
    numbers = {name: torch.randn(shape, generator=random) for name, shape in model.state_shapes(made).items()}
    averages = {f"ema.{name}": tensor + 1 for name, tensor in numbers.items() if name.startswith("encoder.") and model.trained(made)(name)}
    state, optimiser = tmp_path / "state", tmp_path / "optimiser"
    state.write_bytes(weights.dump(numbers, {}))
    optimiser.write_bytes(weights.dump(averages, {}))
    data = b"".join(released_chunks(made, state=state, optimiser=optimiser))
    assert average_digest(made, state=state, optimiser=optimiser) == (digest.of_bytes(data) if what == "average" else None)
    held = {**numbers, **averages} | {f"ema.{name}": tensor for name, tensor in numbers.items() if f"ema.{name}" not in averages}
    exported = weights.load(data)
    assert exported.keys() == model.encoder_spec(made).shapes().keys()
    for name, tensor in exported.items():
        due, stem = held[prefix + name], prefix + name.removesuffix(".weight")
        if f"{stem}.lora_a.weight" not in held:
            assert torch.equal(tensor, due)
            continue
        product = held[f"{stem}.lora_b.weight"].double() @ held[f"{stem}.lora_a.weight"].double()
        assert not torch.equal(tensor, due)
        torch.testing.assert_close(tensor, (due.double() + 0.5 * product).float(), rtol=1e-6, atol=1e-6)


def test_finish_wants_the_average_that_the_last_round_names(plan: Plan, states: list[Path], tmp_path: Path) -> None:
    (tmp_path / "updates").mkdir()
    averaged = Plan.model_validate({**plan.model_dump(), "server_optimiser": {"ema": 0.9}})
    held = weights.load(states[1].read_bytes())
    optimiser, other = tmp_path / "optimiser", tmp_path / "other"
    slots = {f"ema.{name}": tensor for name, tensor in held.items() if name.startswith("encoder.")}
    optimiser.write_bytes(weights.dump(slots, {}))
    other.write_bytes(weights.dump({name: tensor + 1 for name, tensor in slots.items()}, {}))
    world = World(averaged, states, tmp_path / "record", tmp_path / "updates")
    world.average = average_digest(averaged, state=states[ROUNDS], optimiser=optimiser)
    recorder = world.recorder()
    world.begin(recorder)
    for index in (1, 2):
        world.record_round(recorder, index)
    with pytest.raises(ProvenanceError, match="PF601"):
        world.finish(recorder, other)
    world.finish(recorder, optimiser)
    world.verify().require()
    assert digest.of_bytes((world.folder / record.ENCODER).read_bytes()) == world.average


class _KilledError(BaseException):
    """The process is gone; nothing of the recorder's runs on."""


def test_killed_before_any_write_the_record_verifies_and_the_next_process_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Callable[[Recorder], None]] = [
        lambda recorder: world.begin(recorder),
        lambda recorder: world.record_round(recorder, 1),
        lambda recorder: world.record_round(recorder, 2),
        lambda recorder: world.finish(recorder),
    ]
    real, left = files.write_atomic, 0

    def counted(path: Path, data: Any, **options: Any) -> None:
        nonlocal left
        if left == 0:
            raise _KilledError
        left -= 1
        real(path, data, **options)

    monkeypatch.setattr(files, "write_atomic", counted)
    kills = 0
    for step in steps:
        survived, allowed = False, 0
        while not survived:
            left = allowed
            try:
                step(world.recorder())
                survived = True
            except _KilledError:
                kills += 1
                allowed += 1
            if (world.folder / record.MANIFEST).exists():
                world.verify().require()
    assert kills > 12
    world.verify().require(identities=True)
    assert world.verify().rounds == ROUNDS


def test_a_round_recorded_again_replaces_the_earlier_one(world: World) -> None:
    recorder = world.recorder(retain=True)
    world.begin(recorder)
    world.record_round(recorder, 1)
    world.record_round(recorder, 2, ["a", "b"])
    again = world.recorder(retain=True)
    world.record_round(again, 2, ["a"])
    verdict = world.verify()
    verdict.require(identities=True)
    assert [(site.site, site.rounds) for site in verdict.sites] == [("a", 2), ("b", 1)]
    assert not (world.folder / record.statement_path(2, "b")).exists()
    assert not (world.folder / record.update_path(2, "b")).exists()
    before = {path: path.read_bytes() for path in world.folder.rglob("*.dsse")}
    world.record_round(again, 2, ["a"])
    assert {path: path.read_bytes() for path in world.folder.rglob("*.dsse")} == before


def test_an_earlier_round_recorded_again_takes_the_later_ones_back(world: World) -> None:
    recorder = world.recorder()
    world.begin(recorder)
    world.record_round(recorder, 1)
    world.record_round(recorder, 2)
    world.finish(recorder)
    world.record_round(recorder, 1)
    verdict = world.verify()
    verdict.require()
    assert verdict.rounds == 1
    assert "no encoder is exported: the run is not finished" in verdict.notes


def test_begin_again_keeps_the_rounds(world: World) -> None:
    recorder = world.recorder()
    world.begin(recorder)
    world.record_round(recorder, 1)
    world.begin(world.recorder())
    assert (world.verify().consistent, world.verify().rounds) == (True, 1)


@pytest.mark.parametrize("other", ["run", "plan", "server", "state", "card"])
def test_another_runs_record_is_never_overwritten(other: str, world: World) -> None:
    world.begin(world.recorder())
    before = (world.folder / record.MANIFEST).read_bytes()
    changed = {
        "run": world,
        "plan": replace(world, plan=world.plan.model_copy(update={"name": "other"})),
        "server": replace(world, server=SigningKey.generate()),
        "state": replace(world, states=world.states[::-1]),
        "card": replace(world, keys={site: SigningKey.generate() for site in world.keys}),
    }[other]
    with pytest.raises(ProvenanceError) as caught:
        changed.begin(changed.recorder(), run=RunName("run-2") if other == "run" else RUN)
    assert caught.value.code == ErrorCode.RECORD_CHANGED
    assert (world.folder / record.MANIFEST).read_bytes() == before
    world.verify().require()


def test_rounds_cannot_be_skipped_or_recorded_before_the_beginning(world: World) -> None:
    for prepare in (lambda recorder: None, world.begin):
        recorder = world.recorder()
        prepare(recorder)
        with pytest.raises(ProvenanceError) as caught:
            world.record_round(recorder, 2)
        assert caught.value.code == ErrorCode.RECORD_INCOMPLETE


def test_finish_demands_every_round_and_the_last_state(world: World) -> None:
    recorder = world.recorder()
    world.begin(recorder)
    world.record_round(recorder, 1)
    with pytest.raises(ProvenanceError, match="PF605"):
        world.finish(recorder)
    world.record_round(recorder, 2)
    with pytest.raises(ProvenanceError, match="PF601"):
        recorder.finish(run=RUN, rounds=ROUNDS, state=world.states[1], state_digest=world.digest(1), optimiser=world.states[1])
    with pytest.raises(ProvenanceError, match="PF601"):
        recorder.finish(run=RUN, rounds=ROUNDS, state=world.states[1], state_digest=world.digest(2), optimiser=world.states[1])


def test_a_site_without_a_card_is_refused_by_name(world: World) -> None:
    recorder = Recorder(world.folder, world.server, {})
    with pytest.raises(ProvenanceError) as caught:
        world.begin(recorder)
    assert (caught.value.code, caught.value.value) == (ErrorCode.RECORD_INCOMPLETE, "a")


def test_states_come_in_without_a_copy_or_as_one_where_links_do_not_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.begin(world.recorder())
    linked = world.folder / record.state_path(0)
    assert linked.samefile(world.states[0])
    shutil.rmtree(world.folder)

    def no_links(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", no_links)
    world.begin(world.recorder())
    assert not linked.samefile(world.states[0])
    assert linked.read_bytes() == world.states[0].read_bytes()
    world.verify().require()


def test_retained_updates_are_part_of_the_record(world: World) -> None:
    recorder = world.recorder(retain=True)
    world.begin(recorder)
    world.record_round(recorder, 1)
    assert (world.folder / record.update_path(1, "a")).read_bytes() == b"update a 1"
    assert "aggregation not proven: 2 of 2 admitted updates are retained, and none was replayed" in world.verify().notes
