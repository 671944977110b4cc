"""The server optimiser: torch.optim's numbers, from files to files, the same bytes each time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pathfed_common.encoder import weights as tensor_files
from pathfed_common.errors import RoundError
from pathfed_common.files import write_atomic
from pathfed_common.plan import ServerOptimiserPlan
from pathfed_server.rounds.server_step import SLOTS, next_value, step, write_initial_optimiser

Tensors = dict[str, Tensor]


def plan(name: str, **changes: float) -> ServerOptimiserPlan:
    return ServerOptimiserPlan.model_validate({"name": name, "learning_rate": 0.05, **changes})


def some(seed: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(6, 4, generator=random), "b": torch.randn(4, generator=random)}


class Run:
    """Steps from file to file."""

    def __init__(
        self,
        folder: Path,
        optimiser: ServerOptimiserPlan,
        start: Tensors,
        *,
        trained: Callable[[str], bool] = lambda name: not name.startswith("teacher."),
        teacher_keeps: float | None = None,
    ) -> None:
        self.folder, self.optimiser, self.index = folder, optimiser, 0
        self.trained, self.teacher_keeps = trained, teacher_keeps
        write_atomic(folder / "state-0", tensor_files.dump(start, {}))
        write_initial_optimiser(optimiser, folder / "state-0", folder / "optimiser-0", trained=self.trained)

    def step(self, update: Tensors, **changes: Any) -> Tensors:
        write_atomic(self.folder / "mean", tensor_files.dump(update, {}))
        self.index += 1
        step(
            self.optimiser,
            step_index=self.index,
            state=self.folder / f"state-{self.index - 1}",
            mean_update=self.folder / "mean",
            optimiser_state=self.folder / f"optimiser-{self.index - 1}",
            next_state=self.folder / f"state-{self.index}",
            next_optimiser_state=self.folder / f"optimiser-{self.index}",
            trained=self.trained,
            teacher_keeps=self.teacher_keeps,
            **changes,
        )
        return tensor_files.load((self.folder / f"state-{self.index}").read_bytes())


def torch_sgd(made: ServerOptimiserPlan, parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=made.learning_rate, momentum=made.momentum, weight_decay=made.weight_decay)


def torch_adamw(made: ServerOptimiserPlan, parameters: list[Tensor]) -> torch.optim.Optimizer:
    betas = (made.momentum, made.beta2)
    return torch.optim.AdamW(parameters, lr=made.learning_rate, betas=betas, eps=made.epsilon, weight_decay=made.weight_decay)


def torch_nesterov(made: ServerOptimiserPlan, parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=made.learning_rate, momentum=made.momentum, weight_decay=made.weight_decay, nesterov=True)


REFERENCES: dict[str, Callable[[ServerOptimiserPlan, list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": torch_sgd,
    "nesterov": torch_nesterov,
    "adamw": torch_adamw,
}


CHANGES: list[dict[str, float]] = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.0},
    {"momentum": 0.99, "beta2": 0.5},
    {"beta2": 0.0},
    {"epsilon": 0.1},
]


@pytest.mark.parametrize(
    ("name", "changes"), [(name, changes) for name in SLOTS for changes in CHANGES if name != "nesterov" or changes.get("momentum") != 0]
)
def test_steps_are_those_of_torch(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    made = plan(name, **changes)
    ours = Run(tmp_path, made, some(0))
    # In float64, so that what is compared is the rule and not torch's own rounding.
    theirs = {key: tensor.double().requires_grad_() for key, tensor in some(0).items()}
    reference = REFERENCES[name](made, list(theirs.values()))
    for index in range(1, 6):
        update = some(index)
        found = ours.step(update)
        for key, parameter in theirs.items():
            parameter.grad = update[key].double()
        reference.step()
        for key, parameter in theirs.items():
            torch.testing.assert_close(found[key].double(), parameter.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", list(SLOTS))
def test_step_goes_downhill(tmp_path: Path, name: str) -> None:
    target = some(9)
    run, state = Run(tmp_path, plan(name), some(0)), some(0)
    first = sum(float((state[key] - target[key]).square().sum()) for key in state)
    for _ in range(40):
        state = run.step({key: state[key] - target[key] for key in state})
    assert sum(float((state[key] - target[key]).square().sum()) for key in state) < 0.2 * first


@pytest.mark.parametrize("name", list(SLOTS))
def test_same_files_give_the_same_bytes_and_are_left_as_they_were(tmp_path: Path, name: str) -> None:
    seen = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        run = Run(folder, plan(name), some(0))
        before = (folder / "state-0").read_bytes()
        run.step(some(1))
        run.step(some(2))
        assert (folder / "state-0").read_bytes() == before
        seen.append([(folder / file).read_bytes() for file in ("state-1", "state-2", "optimiser-1", "optimiser-2")])
    assert seen[0] == seen[1]
    assert seen[0][0] == tensor_files.dump(tensor_files.load(seen[0][0]), {})


@pytest.mark.parametrize("name", list(SLOTS))
def test_size_of_blocks_changes_no_bit(tmp_path: Path, name: str) -> None:
    seen = set()
    for block in (1, 5, 24, 10_000):
        folder = tmp_path / str(block)
        folder.mkdir()
        run = Run(folder, plan(name, weight_decay=0.1), some(0))
        for index in (1, 2):
            run.step(some(index), block=block)
        seen.add((folder / "state-2").read_bytes() + (folder / "optimiser-2").read_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize("name", list(SLOTS))
def test_number_of_threads_changes_no_bit(tmp_path: Path, name: str) -> None:
    random = torch.Generator().manual_seed(3)
    start, update = ({"w": torch.randn(300, 301, generator=random)} for _ in range(2))
    seen = set()
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        folder = tmp_path / str(threads)
        folder.mkdir()
        Run(folder, plan(name), start).step(update)
        seen.add((folder / "state-1").read_bytes())
    torch.set_num_threads(before)
    assert len(seen) == 1


def test_optimiser_file_holds_a_slot_for_each_tensor(tmp_path: Path) -> None:
    for name, slots in SLOTS.items():
        Run(tmp_path, plan(name), some(0))
        held = tensor_files.load((tmp_path / "optimiser-0").read_bytes())
        assert set(held) == {f"{slot}.{key}" for slot in slots for key in ("w", "b")}
        assert all(not tensor.any() for tensor in held.values())


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, plan("adamw"), some(0))
    with pytest.raises(ValueError, match="not the state's"):
        run.step({"w": some(1)["w"]})
    other = Run(tmp_path, plan("sgd"), some(0))
    other.optimiser = plan("adamw")
    with pytest.raises(ValueError, match="does not belong"):
        other.step(some(1))


def test_step_without_a_finite_result_is_refused_and_writes_no_state(tmp_path: Path) -> None:
    run = Run(tmp_path, plan("sgd", learning_rate=1e45), some(0))
    with pytest.raises(RoundError, match="PF514"):
        run.step(some(1))
    assert not (tmp_path / "state-1").exists()


def test_late_steps_need_no_bias_correction() -> None:
    """After very many rounds beta^t is 0 and the correction 1, without an overflow on the way."""
    made = plan("adamw")
    ones = torch.ones(3)
    value = next_value(made, step_index=1_000_000, value=torch.zeros(3), slots={"first": ones, "second": ones})
    torch.testing.assert_close(value, torch.full((3,), -0.05), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", list(SLOTS))
def test_what_is_not_trained_keeps_every_bit_and_so_does_its_teacher(tmp_path: Path, name: str) -> None:
    """Weight decay and the teacher's mean would both move it; it has no slot, and no place in the update."""
    start = some(0) | {"frozen": torch.randn(7, generator=torch.Generator().manual_seed(8))}
    start |= {f"teacher.{key}": tensor.clone() for key, tensor in start.items()}
    run = Run(tmp_path, plan(name, weight_decay=0.1), start, trained=lambda key: key in ("w", "b"), teacher_keeps=0.7)
    for index in range(1, 4):
        found = run.step(some(index))
    assert set(found) == set(start)
    for key in ("frozen", "teacher.frozen"):
        assert torch.equal(found[key], start[key])
    assert not any(torch.equal(found[key], start[key]) for key in ("w", "b", "teacher.w", "teacher.b"))
    slots = set(tensor_files.header(tmp_path / "optimiser-3"))
    assert slots == {f"{slot}.{key}" for slot in SLOTS[name] for key in ("w", "b")}
