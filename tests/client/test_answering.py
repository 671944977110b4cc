"""One site from offer to sealed answer: real slides, real keys, real SQLite, a real encoder, real noise."""

import base64
import io
import json
import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from answering_site import OFFERED_AT, Clock, Site, bytes_of, file_of, opened

from pathfed_client import answering, app, computing, deciding, showing
from pathfed_client.cohort.patient_list import pseudonym
from pathfed_client.gate.ports import Answer
from pathfed_client.home import SiteHome
from pathfed_client.io.ledger_head import HeadFile
from pathfed_client.io.run_secrets import RunSecrets, secret_id
from pathfed_client.io.site_records import ApprovalState, SealedUpdate, SlideRecord, SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.withdrawing import WithdrawalInput
from pathfed_client.slides.tiling import scan_key
from pathfed_client.training import local_round, private_step
from pathfed_client.training.local_round import run_round
from pathfed_common import digest, files
from pathfed_common.code_digest import code_digest
from pathfed_common.encoder import weights
from pathfed_common.errors import ErrorCode, HostError, PrivacyError, ProvenanceError, TransportError
from pathfed_common.ids import run_name
from pathfed_common.model import state_shapes
from pathfed_common.plan import Plan
from pathfed_common.privacy.accounting import PrivacyEvent, composed_epsilon
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.statement import UpdateStatement

SURNAMES = ("Muellerova", "Oyelaran", "Katzenstein", "Drozdowski", "Yamashiro")


@pytest.fixture
def site(copy_home: Callable[..., SiteHome]) -> Iterator[Site]:
    with opened(copy_home()) as made:
        yield made


@pytest.fixture(scope="module")
def answered(world, ready_home, tmp_path_factory) -> Iterator[tuple[Site, Answer, str]]:
    """A site, its answer to the first offer, and all that was logged meanwhile. Nothing may change it."""
    home = SiteHome(shutil.copytree(ready_home, tmp_path_factory.mktemp("answered") / "home"))
    log = io.StringIO()
    handler, root = logging.StreamHandler(log), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with opened(home) as site:
            yield site, site.answer(world.offer(), world.base_state), log.getvalue()
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


@pytest.fixture(scope="module")
def undisturbed(answered) -> bytes:
    """The update of a site with the same secrets that nothing happened to."""
    return bytes_of(answered[1])


def numbers(update: bytes) -> torch.Tensor:
    """All numbers of an update, in the order of the tensors' names."""
    return torch.cat([tensor.float().flatten() for _, tensor in sorted(weights.load(update).items())])


def correlation(left: bytes, right: bytes) -> float:
    """Of two updates, number by number. Noise that is independent gives 0 within 0.0005 on these 5.5 million."""
    return float(torch.corrcoef(torch.stack([numbers(left), numbers(right)]))[0, 1])


def with_plan(world, home: SiteHome, *, declared: int = 4, **changes) -> Plan:
    """Another plan, signed, and approved here."""
    privacy = {key: changes.pop(key) for key in list(changes) if key in type(world.plan.privacy).model_fields}
    plan = world.plan.model_copy(update={"privacy": world.plan.privacy.model_copy(update=privacy), **changes})
    deciding.approve(home, world.sign(f"{plan.name}-{digest.short(plan.digest)}.dsse", plan), declared, home.root / "other.dsse")
    return plan


# What an honest offer gets


def test_a_signed_offer_gets_a_sealed_update_and_a_statement_that_verifies(world, answered):
    site, answer, _ = answered
    said, data = site.statement(answer), bytes_of(answer)
    assert (said.site, said.run, said.round_index) == ("st-elsewhere", "run-1", 1)
    assert (said.plan, said.base_state) == (world.plan.digest, digest.of_bytes(world.base_state))
    assert (said.update, said.update_bytes) == (digest.of_bytes(data), len(data))
    update = weights.load(data)
    assert {name: tuple(tensor.shape) for name, tensor in update.items()} == state_shapes(world.plan)
    assert all(tensor.dtype is torch.bfloat16 and bool(torch.isfinite(tensor).all()) for tensor in update.values())
    entry = app.open_ledger(site.home, site.store).verify()[0]
    assert said.ledger_head == app.open_ledger(site.home, site.store).head
    assert (said.epsilon_plan, said.epsilon_total) == (entry.epsilon_plan, entry.epsilon_total)
    assert (said.privacy.sampling_rate, said.privacy.noise_multiplier, said.privacy.clip_norm, said.privacy.steps) == (0.5, 1.0, 1.0, 1)
    assert said.epsilon_plan == pytest.approx(app.plan_epsilon(replaced(world.plan, count=1), 4, world.plan.privacy.delta))
    assert (said.reply_slot_s, said.previous) == (5.0, None)


def replaced(plan: Plan, **rounds) -> Plan:
    return plan.model_copy(update={"rounds": plan.rounds.model_copy(update=rounds)})


def test_the_noise_of_the_update_has_the_stated_scale(undisturbed):
    """sigma * C / B on every number: beside 5.5 million of them the clipped gradients of at most five patients are nothing."""
    assert float(numbers(undisturbed).std()) == pytest.approx(1.0 / 2.0, rel=0.01)


def test_rounds_follow_each_other_and_the_same_offer_gets_the_same_bytes_and_no_second_charge(world, site):
    first = site.answer(world.offer(), world.base_state)
    again = site.answer(world.offer(), world.base_state)
    later = site.answer(world.offer(offered_at=OFFERED_AT + 100, deadline=OFFERED_AT + 160), world.base_state)
    assert first == again == later
    assert bytes_of(first) == bytes_of(later)
    assert site.charges() == 1

    times = {"offered_at": OFFERED_AT + 200, "deadline": OFFERED_AT + 260}
    second = site.answer(world.offer(round_index=2, **times), world.base_state)
    said = site.statement(second)
    assert site.charges() == 2
    assert first.statement is not None
    assert said.previous == digest.of_bytes(first.statement)
    assert bytes_of(second) != bytes_of(first)
    assert said.epsilon_plan > site.statement(first).epsilon_plan
    assert said.manifest_commitment != site.statement(first).manifest_commitment  # the same cohort, a fresh salt

    # The first round on another base state, and a round in between: past. On the same base state: the bytes of then.
    other = weights.dump({**weights.load(world.base_state)}, {"kind": "another"})
    assert site.answer(world.offer(base_state=other), other).code == "PF409"
    assert site.answer(world.offer(), world.base_state) == first
    assert site.charges() == 2


def test_another_process_resends_the_sealed_bytes(world, copy_home):
    home = copy_home()
    with opened(home) as site:
        first = site.answer(world.offer(), world.base_state)
    with opened(SiteHome(home.root)) as site:
        assert site.answer(world.offer(), world.base_state) == first
        assert site.charges() == 1
        first_update = file_of(first)
        first_update.write_bytes(first_update.read_bytes()[:-1] + b"x")
        assert site.answer(world.offer(), world.base_state) == Answer(code="PF410")


# What is refused, before anything is charged: the whole list is test_hostile_server.py


def test_an_offer_from_the_future_is_not_waited_for_even_where_the_answer_is_sealed(world, site):
    """Resending waits for a slot too, and the slots are counted from the offer."""
    assert site.answer(world.offer(), world.base_state).code is None
    slept = list(site.clock.slept)
    future = world.offer(offered_at=OFFERED_AT + 1e6, deadline=OFFERED_AT + 1e6 + 60)
    assert site.answer(future, world.base_state) == Answer(code="PF409")
    assert site.clock.slept == slept


def test_a_refused_round_of_the_future_does_not_move_the_secrets_on(world, site, undisturbed):
    assert site.answer(world.offer(round_index=4), world.base_state).code == "PF409"
    assert bytes_of(site.answer(world.offer(), world.base_state)) == undisturbed


def test_a_withdrawn_approval_counts_at_once(world, site):
    approved = site.store.approval(world.plan.digest)
    assert approved is not None
    site.store.add_approval(replace(approved, state=ApprovalState.REVOKED))
    assert site.answer(world.offer(), world.base_state) == Answer(code="PF407")
    assert site.charges() == 0


@pytest.mark.parametrize("gone", ["DELETE FROM slide", "UPDATE slide SET status = 'refused', patient = NULL"])
def test_a_site_whose_last_patient_is_gone_answers_with_noise(world, site, gone):
    """Otherwise answering or not would tell whether a cohort of one still has its patient."""
    with closing(sqlite3.connect(site.home.database)) as database, database:
        database.execute(gone)
    update = numbers(bytes_of(site.answer(world.offer(), world.base_state)))
    assert float(update.std()) == pytest.approx(1.0 / 2.0, rel=0.01)
    assert site.charges() == 1


def test_a_ledger_whose_end_was_cut_off_is_not_charged(world, site):
    """The sealed statement names a head that is no longer there: what was spent would be forgotten."""
    assert site.answer(world.offer(), world.base_state).code is None
    with closing(sqlite3.connect(site.home.database)) as database, database:
        database.execute("DROP TRIGGER ledger_entry_no_delete")
        database.execute("DELETE FROM ledger_entry")
    assert site.answer(world.offer(round_index=2), world.base_state) == Answer(code="PF309")
    assert site.charges() == 0
    with pytest.raises(PrivacyError, match=r"PF309.*the head file .*has seen entry 1, the ledger ends at 0"):
        app.open_ledger(site.home, site.store)
    HeadFile.create(site.home.run_secrets)  # the statement alone finds it too
    with pytest.raises(PrivacyError, match=r"PF309.*a statement this site has sealed names the head"):
        app.open_ledger(site.home, site.store)


def test_a_home_whose_database_was_restored_from_a_backup_answers_nothing_new(world, site, tmp_path):
    """Entries, statements and all are those of then, and whole: the head file, kept out of backups, knows better."""
    assert site.answer(world.offer(), world.base_state).code is None
    with closing(sqlite3.connect(site.home.database)) as source, closing(sqlite3.connect(tmp_path / "backup.db")) as backup:
        source.backup(backup)
    assert site.answer(world.offer(round_index=2), world.base_state).code is None
    with closing(sqlite3.connect(tmp_path / "backup.db")) as backup, closing(sqlite3.connect(site.home.database)) as target:
        backup.backup(target)
    assert site.charges() == 1
    assert site.answer(world.offer(round_index=3), world.base_state) == Answer(code="PF309")
    assert site.charges() == 1


def test_a_site_whose_clock_was_set_back_is_not_charged(world, site):
    assert site.answer(world.offer(), world.base_state).code is None
    (entry,) = app.open_ledger(site.home, site.store).entries()
    site.clock.time = entry.at - 3600
    earlier = world.offer(round_index=2, offered_at=entry.at - 3601, deadline=entry.at - 3541)
    assert site.answer(earlier, world.base_state) == Answer(code="PF308")
    assert site.charges() == 1


def test_the_statements_of_a_runs_record_show_a_home_that_was_restored_whole(world, copy_home, tmp_path):
    """Database, secrets and head file together: nothing on the machine knows better, the consortium's record does."""
    home = copy_home()
    with opened(home) as site:
        assert site.answer(world.offer(), world.base_state).code is None
    shutil.copytree(home.root, tmp_path / "backup")
    record = tmp_path / "record"
    with opened(SiteHome(home.root)) as site:
        for index in (1, 2):
            statement = site.answer(world.offer(round_index=index), world.base_state).statement
            folder = record / "statements" / f"round-{index:04d}"
            folder.mkdir(parents=True)
            (folder / f"{home.name}.dsse").write_bytes(statement)
            (folder / "another-site.dsse").write_bytes(b"not read")
        told = showing.verify_ledger(site.home, site.store, record)
        assert (told["releases"], told["statements_compared"], told["heads_compared"]) == (2, 2, 2)
    with opened(SiteHome(tmp_path / "backup")) as back:
        assert showing.verify_ledger(back.home, back.store)["releases"] == 1
        with pytest.raises(PrivacyError, match=r"PF309.*round-0002"):
            showing.verify_ledger(back.home, back.store, record)
        with pytest.raises(HostError, match=r"PF905.*no statement of site"):
            showing.verify_ledger(back.home, back.store, tmp_path / "backup")
        forged = record / "statements" / "round-0001" / f"{home.name}.dsse"
        forged.write_bytes(
            replace(UpdateStatement.from_payload(dsse.parse(forged.read_bytes()).payload)).to_envelope(SigningKey.generate())
        )
        with pytest.raises(ProvenanceError, match="PF602"):
            showing.verify_ledger(back.home, back.store, record)


def test_a_policy_with_another_delta_than_the_ledgers_is_refused(world, copy_home):
    with opened(copy_home()) as site:
        assert site.answer(world.offer(), world.base_state).code is None
        policy = site.home.root / "policy.toml"
        policy.write_text(policy.read_text(encoding="utf-8").replace("1e-06", "1e-3"), encoding="utf-8")
    with opened(SiteHome(site.home.root)) as site:
        assert site.home.policy.delta == 1e-3
        assert site.answer(world.offer(round_index=2), world.base_state) == Answer(code="PF905")
        assert site.charges() == 1


def test_a_spent_budget_releases_nothing(world, copy_home):
    """The policy was lowered after the approval: the ledger asks it before every charge."""
    with opened(copy_home(max_epsilon=4.5)) as site:
        assert site.answer(world.offer(), world.base_state).code is None
        assert site.answer(world.offer(round_index=2), world.base_state) == Answer(code="PF301")
        assert site.charges() == 1
        assert site.released() == ["run-1-000001.opening", "run-1-000001.safetensors"]
        last = site.store.last_sealed("run-1")
        assert last is not None
        assert last.round_index == 1


def test_a_plans_own_limit_releases_nothing(world, site):
    plan = with_plan(world, site.home, epsilon_limit=0.5, name="short-lived")
    assert site.answer(world.offer(plan=plan.digest, run="other"), world.base_state) == Answer(code="PF302")
    assert site.charges() == 0
    assert site.released() == []


# Crashes


class Crash(BaseException):
    """Like a killed process: nothing in between can catch it."""


@pytest.mark.parametrize("place", ["run_round", "write_atomic", "UpdateStatement", "put_sealed", "advance"])
def test_a_crash_after_the_charge_ends_with_the_bytes_of_an_undisturbed_run_charged_once(world, copy_home, undisturbed, monkeypatch, place):
    home = copy_home()

    def crash(*args, **kwargs):
        raise Crash

    def crash_half_way(path: Path, data: bytes, **options) -> None:
        """The update is on the disk, the opening of its commitment is not."""
        if path.suffix == ".opening":
            raise Crash
        write(path, data, **options)

    write = files.write_atomic
    with opened(home) as site, monkeypatch.context() as patch:
        if place == "write_atomic":
            patch.setattr(files, place, crash_half_way)
        else:
            owners = {"put_sealed": SiteStore, "advance": RunSecrets, "run_round": computing}
            patch.setattr(owners.get(place, answering), place, crash)
        with pytest.raises(Crash):
            site.answer(world.offer(), world.base_state)
        assert site.charges() == 1
    with opened(SiteHome(home.root)) as site:
        answer = site.answer(world.offer(), world.base_state)
        assert bytes_of(answer) == undisturbed
        assert site.charges() == 1
        assert site.statement(answer).ledger_head == app.open_ledger(site.home, site.store).head
        assert site.answer(world.offer(), world.base_state) == answer


def test_a_sealed_rounds_secret_that_a_crash_left_is_erased_when_any_round_is_offered(world, copy_home, monkeypatch):
    home = copy_home()

    def crash(*_):
        raise Crash

    with opened(home) as site, monkeypatch.context() as patch:
        patch.setattr(RunSecrets, "advance", crash)
        with pytest.raises(Crash):
            site.answer(world.offer(), world.base_state)
    left = (home.run_secrets / "run-run-1.secret").read_bytes()
    with opened(SiteHome(home.root)) as site:
        assert site.answer(world.offer(run="run-2"), world.base_state).code is None
    assert (home.run_secrets / "run-run-1.secret").read_bytes() != left
    assert json.loads((home.run_secrets / "run-run-1.secret").read_bytes())["round"] == 2


def test_a_failure_after_the_charge_is_a_code_at_a_time_slot_and_the_round_can_still_be_answered(
    world, site, undisturbed, monkeypatch, caplog
):
    """How long training took before it failed would tell how many patients were drawn."""

    def fail(**kwargs):
        site.clock.time += 4.25
        raise RuntimeError(f"cannot read {SURNAMES[0]}_biopsy.tif")

    with monkeypatch.context() as patch:
        patch.setattr(computing, "run_round", fail)
        answer = site.answer(world.offer(), world.base_state)
    assert answer == Answer(code="PF410")
    assert SURNAMES[0] not in repr(answer)
    shown = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    assert [line for line in shown if SURNAMES[0] in line] == []
    assert any(line.startswith("the round failed: RuntimeError at pathfed_client.computing:") for line in shown)
    assert not any(record.exc_info for record in caplog.records if record.levelno >= logging.INFO), "a traceback shows the text"
    assert SURNAMES[0] in caplog.text  # on demand, the hospital's own log says what it was
    assert site.clock.time == pytest.approx(OFFERED_AT + 10.0)
    assert site.charges() == 1
    assert bytes_of(site.answer(world.offer(), world.base_state)) == undisturbed
    assert site.charges() == 1


def test_a_round_charged_but_not_sealed_gets_other_noise_and_a_charge_of_its_own_on_another_base_state(
    world, site, undisturbed, dump_state, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(computing, "run_round", lambda **_: 1 / 0)
        assert site.answer(world.offer(), world.base_state).code == "PF410"
    name = sorted(weights.load(world.base_state))[0]
    other = dump_state(world.plan, **{name: weights.load(world.base_state)[name] + 1e-6})
    answer = site.answer(world.offer(base_state=other), other)
    assert site.charges() == 2
    left, right = weights.load(bytes_of(answer)), weights.load(undisturbed)
    shared = torch.stack([left[name].float().flatten()[:10_000] for name in ("encoder.pos_embed",)])
    assert not torch.equal(left["encoder.pos_embed"], right["encoder.pos_embed"])
    correlation = torch.corrcoef(torch.stack([shared[0], right["encoder.pos_embed"].float().flatten()[:10_000]]))[0, 1]
    assert abs(float(correlation)) < 0.2


# What a release depends on


def stopped(site: Site, world, patch, **changes) -> tuple[bytes, dict]:
    """What keys the randomness of a round that is charged, and stopped before its first step."""
    made = []

    def record(secret: bytes, context: dict) -> None:
        made.append((secret, context))

    with patch.context() as inner:
        inner.setattr(computing, "KeyedRandom", record)
        inner.setattr(computing, "run_round", lambda **_: 1 / 0)
        state = changes.pop("state", world.base_state)
        assert site.answer(world.offer(base_state=state, **changes), state).code == "PF410"
    (secret, context), *others = made
    assert others == []
    return secret, context


def test_the_randomness_is_keyed_by_the_runs_secret_and_by_all_that_the_release_depends_on(world, site, monkeypatch):
    secret, context = stopped(site, world, monkeypatch)
    current = RunSecrets(site.home.run_secrets).current(run_name("run-1"), 1)
    assert secret == current
    engine = context["engine"]
    assert engine in ("serial", "book_keeping")
    assert context == {
        "plan": world.plan.digest,
        "run": "run-1",
        "round": 1,
        "base_state": digest.of_bytes(world.base_state),
        "cohort": site.store.cohort(scan_key(world.plan.cohort)).digest,
        "withdrawn": 0,
        "declared_patients": 4,
        "code": code_digest(("pathfed_client", "pathfed_common")),
        "engine": engine,
        "patients_at_once": 1 if engine == "serial" else context["patients_at_once"],
        "precision": "float32",
        "activation_checkpointing": 0,
        "compile": 0,
        "device": "cpu",
        "ranks": 1,
        "mode": "single",
        "tiles_at_once": 2,
        "secret": secret_id(current),
    }
    assert [entry.release_id for entry in app.open_ledger(site.home, site.store).verify()] == [digest.of_value(context)]


def rescan(site: Site, world) -> None:
    """Scan anew, as after a change of the slides: each gets another number."""
    with closing(sqlite3.connect(site.home.database)) as database, database:
        database.execute("DELETE FROM slide")
    app.scan(site.home, world.plan.cohort, lambda done, total: None)


@pytest.mark.parametrize("changed", ["plan", "run", "round", "base_state", "cohort", "withdrawn", "declared_patients", "code", "secret"])
def test_a_change_in_anything_a_release_depends_on_is_another_release(world, site, dump_state, monkeypatch, changed):
    elsewhere = SlideRecord(
        path="elsewhere.tif",
        fingerprint="",
        size=1,
        mtime_ns=1,
        scan_key=digest.of_bytes(b"another plan's scan"),
        status=SlideStatus.UNMAPPED,
    )
    site.store.upsert_slide(elsewhere)
    _, before = stopped(site, world, monkeypatch)
    change: dict[str, Any] = {}
    if changed == "plan":
        change["plan"] = with_plan(world, site.home, name="other").digest
    elif changed == "declared_patients":
        monkeypatch.setattr(deciding, "_standing", lambda *_: None)  # no command approves a plan twice with other figures
        deciding.approve(site.home, world.signed_plan, 3, site.home.root / "again.dsse")
    elif changed == "run":
        change["run"] = "run-2"
    elif changed == "round":
        change["round_index"] = 2
    elif changed == "base_state":
        change["state"] = dump_state(world.plan, **{"encoder.pos_embed": weights.load(world.base_state)["encoder.pos_embed"] + 1e-6})
    elif changed == "cohort":
        rescan(site, world)
    elif changed == "withdrawn":
        app.withdraw(site.home, None, WithdrawalInput(b"elsewhere.tif", "test"))
    elif changed == "code":
        monkeypatch.setattr(answering, "code_digest", lambda packages: digest.of_bytes(b"other code"))
    else:
        (site.home.run_secrets / "run-run-1.secret").unlink()
    _, after = stopped(site, world, monkeypatch, **change)
    differing = {key for key in before if before[key] != after[key]}
    assert changed in differing
    # A run and a round have secrets of their own; nothing else moves with anything else.
    assert differing - {changed} == ({"secret"} if changed in ("run", "round") else set())
    first, second = app.open_ledger(site.home, site.store).verify()
    assert first.release_id != second.release_id


def test_sites_with_other_secrets_have_independent_noise(world, copy_home, undisturbed):
    home = copy_home()
    files.write_atomic(home.run_secrets / "root.secret", bytes(range(32)), secret=True)
    with opened(home) as site:
        assert abs(correlation(bytes_of(site.answer(world.offer(), world.base_state)), undisturbed)) < 0.01


def test_a_round_of_three_steps_is_charged_stated_and_taken_as_three(world, site, monkeypatch):
    plan = with_plan(world, site.home, rounds=world.plan.rounds.model_copy(update={"steps": 3}))
    taken = []
    take = private_step.private_step

    def counted(*args, **options):
        taken.append(args)
        return take(*args, **options)

    monkeypatch.setattr(local_round, "private_step", counted)
    said = site.statement(site.answer(world.offer(plan=plan.digest), world.base_state))
    (entry,) = app.open_ledger(site.home, site.store).verify()
    assert (len(taken), entry.event.steps, said.privacy.steps) == (3, 3, 3)
    three = PrivacyEvent(sampling_rate=0.5, noise_multiplier=1.0, steps=3)
    assert entry.event == three
    assert said.epsilon_plan == entry.epsilon_plan == pytest.approx(composed_epsilon([three], 1e-5))
    assert said.epsilon_total == entry.epsilon_total == pytest.approx(composed_epsilon([three], 1e-6))


def test_a_rescan_between_the_charge_and_the_retry_is_another_release_with_noise_of_its_own(world, site, undisturbed, monkeypatch):
    stopped(site, world, monkeypatch)
    rescan(site, world)
    answer = site.answer(world.offer(), world.base_state)
    assert site.charges() == 2
    assert abs(correlation(bytes_of(answer), undisturbed)) < 0.01


# Withdrawals


def withdraw(site: Site, *patients: str, slides: tuple[str, ...] = ()) -> None:
    """From another process, as the command does it."""
    given = [WithdrawalInput("\n".join(names).encode(), "test") if names else None for names in (patients, slides)]
    app.withdraw(SiteHome(site.home.root), *given)


OYELARAN = "PATIENTID-0001-Oyelaran"


@dataclass
class Rounds:
    """Watches the rounds that are computed; `then` happens while the first of them runs."""

    then: Callable[[], None]
    cohorts: list[list[str]] = field(default_factory=list)
    updates: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def run(self, **given):
        self.cohorts.append([patient.pseudonym for patient in given["cohort"].patients])
        outcome = run_round(**given)
        self.updates.append(outcome.update)
        if len(self.cohorts) == 1:
            self.then()
        return outcome


def watch(monkeypatch, then: Callable[[], None]) -> Rounds:
    rounds = Rounds(then)
    monkeypatch.setattr(computing, "run_round", rounds.run)
    return rounds


def alike(rounds: Rounds) -> float:
    """Correlation of the first two draws' updates, number by number."""
    flat = [torch.cat([update[name].float().flatten() for name in sorted(update)]) for update in rounds.updates[:2]]
    return float(torch.corrcoef(torch.stack(flat))[0, 1])


def test_who_is_withdrawn_while_a_round_is_computed_is_not_in_its_answer(world, site, monkeypatch):
    rounds = watch(monkeypatch, lambda: withdraw(site, OYELARAN))
    answer = site.answer(world.offer(), world.base_state)
    gone = pseudonym(site.home.pseudonym_key, OYELARAN)
    assert [gone in names for names in rounds.cohorts] == [True, False]
    assert [len(names) for names in rounds.cohorts] == [5, 4]
    sent = weights.load(bytes_of(answer))
    assert all(torch.equal(sent[name], rounds.updates[1][name].to(torch.bfloat16)) for name in sent), "the second draw is what is sent"
    assert abs(alike(rounds)) < 0.01, "its noise is independent of the discarded draw's"
    assert site.charges() == 2, "the discarded draw's charge stays"
    entries = app.open_ledger(site.home, site.store).verify()
    assert len({entry.release_id for entry in entries}) == 2
    assert site.statement(answer).epsilon_total == entries[1].epsilon_total
    assert site.answer(world.offer(), world.base_state) == answer
    assert site.charges() == 2
    assert site.released() == ["run-1-000001.opening", "run-1-000001.safetensors"]
    assert [event.kind for event in site.store.events()][-2:] == ["withdraw", "round"]


def test_a_round_drawn_again_needs_no_reading_process_that_ended_meanwhile(world, copy_home, monkeypatch):
    """None may be started after the charge."""
    with opened(copy_home(tile_workers=1)) as site:

        def end_all() -> None:
            withdraw(site, OYELARAN)
            site.answer.answerer._end_processes()

        rounds = watch(monkeypatch, end_all)
        assert site.answer(world.offer(), world.base_state).code is None
        assert [len(names) for names in rounds.cohorts] == [5, 4]


@pytest.mark.parametrize("who", ["a patient of the cohort", "a slide of the cohort", "a patient of no cohort"])
def test_whether_a_round_is_drawn_again_does_not_depend_on_who_was_withdrawn(world, site, monkeypatch, who):
    """Otherwise a second charge in the statement, or a later slot, would tell that the withdrawn patient was in the cohort."""
    site.store.upsert_slide(
        SlideRecord(
            path="elsewhere.tif",
            fingerprint=digest.of_bytes(b"elsewhere"),
            size=1,
            mtime_ns=1,
            scan_key=digest.of_bytes(b"another plan's scan"),
            status=SlideStatus.REFUSED,
            patient=pseudonym(site.home.pseudonym_key, "elsewhere"),
        )
    )
    given = {"a patient of the cohort": (OYELARAN,), "a patient of no cohort": ("elsewhere",)}.get(who, ())
    slides = () if given else (f"{SURNAMES[2]}_biopsy.tif",)
    rounds = watch(monkeypatch, lambda: withdraw(site, *given, slides=slides))
    answer = site.answer(world.offer(), world.base_state)
    assert answer.code is None
    assert (len(rounds.cohorts), site.charges()) == (2, 2)
    assert abs(alike(rounds)) < 0.01
    assert len(site.clock.slept) == 1


def test_a_withdrawal_at_the_last_instant_before_the_seal_counts(world, site, monkeypatch):
    """The update is on the disk already: it is removed, not sent."""
    put_sealed, seen = SiteStore.put_sealed, []

    def withdraw_first(store, sealed, **more):
        seen.append(sealed.update)
        if len(seen) == 1:
            withdraw(site, OYELARAN)
        put_sealed(store, sealed, **more)

    monkeypatch.setattr(SiteStore, "put_sealed", withdraw_first)
    answer = site.answer(world.offer(), world.base_state)
    assert digest.of_bytes(bytes_of(answer)) == seen[1] != seen[0]
    assert site.charges() == 2


def test_a_withdrawal_after_the_seal_counts_from_the_next_round_on(world, site, monkeypatch):
    first = site.answer(world.offer(), world.base_state)
    withdraw(site, OYELARAN)
    assert site.answer(world.offer(), world.base_state) == first, "what was released is sent again as it was"
    rounds = watch(monkeypatch, lambda: None)
    times = {"offered_at": OFFERED_AT + 200, "deadline": OFFERED_AT + 260}
    assert site.answer(world.offer(round_index=2, **times), world.base_state).code is None
    assert [len(names) for names in rounds.cohorts] == [4]
    assert site.charges() == 2


def test_a_round_that_crashed_before_a_withdrawal_is_another_release_after_it(world, copy_home, undisturbed, monkeypatch):
    def crash(**_):
        raise Crash

    home = copy_home()
    with opened(home) as site, monkeypatch.context() as patch:
        patch.setattr(computing, "run_round", crash)
        with pytest.raises(Crash):
            site.answer(world.offer(), world.base_state)
    with opened(SiteHome(home.root)) as site:
        withdraw(site, OYELARAN)
        rounds = watch(monkeypatch, lambda: None)
        answer = site.answer(world.offer(), world.base_state)
        assert [len(names) for names in rounds.cohorts] == [4]
        assert site.charges() == 2
        assert abs(correlation(bytes_of(answer), undisturbed)) < 0.01


@pytest.mark.parametrize(("limit", "late", "code"), [(4.5, False, "PF301"), (100.0, True, "PF409")])
def test_a_draw_that_cannot_be_repeated_is_a_code_at_a_slot_and_nothing_of_it_stays(world, copy_home, monkeypatch, limit, late, code):
    with opened(copy_home(max_epsilon=limit)) as site:

        def then() -> None:
            withdraw(site, OYELARAN)
            site.clock.time += 100.0 if late else 1.0

        rounds = watch(monkeypatch, then)
        assert site.answer(world.offer(), world.base_state) == Answer(code=code)
        assert (len(rounds.cohorts), site.charges()) == (1, 1)
        assert site.released() == []
        assert (site.clock.time - OFFERED_AT) % 5.0 == pytest.approx(0.0)


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_site_whose_patients_are_all_withdrawn_answers_with_noise(world, site, monkeypatch, meanwhile):
    """Otherwise answering or not would tell whether the last patient was withdrawn."""
    everybody = [f"PATIENTID-{number:04d}-{name}" for number, name in enumerate(SURNAMES)]
    if meanwhile:
        watch(monkeypatch, lambda: withdraw(site, *everybody))
    else:
        withdraw(site, *everybody)
    update = numbers(bytes_of(site.answer(world.offer(), world.base_state)))
    assert float(update.std()) == pytest.approx(1.0 / 2.0, rel=0.01)
    assert site.charges() == 1 + meanwhile


def test_the_log_of_a_withdrawal_names_nobody(world, site, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    watch(monkeypatch, lambda: withdraw(site, OYELARAN))
    answer = site.answer(world.offer(), world.base_state)
    assert "the draw is discarded" in caplog.text
    assert leaked(caplog.text.encode()) == []
    said = base64.b64decode(json.loads(answer.statement or b"{}")["payload"])
    assert leaked(said) == []
    assert pseudonym(site.home.pseudonym_key, OYELARAN).encode() not in said


# Time slots


def test_how_long_a_round_took_is_in_nothing_that_leaves(world, copy_home, monkeypatch):
    """Two sites with the same keys and secrets, one of them slow, within one slot: the same answer at the same time."""
    run_round = local_round.run_round
    said, left_at = [], []
    for name, took_s in (("fast", 0.25), ("slow", 3.0)):
        with opened(copy_home(name)) as site, monkeypatch.context() as patch:

            def slowly(clock: Clock = site.clock, seconds: float = took_s, **options):
                clock.time += seconds
                return run_round(**options)

            patch.setattr(computing, "run_round", slowly)
            said.append(site.statement(site.answer(world.offer(), world.base_state)))
            left_at.append(site.clock.time)
    assert left_at == pytest.approx([OFFERED_AT + 5.0] * 2)
    # The commitment's salt is drawn anew each time; it hides the same cohort.
    assert replace(said[0], manifest_commitment=said[1].manifest_commitment) == said[1]
    assert said[0].issued_at == OFFERED_AT


@pytest.mark.parametrize("after_s", [0.0, 1.5, 4.999, 5.0, 12.0])
def test_answers_leave_at_the_next_whole_slot_after_the_offer(world, copy_home, after_s):
    with opened(copy_home()) as site:
        site.clock.time = OFFERED_AT + after_s
        seal(site, world)
        site.clock.time = OFFERED_AT + after_s
        site.clock.slept.clear()
        left: list[float] = []
        site.answer.bulk.before_delivery = lambda: left.append(site.clock.time)
        assert site.answer(world.offer(), world.base_state).code is None
        assert len(site.clock.slept) == 1
        assert left == [site.clock.time], "no byte of the update before the slot"
        slots = (site.clock.time - OFFERED_AT) / 5.0
        assert slots == pytest.approx(max(1, round(slots)))
        assert 0 <= site.clock.time - OFFERED_AT - after_s <= 5.0


def test_an_update_that_cannot_be_delivered_is_a_code_and_the_same_bytes_leave_with_the_next_offer(world, site):
    seal(site, world)

    def cut() -> None:
        raise TransportError(ErrorCode.TRANSFER_UNFINISHED, "the deadline came first")

    site.answer.bulk.before_delivery = cut
    assert site.answer(world.offer(), world.base_state) == Answer(code="PF465")
    assert site.answer.bulk.delivered == {}
    site.answer.bulk.before_delivery = lambda: None
    assert bytes_of(site.answer(world.offer(), world.base_state)) == b"update"
    assert (site.charges(), site.answer.bulk.fetched) == (1, 0), "a resend needs no base state"


def seal(site: Site, world) -> None:
    """An answer as if the round had been trained: only its time matters here."""
    data = b"update"
    path = site.home.updates / "run-1-000001.safetensors"
    path.write_bytes(data)
    ledger = site.answer.answerer._ledger
    mechanism = world.plan.mechanism(4)  # the patients that the fixture declares
    ledger.charge(
        release_id=digest.of_bytes(b"a release"),
        plan=world.plan.digest,
        run=TEMPLATE.run,
        round_index=1,
        event=mechanism.event(world.plan.rounds.steps),
        plan_delta=world.plan.privacy.delta,
        plan_limit=world.plan.privacy.epsilon_limit,
        now=site.clock.now(),
    )
    assert ledger.head is not None
    said = replace(
        TEMPLATE,
        base_state=digest.of_bytes(world.base_state),
        plan=world.plan.digest,
        update=digest.of_bytes(data),
        ledger_head=ledger.head,
    )
    envelope = said.to_envelope(site.home.evidence_key)
    site.store.put_sealed(
        SealedUpdate(
            run=said.run, round_index=1, statement=envelope, update_path="updates/" + path.name, update=digest.of_bytes(data), at=1.0
        )
    )


def test_without_slots_an_answer_leaves_at_once_and_the_statement_says_so(world, copy_home):
    with opened(copy_home(reply_slots=False)) as site:
        answer = site.answer(world.offer(), world.base_state)
        assert site.statement(answer).reply_slot_s is None
        assert site.clock.slept == []


# What leaves


def leaked(data: bytes) -> list[str]:
    words = [*SURNAMES, "PATIENTID", "biopsy", ".tif", "/slides", "slides/", "patients.csv"]
    return [word for word in words if word.lower().encode() in data.lower()]


def test_nothing_that_leaves_holds_a_slide_name_a_path_or_a_patient(world, answered):
    site, answer, _ = answered
    assert answer.statement is not None
    sent = {
        "update": bytes_of(answer),
        "envelope": answer.statement,
        "statement": base64.b64decode(json.loads(answer.statement)["payload"]),
    }
    sent["approval"] = base64.b64decode(json.loads((site.home.root / "approval.dsse").read_bytes())["payload"])
    sent["site card"] = base64.b64decode(json.loads(site.home.card_file.read_bytes())["payload"])
    assert {what: leaked(data) for what, data in sent.items()} == {what: [] for what in sent}
    cohort = site.store.cohort(scan_key(world.plan.cohort))
    assert len(cohort.patients) == len(SURNAMES)
    stays = [*(patient.pseudonym for patient in cohort.patients), cohort.digest, str(site.home.root)]
    for data in sent.values():
        assert not any(word.removeprefix("sha256:").encode() in data for word in stays)
    # The search finds what is there: the site's own database holds the slide names.
    assert leaked(site.home.database.read_bytes() + (site.home.root / "site.db-wal").read_bytes())


def test_the_log_of_a_round_names_no_patient_and_no_slide(answered):
    _, _, log = answered
    assert "round 1 of run run-1" in log
    assert leaked(log.encode()) == []


def test_secrets_are_moved_on_once_the_answer_is_sealed(answered, ready_home):
    site, _, _ = answered
    before = {path.name: path.read_bytes() for path in SiteHome(ready_home).run_secrets.iterdir()}
    after = {path.name: path.read_bytes() for path in site.home.run_secrets.iterdir()}
    assert json.loads(after["run-run-1.secret"])["round"] == 2
    assert before["root.secret"] != after["root.secret"]
    assert Path(site.home.run_secrets).stat().st_mode & 0o077 == 0


TEMPLATE = UpdateStatement.from_plain(
    {
        "site": "st-elsewhere",
        "run": "run-1",
        "round_index": 1,
        "plan": digest.of_bytes(b""),
        "base_state": digest.of_bytes(b""),
        "update": digest.of_bytes(b""),
        "update_bytes": 6,
        "privacy": {"sampling_rate": 0.5, "noise_multiplier": 1.0, "clip_norm": 1.0, "steps": 1, "delta": 1e-5},
        "epsilon_plan": 1.0,
        "epsilon_total": 1.0,
        "delta_total": 1e-6,
        "ledger_head": digest.of_bytes(b""),
        "code": digest.of_bytes(b""),
        "figures": {"loss_sum": 1.0, "loss_sum_std": 1.0, "patients": 1.0, "patients_std": 1.0},
        "reply_slot_s": 5.0,
        "manifest_commitment": digest.of_bytes(b""),
        "previous": None,
        "issued_at": 1.0,
    }
)
