"""Environment variables that every Flower process of pathfed gets, on either side."""

from pathlib import Path


def flower_environment(home: Path) -> dict[str, str]:
    """Quiet (no telemetry, no update check), at home in `home`, and never through a proxy to its own loopback."""
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(home),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "PYTHONUNBUFFERED": "1",
        # glibc keeps freed memory in an arena for each thread; with large messages that doubles what a process holds.
        "MALLOC_ARENA_MAX": "2",
    }
