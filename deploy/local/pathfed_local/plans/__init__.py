"""The plans that come with pathfed: `demo.toml`, and `consortium.toml` to start a real one from."""

from importlib import resources
from pathlib import Path


def demo_plan() -> Path:
    """The demo's plan."""
    return Path(str(resources.files(__name__).joinpath("demo.toml")))
