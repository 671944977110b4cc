"""The round loop's process: it drives a run from the plan's start to a record that verifies, and ends with the one that started it."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from pathfed_common import digest, model
from pathfed_common.encoder import spec as encoder_specs
from pathfed_common.encoder import weights
from pathfed_common.encoder.spec import EncoderSpec, preset
from pathfed_common.encoder.vit import VisionTransformer
from pathfed_common.errors import ErrorCode, PathfedError
from pathfed_common.ids import RunName
from pathfed_common.plan import Plan
from pathfed_common.privacy.accounting import PrivacyEvent, composed_epsilon
from pathfed_common.protocol import wire
from pathfed_common.protocol.messages import OFFER_TYPE, RoundOffer
from pathfed_common.provenance import dsse, record
from pathfed_common.provenance.documents import SiteCard
from pathfed_common.provenance.record_reader import TrustedKeys
from pathfed_common.provenance.statement import Figures, Privacy, UpdateStatement
from pathfed_common.provenance.verify import Verdict, verify_record
from pathfed_common.units import UtcSeconds
from pathfed_server import app, driving
from pathfed_server.db.rows import CertificateRow, EnrolmentRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.encoders import StoredEncoder, import_checkpoint
from pathfed_server.home import ServerHome
from pathfed_server.rounds import uploads
from pathfed_server.rounds.files import RunFiles
from pathfed_server.transport.flower_control import node_key

CHILD = "from pathfed_server.driving import end_with_parent; import time; end_with_parent(); print('ready', flush=True); time.sleep(600)"
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""
RUN = RunName("r")
PRESET = "vit_tiny_patch16_224"


def test_a_round_loop_whose_superexec_is_killed_ends_by_itself():
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
            time.sleep(2.5)
            assert child.is_running(), "it does not end while its parent lives"
            os.kill(parent.pid, signal.SIGKILL)
            parent.wait()
            _, alive = psutil.wait_procs([child], timeout=60)
            assert not alive
        finally:
            parent.kill()


# ---- a run, over a grid of this process; the whole way is in tests/end_to_end ----


@dataclass
class Site:
    """A site that answers each offer with noise of the plan's size, truly stated and signed."""

    member: Any
    plan: Plan
    home: ServerHome
    last: bytes | None = None
    rounds: int = 0

    def answer(self, message: Message) -> Message:
        envelope = cast(bytes, message.content.config_records[wire.OFFER][wire.ENVELOPE])
        offer = RoundOffer.from_bytes(dsse.open_envelope(envelope, payload_type=OFFER_TYPE, keys=self.home.evidence_key.public))
        mechanism, privacy = self.plan.mechanism(8), self.plan.privacy
        random = torch.Generator().manual_seed(offer.round_index)
        update = {
            name: (torch.randn(shape, generator=random) * mechanism.gradient_std).to(getattr(torch, self.plan.wire.dtype))
            for name, shape in model.update_shapes(self.plan).items()
        }
        data = weights.dump(update, {"kind": "pathfed-update"})
        self.rounds += 1
        event = PrivacyEvent(sampling_rate=mechanism.sampling_rate, noise_multiplier=privacy.noise_multiplier, steps=self.rounds)
        epsilon = composed_epsilon([event], privacy.delta)
        statement = UpdateStatement(
            site=self.member.name,
            run=offer.run,
            round_index=offer.round_index,
            plan=offer.plan,
            base_state=offer.base_state,
            update=digest.of_bytes(data),
            update_bytes=len(data),
            privacy=Privacy(
                sampling_rate=mechanism.sampling_rate,
                noise_multiplier=privacy.noise_multiplier,
                clip_norm=privacy.clip_norm,
                steps=self.plan.rounds.steps,
                delta=privacy.delta,
            ),
            epsilon_plan=epsilon,
            epsilon_total=epsilon,
            delta_total=privacy.delta,
            ledger_head=digest.of_bytes(b"head"),
            code=digest.of_bytes(b"code"),
            figures=Figures(loss_sum=1.0, loss_sum_std=mechanism.loss_sum_std, patients=4.0, patients_std=mechanism.patients_std),
            reply_slot_s=self.plan.rounds.reply_slot_s,
            manifest_commitment=digest.of_bytes(b"commitment"),
            previous=None if self.last is None else digest.of_bytes(self.last),
            issued_at=UtcSeconds(offer.offered_at),
        )
        self.last = statement.to_envelope(self.member.key)
        uploads.arrived(RunFiles(self.home.root, offer.run).incoming(offer.round_index), self.member.name).write_bytes(data)
        return Message(RecordDict({wire.REPLY: ConfigRecord({wire.CODE: "", wire.ENVELOPE: self.last})}), reply_to=message)


@dataclass
class LocalGrid:
    """What `FlowerSites` uses of Flower's grid."""

    sites: list[Site]
    sent: list[Message] = field(default_factory=list)

    def get_nodes(self) -> list[NodeInfo]:
        keys = [node_key(SiteCard.from_bytes(site.member.card.read_bytes()).flower_key) for site in self.sites]
        return [NodeInfo(node_id=number, public_key=key) for number, key in enumerate(keys, 1)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.sent += messages
        return [str(len(self.sent) - 1)]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (message,) = (self.sent[int(message_id)] for message_id in message_ids)
        return [self.sites[message.metadata.dst_node_id - 1].answer(message)]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flower's identity of this process, a small encoder in place of the smallest preset, and no trace left of a driven run."""
    for name, value in {"_task_id": 3, "_run_id": 1, "_node_id": 2}.items():
        monkeypatch.setattr(TaskIdentity, name, value)
    small = EncoderSpec(name=PRESET, img_size=224, patch_size=16, embed_dim=12, depth=1, num_heads=3)
    monkeypatch.setitem(encoder_specs._PRESETS, PRESET, small)
    monkeypatch.setattr(driving, "end_with_parent", lambda: None)
    log = logging.getLogger("pathfed_server")
    before, level = list(log.handlers), log.level
    yield
    for handler in [handler for handler in log.handlers if handler not in before]:
        log.removeHandler(handler)
        handler.close()
    log.setLevel(level)


@dataclass
class Started:
    """A run that is ready to be driven."""

    home: ServerHome
    plan: Plan
    sites: list[Site]
    start: dict[str, Tensor]

    def drive(self) -> None:
        driving.drive(self.home, RUN, 1, cast(Grid, LocalGrid(self.sites)))

    def verify(self) -> Verdict:
        sites = {site.member.name: site.member.key.public for site in self.sites}
        return verify_record(self.home.record(RUN), TrustedKeys(server=self.home.evidence_key.public, sites=sites))


@pytest.fixture
def started(here: None, server_home: ServerHome, plan_file: Path, member: Callable[[str], Any], tmp_path: Path) -> Started:
    """A run of two rounds and two sites, from an encoder that was imported from a file."""
    spec = preset(PRESET, img_size=32)
    start = {
        name: tensor.detach() for name, tensor in VisionTransformer(spec, generator=torch.Generator().manual_seed(9)).state_dict().items()
    }
    file = tmp_path / "published.safetensors"
    file.write_bytes(weights.dump(start, {"from": "elsewhere"}))
    named = import_checkpoint(server_home, file, spec).digest
    text = plan_file.read_text().replace("count = 3", "count = 2").replace("[privacy]", f'[encoder]\ninit_from = "{named}"\n[privacy]', 1)
    plan_file.write_text(text)
    plan = app.publish_plan(server_home.root, plan_file, tmp_path / "plan.dsse")
    members = [member(name) for name in ("site-a", "site-b")]
    for one in members:
        app.add_site(server_home.root, one.card)
        app.add_word(server_home.root, one.approve(plan.digest))
    app.start_run(server_home.root, plan.digest, RUN, [one.name for one in members])
    return Started(server_home, plan, [Site(one, plan, server_home) for one in members], start)


def test_a_run_starts_from_the_encoder_that_its_plan_names_and_its_record_verifies(started: Started) -> None:
    started.drive()
    verdict = started.verify()
    verdict.require(identities=True)
    assert verdict.rounds == 2
    assert not [note for note in verdict.notes if "first state" in note]
    first, last = (weights.load((started.home.record(RUN) / record.state_path(index)).read_bytes()) for index in (0, 2))
    for name, tensor in started.start.items():
        assert torch.equal(first[model.ENCODER_PREFIX + name], tensor)
    assert not torch.equal(last["encoder.norm.bias"], first["encoder.norm.bias"])


def test_a_server_that_starts_from_other_weights_than_the_plan_names_makes_a_record_that_is_refused(
    started: Started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(weights.dump({**started.start, "norm.bias": started.start["norm.bias"] + 1e-6}, {}))
    monkeypatch.setattr(driving, "stored_encoder", lambda home, plan: StoredEncoder(other))
    started.drive()
    assert [(found.code, found.where) for found in started.verify().findings] == [(ErrorCode.FIRST_STATE, record.state_path(0))]


def test_a_run_whose_checkpoint_is_gone_when_it_is_driven_ends_with_a_code_and_no_state(started: Started) -> None:
    started.home.checkpoint(digest.parse(started.plan.encoder.init_from)).unlink()
    with pytest.raises(PathfedError) as caught:
        started.drive()
    assert caught.value.code is ErrorCode.CHECKPOINT_UNAVAILABLE
    assert "PF109" in (started.home.logs / "server-app.log").read_text()
    assert not list(started.home.root.rglob("states/*.safetensors"))


def test_a_site_whose_admission_was_cut_short_after_the_commit_takes_part_with_the_card_it_asked_with(started: Started) -> None:
    member = started.sites[0].member
    place, name = started.home.site_card_file(member.name), digest.of_bytes(b"secret")
    asked = EnrolmentRow(
        invitation=name, site=member.name, site_card=place.read_bytes(), tls_csr=b"", software="1", state="pending", asked_at=1.0
    )
    certificate = CertificateRow(
        serial="a", site=member.name, tls_key=name, fingerprint=name, issuer=name, pem=b"", issued_at=1.0, expires_at=2.0
    )
    with SqlStore(started.home.database_url) as store:
        store.add_invitation(name, member.name, expires_at=2.0, at=1.0, by="operator")
        store.admit(store.ask(asked, at=1.0), certificate, at=1.0, by="operator")
    place.unlink()
    started.drive()
    started.verify().require(identities=True)
    assert place.read_bytes() == asked.site_card
