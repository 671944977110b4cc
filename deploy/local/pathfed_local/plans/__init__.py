"""The plans that come with pathfed: the demo's, one an objective; the simulation's; and `consortium.toml` to start a real one from."""

from importlib import resources
from pathlib import Path

_DEMO = {"mae": "demo.toml", "dino": "demo_dino.toml"}


def demo_plan(objective: str = "mae") -> Path:
    """The demo's plan for an objective, "mae" or "dino"."""
    return Path(str(resources.files(__name__).joinpath(_DEMO[objective])))


def simulation_plan() -> Path:
    """The plan of `pathfed simulate`."""
    return Path(str(resources.files(__name__).joinpath("simulation.toml")))
