"""The server optimiser: state and mean update in, next state out, block by block from file to file.

    sgd      g = u + weight_decay * w;   v' = momentum * v + g;   w' = w - learning_rate * v'
    nesterov the same v';                                         w' = w - learning_rate * (g + momentum * v')
    adamw    m' = momentum * m + (1 - momentum) * u;   s' = beta2 * s + (1 - beta2) * u^2
             w' = w * (1 - learning_rate * weight_decay) - learning_rate * (m' / (1 - momentum^t)) / (sqrt(s' / (1 - beta2^t)) + epsilon)

with u the aggregated update and t the round's index, 1 for the first. All are those of torch.optim (SGD without dampening, with nesterov or
without; AdamW after Loshchilov and Hutter 2019), which a test compares them with. Nesterov's is the outer step of DiLoCo (Douillard et
al. 2023, arXiv:2311.08105). A teacher's tensors then follow the new state (`teacher`). What is not trained, and what a teacher has of it,
keeps every bit. Only what is trained has optimiser slots.

With `ema` above 0 the optimiser's file also holds a running average of the trained encoder, e' = ema * e + (1 - ema) * w'. It begins as the
first state's, never leaves the server before the release, and is what is released (`released`).

Guarantees:
    - Pure: the same files give the same bytes. Each number is formed in float64 by single operations that IEEE 754 rounds exactly (no fused
      ones), then rounded to float32 once; so the bytes do not depend on threads or on the processor either.
    - The optimiser's file is made first and the next state from it, so that each is one pass. Memory holds a few copies of one block, and
      no number depends on where blocks begin.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pathfed_common.encoder import weights as tensor_files
from pathfed_common.encoder.blocks import BLOCK, FileBlocks, block_chunks
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.files import write_atomic
from pathfed_common.model import ENCODER_PREFIX, TEACHER_PREFIX
from pathfed_common.plan import ServerOptimiserPlan
from pathfed_server.rounds.teacher import next_teacher

#: What an optimiser remembers of each tensor; the file names them ``<slot>.<tensor's name>``.
SLOTS = {"sgd": ("velocity",), "nesterov": ("velocity",), "adamw": ("first", "second")}
#: The running average of the encoder, beside the optimiser's slots.
AVERAGE = "ema"


def write_initial_optimiser(optimiser: ServerOptimiserPlan, state: Path, out: Path, *, trained: Callable[[str], bool]) -> None:
    """Write the optimiser's file for a run that has made no step: zeros, shaped as the state's trained tensors; averages are the state's.

    Args:
        optimiser: the plan's server optimiser.
        state: the first state's file.
        out: the file to write.
        trained: which of the state's tensors are trained, by name (`model.trained`).

    Raises:
        ValueError: `state` is not a state file.
        HostError: the disk is full (PF901) or cannot be written (PF904).
    """
    layout = _slot_layout(optimiser, state, trained)
    first = FileBlocks(state)

    def slot(full_name: str, start: int, stop: int) -> Tensor:
        kind, name = full_name.split(".", 1)
        return first.read(name, start, stop) if kind == AVERAGE else torch.zeros(stop - start)

    write_atomic(out, block_chunks(layout, slot, {}))


def step(
    optimiser: ServerOptimiserPlan,
    *,
    step_index: int,
    state: Path,
    mean_update: Path,
    optimiser_state: Path,
    next_state: Path,
    next_optimiser_state: Path,
    trained: Callable[[str], bool],
    teacher_keeps: float | None = None,
    block: int = BLOCK,
) -> None:
    """Make one step, writing `next_optimiser_state` and then `next_state`, each whole or not at all.

    Args:
        optimiser: the plan's server optimiser.
        step_index: t, the round's index, 1 for the first.
        state: the base state's file, float32.
        mean_update: file of the mean update, float32: the state's trained tensors.
        optimiser_state: the file the last step (or `write_initial_optimiser`) left.
        next_state: where the next state goes.
        next_optimiser_state: where the next optimiser file goes.
        trained: which of the state's tensors are trained, by name (`model.trained`).
        teacher_keeps: share of itself that the state's teacher keeps; given just when there is one.
        block: numbers in a block.

    Raises:
        ValueError: the files do not fit together.
        RoundError: PF514, a number of the next state is not finite.
        HostError: the disk is full (PF901) or cannot be written (PF904).
    """
    if step_index < 1:
        raise ValueError(f"step_index counts from 1, got {step_index}")
    whole = tensor_files.header(state)
    if tensor_files.header(mean_update) != {name: kind for name, kind in whole.items() if trained(name)}:
        raise ValueError("the mean update's tensors are not the state's trained ones")
    teacher = any(name.startswith(TEACHER_PREFIX) for name in whole)
    if teacher != (teacher_keeps is not None):
        raise ValueError(f"a state {'with' if teacher else 'without'} a teacher, and {teacher_keeps=}")
    layout = _slot_layout(optimiser, state, trained)
    if tensor_files.header(optimiser_state) != layout:
        raise ValueError("the optimiser's file does not belong to this state and optimiser")

    reading = _Reading(optimiser, step_index, FileBlocks(state), FileBlocks(mean_update), FileBlocks(optimiser_state))
    write_atomic(next_optimiser_state, block_chunks(layout, reading.slot, {}, size=block))
    slots = FileBlocks(next_optimiser_state)

    def following(name: str, start: int, stop: int) -> Tensor:
        if trained(name):
            return reading.moved(name, start, stop, slots.read)
        followed = name.removeprefix(TEACHER_PREFIX)
        before = reading.state.read(name, start, stop)
        if teacher_keeps is None or followed == name or not trained(followed):
            return before
        # Made again rather than kept, so that memory holds one block.
        return next_teacher(before, reading.moved(followed, start, stop, slots.read), teacher_keeps)

    write_atomic(next_state, block_chunks(whole, following, {}, size=block))


@dataclass(frozen=True)
class _Reading:
    """What a step reads, and what it makes of it, block by block."""

    optimiser: ServerOptimiserPlan
    step_index: int
    state: FileBlocks
    mean: FileBlocks
    slots: FileBlocks

    def slot(self, full_name: str, start: int, stop: int) -> Tensor:
        """A slot's numbers after the step."""
        kind, name = full_name.split(".", 1)
        before = self.slots.read(full_name, start, stop)
        if kind == AVERAGE:
            return next_teacher(before, self.moved(name, start, stop, self.slot), self.optimiser.ema)
        value = self.state.read(name, start, stop) if kind == "velocity" else None
        return next_slot(self.optimiser, kind, before=before, mean=self.mean.read(name, start, stop), value=value)

    def moved(self, name: str, start: int, stop: int, slot: Callable[[str, int, int], Tensor]) -> Tensor:
        """The state's numbers after the step, with `slot` for the slots' after it."""
        slots = {kind: slot(f"{kind}.{name}", start, stop) for kind in SLOTS[self.optimiser.name]}
        mean = self.mean.read(name, start, stop) if self.optimiser.name == "nesterov" else None
        value = self.state.read(name, start, stop)
        return next_value(self.optimiser, step_index=self.step_index, value=value, slots=slots, mean=mean)


def next_slot(optimiser: ServerOptimiserPlan, kind: str, *, before: Tensor, mean: Tensor, value: Tensor | None) -> Tensor:
    """A slot's numbers after a step, float32.

    Args:
        optimiser: the plan's server optimiser.
        kind: "velocity" (sgd, nesterov), "first" or "second" (adamw).
        before: the slot before the step.
        mean: the mean update's numbers.
        value: the state's, which SGD's weight decay needs; None for adamw.
    """
    old = before.to(torch.float64)
    if kind == "velocity":
        return old.mul(optimiser.momentum).add(_gradient(optimiser, mean, value)).to(torch.float32)
    update = mean.to(torch.float64)
    if kind == "first":
        return old.mul(optimiser.momentum).add(update.mul(1 - optimiser.momentum)).to(torch.float32)
    return old.mul(optimiser.beta2).add(update.mul(update).mul(1 - optimiser.beta2)).to(torch.float32)


def next_value(
    optimiser: ServerOptimiserPlan, *, step_index: int, value: Tensor, slots: Mapping[str, Tensor], mean: Tensor | None = None
) -> Tensor:
    """Numbers of the state after a step, float32.

    Args:
        optimiser: the plan's server optimiser.
        step_index: t, 1 for the first step.
        value: the state's numbers before.
        slots: their slots after, by kind.
        mean: the mean update's numbers, which nesterov needs.

    Raises:
        RoundError: PF514, a number of the result is not finite.
    """
    before = value.to(torch.float64)
    rate = optimiser.learning_rate
    if optimiser.name == "adamw":
        scale = 1 - _power(optimiser.beta2, step_index)
        spread = slots["second"].to(torch.float64).div(scale).sqrt().add(optimiser.epsilon)
        direction = slots["first"].to(torch.float64).div(1 - _power(optimiser.momentum, step_index)).div(spread)
        after = before.mul(1 - rate * optimiser.weight_decay).sub(direction.mul(rate))
    else:
        direction = slots["velocity"].to(torch.float64)
        if mean is not None:
            direction = direction.mul(optimiser.momentum).add(_gradient(optimiser, mean, value))
        after = before.sub(direction.mul(rate))
    result = after.to(torch.float32)
    if not bool(torch.isfinite(result).all()):
        raise RoundError(
            ErrorCode.RUN_FAILED,
            "the server step leaves a number that is not finite",
            remedy="publish a plan with a lower server_optimiser.learning_rate",
        )
    return result


def _gradient(optimiser: ServerOptimiserPlan, mean: Tensor, value: Tensor | None) -> Tensor:
    """g of both kinds of SGD, float64."""
    update = mean.to(torch.float64)
    if value is None or not optimiser.weight_decay:
        return update
    return update.add(value.to(torch.float64).mul(optimiser.weight_decay))


def _slot_layout(
    optimiser: ServerOptimiserPlan, state: Path, trained: Callable[[str], bool]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    shapes = {name: shape for name, (_, shape) in tensor_files.header(state).items() if trained(name)}
    layout = {f"{kind}.{name}": (torch.float32, shape) for kind in SLOTS[optimiser.name] for name, shape in shapes.items()}
    if optimiser.ema:
        layout |= {f"{AVERAGE}.{name}": (torch.float32, shape) for name, shape in shapes.items() if name.startswith(ENCODER_PREFIX)}
    return dict(sorted(layout.items()))


def _power(base: float, exponent: int) -> float:
    """`base` to a whole power by multiplications alone, whose bits, unlike those of libm's pow, are the same everywhere."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
