"""Groups of real rank processes on the CPU, one of each kind a module, and what is compared with them: a single process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from faulty_ranks import COMMAND, Plant, Scaled, build
from training_fixtures import SIDE, Colours, base_state, cohort, mechanism, objective, one_thread, random, tiles

from pathfed_client.io.rank_group import GroupSpec, RankGroup
from pathfed_client.io.rank_round import run_round_on_ranks
from pathfed_client.io.shared_numbers import Layout
from pathfed_client.training.compute import Compute
from pathfed_client.training.engines.engine import trainable
from pathfed_client.training.engines.serial import SerialEngine
from pathfed_client.training.local_round import RoundOutcome, run_round
from pathfed_common.objectives.objective import ObjectiveModule
from pathfed_common.privacy.randomness import KeyedRandom

__all__ = ["base_state", "cohort", "mechanism", "objective", "one_thread", "random", "tiles"]

SECRET = bytes(range(32))
SERIAL = Compute()


def start(
    mode: Any, ranks: int, *, kind: type[ObjectiveModule] = Scaled, compute: Compute = SERIAL, slots: int = 3, timeout_s: float = 60.0
) -> RankGroup:
    """A group that trains the small objective of its kind."""
    objective = build(kind)()
    state = {name: tuple(tensor.shape) for name, tensor in objective.state_dict().items()}
    layout = Layout(state, {name: state[name] for name in trainable(objective)}, (slots, 8, SIDE, SIDE, 3))
    tiles_at_once = 2 if objective.separable else None
    devices = [torch.device("cpu")] * ranks
    spec = GroupSpec(devices=devices, mode=mode, build=build(kind), layout=layout, compute=compute, tiles_at_once=tiles_at_once)
    return RankGroup(spec, timeout_s=timeout_s, command=COMMAND)


class Groups:
    """Starts groups when they are first asked for, and plants faults in them."""

    def __init__(self) -> None:
        self._open: dict[tuple[object, ...], RankGroup] = {}

    def __call__(self, mode: str, ranks: int, *faults: str, only: int | None = None, **options: Any) -> RankGroup:
        key = (mode, ranks, *sorted(options.items(), key=str))
        if key not in self._open or not self._open[key].is_open:
            self._open[key] = start(mode, ranks, **options)
        self._open[key].ask_all(Plant(faults, only))  # type: ignore[arg-type]
        return self._open[key]

    def close(self) -> None:
        """End them all."""
        for group in self._open.values():
            group.close()


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    made = Groups()
    yield made
    made.close()


@pytest.fixture
def compare(cohort, mechanism) -> Callable[..., tuple[RoundOutcome, RoundOutcome]]:
    """A round on ranks, and by a single process, from the same state, cohort, secret and context."""

    def both(
        group: RankGroup, *, kind: type[ObjectiveModule] = Scaled, tiles: Callable[[], Colours] = Colours, **changes: Any
    ) -> tuple[RoundOutcome, RoundOutcome]:
        single = build(kind)()
        values = {
            "base_state": {name: tensor.clone() for name, tensor in single.state_dict().items()},
            "cohort": cohort(5, 3, 4, 1, 2),
            "mechanism": mechanism(loss_bound=20.0),
            "tiles_per_patient": 5,
            "steps": 1,
            "local_learning_rate": 0.1,
            **changes,
        }
        on_ranks = run_round_on_ranks(group, secret=SECRET, context={"round": 1}, tiles=tiles(), **values)
        # A rank with patients of its own takes a patient's tiles in passes of the same size.
        at_once = group.spec.tiles_at_once if group.spec.mode == "replicated" else None
        engine = SerialEngine(single, trainable(single), group.spec.compute, tiles_at_once=at_once)
        random = KeyedRandom(SECRET, {"round": 1})
        return on_ranks, run_round(objective=single, random=random, tiles=tiles(), engine=engine, **values)

    return both
