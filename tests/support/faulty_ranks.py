"""Ranks for tests: the real rank process, which can be told to have a fault. As a script it is a rank; imported, it names the faults."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from pathfed_client.io import rank_process
from pathfed_client.training.engines.serial import gradient_norm
from pathfed_client.training.joint_sum import JointSum, release
from pathfed_client.training.ranks import program, replicated, sharded, shards
from pathfed_client.training.ranks.group import Ranks
from pathfed_client.training.ranks.tasks import Done, Outcome
from pathfed_common.encoder.adapters import Adapters, attach, is_adapter
from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.objectives.dino import DinoSettings, SelfDistillation
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.objectives.objective import Draws, ObjectiveModule
from pathfed_common.plan import Plan
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

SIDE = 16
Engine = sharded.ShardedEngine
Vector = tuple[float, float, dict[str, Tensor]]
#: What starts a rank that takes faults.
COMMAND = (sys.executable, str(Path(__file__).resolve()))


class Scaled(MaskedAutoencoder):
    """With a parameter that has no axis, which FSDP2 leaves whole on every rank."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def loss(self, tiles_NCHW: Tensor, draws: Draws) -> Tensor:
        return super().loss(tiles_NCHW, draws) * self.scale


class Hungry(MaskedAutoencoder):
    """Runs out of memory above two tiles at once."""

    def loss(self, tiles_NCHW: Tensor, draws: Draws) -> Tensor:
        if len(tiles_NCHW) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory: as torch says it")
        return super().loss(tiles_NCHW, draws)


class Insatiable(MaskedAutoencoder):
    """Runs out of memory at one tile."""

    def loss(self, tiles_NCHW: Tensor, draws: Draws) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory: as torch says it")


class Brittle(MaskedAutoencoder):
    """Its loss is not finite where a tile's first number is the largest there is: white, with no augmentation."""

    def loss(self, tiles_NCHW: Tensor, draws: Draws) -> Tensor:
        white = tiles_NCHW[:, 0, 0, 0].amax() > 2.24
        return super().loss(tiles_NCHW, draws) * torch.where(white, torch.nan, 1.0)


class Adapted(MaskedAutoencoder):
    """Adapters beside an encoder that is frozen: they and the head are trained."""

    def __init__(self, spec: EncoderSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        attach(self.encoder, Adapters(rank=3, scale=0.5), torch.Generator().manual_seed(1))
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(is_adapter(name))
            if "lora_b" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))


#: Small crops, a small head, and no colour jitter or dropped branch.
DINO = DinoSettings(
    local_crops=2,
    local_crop_px=8,
    global_scale=(0.4, 1.0),
    local_scale=(0.1, 0.4),
    crop_aspect=1.3,
    colour_jitter=0.1,
    mask_ratio=(0.3, 0.6),
    head_dim=16,
    bottleneck_dim=8,
    prototypes=32,
    student_temperature=0.1,
    teacher_temperature=0.07,
    centring="sinkhorn",
    ibot_weight=1.0,
    spread="kde",
    spread_weight=0.1,
    drop_path=0.0,
)


def build(kind: type[ObjectiveModule] = MaskedAutoencoder) -> Callable[[], ObjectiveModule]:
    """The small objective of `training_fixtures`, or self-distillation on the same encoder, as ranks are told of it."""
    spec = EncoderSpec(name="tiny", img_size=SIDE, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    if issubclass(kind, SelfDistillation):
        return partial(kind, spec, DINO, seed=3)
    if not issubclass(kind, MaskedAutoencoder):
        raise ValueError(f"no small objective of kind {kind}")
    return partial(kind, spec, mask_ratio=0.5, decoder_dim=16, decoder_depth=1, decoder_heads=2, normalise_target=False, seed=3)


def small(plan: Plan) -> ObjectiveModule:
    """In the place of a plan's model: the small objective."""
    return build()()


def hungry(plan: Plan) -> ObjectiveModule:
    """The same, `Hungry`."""
    return build(Hungry)()


def insatiable(plan: Plan) -> ObjectiveModule:
    """The same, `Insatiable`."""
    return build(Insatiable)()


@dataclass(frozen=True)
class Plant:
    """Have these faults from now on, and no others. `only`: the one rank that has them; None: all."""

    faults: tuple[str, ...]
    only: int | None = None


def _own_noise(total: JointSum, ranks: Ranks) -> dict[str, shards.Piece]:
    """Each rank adds noise of its own to its partial sum."""
    for integers in total.integers.values():
        noise = torch.randn(integers.shape, generator=torch.Generator().manual_seed(ranks.rank)) * (4.0 / total.unit)
        integers.add_(noise.to(torch.int32))
    return replicated.joined(total, ranks)


def _same_noise(integers: Tensor, mechanism: PatientMechanism, random: KeyedRandom, *, start: int) -> Tensor:
    """Every piece gets the first elements of its parameter's stream."""
    return release(integers, mechanism, random)


_joined = sharded.ShardedEngine._joined


def _local_norm(engine: Engine, failure: str | None, value: float, gradients: dict[str, Tensor]) -> Vector:
    """Each rank clips to the norm of its own pieces."""
    value, _, gradients = _joined(engine, failure, value, gradients)
    return value, gradient_norm(gradients), gradients


def _counted_often(engine: Engine, failure: str | None, value: float, gradients: dict[str, Tensor]) -> Vector:
    """What every rank holds whole counts once for each of them."""
    pieces = {name: replace(held, whole=False) for name, held in engine.pieces.items()}
    with mock.patch.object(engine, "pieces", pieces):
        return _joined(engine, failure, value, gradients)


_passes = sharded.passes


def _equal_weights(tiles: int, rank: int, ranks: int, at_once: int) -> list[sharded.Pass]:
    """Each rank weighs the same, however many tiles it has."""
    return [replace(one, weight=1 / ranks if one.weight else 0.0) for one in _passes(tiles, rank, ranks, at_once)]


_losses = MaskedAutoencoder.tile_losses


def _in_backward(then: Callable[[], Any], of: int = 2) -> Callable[..., Tensor]:
    """Losses during whose backward pass something happens, the second time. (FSDP2 has taken `loss` itself by then.)"""
    calls: list[int] = []

    def losses(objective: MaskedAutoencoder, tiles: Tensor, draws: Draws) -> Tensor:
        value = _losses(objective, tiles, draws)
        calls.append(1)
        if len(calls) == of:
            value.register_hook(lambda _: then())
        return value

    return losses


def _raise() -> None:
    raise RuntimeError("/slides/Muellerova.tif")


_FAULTS: dict[str, Callable[[], Any]] = {
    "own noise": lambda: mock.patch.object(program, "joined", _own_noise),
    "same noise": lambda: mock.patch.object(program, "release", _same_noise),
    "local norm": lambda: mock.patch.object(sharded.ShardedEngine, "_joined", _local_norm),
    "counted often": lambda: mock.patch.object(sharded.ShardedEngine, "_joined", _counted_often),
    "equal weights": lambda: mock.patch.object(sharded, "passes", _equal_weights),
    "killed": lambda: mock.patch.object(MaskedAutoencoder, "tile_losses", _in_backward(lambda: os.kill(os.getpid(), signal.SIGKILL))),
    "raises": lambda: mock.patch.object(MaskedAutoencoder, "tile_losses", _in_backward(_raise)),
    "hangs": lambda: mock.patch.object(MaskedAutoencoder, "tile_losses", _in_backward(lambda: time.sleep(1e6))),
    "no memory for tiles": lambda: mock.patch.object(program, "patient_tiles", mock.Mock(side_effect=MemoryError)),
}


class FaultyRank(rank_process.Rank):
    """A rank that takes faults; "hides": it says that all is well when it is not."""

    def __init__(self, memory: int) -> None:
        super().__init__(memory)
        self._planted = ExitStack()
        self._hides = False

    def __call__(self, task: tuple[Any, Any]) -> Outcome:
        if isinstance(task[0], Plant):
            self._planted.close()
            here = task[0].only in (None, int(os.environ["RANK"]))
            self._hides = here and "hides" in task[0].faults
            for fault in task[0].faults if here else ():
                if fault != "hides":
                    self._planted.enter_context(_FAULTS[fault]())
            return Done()
        outcome = super().__call__(task)
        return Done() if self._hides and not isinstance(outcome, Done) else outcome


def start(arguments: list[str]) -> None:
    """Be a rank."""
    rank_process.main(arguments, FaultyRank)


if __name__ == "__main__":
    import faulty_ranks  # by its name, so that what is sent here is found

    faulty_ranks.start(sys.argv[1:])
