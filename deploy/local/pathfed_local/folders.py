"""A folder that a command of this package fills: an earlier one of its kind is replaced, anything else is left alone."""

import shutil
from pathlib import Path

from pathfed_common.errors import ErrorCode, HostError


def fresh_folder(out: Path, mark: str, what: str) -> Path:
    """An empty folder, in place of an earlier one.

    Args:
        out: where.
        mark: name of the file by which such a folder is known.
        what: what it is, as told to people: "a demo".

    Raises:
        HostError: PF904, something else is there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / mark).exists():
            raise HostError(
                ErrorCode.HOME_UNUSABLE,
                f"the folder holds something that is not {what}, and is left as it is",
                where=out,
                remedy="choose another --out",
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / mark).touch()
    return out.resolve()
