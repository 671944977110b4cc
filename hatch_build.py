"""Hatchling's hook: a wheel, and an editable install, hold the protobuf messages that are made from their .proto files."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtocolHook(BuildHookInterface[Any]):
    """Runs common/build_protocol.py."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the messages before files are collected."""
        subprocess.run([sys.executable, str(Path(self.root) / "common" / "build_protocol.py")], check=True)
