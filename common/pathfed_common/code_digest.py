"""Which code made a release, and whether it is the code that was installed.

The digest is over the lines that a wheel's RECORD has of the packages' files (`path,sha256=<base64url>,<bytes>`), sorted, so that anybody
with the wheel makes it again (docs/how-to/security-office.md): its RECORD through grep, sort and sha256sum.
With an installed wheel the files are compared with RECORD at start (`verify_installation`). An editable install has no such lines: the
files are digested as they lie, wherever Python finds them, and nothing says that they are a wheel's.
"""

import base64
import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, TransportError

DISTRIBUTION = "pathfed"
#: What runs at a site, and is stated.
SITE_PACKAGES = ("pathfed_client", "pathfed_common")
_SHOWN = 3


@cache
def code_digest(packages: Sequence[str]) -> Digest:
    """Digest over every source file (name, content and size) of the named packages; `packages` is a tuple.

    Raises:
        ValueError: a package is not installed.
    """
    lines = [f"{path},{rest}\n" for package in packages for path, rest in _found(package).items()]
    return digest.of_bytes("".join(sorted(lines)).encode())


def verify_installation(packages: Sequence[str], name: str = DISTRIBUTION) -> bool:
    """Check that the packages are those of the installed wheel, file by file.

    Returns:
        Whether there was a wheel's RECORD to compare with; an editable install has none.

    Raises:
        TransportError: PF447, Python found a package elsewhere than the wheel put it; PF446, files changed, missing or added.
    """
    installed = _distribution(name)
    recorded = {} if installed is None else _recorded(installed, packages)
    if installed is None or not recorded:
        return False
    for package in packages:
        due = Path(str(installed.locate_file(package))).resolve()
        if _root(package).resolve() != due:
            raise TransportError(
                ErrorCode.FOREIGN_CODE,
                "another package stands before the installed one",
                where=_root(package),
                value=package,
                remedy=f"the installed one is in {due}; look at PYTHONPATH and at .pth files",
            )
    found = {path: rest for package in packages for path, rest in _found(package).items()}
    differing = sorted(path for path in found.keys() | recorded.keys() if found.get(path) != recorded.get(path))
    if differing:
        raise TransportError(
            ErrorCode.CODE_CHANGED,
            "the installed code is not that of its wheel",
            where=str(installed.locate_file("")),
            value=f"{len(differing)} files: {', '.join(differing[:_SHOWN])}",
            remedy="install the wheel again, and find out who changed it",
        )
    return True


def module_command(module: str) -> list[str]:
    """What runs an installed module in a process of its own.

    Nothing that lies in the current folder counts (`-P`); with an installed wheel, neither does PYTHONPATH nor the user's own site folder
    (`-I`), which an editable install may need.
    """
    installed = _distribution(DISTRIBUTION)
    isolated = installed is not None and bool(_recorded(installed, [module.split(".")[0]]))
    return [sys.executable, "-I" if isolated else "-P", "-m", module]


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _recorded(installed: Distribution, packages: Sequence[str]) -> dict[str, str]:
    """RECORD's lines of the packages, by path; compiled files, which have no digest there, left out."""
    lines = (installed.read_text("RECORD") or "").splitlines()
    parts = (line.partition(",") for line in lines)
    return {path: rest for path, _, rest in parts if path.split("/")[0] in packages and "__pycache__" not in path.split("/")}


def _found(package: str) -> dict[str, str]:
    """The same lines of the files as they lie."""
    root = _root(package)
    return {
        f"{package}/{path.relative_to(root).as_posix()}": _line(path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _line(data: bytes) -> str:
    checksum = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode("ascii")
    return f"sha256={checksum},{len(data)}"


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"the package {package} is not installed")
    return Path(spec.origin).parent
