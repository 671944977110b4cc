"""One round at a site, from offer to sealed answer.

The order of the steps is the privacy argument:

    1. gate       signature, addressee, stop switch, approved plan, round order, policy, hours                public facts only
    2. resend     an answer already sealed for this very offer goes out again, byte for byte  nothing new is released
    3. fetch      the base state, only now; its file has the length and digest that the offer names
    4. try        the base state on synthetic tiles, with devices, processes and memory       no patient is touched yet
    5. charge     the ledger, before anything that depends on patients exists                 a crash later costs budget, never privacy
    6. train      the private steps, with randomness keyed by all that the release depends on
    7. seal       unless something was withdrawn since the cohort was read (then 5 again, without it); update and statement are on the
                  disk before they are sent; then the round's secret is erased
    8. wait       until the next public time slot; a failure after the charge waits too
    9. write down what leaves, in the egress record, before it leaves; where that cannot be written, it does not
   10. deliver    the update, through every cut until the deadline; then the statement is handed over

Before steps 5 and 7, and before an answer leaves, the stop switch and the approval are looked at again (`gating`).

What the line shows of steps 3 and 10. A base state is asked for, or not, by public facts and by what the site has fetched before. The first
byte of an update leaves at a public time slot; how many follow, the plan says; when they follow, and which are sent again, the line and
the server decide, and nothing here that patients have shaped. The statement leaves when the last byte has arrived.

Whatever goes wrong becomes a code; a code is decided by public facts (see training.private_step for what happens inside step 6).

Withdrawals. A sealed answer holds nobody who was withdrawn before it was sealed: the number of withdrawn names is compared and the seal
written in one transaction. Where the number has moved, the draw is discarded, its charge stays, and the round is drawn again. Why that
gives nothing away:

- **What was discarded is never released**, so it costs nobody anything; its charge stays, which is on the safe side.
- **The new draw is another release.** The number of withdrawn names, and the cohort, are part of the context that keys all randomness and
  names the charge: sampling and noise are independent of the discarded draw's, though the round's secret is the same.
- **Whether to draw again depends on the number of withdrawals alone**, never on whether the withdrawn patient was drawn, belongs to this
  plan's cohort, or has a slide at all. Neither a second charge in the statement nor a later reply slot tells that.
- What does show outside is that *something* was withdrawn at this site during this round: the second charge, and perhaps a later slot. The
  threat model names it.
- A crash after the charge is no way around: the restarted round reads the withdrawals anew.

What was sealed before the withdrawal is a release like all earlier ones, and is sent.
"""

import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pathfed_client.budget.entry import LedgerEntry
from pathfed_client.budget.ledger import Ledger
from pathfed_client.budget.spend import charged_for
from pathfed_client.cohort.cohort import Cohort
from pathfed_client.cohort.withdrawal import Withdrawn
from pathfed_client.computing import RoundComputer
from pathfed_client.egress.entry import EgressKind, Outgoing
from pathfed_client.egress.outlet import Outlet
from pathfed_client.gate.offer import check_bounds, check_deadline, check_order, open_offer, reply_time
from pathfed_client.gate.ports import Answer, BulkPort
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.gating import SiteGate
from pathfed_client.home import SiteHome
from pathfed_client.io import site_cohort
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.io.ledger_head import site_ledger
from pathfed_client.io.run_secrets import RunSecrets, secret_id
from pathfed_client.io.site_records import Event, SealedUpdate, StoredApproval, WithdrawnMeanwhileError
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.tile_stream import TileStream
from pathfed_client.io.tile_workers import TileWorkers
from pathfed_client.training.local_round import RoundOutcome
from pathfed_common import digest, files, wire_format
from pathfed_common.code_digest import SITE_PACKAGES, code_digest
from pathfed_common.digest import Digest
from pathfed_common.encoder import weights
from pathfed_common.errors import ErrorCode, PathfedError, SiteDataError, TransportError
from pathfed_common.model import state_shapes
from pathfed_common.part_file import file_digest, manifest_of
from pathfed_common.plan import Plan
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom
from pathfed_common.protocol.messages import RoundOffer
from pathfed_common.provenance.documents import open_plan
from pathfed_common.provenance.statement import Figures, Privacy, UpdateStatement
from pathfed_common.shards import Manifest
from pathfed_common.units import UtcSeconds

_log = logging.getLogger(__name__)

_SALT_BYTES = 32


@dataclass(frozen=True)
class _Task:
    """One accepted offer with what the site holds for it.

    `withdrawn` was read before the cohort, which lacks all of it: a withdrawal in between is found when the answer is sealed.
    """

    offer: RoundOffer
    plan: Plan
    approval: StoredApproval
    withdrawn: frozenset[Withdrawn]
    cohort: Cohort

    @property
    def mechanism(self) -> PatientMechanism:
        return self.plan.mechanism(self.approval.declared_patients)

    def context(self) -> dict[str, str | int]:
        """All that the release depends on beside the run's secret and how it is computed. The cohort's digest keeps it at the site."""
        return {
            "plan": self.offer.plan,
            "run": self.offer.run,
            "round": self.offer.round_index,
            "base_state": self.offer.base_state,
            "cohort": self.cohort.digest,
            "withdrawn": len(self.withdrawn),
            "declared_patients": self.approval.declared_patients,
            "code": code_digest(SITE_PACKAGES),
        }


class SiteAnswerer:
    """Answers round offers for one site. Keeps the model of the last plan, and its processes, warm between rounds."""

    def __init__(
        self,
        home: SiteHome,
        store: SiteStore,
        bulk: Callable[[Outlet], BulkPort],
        *,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._home = home
        self._store = store
        self._now = now
        self._sleep = sleep
        self._record = EgressLog(home.egress)
        self._outlet = Outlet(self._record)
        self._bulk = bulk(self._outlet)
        self._gate = SiteGate(home, store, now)
        self._readers: TileWorkers | None = None
        self._take_policy(home.policy)

    def __call__(self, envelope: bytes) -> Answer:
        """Answer one offer; see `gate.ports.Answerer`. The log gets our own words and types, no text that could name a slide or a path.

        Raises:
            HostError: PF901, PF904, PF913: not even a code can be written down, so none may leave.
        """
        try:
            return self._answer(envelope)
        except PathfedError as error:
            # What is wrong with site data is said in words that name slides; where and which value may be a path.
            _log.error("%s: %s", error.code.value, type(error).__name__ if isinstance(error, SiteDataError) else error.what)
            _log.debug("the whole error: %s", error)
            return self._refusal(error.code, envelope)
        except Exception as error:
            # The edge towards the server: a code goes out. An exception's text and traceback may name a slide, so the log shows its type.
            _log.error("the round failed: %s at %s", type(error).__name__, _place(error))
            _log.debug("the round failed", exc_info=error)
            return self._refusal(ErrorCode.SITE_INTERNAL, envelope)

    def _take_policy(self, policy: SitePolicy) -> None:
        self._policy = policy
        self._computer = RoundComputer(policy)
        torch.set_num_threads(policy.threads)

    def _read_policy(self) -> None:
        """Take the policy up as it is now; where it has changed, devices, processes and ledger are set up anew."""
        policy = self._home.policy_now()
        if policy != self._policy:
            _log.info("the site's policy has changed; it counts from this round on")
            self._end_processes()
            self.__dict__.pop("_ledger", None)
            self._take_policy(policy)

    def _answer(self, envelope: bytes) -> Answer:
        offer = open_offer(envelope, self._home.server_card.evidence_key, self._home.name)
        approval = self._gate.standing(offer.plan)
        plan = open_plan(approval.signed_plan, self._home.server_card.evidence_key)
        check_bounds(offer, plan.rounds, self._now())
        sealed = self._sealed_before(offer)
        if sealed is None:
            check_deadline(offer, self._now())
            self._read_policy()
            self._gate.check_begin(self._policy, plan, approval)
            _log.info("round %d of run %s: training", offer.round_index, offer.run)
            base_state = self._bulk.fetch(offer)
            check_deadline(offer, self._now())
            sealed = self._train(self._task(offer, plan, approval), base_state)
        else:
            _log.info("round %d of run %s: resending the sealed answer", offer.round_index, offer.run)
            self._secrets.settle(offer.run, offer.round_index)
        path = self._home.root / sealed.update_path
        manifest = _manifest(path, sealed.update)
        self._wait_for_slot(offer, plan)
        self._gate.standing(offer.plan)
        self._write_down(offer, sealed, manifest.size)
        self._bulk.deliver(path, manifest, offer)
        return Answer(code=None, statement=sealed.statement)

    def _write_down(self, offer: RoundOffer, sealed: SealedUpdate, size: int) -> None:
        """Enter an answer in the egress record. The round's price stands where its update left first; a resend is charged nothing.

        The update goes to the control plane's address, the statement to the fleet's.
        """
        resent = self._outlet.left_before(offer.run, offer.round_index)
        charged = 0.0 if resent else charged_for(self._ledger.entries(), offer.run, offer.round_index)
        shared = Outgoing(
            destination=self._home.server_card.control_address,
            kind=EgressKind.UPDATE,
            size=size,
            digest=sealed.update,
            plan=offer.plan,
            run=offer.run,
            round_index=offer.round_index,
            epsilon_charged=charged,
        )
        told = digest.of_bytes(sealed.statement)
        statement = replace(
            shared,
            destination=self._home.server_card.fleet_address,
            kind=EgressKind.STATEMENT,
            size=len(sealed.statement),
            digest=told,
            epsilon_charged=None,
        )
        self._outlet.answer(shared, statement)

    def refused(self, code: str) -> None:
        """Write down a code that leaves for something that is no offer; see `gate.ports.Refusals`."""
        self._outlet.message(self._home.server_card.fleet_address, EgressKind.REFUSAL, code.encode())

    def _refusal(self, code: ErrorCode, envelope: bytes) -> Answer:
        """A code in place of an answer, written down first.

        Raises:
            HostError: it cannot be written down.
        """
        try:
            offer = open_offer(envelope, self._home.server_card.evidence_key, self._home.name)
        except PathfedError:
            about: dict[str, Any] = {}  # what is not authentic names nothing
        else:
            about = {"plan": offer.plan, "run": offer.run, "round_index": offer.round_index}
        self._outlet.message(self._home.server_card.fleet_address, EgressKind.REFUSAL, code.value.encode(), **about)
        return Answer(code=code.value)

    def _sealed_before(self, offer: RoundOffer) -> SealedUpdate | None:
        """The answer sealed for this very round and base state, or None when the round is new."""
        sealed = self._store.get_sealed(offer.run, offer.round_index)
        if sealed is not None:
            statement = UpdateStatement.from_envelope(sealed.statement, self._home.evidence_keys)
            if statement.base_state == offer.base_state and statement.plan == offer.plan:
                return sealed
        last = self._store.last_sealed(offer.run)
        check_order(offer, None if last is None else last.round_index, None if last is None else last.update)
        return None

    def _task(self, offer: RoundOffer, plan: Plan, approval: StoredApproval) -> _Task:
        """The round with the patients as they are now.

        An approved plan was scanned, so an empty cohort is no error: whether a site answers must not depend on its last patient.
        """
        withdrawn = self._store.withdrawn()
        cohort = site_cohort.cohort(self._store, plan.cohort, self._home.pseudonym_key, withdrawn)
        if not cohort.patients:
            _log.warning("no patient is left under this plan's rules; the answer will be noise alone")
        return _Task(offer, plan, approval, withdrawn, cohort)

    @cached_property
    def _ledger(self) -> Ledger:
        return site_ledger(self._store, self._home.evidence_key, self._policy, self._home.run_secrets, former=self._home.former_keys)

    @cached_property
    def _secrets(self) -> RunSecrets:
        return RunSecrets(self._home.run_secrets)

    def _train(self, task: _Task, base_state: Path) -> SealedUpdate:
        """Charge, train and seal; again for as long as something is withdrawn meanwhile and the offer's deadline has not passed."""
        offer, plan = task.offer, task.plan
        state = _open_state(base_state, plan)
        self._computer.prepare(plan, state)
        readers = self._tile_workers(plan)
        self._gate.standing(offer.plan)
        secret = self._secrets.current(offer.run, offer.round_index)
        entry = self._charge(task, secret)
        try:
            while True:
                try:
                    return self._seal(task, self._draw(task, state, secret, readers), entry, secret)
                except WithdrawnMeanwhileError:
                    self._note_discarded(offer)
                check_deadline(offer, self._now())
                task = self._task(offer, plan, task.approval)
                entry = self._charge(task, secret)
        except Exception:
            # From the charge on, time may tell how many patients were drawn: a failure, too, leaves at a time slot.
            self._wait_for_slot(offer, plan)
            raise

    def _charge(self, task: _Task, secret: bytes) -> LedgerEntry:
        offer, plan = task.offer, task.plan
        return self._ledger.charge(
            release_id=digest.of_value(self._context(task, secret)),
            plan=offer.plan,
            run=offer.run,
            round_index=offer.round_index,
            event=task.mechanism.event(plan.rounds.steps),
            plan_delta=plan.privacy.delta,
            plan_limit=plan.privacy.epsilon_limit,
            now=self._now(),
        )

    def _context(self, task: _Task, secret: bytes) -> dict[str, str | int]:
        """Everything the release depends on: it keys the randomness and names the charge."""
        return {**task.context(), **self._computer.context(task.plan), "secret": secret_id(secret)}

    def _draw(self, task: _Task, state: Mapping[str, torch.Tensor], secret: bytes, readers: TileWorkers | None) -> RoundOutcome:
        if readers is not None and not readers.is_open:
            readers = None  # an earlier draw of this round had to do without; no process is started after the charge
        with TileStream(self._store, self._home.slides, task.plan.cohort, workers=readers) as stream:
            return self._computer.run(
                plan=task.plan,
                base_state=state,
                cohort=task.cohort,
                tiles=stream,
                mechanism=task.mechanism,
                secret=secret,
                context=self._context(task, secret),
            )

    def _note_discarded(self, offer: RoundOffer) -> None:
        said = f"round {offer.round_index} of run {offer.run}: something was withdrawn; the draw is discarded, its charge stays"
        _log.info("%s", said)
        self._store.add_event(Event(at=self._now(), kind="round", detail=said))

    def _tile_workers(self, plan: Plan) -> TileWorkers | None:
        """The reading processes, kept from round to round."""
        wanted, tile_px = self._policy.tile_workers, plan.cohort.tile_px
        if self._readers is None or not self._readers.is_open or self._readers.tile_px != tile_px:
            if self._readers is not None:
                self._readers.close()
            self._readers = TileWorkers(self._home.slides, tile_px, wanted) if wanted else None
        return self._readers

    def close(self) -> None:
        """End the reading processes and the ranks, and close the egress record. Safe to call twice."""
        self._end_processes()
        self._record.close()

    def _end_processes(self) -> None:
        self._computer.close()
        if self._readers is not None:
            self._readers.close()
            self._readers = None

    def _seal(self, task: _Task, outcome: RoundOutcome, entry: LedgerEntry, secret: bytes) -> SealedUpdate:
        offer = task.offer
        self._gate.standing(offer.plan)
        # Rounded after the noise, by coins of the round's own source: made again after a crash, the bytes are the same.
        data = wire_format.chunks(outcome.update, task.plan.wire.dtype, KeyedRandom(secret, self._context(task, secret)))
        name = f"updates/{offer.run}-{offer.round_index:06d}"
        path = self._home.root / f"{name}.safetensors"
        salt = os.urandom(_SALT_BYTES)
        files.write_atomic(path, data)
        files.write_atomic(self._home.root / f"{name}.opening", salt, secret=True)
        statement = self._statement(task, outcome, entry, path, digest.of_bytes(salt + task.cohort.digest.encode()))
        sealed = SealedUpdate(
            run=offer.run,
            round_index=offer.round_index,
            statement=statement.to_envelope(self._home.evidence_key),
            update_path=path.relative_to(self._home.root).as_posix(),
            update=statement.update,
            at=self._now(),
        )
        try:
            self._store.put_sealed(sealed, withdrawn=len(task.withdrawn))
        except WithdrawnMeanwhileError:
            for discarded in (path, path.with_suffix(".opening")):
                discarded.unlink()
            raise
        self._secrets.advance(offer.run, offer.round_index)
        return sealed

    def _statement(self, task: _Task, outcome: RoundOutcome, entry: LedgerEntry, update: Path, commitment: Digest) -> UpdateStatement:
        offer, plan, mechanism, figures = task.offer, task.plan, task.mechanism, outcome.figures
        previous, head = self._store.last_sealed(offer.run), self._ledger.head
        assert head is not None, "the round was charged"  # noqa: S101
        return UpdateStatement(
            site=self._home.name,
            run=offer.run,
            round_index=offer.round_index,
            plan=offer.plan,
            base_state=offer.base_state,
            update=file_digest(update),
            update_bytes=update.stat().st_size,
            privacy=Privacy(
                sampling_rate=mechanism.sampling_rate,
                noise_multiplier=mechanism.noise_multiplier,
                clip_norm=mechanism.clip_norm,
                steps=plan.rounds.steps,
                delta=plan.privacy.delta,
            ),
            epsilon_plan=entry.epsilon_plan,
            epsilon_total=entry.epsilon_total,
            delta_total=entry.delta,
            ledger_head=head,
            code=code_digest(SITE_PACKAGES),
            figures=Figures(
                loss_sum=figures.loss_sum, loss_sum_std=figures.loss_sum_std, patients=figures.patients, patients_std=figures.patients_std
            ),
            reply_slot_s=plan.rounds.reply_slot_s if self._policy.reply_slots else None,
            manifest_commitment=commitment,
            previous=None if previous is None else digest.of_bytes(previous.statement),
            issued_at=UtcSeconds(offer.offered_at),
        )

    def _wait_for_slot(self, offer: RoundOffer, plan: Plan) -> None:
        if self._policy.reply_slots:
            self._sleep(max(0.0, reply_time(offer, plan.rounds.reply_slot_s, self._now()) - self._now()))


def _place(error: Exception) -> str:
    """Where in our own code an exception came from: the innermost frame that is ours, module and line. Names no data."""
    modules = ((str(frame.f_globals.get("__name__")), line) for frame, line in traceback.walk_tb(error.__traceback__))
    ours = [f"{module}:{line}" for module, line in modules if module.startswith("pathfed_")]
    return ours[-1] if ours else "an unknown place"


def _manifest(update: Path, named: Digest) -> Manifest:
    """What a sealed update consists of.

    Raises:
        TransportError: PF410, its file is not what was sealed.
    """
    try:
        found = manifest_of(update)
    except (OSError, ValueError):
        found = None
    if found is None or found.file != named:
        raise TransportError(ErrorCode.SITE_INTERNAL, "the sealed update's file is missing or changed", where=update)
    return found


def _open_state(base_state: Path, plan: Plan) -> Mapping[str, torch.Tensor]:
    """The base state's tensors, each read from the file when it is used; refused unless names and shapes are exactly the plan's.

    Raises:
        TransportError: PF408, not safetensors, or another model's.
    """
    try:
        found = weights.header(base_state)
        state = weights.FileTensors(base_state)
    except ValueError as error:
        raise TransportError(ErrorCode.BASE_STATE_MISMATCH, f"the base state cannot be read: {error}") from None
    if {name: shape for name, (_, shape) in found.items()} != state_shapes(plan):
        raise TransportError(ErrorCode.BASE_STATE_MISMATCH, "the base state's tensors are not those of the plan's model")
    if any(dtype is not torch.float32 for dtype, _ in found.values()):
        raise TransportError(ErrorCode.BASE_STATE_MISMATCH, "the base state's tensors must be float32")
    return state
