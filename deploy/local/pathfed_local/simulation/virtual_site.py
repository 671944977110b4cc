"""One virtual site's round: the private step that hospitals run, on painted tiles, in whatever process Ray starts for it.

A virtual site has no folder, no ledger and no patients: what it is follows from its name. What it computes, seals and signs is what a real
site does; what it does not do is the gate and the charge, which are a hospital's and not the server's load.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from torch import Tensor

from pathfed_client.cohort.cohort import Cohort, Patient, Pseudonym, SlideId, SlideTiles, TileRef
from pathfed_client.computing import RoundComputer
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.training.local_round import RoundOutcome
from pathfed_common import digest, files
from pathfed_common.code_digest import SITE_PACKAGES, code_digest
from pathfed_common.encoder import weights
from pathfed_common.ids import SiteName
from pathfed_common.plan import Plan, plan_from_bytes
from pathfed_common.privacy.accounting import epsilon
from pathfed_common.privacy.randomness import hkdf
from pathfed_common.protocol.messages import OFFER_TYPE, RoundOffer
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.provenance.statement import Figures, Privacy, UpdateStatement
from pathfed_common.synthetic import synthetic_tiles
from pathfed_common.units import UtcSeconds

#: Tiles of every virtual patient, all on one slide.
TILES = 8
#: Patients of every virtual site for one that is expected in a step: a sampling rate of 1/4.
PATIENTS_FOR_ONE_EXPECTED = 4


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What all virtual sites of a simulation share; it travels to Ray's processes.

    Attributes:
        plan: the plan's canonical bytes.
        server_key: the server's evidence key, as text: offers are opened with it.
        secret: 32 bytes that every virtual site's key and draws follow from.
    """

    plan: bytes
    server_key: str
    secret: bytes = field(repr=False)

    @property
    def declared_patients(self) -> int:
        """N_public of each virtual site, which is also how many patients it has."""
        return _declared(plan_from_bytes(self.plan, where="simulation"))

    def key(self, site: SiteName) -> SigningKey:
        """The evidence key of a virtual site."""
        return SigningKey(Ed25519PrivateKey.from_private_bytes(hkdf(self.secret, salt=b"virtual site", info=site.encode())))


def _declared(plan: Plan) -> int:
    return round(PATIENTS_FOR_ONE_EXPECTED * plan.privacy.expected_patients)


@dataclass(frozen=True)
class Answered:
    """A virtual site's answer: its signed statement, and the file that its update lies in."""

    statement: bytes
    update: Path


def answer(fleet: Fleet, envelope: bytes, states: Path, folder: Path) -> Answered:
    """Open an offer, take the private steps on painted tiles, and leave the update as a file.

    Args:
        fleet: what all virtual sites share.
        envelope: the signed offer.
        states: the folder of the run's states (`rounds.files.RunFiles`).
        folder: where virtual sites keep their statements, each naming the one before, and put their updates.

    Raises:
        PathfedError: the offer is not the server's, or the base state is not the one it names or cannot be trained.
    """
    payload = dsse.open_envelope(envelope, payload_type=OFFER_TYPE, keys=VerifyKey.from_text(fleet.server_key))
    offer = RoundOffer.from_bytes(payload)
    world = _world(fleet.plan)
    before = states / f"round-{offer.round_index - 1:06d}.safetensors"
    outcome = world.round(fleet, offer, world.state(before, offer.base_state))
    dtype = getattr(torch, world.plan.wire.dtype)
    data = weights.dump({name: tensor.to(dtype) for name, tensor in outcome.update.items()}, {"kind": "pathfed-update"})
    update, kept = folder / f"{offer.site}.update", folder / f"{offer.site}-{offer.round_index:06d}.dsse"
    files.write_atomic(update, data)
    earlier = sorted(path for path in folder.glob(f"{offer.site}-*.dsse") if path.name < kept.name)
    previous = digest.of_bytes(earlier[-1].read_bytes()) if earlier else None
    statement = _statement(world.plan, offer, outcome, data, previous).to_envelope(fleet.key(offer.site))
    files.write_atomic(kept, statement)
    return Answered(statement, update)


@lru_cache(maxsize=1)
def _world(plan: bytes) -> "_World":
    """What a process keeps from one virtual site to the next: the model and its engine."""
    return _World(plan_from_bytes(plan, where="simulation"))


class _World:
    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(1)  # Ray runs a process a core
        self.plan = plan
        self._computer = RoundComputer(SitePolicy.model_validate({"max_epsilon": 1000.0, "delta": plan.privacy.delta, "device": "cpu"}))
        self._state: tuple[digest.Digest, dict[str, Tensor]] | None = None

    def state(self, path: Path, due: digest.Digest) -> dict[str, Tensor]:
        """A base state, read and tried on public tiles once a process; a real site does so once a round."""
        if self._state is None or self._state[0] != due:
            data = path.read_bytes()
            if digest.of_bytes(data) != due:
                raise ValueError(f"the base state in {path.name} is not the one that was offered")
            tensors = weights.load(data)
            self._computer.prepare(self.plan, tensors)
            self._state = (due, tensors)
        return self._state[1]

    def round(self, fleet: Fleet, offer: RoundOffer, state: dict[str, Tensor]) -> RoundOutcome:
        """The private steps of one virtual site."""
        context = {**self._computer.context(self.plan), "site": offer.site, "run": offer.run, "round": offer.round_index}
        return self._computer.run(
            plan=self.plan,
            base_state=state,
            cohort=_cohort(_declared(self.plan)),
            tiles=_Painted(self.plan.cohort.source_px, offer.site),
            mechanism=self.plan.mechanism(_declared(self.plan)),
            secret=fleet.secret,
            context={**context, "base_state": offer.base_state},
        )


@lru_cache(maxsize=1)
def _cohort(patients: int) -> Cohort:
    names = [f"{number:032x}" for number in range(patients)]
    return Cohort.of([Patient(Pseudonym(name), (SlideTiles(SlideId(number), TILES, name),)) for number, name in enumerate(names)])


@dataclass(frozen=True)
class _Painted:
    """Tiles painted when they are asked for: the same for the same site, patient and number."""

    px: int
    site: SiteName

    def expect(self, batches: Sequence[Sequence[TileRef]], /) -> None:
        """Nothing is painted ahead."""

    def read(self, refs: Sequence[TileRef], /) -> NDArray[np.uint8]:
        seeds = (int(digest.of_value([self.site, ref.slide, ref.tile])[-12:], 16) for ref in refs)
        return np.concatenate([synthetic_tiles(1, self.px, seed) for seed in seeds])


def _statement(plan: Plan, offer: RoundOffer, outcome: RoundOutcome, data: bytes, previous: digest.Digest | None) -> UpdateStatement:
    mechanism, figures = plan.mechanism(_declared(plan)), outcome.figures
    spent = _epsilon(mechanism.sampling_rate, mechanism.noise_multiplier, offer.round_index * plan.rounds.steps, plan.privacy.delta)
    return UpdateStatement(
        site=offer.site,
        run=offer.run,
        round_index=offer.round_index,
        plan=offer.plan,
        base_state=offer.base_state,
        update=digest.of_bytes(data),
        update_bytes=len(data),
        privacy=Privacy(
            sampling_rate=mechanism.sampling_rate,
            noise_multiplier=mechanism.noise_multiplier,
            clip_norm=mechanism.clip_norm,
            steps=plan.rounds.steps,
            delta=plan.privacy.delta,
        ),
        epsilon_plan=spent,
        epsilon_total=spent,
        delta_total=plan.privacy.delta,
        ledger_head=digest.of_value(["no ledger", offer.site, offer.round_index]),
        code=code_digest(SITE_PACKAGES),
        figures=Figures(
            loss_sum=figures.loss_sum, loss_sum_std=figures.loss_sum_std, patients=figures.patients, patients_std=figures.patients_std
        ),
        reply_slot_s=None,
        manifest_commitment=digest.of_value(["no slides", offer.site]),
        previous=previous,
        issued_at=UtcSeconds(offer.offered_at),
    )


@lru_cache(maxsize=64)
def _epsilon(rate: float, noise: float, steps: int, delta: float) -> float:
    return epsilon(sampling_rate=rate, noise_multiplier=noise, steps=steps, delta=delta)
