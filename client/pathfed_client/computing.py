"""How a site computes a round: on which devices, shared out in which way, how many tiles at a time. All of it decided before the charge.

One device: this process computes. Several: a process for each (`io.rank_group`), kept from round to round, started before the charge and
never after it. What was decided is part of the context that keys a round's randomness: another number of devices, or another kind, gives
other last bits of the sum, and therefore gets noise of its own.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pathfed_client.cohort.cohort import Cohort
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.io.rank_group import GroupSpec, OutOfStepError, RankGroup
from pathfed_client.io.rank_round import run_round_on_ranks, try_base_state_on_ranks
from pathfed_client.io.shared_numbers import Layout
from pathfed_client.training import device as devices
from pathfed_client.training.augmentation import Augmentation
from pathfed_client.training.compute import Compute
from pathfed_client.training.engines.choice import decide, make_engine
from pathfed_client.training.engines.engine import Engine, EngineUnfitError, trainable
from pathfed_client.training.engines.serial import out_of_memory
from pathfed_client.training.local_round import RoundOutcome, TileSource, run_round, too_small, try_base_state, unfit_engine
from pathfed_client.training.memory import DoesNotFit, fit_microbatch, one_pass, tiles_within
from pathfed_client.training.ranks.tasks import Mode
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, PrivacyError
from pathfed_common.model import build_model, state_shapes, update_shapes
from pathfed_common.objectives.objective import ObjectiveModule
from pathfed_common.plan import Plan
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

_log = logging.getLogger(__name__)

#: Patients whose tiles are in memory: those that are computed, and those read ahead.
_AHEAD = 3


class RoundComputer:
    """Computes rounds under a site's policy. Keeps the model of the last plan, or its ranks, between rounds. For one thread."""

    def __init__(self, policy: SitePolicy) -> None:
        """Nothing is started yet."""
        self._policy = policy
        self._most = devices.memory_bytes(policy.device_memory_gb)
        self._plan: Digest | None = None
        self._compute = Compute()
        self._at_once: int | None = None
        self._model: nn.Module | None = None
        #: What this round is computed with: `_compute`, or the serial engine instead.
        self._chosen = self._compute
        # Kept from round to round: what an engine compiled would be compiled again in every one.
        self._engines: dict[Compute, Engine] = {}
        self._group: RankGroup | None = None

    def prepare(self, plan: Plan, state: Mapping[str, Tensor]) -> None:
        """All that can fail for public reasons, before the charge: devices, processes, memory, the base state on synthetic tiles.

        Raises:
            PrivacyError: PF306, the base state cannot be trained; PF312, the plan's engine does not fit its objective.
            HostError: PF910, a device is not there; PF911, PF903, a rank failed or does not start; PF912, one tile does not fit.
        """
        places = self._look()
        if self._plan != plan.digest:
            self.close()
            self._plan, self._model, self._engines = None, None, {}
            try:
                self._decide(plan, places)
            except (MemoryError, RuntimeError) as error:
                if out_of_memory(error):
                    raise too_small(type(error).__name__) from error
                raise
        if len(places) > 1:
            self._prepare_ranks(plan, places, state)
        elif self._model is not None:
            self._try(self._model, plan, state)
        self._plan = plan.digest

    def context(self, plan: Plan) -> dict[str, str | int]:
        """What of all this a release depends on. Of a plan that was prepared."""
        places = self._look()
        mode = "single" if len(places) == 1 else self._mode(plan)
        at_once = self._at_once or plan.cohort.tiles_per_patient
        return {**self._chosen.context(), "device": places[0].type, "ranks": len(places), "mode": mode, "tiles_at_once": at_once}

    def run(
        self,
        *,
        plan: Plan,
        base_state: Mapping[str, Tensor],
        cohort: Cohort,
        tiles: TileSource,
        mechanism: PatientMechanism,
        secret: bytes,
        context: Mapping[str, str | int],
    ) -> RoundOutcome:
        """Take the round's private steps; see `training.local_round.run_round`. The update is on the CPU.

        Args:
            plan: the plan, prepared.
            base_state: the round's start.
            cohort: the patients.
            tiles: reads their tiles.
            mechanism: the public constants of a step.
            secret: the round's.
            context: everything the release depends on, `context(plan)` included.

        Raises:
            HostError: PF911, a rank failed. Nothing was released.
        """
        if self._model is None:
            way: Callable[..., RoundOutcome] = partial(run_round_on_ranks, self._running())
        else:
            way = partial(_here, self._model, self._engine(self._model, plan))
        return way(
            base_state=base_state,
            cohort=cohort,
            tiles=tiles,
            mechanism=mechanism,
            tiles_per_patient=plan.cohort.tiles_per_patient,
            steps=plan.rounds.steps,
            local_learning_rate=plan.rounds.local_learning_rate,
            secret=secret,
            context=context,
            augmentation=Augmentation(**plan.augmentation.model_dump()),
        )

    def close(self) -> None:
        """End the ranks. Safe to call twice."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _decide(self, plan: Plan, places: Sequence[torch.device]) -> None:
        """The engine, and how many tiles it takes at once, by trying passes over public tiles."""
        model = build_model(plan)
        # Weights and sum come first; what they leave is for activations.
        held = devices.parameter_bytes(model) + devices.parameter_bytes(model, trained=True)
        room = None if self._most is None else max(1, self._most - held)
        asked = Compute(**plan.compute.model_dump(), memory_bytes=room)
        px, k, alone = plan.cohort.tile_px, plan.cohort.tiles_per_patient, len(places) == 1
        if alone:
            if self._most is not None:
                devices.limit_memory(places[0], self._most)
            self._model = model.to(places[0])
        try:
            # Several ranks share a patient's tiles, or patients among them: one at a time either way.
            self._compute = decide(model, asked if alone else replace(asked, engine="serial"), tiles_per_patient=k, tile_px=px)
        except EngineUnfitError as error:
            raise unfit_engine(error) from None
        self._chosen = self._compute
        shared = len(places) if not alone and self._mode(plan) == "sharded" else 1
        self._at_once = None
        if self._compute.engine == "serial" and model.separable:
            self._at_once = self._first_guess(model, px, -(-k // shared), places, shared)
            if alone:
                try:
                    self._at_once = fit_microbatch(partial(one_pass, model, self._compute, px), self._at_once)
                except DoesNotFit:
                    self._at_once = 1  # the engine still has checkpointed blocks to try; then it is PF912

    def _try(self, model: nn.Module, plan: Plan, state: Mapping[str, Tensor]) -> None:
        """Try the base state with the engine that was decided; where that does not agree with the serial one, this round is the latter's.

        On weights that noise has carried far, a tile of one colour can have a gradient whose fp32 digits depend on the size of the pass:
        the engines then differ by more than the rehearsal allows, though neither is wrong. Decided by plan and base state alone, so that a
        round that is computed again is computed alike.
        """
        px, k = plan.cohort.tile_px, plan.cohort.tiles_per_patient
        self._chosen = self._compute
        try:
            engine = self._engine(model, plan)
            try_base_state(objective=model, base_state=state, tile_px=px, tiles_per_patient=k, engine=engine)
        except PrivacyError as error:
            if error.code is not ErrorCode.ENGINE_UNFIT or plan.compute.engine != "auto":
                raise
            _log.info("the book-keeping engine does not agree with the serial one on this base state; the serial one takes the round")
            self._chosen = replace(self._compute, engine="serial", patients_at_once=None)
            engine = self._engine(model, plan)
            try_base_state(objective=model, base_state=state, tile_px=px, tiles_per_patient=k, engine=engine)

    def _engine(self, model: nn.Module, plan: Plan) -> Engine:
        """This round's engine."""
        if self._chosen not in self._engines:
            self._engines[self._chosen] = make_engine(
                model,
                trainable(model),
                self._chosen,
                tiles_per_patient=plan.cohort.tiles_per_patient,
                tile_px=plan.cohort.tile_px,
                tiles_at_once=self._at_once,
            )
        return self._engines[self._chosen]

    def _first_guess(self, model: ObjectiveModule, tile_px: int, own: int, places: Sequence[torch.device], shared: int) -> int:
        """Tiles a pass takes at once: all a device has of a patient, or on the CPU as many as the policy's limit allows by estimate."""
        if self._most is None or places[0].type != "cpu":
            return own
        within = tiles_within(model, self._compute, tile_px, self._most, shared_by=shared)
        if within < 1:
            raise too_small(f"more than device_memory_gb = {self._policy.device_memory_gb:g}")
        return min(own, within)

    def _prepare_ranks(self, plan: Plan, places: Sequence[torch.device], state: Mapping[str, Tensor]) -> None:
        if self._at_once is None:
            self._attempt(plan, places, state, None)
            return
        try:
            self._at_once = fit_microbatch(partial(self._attempt, plan, places, state), self._at_once)
        except DoesNotFit as error:
            raise too_small(str(error)) from error

    def _attempt(self, plan: Plan, places: Sequence[torch.device], state: Mapping[str, Tensor], at_once: int | None) -> None:
        """Train on synthetic tiles on every rank, so many at once; raises MemoryError where that is too many."""
        if self._group is None or not self._group.is_open or self._group.spec.tiles_at_once != at_once:
            self.close()
            self._group = RankGroup(self._spec(plan, places, at_once))
        try:
            try_base_state_on_ranks(self._group, state)
        except OutOfStepError as error:
            if error.out_of_memory:
                raise MemoryError(error.what) from error
            raise

    def _spec(self, plan: Plan, places: Sequence[torch.device], at_once: int | None) -> GroupSpec:
        mode, px = self._mode(plan), plan.cohort.tile_px
        slots = _AHEAD if mode == "sharded" else _AHEAD * len(places)
        return GroupSpec(
            devices=places,
            mode=mode,
            build=partial(build_model, plan),
            layout=Layout(state_shapes(plan), update_shapes(plan), (slots, plan.cohort.tiles_per_patient, px, px, 3)),
            compute=self._compute,
            tiles_at_once=at_once,
            threads=max(1, self._policy.threads // len(places)),
            memory_bytes=self._most,
        )

    def _mode(self, plan: Plan) -> Mode:
        if self._policy.sharding != "auto":
            return self._policy.sharding
        whole, trained = (sum(map(prod, shapes.values())) for shapes in (state_shapes(plan), update_shapes(plan)))
        return "replicated" if devices.fits_one(4 * (whole + devices.BESIDE * trained), self._look(), self._most) else "sharded"

    def _look(self) -> tuple[torch.device, ...]:
        return devices.resolve_all(self._policy.device, self._policy.devices)

    def _running(self) -> RankGroup:
        if self._group is None:
            raise ValueError("a plan must be prepared before its rounds are computed")
        return self._group


def _here(objective: nn.Module, engine: Engine, *, secret: bytes, context: Mapping[str, str | int], **given: Any) -> RoundOutcome:
    """A round in this process, on the model's device; the update is on the CPU."""
    outcome = run_round(objective=objective, random=KeyedRandom(secret, context), engine=engine, **given)
    return replace(outcome, update={name: tensor.cpu() for name, tensor in outcome.update.items()})
