"""A server's home with a finished run in it: real store, loop, recorder and log; sites that sign real statements over small updates."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pathfed_common import digest, model
from pathfed_common.encoder import weights
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import Plan
from pathfed_common.privacy.accounting import PrivacyEvent, composed_epsilon
from pathfed_common.protocol.messages import OFFER_TYPE, RoundOffer
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import Checkpoint, cosign_checkpoint, origin_of
from pathfed_common.provenance.note import Note
from pathfed_common.provenance.statement import Figures, Privacy, UpdateStatement
from pathfed_common.units import UtcSeconds
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.provenance.log_keeper import LogKeeper
from pathfed_server.provenance.recorder import Recorder
from pathfed_server.rounds.loop import run_rounds
from pathfed_server.rounds.ports import Consent, Offer, Reply, Sending
from pathfed_server.rounds.settings import RunSettings

_DIGEST = digest.of_bytes(b"anything")


class _Clock:
    def __init__(self) -> None:
        self._time = 1_795_460_000.0

    def now(self) -> float:
        self._time += 1.0
        return self._time

    def sleep(self, seconds: float) -> None:
        self._time += seconds


@dataclass
class SigningSites:
    """Answer every offer with noise of the plan's size, and a statement that says so."""

    plan: Plan
    server: SigningKey
    keys: dict[SiteName, SigningKey]
    declared: int
    last: dict[SiteName, bytes] = field(default_factory=dict)
    rounds: dict[SiteName, int] = field(default_factory=dict)

    def exchange(self, offers: Sequence[Offer], spool: Path, *, withheld: Consent, sending: Sending) -> Iterator[Reply]:
        for sent in offers:
            sending(sent.site)
            payload = dsse.open_envelope(sent.envelope, payload_type=OFFER_TYPE, keys=self.server.public)
            offer = RoundOffer.from_bytes(payload)
            path = spool / f"{offer.site}.part"
            path.write_bytes(self._update(offer))
            envelope = self._statement(offer, path.read_bytes()).to_envelope(self.keys[offer.site])
            self.last[offer.site] = envelope
            yield Reply(site=offer.site, code=None, statement=envelope, update=path, received_at=offer.offered_at + 5, transfer_s=0.1)

    def _update(self, offer: RoundOffer) -> bytes:
        mechanism = self.plan.mechanism(self.declared)
        random = torch.Generator().manual_seed(int(digest.of_value([offer.site, offer.round_index])[-12:], 16))
        shapes = model.update_shapes(self.plan)
        return weights.dump({name: torch.randn(shape, generator=random) * mechanism.gradient_std for name, shape in shapes.items()}, {})

    def _statement(self, offer: RoundOffer, update: bytes) -> UpdateStatement:
        mechanism, privacy = self.plan.mechanism(self.declared), self.plan.privacy
        taken = self.rounds[offer.site] = self.rounds.get(offer.site, 0) + 1
        event = PrivacyEvent(sampling_rate=mechanism.sampling_rate, noise_multiplier=mechanism.noise_multiplier, steps=taken)
        before = self.last.get(offer.site)
        return UpdateStatement(
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
                steps=1,
                delta=privacy.delta,
            ),
            epsilon_plan=composed_epsilon([event], privacy.delta),
            epsilon_total=1.0,
            delta_total=1e-6,
            ledger_head=_DIGEST,
            code=_DIGEST,
            figures=Figures(loss_sum=1.0, loss_sum_std=mechanism.loss_sum_std, patients=4.0, patients_std=mechanism.patients_std),
            reply_slot_s=self.plan.rounds.reply_slot_s,
            manifest_commitment=_DIGEST,
            previous=None if before is None else digest.of_bytes(before),
            issued_at=UtcSeconds(offer.offered_at),
        )


def finish_run(home: ServerHome, run: RunName, keys: dict[SiteName, SigningKey], *, declared: int, retain: bool = True) -> None:
    """Drive a planned run to its end."""
    with SqlStore(home.database_url) as store:
        plan = store.plan(store.run(run).plan).plan()
        settings = RunSettings(
            run=run,
            plan=plan,
            shapes=model.state_shapes(plan),
            initial_state=lambda: model.initial_state(plan),
            key=home.evidence_key,
            home=home.root,
        )
        cards = {site: home.site_card(site) for site in keys}
        run_rounds(
            settings,
            sites=SigningSites(plan, home.evidence_key, keys, declared),
            store=store,
            recorder=Recorder(home.record(run), home.evidence_key, cards, retain_updates=retain),
            clock=_Clock(),
            progress=lambda told: None,
        )


def cosign(home: ServerHome, keys: dict[SiteName, SigningKey]) -> int:
    """Let sites cosign the log as it stands; its size."""
    with SqlStore(home.database_url) as store:
        keeper = LogKeeper(store, home.evidence_key, origin_of(home.settings.consortium), least_interval_s=0.0)
        found = Checkpoint.from_text(Note.from_bytes(keeper.checkpoint(0).note).text)
        for site, key in keys.items():
            keeper.cosign(site, found.size, cosign_checkpoint(found, site, key, at=1_795_460_000).to_line().encode())
        return found.size
