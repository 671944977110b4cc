"""What a round loop is told of its run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pathfed_common.ids import RunName
from pathfed_common.plan import Plan
from pathfed_common.provenance.keys import SigningKey


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a loop is told of its run.

    Attributes:
        run: the run.
        plan: its plan.
        shapes: shape of each tensor of a state, by name (`model.state_shapes`); updates hold the trained ones.
        initial_state: makes the first state; called once, before round 1.
        key: the server's evidence key, which signs offers.
        home: the server's home.
        attempts: a round that fails this often fails the run.
        retry_pause_s: wait before a failed round is offered again, seconds.
        suspend_after: a site whose updates are refused in so many rounds running, for its own faults, is suspended; 0: never.
    """

    run: RunName
    plan: Plan
    shapes: Mapping[str, tuple[int, ...]]
    initial_state: Callable[[], Mapping[str, Tensor]]
    key: SigningKey
    home: Path
    attempts: int = 2
    retry_pause_s: float = 5.0
    suspend_after: int = 3
