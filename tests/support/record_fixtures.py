"""An honest record with real keys and small tensors, built step by step so that a test can lie at any step and sign the lie."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pathfed_common import digest, model
from pathfed_common.digest import Digest
from pathfed_common.encoder import spec, weights
from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import CohortPlan, MaePlan, Plan, PrivacyPlan, RoundsPlan
from pathfed_common.privacy.accounting import PrivacyEvent, composed_epsilon
from pathfed_common.provenance import record
from pathfed_common.provenance.documents import Approval, SiteCard, seal_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.record import AbsentSite, AdmittedSite, FileEntry, Manifest, RoundRecord, ServerTimes
from pathfed_common.provenance.record_reader import TrustedKeys
from pathfed_common.provenance.statement import Figures, Privacy, UpdateStatement
from pathfed_common.released_encoder import ReleasedEncoder
from pathfed_common.units import UtcSeconds

RUN = RunName("run-1")
SITES = [SiteName(name) for name in ("a", "b", "c")]
PATIENTS = {"a": 40, "b": 60, "c": 40}
ROUNDS = 3
#: c is silent in round 2.
TAKES_PART = {1: ["a", "b", "c"], 2: ["a", "b"], 3: ["a", "b", "c"]}


def small_plan() -> Plan:
    return Plan(
        name="small",
        objective=MaePlan(decoder_dim=32, decoder_depth=1),
        cohort=CohortPlan(tile_px=32),
        privacy=PrivacyPlan(expected_patients=4, noise_multiplier=1.0, clip_norm=1.0, epsilon_limit=8.0),
        rounds=RoundsPlan(count=ROUNDS, quorum=2),
        site_weights={"b": 2.0},
    )


class Held:
    """A state in memory, read by blocks."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._state[name].flatten()[start:stop].clone()


@contextmanager
def small_preset() -> Iterator[None]:
    """Stand a small encoder in for the smallest preset, so that a state has 170 kB and not 22 MB."""
    name = "vit_tiny_patch16_224"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(spec._PRESETS, name, EncoderSpec(name=name, img_size=224, patch_size=16, embed_dim=12, depth=1, num_heads=3))
        yield


def sample_statement(**change: Any) -> UpdateStatement:
    honest: dict[str, Any] = {
        "site": "a",
        "run": "run-1",
        "round_index": 2,
        "plan": digest.of_bytes(b"plan"),
        "base_state": digest.of_bytes(b"state"),
        "update": digest.of_bytes(b"update"),
        "update_bytes": 2**60 + 1,
        "privacy": Privacy(sampling_rate=0.1, noise_multiplier=1.0, clip_norm=0.5, steps=3, delta=1e-6),
        "epsilon_plan": 1.0,
        "epsilon_total": 2,
        "delta_total": 1e-6,
        "ledger_head": digest.of_bytes(b"head"),
        "code": digest.of_bytes(b"code"),
        "figures": Figures(loss_sum=-0.25, loss_sum_std=3.0, patients=7.5, patients_std=2.0),
        "reply_slot_s": 5.0,
        "manifest_commitment": digest.of_bytes(b"commitment"),
        "previous": digest.of_bytes(b"previous"),
        "issued_at": 1.7e9,
    }
    return UpdateStatement(**{**honest, **change})


def _same(value: Any, *_: Any) -> Any:
    return value


@dataclass
class Scene:
    """Builds a record's files. Every hook gets the honest thing and may return another, which is then signed like an honest one."""

    plan: Plan
    server: SigningKey = field(default_factory=SigningKey.generate)
    keys: dict[str, SigningKey] = field(default_factory=lambda: {site: SigningKey.generate() for site in SITES})
    #: The weights that the plan's `encoder.init_from` names, where it names some.
    start: dict[str, Tensor] | None = None
    #: States by round and updates by round and site, where a test has real ones.
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    updates: dict[tuple[int, str], bytes] = field(default_factory=dict)
    #: Files of the running average by round, where the plan releases that, and factors of weights, where a test has real ones.
    averages: dict[int, bytes] = field(default_factory=dict)
    factors: dict[tuple[int, str], float] = field(default_factory=dict)

    @property
    def trusted(self) -> TrustedKeys:
        return TrustedKeys(server=self.server.public, sites={site: key.public for site, key in self.keys.items()})

    def files(
        self,
        *,
        statement: Callable[[UpdateStatement], UpdateStatement] = _same,
        statement_key: Callable[[SigningKey, UpdateStatement], SigningKey] = _same,
        approval: Callable[[Approval], Approval] = _same,
        round_record: Callable[[RoundRecord], RoundRecord] = _same,
        state: Callable[[dict[str, Tensor], int], dict[str, Tensor]] = _same,
        files: Callable[[dict[str, bytes]], dict[str, bytes]] = _same,
        manifest: Callable[[Manifest], Manifest] = _same,
        retain: bool = False,
    ) -> dict[str, bytes]:
        """All files of the record, by path, the manifest among them."""
        made = self._before_rounds(approval)
        states = [weights.dump(state(self._state(index), index), {}) for index in range(ROUNDS + 1)]
        made |= {record.state_path(index): data for index, data in enumerate(states)}
        previous: Digest | None = None
        last: dict[str, bytes] = {}
        for index in range(1, ROUNDS + 1):
            base, after = (digest.of_bytes(states[number]) for number in (index - 1, index))
            envelopes = {}
            for site in TAKES_PART[index]:
                value = statement(self._statement(index, site, base, last.get(site)))
                envelopes[site] = last[site] = value.to_envelope(statement_key(self.keys[site], value))
                made[record.statement_path(index, site)] = envelopes[site]
                if retain:
                    made[record.update_path(index, site)] = self._update(index, site)
            entry = round_record(self._round(index, base, after, previous, envelopes))
            made[record.round_path(index)] = entry.to_bytes(self.server)
            previous = digest.of_bytes(made[record.round_path(index)])
        last_state = weights.load(states[-1])
        encoder = ReleasedEncoder(self.plan, Held(last_state))
        released = {name: encoder.read(name, 0, prod(shape)).view(shape) for name, shape in encoder.shapes.items()}
        made[record.ENCODER] = self._average(ROUNDS) if self.plan.server_optimiser.ema else weights.dump(released, {"format": "pt"})
        made[record.ENCODER_CONFIG] = digest.canonical(model.timm_config(self.plan))
        made = files(made)
        entries = [FileEntry(path=path, digest=digest.of_bytes(data), size=len(data)) for path, data in sorted(made.items())]
        listing = Manifest(run=RUN, plan=self.plan.digest, server_key=self.server.public, rounds=ROUNDS, files=tuple(entries))
        return {**made, record.MANIFEST: manifest(listing).to_bytes(self.server)}

    def _before_rounds(self, approval: Callable[[Approval], Approval]) -> dict[str, bytes]:
        made = {record.PLAN: self.plan.canonical_bytes(), record.SIGNED_PLAN: seal_plan(self.plan, self.server)}
        for site in SITES:
            key = self.keys[site]
            made[record.card_path(site)] = SiteCard(site=site, evidence_key=key.public, flower_key="ssh").to_bytes(key)
            value = Approval(
                site=site, plan=self.plan.digest, declared_patients=PATIENTS[site], reply_slots=True, approved_at=UtcSeconds(1.7e9)
            )
            made[record.approval_path(site)] = approval(value).to_bytes(key)
        return made

    def _state(self, index: int) -> dict[str, Tensor]:
        if index in self.states:
            return self.states[index]
        if index == 0:
            return model.initial_state(self.plan, self.start)
        generator, is_trained = torch.Generator().manual_seed(index), model.trained(self.plan)
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in model.state_shapes(self.plan).items()}
        kept = {name for name in drawn if not is_trained(name.removeprefix(model.TEACHER_PREFIX))}
        return drawn | {name: tensor for name, tensor in (self._state(0) if kept else {}).items() if name in kept}

    def _average(self, index: int) -> bytes:
        if index in self.averages:
            return self.averages[index]
        generator = torch.Generator().manual_seed(100 + index)
        shapes = model.encoder_spec(self.plan).shapes()
        return weights.dump({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, {"format": "pt"})

    def _update(self, index: int, site: str) -> bytes:
        return self.updates.get((index, site), f"update of {site} in round {index}".encode())

    def _statement(self, index: int, site: str, base: Digest, previous: bytes | None) -> UpdateStatement:
        privacy = self.plan.privacy
        rate = self.plan.sampling_rate(PATIENTS[site])
        taken = sum(site in TAKES_PART[earlier] for earlier in range(1, index + 1))
        event = PrivacyEvent(sampling_rate=rate, noise_multiplier=privacy.noise_multiplier, steps=taken)
        update = self._update(index, site)
        return sample_statement(
            site=site,
            round_index=index,
            plan=self.plan.digest,
            base_state=base,
            update=digest.of_bytes(update),
            update_bytes=len(update),
            privacy=Privacy(
                sampling_rate=rate,
                noise_multiplier=privacy.noise_multiplier,
                clip_norm=privacy.clip_norm,
                steps=self.plan.rounds.steps,
                delta=privacy.delta,
            ),
            epsilon_plan=composed_epsilon([event], privacy.delta),
            previous=None if previous is None else digest.of_bytes(previous),
        )

    def _round(self, index: int, base: Digest, after: Digest, previous: Digest | None, envelopes: dict[str, bytes]) -> RoundRecord:
        raw = {site: self.plan.site_weights.get(site, 1.0) for site in envelopes}
        admitted = [
            AdmittedSite(
                site=SiteName(site),
                update=digest.of_bytes(self._update(index, site)),
                update_bytes=len(self._update(index, site)),
                statement=digest.of_bytes(envelope),
                weight=raw[site] / sum(raw.values()),
                factor=self.factors.get((index, site), 1.0),
                rounding=0.0,
            )
            for site, envelope in envelopes.items()
        ]
        return RoundRecord(
            run=RUN,
            round_index=index,
            plan=self.plan.digest,
            base_state=base,
            next_state=after,
            previous=previous,
            admitted=tuple(admitted),
            refused=(),
            silent=tuple(AbsentSite(site=site, code="PF515") for site in SITES if site not in envelopes),
            excluded=(),
            offered_at=UtcSeconds(1.7e9 + index),
            deadline=UtcSeconds(1.7e9 + index + 600),
            committed_at=UtcSeconds(1.7e9 + index + 30),
            average=digest.of_bytes(self._average(index)) if self.plan.server_optimiser.ema else None,
            times=ServerTimes(exchange_s=20.0, transfer_s=1.0, admission_s=0.5, aggregation_s=0.1, step_s=0.1),
        )


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder
