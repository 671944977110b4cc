"""Which code made a release: one digest over the installed sources of pathfed's packages."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from pathfed_common import digest
from pathfed_common.digest import Digest


@cache
def code_digest(packages: Sequence[str]) -> Digest:
    """Digest over every source file (name and content) of the named packages, in name order; `packages` is a tuple.

    Raises:
        ValueError: a package is not installed.
    """
    lines = []
    for package in sorted(packages):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(f"the package {package} is not installed")
        root = Path(spec.origin).parent
        for path in sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            lines.append(f"{package}/{path.relative_to(root).as_posix()} {digest.of_bytes(path.read_bytes())}\n")
    return digest.of_bytes("".join(lines).encode())
