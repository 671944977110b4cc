"""Options and names that the commands of `pathfed-server` share."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.ids import run_name as check_run_name
from pathfed_common.ids import site_name as check_site_name

Home = Annotated[Path, typer.Option("--home", envvar="PATHFED_SERVER_HOME", help="The server's home folder.")]
HOME = Path("pathfed-server")
Name = TypeVar("Name", bound=str)


def run_name(text: str) -> RunName:
    """A run's name as a person gave it.

    Raises:
        HostError: PF905, it cannot be one.
    """
    return _checked(check_run_name, text, "run")


def site_name(text: str) -> SiteName:
    """A site's name as a person gave it.

    Raises:
        HostError: PF905, it cannot be one.
    """
    return _checked(check_site_name, text, "site")


def _checked(check: Callable[[str], Name], text: str, what: str) -> Name:
    try:
        return check(text)
    except ValueError as error:
        raise HostError(ErrorCode.SETTINGS_INVALID, str(error), where=f"the {what}'s name") from None
