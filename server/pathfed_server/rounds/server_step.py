"""The server optimiser: state and mean update in, next state out, block by block from file to file.

    sgd      g = u + weight_decay * w;   v' = momentum * v + g;                      w' = w - learning_rate * v'
    adamw    m' = momentum * m + (1 - momentum) * u;   s' = beta2 * s + (1 - beta2) * u^2
             w' = w * (1 - learning_rate * weight_decay) - learning_rate * (m' / (1 - momentum^t)) / (sqrt(s' / (1 - beta2^t)) + epsilon)

with u the mean update and t the round's index, 1 for the first. Both are those of torch.optim (SGD without dampening; AdamW after
Loshchilov and Hutter 2019), which a test compares them with. A teacher's tensors then follow the new state (`teacher`). What is not
trained, and what a teacher has of it, keeps every bit. Only what is trained has optimiser slots.

Guarantees:
    - Pure: the same files give the same bytes. Each number is formed in float64 by single operations that IEEE 754 rounds exactly (no fused
      ones), then rounded to float32 once; so the bytes do not depend on threads or on the processor either.
    - The optimiser's file is made first and the next state from it, so that each is one pass. Memory holds a few copies of one block, and
      no number depends on where blocks begin.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pathfed_common.encoder import weights as tensor_files
from pathfed_common.encoder.blocks import BLOCK, FileBlocks, block_chunks
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.files import write_atomic
from pathfed_common.model import TEACHER_PREFIX
from pathfed_common.plan import ServerOptimiserPlan
from pathfed_server.rounds.teacher import next_teacher

#: What an optimiser remembers of each tensor; the file names them ``<slot>.<tensor's name>``.
SLOTS = {"sgd": ("velocity",), "adamw": ("first", "second")}


def write_initial_optimiser(optimiser: ServerOptimiserPlan, state: Path, out: Path, *, trained: Callable[[str], bool]) -> None:
    """Write the optimiser's file for a run that has made no step: zeros, shaped as the state's trained tensors.

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
    write_atomic(out, block_chunks(layout, lambda name, start, stop: torch.zeros(stop - start), {}))


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

    before, mean, slots = FileBlocks(state), FileBlocks(mean_update), FileBlocks(optimiser_state)

    def slot(full_name: str, start: int, stop: int) -> Tensor:
        kind, name = full_name.split(".", 1)
        value = before.read(name, start, stop) if kind == "velocity" else None
        return next_slot(optimiser, kind, before=slots.read(full_name, start, stop), mean=mean.read(name, start, stop), value=value)

    write_atomic(next_optimiser_state, block_chunks(layout, slot, {}, size=block))
    after = FileBlocks(next_optimiser_state)

    def moved(name: str, start: int, stop: int) -> Tensor:
        moving = {kind: after.read(f"{kind}.{name}", start, stop) for kind in SLOTS[optimiser.name]}
        return next_value(optimiser, step_index=step_index, value=before.read(name, start, stop), slots=moving)

    def following(name: str, start: int, stop: int) -> Tensor:
        if trained(name):
            return moved(name, start, stop)
        followed = name.removeprefix(TEACHER_PREFIX)
        if teacher_keeps is None or followed == name or not trained(followed):
            return before.read(name, start, stop)
        # Made again rather than kept, so that memory holds one block.
        return next_teacher(before.read(name, start, stop), moved(followed, start, stop), teacher_keeps)

    write_atomic(next_state, block_chunks(whole, following, {}, size=block))


def next_slot(optimiser: ServerOptimiserPlan, kind: str, *, before: Tensor, mean: Tensor, value: Tensor | None) -> Tensor:
    """A slot's numbers after a step, float32.

    Args:
        optimiser: the plan's server optimiser.
        kind: "velocity" (sgd), "first" or "second" (adamw).
        before: the slot before the step.
        mean: the mean update's numbers.
        value: the state's, which sgd's weight decay needs; None for adamw.
    """
    update = mean.to(torch.float64)
    old = before.to(torch.float64)
    if kind == "velocity":
        if value is not None and optimiser.weight_decay:
            update = update.add(value.to(torch.float64).mul(optimiser.weight_decay))
        return old.mul(optimiser.momentum).add(update).to(torch.float32)
    if kind == "first":
        return old.mul(optimiser.momentum).add(update.mul(1 - optimiser.momentum)).to(torch.float32)
    return old.mul(optimiser.beta2).add(update.mul(update).mul(1 - optimiser.beta2)).to(torch.float32)


def next_value(optimiser: ServerOptimiserPlan, *, step_index: int, value: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
    """Numbers of the state after a step, float32.

    Args:
        optimiser: the plan's server optimiser.
        step_index: t, 1 for the first step.
        value: the state's numbers before.
        slots: their slots after, by kind.

    Raises:
        RoundError: PF514, a number of the result is not finite.
    """
    before = value.to(torch.float64)
    rate = optimiser.learning_rate
    if optimiser.name == "sgd":
        after = before.sub(slots["velocity"].to(torch.float64).mul(rate))
    else:
        scale = 1 - _power(optimiser.beta2, step_index)
        spread = slots["second"].to(torch.float64).div(scale).sqrt().add(optimiser.epsilon)
        direction = slots["first"].to(torch.float64).div(1 - _power(optimiser.momentum, step_index)).div(spread)
        after = before.mul(1 - rate * optimiser.weight_decay).sub(direction.mul(rate))
    result = after.to(torch.float32)
    if not bool(torch.isfinite(result).all()):
        raise RoundError(
            ErrorCode.RUN_FAILED,
            "the server step leaves a number that is not finite",
            remedy="publish a plan with a lower server_optimiser.learning_rate",
        )
    return result


def _slot_layout(
    optimiser: ServerOptimiserPlan, state: Path, trained: Callable[[str], bool]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    shapes = {name: shape for name, (_, shape) in tensor_files.header(state).items() if trained(name)}
    layout = {f"{kind}.{name}": (torch.float32, shape) for kind in SLOTS[optimiser.name] for name, shape in shapes.items()}
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
