"""Sharded: all ranks share one patient's tiles and one copy of the model.

Rank r takes tiles r, r + R, r + 2R, ... of the patient's n, and weighs its mean loss by its share of them, so that the gradient FSDP2 sums
over the ranks is the gradient of the patient's mean loss:

    sum over ranks of  n_r / n * gradient of (mean over rank r's tiles)  =  gradient of (mean over all n tiles)

A rank that is left without a tile runs the patient's first one with weight 0, for the sake of the collective operations: what is not finite
there is not finite in the patient's gradient either. An objective that compares a patient's tiles takes all of a rank's in one pass, gives
the rank's share of the loss, and reaches the other ranks' tiles through `across`; there a rank may be left without tiles.

The squared norms of the pieces are added over the ranks in fp64; a parameter that every rank holds whole is counted once. Every rank then
holds the same loss, norm and clip factor, bit for bit.

    | what happens with a patient | outcome |
    | --- | --- |
    | a loss or gradient that is not finite, on whichever rank | contributes zero; all ranks know, as the numbers are shared |
    | tiles cannot be prepared on one rank (memory, say) | contributes zero; ranks agree before any of them starts a collective |
    | an error inside forward or backward, on one rank alone | the others wait in a collective: the rank fails, and with it the round |

The last line is no patient's doing in the objectives here, which raise on no pixel, and whose memory was tried on synthetic tiles.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pathfed_client.training.compute import Compute
from pathfed_client.training.engines.engine import NotContributed, PatientLoader, PatientTiles, contributes, why_not
from pathfed_client.training.engines.guard import StateGuard
from pathfed_client.training.engines.passes import Passes
from pathfed_client.training.engines.serial import clear_gradients, gradient_norm
from pathfed_client.training.joint_sum import JointSum
from pathfed_client.training.ranks.group import AcrossRanks, Ranks
from pathfed_client.training.ranks.shards import piece
from pathfed_common.objectives.objective import Objective
from pathfed_common.privacy.mechanism import PatientMechanism


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a rank.

    Attributes:
        tiles: places of its tiles among the patient's.
        weight: share of the patient's tiles that they are; 0 where they only keep this rank in step.
    """

    tiles: tuple[int, ...]
    weight: float


def passes(tiles: int, rank: int, ranks: int, at_once: int) -> list[Pass]:
    """A rank's passes over a patient's tiles: equally many on every rank, with weights that add up to 1 over all passes of all ranks.

    Args:
        tiles: how many the patient has, at least 1.
        rank: this rank.
        ranks: how many ranks there are.
        at_once: tiles a rank takes in one pass at most.
    """
    if tiles < 1 or at_once < 1:
        raise ValueError(f"tiles and at_once must be at least 1, got {tiles} and {at_once}")
    own = range(rank, tiles, ranks)
    most = -(-tiles // ranks)
    chosen = [own[start : start + at_once] for start in range(0, most, at_once)]
    return [Pass(tuple(places), len(places) / tiles) if places else Pass((0,), 0.0) for places in chosen]


class ShardedEngine:
    """Adds patients' clipped gradients to pieces of the sum. Every rank makes the same calls in the same order."""

    def __init__(
        self,
        objective: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        mechanism: PatientMechanism,
        ranks: Ranks,
        compute: Compute,
        *,
        tiles_at_once: int | None = None,
    ) -> None:
        """Train an objective that `shards.shard` was applied to.

        Args:
            objective: the model; where it is not separable its `across` is set to the ranks.
            parameters: its trainable parameters by name.
            mechanism: the public constants.
            ranks: this process among the others.
            compute: how passes are run; nothing is compiled.
            tiles_at_once: tiles a rank takes in one pass at most; None: all it has. Only for a separable objective.

        Raises:
            ValueError: the objective neither is separable nor has an `across`, or `tiles_at_once` is given for one that is not separable.
        """
        self._separable = cast(Objective, objective).separable
        if not self._separable:
            if not hasattr(objective, "across") or tiles_at_once is not None:
                raise ValueError("tiles that have no losses of their own are shared among ranks in one pass, by an objective's `across`")
            cast(Any, objective).across = AcrossRanks(ranks)
        self._passes = Passes(objective, compute)
        self._objective, self._parameters, self._mechanism, self._ranks = objective, parameters, mechanism, ranks
        self._tiles_at_once, self._guard = tiles_at_once, StateGuard(objective)
        self.pieces = {name: piece(parameter, ranks.rank, ranks.size) for name, parameter in parameters.items()}

    def empty_sum(self) -> JointSum:
        """A sum over this rank's pieces, at zero. Its clip leaves room for the rounding of all ranks' numbers."""
        dimension = sum(parameter.numel() for parameter in self._parameters.values())
        return JointSum({name: held.values for name, held in self.pieces.items()}, self._mechanism, dimension=dimension)

    def add(self, load: PatientLoader, total: JointSum) -> str | None:
        """Add a patient's vector to the sum; why the patient contributes zero, or None. The same on every rank.

        Raises:
            Exception: forward or backward failed here and perhaps nowhere else: the ranks are out of step, and this one must end.
        """
        try:
            value, norm, gradients = self.gradient(load)
        except NotContributed as reason:
            return str(reason)
        else:
            total.add(gradients.items(), norm=norm, loss=value)
            return None
        finally:
            clear_gradients(self._parameters)

    def gradient(self, load: PatientLoader) -> tuple[float, float, dict[str, Tensor]]:
        """A patient's loss, norm of the gradient, and this rank's pieces of it by name.

        Raises:
            NotContributed: on every rank.
            Exception: see `add`.
        """
        patient = self._agreed(load)
        clear_gradients(self._parameters)
        failure, value = None, 0.0
        versions = [held.values._version for held in self.pieces.values()]
        try:
            with self._guard.unchanged():
                value = self._backward(patient)
        except NotContributed as reason:
            failure = str(reason)
        if versions != [held.values._version for held in self.pieces.values()]:
            failure = "a parameter changed during the forward pass, which would couple patients"
        gradients = self._gradients()
        return self._joined(failure, value, gradients)

    def _agreed(self, load: PatientLoader) -> PatientTiles:
        """The patient's tiles, if every rank has them."""
        patient, failure = None, "not ready on another rank"
        try:
            patient = load()
        except Exception as error:  # aborts are releases
            failure = why_not(error)
        everywhere = bool(self._ranks.every([float(patient is not None)]).min())
        if patient is None or not everywhere:
            raise NotContributed(failure)
        return patient

    def _backward(self, patient: PatientTiles) -> float:
        """This rank's share of the patient's loss; its gradient is summed over the ranks on the way."""
        value = 0.0
        for own in self._own(len(patient.tiles)):
            places = torch.tensor(own.tiles, dtype=torch.int64, device=patient.tiles.device)
            draws = {name: drawn[places.to(drawn.device)] for name, drawn in patient.draws.items()}
            loss = self._passes.loss(patient.tiles[places], draws)
            torch.autograd.backward(loss * own.weight)
            value += float(loss.detach()) * own.weight
        return value

    def _own(self, tiles: int) -> list[Pass]:
        """This rank's passes. Where tiles are compared, the loss of the one pass is the rank's share already."""
        rank, ranks = self._ranks.rank, self._ranks.size
        if not self._separable:
            return [Pass(tuple(range(rank, tiles, ranks)), 1.0)]
        return passes(tiles, rank, ranks, self._tiles_at_once or tiles)

    def _gradients(self) -> dict[str, Tensor]:
        """This rank's pieces of the gradient. What a rank holds whole has only its own share in `.grad`, which is added up here."""
        gradients = {}
        for name, parameter in self._parameters.items():
            if self.pieces[name].whole:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients[name] = self._ranks.total(own.detach())
            elif parameter.grad is not None:
                gradients[name] = piece(parameter.grad, self._ranks.rank, self._ranks.size).values
        return gradients

    def _joined(self, failure: str | None, value: float, gradients: dict[str, Tensor]) -> tuple[float, float, dict[str, Tensor]]:
        """Loss and norm over all ranks.

        Raises:
            NotContributed: on every rank, if one has a failure, or loss or gradient is not finite.
        """
        shards = {name: gradient for name, gradient in gradients.items() if not self.pieces[name].whole}
        wholes = {name: gradient for name, gradient in gradients.items() if self.pieces[name].whole}
        told = self._ranks.every([float(failure is None), value, gradient_norm(shards) ** 2])
        if not bool(told[:, 0].min()):
            raise NotContributed(failure or "failed on another rank")
        loss, norm = float(told[:, 1].sum()), math.sqrt(float(told[:, 2].sum()) + gradient_norm(wholes) ** 2)
        if not contributes(loss, norm):
            raise NotContributed("loss or gradient is not finite")
        return loss, norm, gradients
