"""The running average of the encoder: right, outlasting a restart, recorded each round, and released in the last state's place."""

from pathlib import Path

import pytest
import torch
from tests.server.rounds.consortium import NAMES, Consortium, Make, make_plan
from tests.server.rounds.test_server_step import Run, plan
from torch import Tensor

from pathfed_common import digest
from pathfed_common.encoder import weights
from pathfed_server.rounds.released import released_chunks
from pathfed_server.rounds.replay import replay_states
from pathfed_server.rounds.state import RunState

Tensors = dict[str, Tensor]


def some(seed: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {"encoder.w": torch.randn(6, 4, generator=random), "head.b": torch.randn(4, generator=random)}


def held(path: Path) -> Tensors:
    return weights.load(path.read_bytes())


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("block", [5, 10_000])
def test_the_average_follows_the_new_states_encoder_and_nothing_else(tmp_path: Path, name: str, block: int) -> None:
    run = Run(tmp_path, plan(name, ema=0.75), some(0))
    due = some(0)["encoder.w"]
    for index in range(1, 4):
        after = run.step(some(index), block=block)
        numbers = zip(due.reshape(-1).tolist(), after["encoder.w"].reshape(-1).tolist(), strict=True)
        due = torch.tensor([0.75 * before + (1 - 0.75) * now for before, now in numbers]).reshape(6, 4)
        slots = held(tmp_path / f"optimiser-{index}")
        assert torch.equal(slots["ema.encoder.w"], due)
        assert "ema.head.b" not in slots


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw"])
def test_the_average_changes_no_bit_of_state_or_slots(tmp_path: Path, name: str) -> None:
    made = {}
    for ema in (0.0, 0.9):
        folder = tmp_path / str(ema)
        folder.mkdir()
        run = Run(folder, plan(name, ema=ema), some(0))
        state = [run.step(some(index)) for index in (1, 2)][-1]
        slots = {key: tensor for key, tensor in held(folder / "optimiser-2").items() if not key.startswith("ema.")}
        made[ema] = weights.dump(state, {}) + weights.dump(slots, {})
    assert made[0.0] == made[0.9]


def released(made: Consortium, index: int) -> bytes:
    state, optimiser = (made.home / "runs" / "run-1" / kind / f"round-{index:06d}.safetensors" for kind in ("states", "optimiser"))
    return b"".join(released_chunks(made.plan, state=state, optimiser=optimiser))


@pytest.mark.parametrize("rule", ["mean", "trimmed_mean", "norm_weighted"])
def test_a_run_names_the_average_in_each_round_and_a_replay_gives_it(rule: str, consortium: Make, tmp_path: Path) -> None:
    """The updates that were sent, aggregated by the same rule, give state, average and factors of every round again."""
    plan = make_plan(
        rounds=3, quorum=3, server_optimiser={"name": "nesterov", "learning_rate": 0.01, "ema": 0.5}, aggregation={"rule": rule}
    )
    made = consortium(plan, sites=NAMES)
    kept = tmp_path / "kept"
    real = made.recorder.record_round

    def keeping(**told: object) -> None:
        for site, path in told["updates"].items():  # type: ignore[attr-defined]
            kept.mkdir(exist_ok=True)
            (kept / f"{told['result'].round_index}-{site}").write_bytes(path.read_bytes())  # type: ignore[attr-defined]
        real(**told)  # type: ignore[arg-type]

    made.recorder.record_round = keeping
    assert made.drive().state is RunState.FINISHED
    rounds = {index: result for index, (result, _, _) in made.recorder.rounds.items()}
    assert rounds[3].average == digest.of_bytes(released(made, 3))
    assert len({result.average for result in rounds.values()}) == 3
    assert any(factor < 1 for result in rounds.values() for factor in result.factors.values()) is (rule == "norm_weighted")
    first = made.home / "runs" / "run-1" / "states" / "round-000000.safetensors"
    (tmp_path / "work").mkdir()
    seen = 0
    for replayed in replay_states(plan, [NAMES] * 3, lambda index, site: kept / f"{index}-{site}", first=first, work=tmp_path / "work"):
        seen = replayed.round_index
        result = rounds[seen]
        assert digest.of_bytes(replayed.state.read_bytes()) == result.checkpoint.state
        assert (replayed.average, replayed.factors) == (result.average, result.factors)
    assert seen == 3


def test_a_plan_without_an_average_records_none(consortium: Make) -> None:
    made = consortium(make_plan(rounds=1))
    made.drive()
    assert made.recorder.rounds[1][0].average is None
    assert set(weights.load(released(made, 1))) == {"blocks.0.w", "norm"}
