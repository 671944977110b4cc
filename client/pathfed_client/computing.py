"""How a site computes a round: on which devices, shared out in which way, how many tiles at a time. All of it decided before the charge.

One device: this process computes. Several: a process for each (`io.rank_group`), kept from round to round, started before the charge and
never after it. What was decided is part of the context that keys a round's randomness: another number of devices, or another kind, gives
other last bits of the sum, and therefore gets noise of its own.
"""

from collections.abc import Mapping, Sequence
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
from pathfed_client.training.local_round import RoundOutcome, TileSource, run_round, try_base_state
from pathfed_client.training.memory import DoesNotFit, fit_microbatch, tiles_within
from pathfed_client.training.ranks.tasks import Mode
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.model import build_model, state_shapes, update_shapes
from pathfed_common.plan import Plan
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

#: Patients whose tiles are in memory: those that are computed, and those read ahead.
_AHEAD = 3


class RoundComputer:
    """Computes rounds under a site's policy. Keeps the model of the last plan, or its ranks, between rounds. For one thread."""

    def __init__(self, policy: SitePolicy) -> None:
        """Nothing is started yet."""
        self._policy = policy
        self._plan: Digest | None = None
        self._at_once = 0
        self._model: nn.Module | None = None
        self._group: RankGroup | None = None

    def prepare(self, plan: Plan, state: Mapping[str, Tensor]) -> None:
        """All that can fail for public reasons, before the charge: devices, processes, memory, the base state on synthetic tiles.

        Raises:
            PrivacyError: PF306, the base state cannot be trained.
            HostError: PF910, a device is not there; PF911, PF903, a rank failed or does not start; PF912, one tile does not fit.
        """
        self._look()
        if self._plan != plan.digest:
            self.close()
            self._model = None
            self._plan, self._at_once = plan.digest, self._first_guess(plan)
        try:
            self._at_once = fit_microbatch(partial(self._attempt, plan, state), self._at_once)
        except DoesNotFit as error:
            raise _too_small(str(error)) from error

    def context(self, plan: Plan) -> dict[str, str | int]:
        """What of all this a release depends on. Of a plan that was prepared."""
        places = self._look()
        mode = "single" if len(places) == 1 else self._mode(plan)
        return {"engine": "serial", "device": places[0].type, "ranks": len(places), "mode": mode, "tiles_at_once": self._at_once}

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
        way = partial(_here, self._model) if self._model is not None else partial(run_round_on_ranks, self._running())
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

    def _attempt(self, plan: Plan, state: Mapping[str, Tensor], at_once: int) -> None:
        """Train on synthetic tiles, so many at once; raises MemoryError where that is too many."""
        places = self._look()
        if len(places) == 1:
            model = self._model = self._built(plan, places[0]) if self._model is None else self._model
            px, k = plan.cohort.tile_px, plan.cohort.tiles_per_patient
            try_base_state(objective=model, base_state=state, tile_px=px, tiles_per_patient=k)
            return
        if self._group is None or not self._group.is_open or self._group.spec.tiles_at_once != at_once:
            if self._group is not None:
                self._group.close()
            self._group = RankGroup(self._spec(plan, places, at_once))
        try:
            try_base_state_on_ranks(self._group, state)
        except OutOfStepError as error:
            if error.out_of_memory:
                raise MemoryError(error.what) from error
            raise

    def _built(self, plan: Plan, place: torch.device) -> nn.Module:
        most = devices.memory_bytes(self._policy.device_memory_gb)
        if most is not None:
            devices.limit_memory(place, most)
        return build_model(plan).to(place)

    def _spec(self, plan: Plan, places: Sequence[torch.device], at_once: int) -> GroupSpec:
        mode, px = self._mode(plan), plan.cohort.tile_px
        slots = _AHEAD if mode == "sharded" else _AHEAD * len(places)
        return GroupSpec(
            devices=places,
            mode=mode,
            build=partial(build_model, plan),
            layout=Layout(state_shapes(plan), update_shapes(plan), (slots, plan.cohort.tiles_per_patient, px, px, 3)),
            bfloat16=plan.compute.precision == "bfloat16",
            tiles_at_once=at_once,
            threads=max(1, self._policy.threads // len(places)),
            memory_bytes=devices.memory_bytes(self._policy.device_memory_gb),
        )

    def _mode(self, plan: Plan) -> Mode:
        if self._policy.sharding != "auto":
            return self._policy.sharding
        numbers = sum(prod(shape) for shape in update_shapes(plan).values())
        most = devices.memory_bytes(self._policy.device_memory_gb)
        return "replicated" if devices.fits_one(4 * numbers, self._look(), most) else "sharded"

    def _first_guess(self, plan: Plan) -> int:
        """Tiles a pass takes at once if memory allows: all that a device has of a patient, or on the CPU what the policy's limit allows."""
        places = self._look()
        k = plan.cohort.tiles_per_patient
        shared = len(places) if len(places) > 1 and self._mode(plan) == "sharded" else 1
        most = devices.memory_bytes(self._policy.device_memory_gb)
        own = -(-k // shared)
        if most is None or places[0].type != "cpu":
            return own
        within = tiles_within(build_model(plan), plan.cohort.tile_px, most, copies_shared_by=shared)
        if within < 1:
            raise _too_small(f"one tile at a time takes more than {self._policy.device_memory_gb:g} GB")
        return min(own, within)

    def _look(self) -> tuple[torch.device, ...]:
        return devices.resolve_all(self._policy.device, self._policy.devices)

    def _running(self) -> RankGroup:
        if self._group is None:
            raise ValueError("a plan must be prepared before its rounds are computed")
        return self._group


def _here(objective: nn.Module, *, secret: bytes, context: Mapping[str, str | int], **given: Any) -> RoundOutcome:
    """A round in this process, on the model's device; the update is on the CPU."""
    outcome = run_round(objective=objective, random=KeyedRandom(secret, context), **given)
    return replace(outcome, update={name: tensor.cpu() for name, tensor in outcome.update.items()})


def _too_small(value: str) -> HostError:
    return HostError(
        ErrorCode.MEMORY_TOO_SMALL,
        "the memory that training may use does not hold one tile of this plan",
        value=value,
        remedy="nothing was charged; raise device_memory_gb in policy.toml, or share the model among more GPUs",
    )
