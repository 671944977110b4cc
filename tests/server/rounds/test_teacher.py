"""The teacher follows the new state by the plan's share, in the same bits everywhere, and nothing else moves it."""

import math
from pathlib import Path

import pytest
import torch
from tests.server.rounds.consortium import SHAPES, Make, initial_state, make_plan
from torch import Tensor

from pathfed_common.encoder import weights as tensor_files
from pathfed_common.files import write_atomic
from pathfed_common.plan import ServerOptimiserPlan, TeacherSchedule
from pathfed_server.rounds.admission import file_norm
from pathfed_server.rounds.server_step import step, write_initial_optimiser
from pathfed_server.rounds.state import RunState
from pathfed_server.rounds.teacher import next_teacher, share_kept

TEACHER = ("encoder.norm", "head.bias")
ALL_SHAPES = SHAPES | {f"teacher.{name}": SHAPES[name] for name in TEACHER}


def state_with_teacher() -> dict[str, Tensor]:
    state = initial_state()
    return state | {f"teacher.{name}": state[name].clone() for name in TEACHER}


def _followed(name: str) -> bool:
    return not name.startswith("teacher.")


def cosine(momentum: float) -> TeacherSchedule:
    return TeacherSchedule(momentum=momentum, schedule="cosine")


@pytest.mark.parametrize("rounds", [2, 5, 200])
def test_the_cosine_schedule_rises_from_its_share_to_one(rounds: int) -> None:
    kept = [share_kept(cosine(0.9), round_index=index, rounds=rounds) for index in range(1, rounds + 1)]
    assert (kept[0], kept[-1]) == (0.9, 1.0)
    assert kept == sorted(kept)
    for index, value in enumerate(kept):
        assert value == pytest.approx(1 - 0.1 * (1 + math.cos(math.pi * index / (rounds - 1))) / 2, rel=1e-14)


def test_the_schedules_bits_are_known() -> None:
    assert [share_kept(cosine(0.9), round_index=index, rounds=7).hex() for index in (2, 4, 6)] == [
        "0x1.d03ad0dfb95c4p-1",
        "0x1.e666666666667p-1",
        "0x1.fc91fbed13709p-1",
    ]


def test_a_constant_share_and_a_single_round_are_the_plans() -> None:
    constant = TeacherSchedule(momentum=0.7, schedule="constant")
    assert {share_kept(constant, round_index=index, rounds=9) for index in range(1, 10)} == {0.7}
    assert share_kept(cosine(0.7), round_index=1, rounds=1) == 0.7


@pytest.mark.parametrize("index", [0, 6])
def test_a_round_outside_the_run_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 5, got {index}"):
        share_kept(cosine(0.9), round_index=index, rounds=5)


def test_a_teacher_is_the_weighted_mean_rounded_once() -> None:
    generator = torch.Generator().manual_seed(1)
    value, followed = (torch.randn(50, generator=generator) for _ in range(2))
    expected = torch.tensor([0.9 * float(left) + (1 - 0.9) * float(right) for left, right in zip(value, followed, strict=True)])
    assert torch.equal(next_teacher(value, followed, 0.9), expected)
    assert torch.equal(next_teacher(value, followed, 1.0), value)
    assert torch.equal(next_teacher(value, followed, 0.0), followed)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_step_moves_the_teacher_after_the_state_and_gives_it_no_slot(optimiser: str, tmp_path: Path) -> None:
    plan = ServerOptimiserPlan.model_validate({"name": optimiser, "learning_rate": 0.05})
    update = {name: torch.full(shape, 0.25) for name, shape in SHAPES.items()}
    made = {}
    for kind, start, keeps in (("with", state_with_teacher(), 0.75), ("without", initial_state(), None)):
        folder = tmp_path / kind
        folder.mkdir()
        write_atomic(folder / "state", tensor_files.dump(start, {}))
        write_atomic(folder / "mean", tensor_files.dump(update, {}))
        write_initial_optimiser(plan, folder / "state", folder / "optimiser", trained=_followed)
        step(
            plan,
            step_index=1,
            state=folder / "state",
            mean_update=folder / "mean",
            optimiser_state=folder / "optimiser",
            next_state=folder / "next",
            next_optimiser_state=folder / "next-optimiser",
            trained=_followed,
            teacher_keeps=keeps,
        )
        made[kind] = tensor_files.load((folder / "next").read_bytes())
    assert (tmp_path / "with" / "next-optimiser").read_bytes() == (tmp_path / "without" / "next-optimiser").read_bytes()
    assert set(made["with"]) == set(ALL_SHAPES)
    for name in SHAPES:
        assert torch.equal(made["with"][name], made["without"][name])
    for name in TEACHER:
        assert torch.equal(made["with"][f"teacher.{name}"], next_teacher(initial_state()[name], made["with"][name], 0.75))
        assert not torch.equal(made["with"][f"teacher.{name}"], made["with"][name])


@pytest.mark.parametrize(("teacher", "keeps"), [(True, None), (False, 0.9)])
def test_a_share_without_a_teacher_and_a_teacher_without_a_share_are_refused(teacher: bool, keeps: float | None, tmp_path: Path) -> None:
    plan = ServerOptimiserPlan()
    write_atomic(tmp_path / "state", tensor_files.dump(state_with_teacher() if teacher else initial_state(), {}))
    write_atomic(tmp_path / "mean", tensor_files.dump(initial_state(), {}))
    write_initial_optimiser(plan, tmp_path / "state", tmp_path / "optimiser", trained=_followed)
    with pytest.raises(ValueError, match="a teacher, and teacher_keeps="):
        step(
            plan,
            step_index=1,
            state=tmp_path / "state",
            mean_update=tmp_path / "mean",
            optimiser_state=tmp_path / "optimiser",
            next_state=tmp_path / "next",
            next_optimiser_state=tmp_path / "next-optimiser",
            trained=_followed,
            teacher_keeps=keeps,
        )
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_sends_and_admits_the_trained_tensors_and_keeps_the_teachers(consortium: Make, steps: int) -> None:
    """Sites answer with the trained tensors alone; every state of the run has the teacher, moved by the plan's schedule."""
    made = consortium(make_plan(rounds=3, steps=steps, objective={"name": "dino", "teacher_momentum": 0.5}))
    outcome = made.drive(shapes=ALL_SHAPES, initial_state=state_with_teacher)
    assert outcome.state is RunState.FINISHED
    last = made.final_state()
    assert set(last) == set(ALL_SHAPES)
    plain = consortium(
        make_plan(rounds=3, steps=steps, objective={"name": "dino", "teacher_momentum": 0.5, "teacher_schedule": "constant"})
    )
    plain.drive(shapes=ALL_SHAPES, initial_state=state_with_teacher)
    other = plain.final_state()
    for name in TEACHER:
        # In the last of the rounds the cosine schedule leaves the teacher where it is.
        assert not torch.equal(last[f"teacher.{name}"], last[name])
        assert not torch.equal(last[f"teacher.{name}"], other[f"teacher.{name}"])


def test_the_same_run_twice_has_the_same_teacher_bit_for_bit(consortium: Make) -> None:
    plan = make_plan(rounds=3, objective={"name": "dino"})
    runs = [consortium(plan) for _ in range(2)]
    for run in runs:
        run.drive(shapes=ALL_SHAPES, initial_state=state_with_teacher)
    first, second = (run.final_state() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in ALL_SHAPES)


def test_the_norm_of_what_is_trained_leaves_the_teacher_out(tmp_path: Path) -> None:
    write_atomic(tmp_path / "state", tensor_files.dump({"a": torch.tensor([3.0, 4.0]), "teacher.a": torch.full((2,), 1e6)}, {}))
    assert file_norm(tmp_path / "state", only=_followed) == 5.0
    assert file_norm(tmp_path / "state") > 1e6
