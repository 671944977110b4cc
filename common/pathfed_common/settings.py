"""Settings files of a server or site: small TOML files, read strictly, never changed behind a person's back."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.validation import first_finding


class Settings(BaseModel):
    """Base of settings: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _writable(cls, value: object) -> object:
        """A path whose bytes are no text (Python marks them with surrogates) cannot be written into a settings file."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"must be text, got {text!a}")
        return value


Model = TypeVar("Model", bound=Settings)


def read_settings(model: type[Model], path: Path) -> Model:
    """Read a settings file.

    Raises:
        HostError: PF904, the file is missing (nothing was initialised there); PF905, a key is unknown, of the wrong type or out of bounds.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HostError(ErrorCode.SETTINGS_INVALID, f"not UTF-8 text: {error.reason}", where=path) from None
    except OSError as error:
        raise HostError(
            ErrorCode.HOME_UNUSABLE,
            f"the settings cannot be read: {error.strerror}",
            where=path,
            remedy="run `init` first, or give the right --home",
        ) from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise HostError(ErrorCode.SETTINGS_INVALID, f"not TOML: {error}", where=path) from None
    return checked(model, raw, where=str(path))


def checked(model: type[Model], raw: Mapping[str, object], *, where: str = "options") -> Model:
    """Check settings that a person gave.

    Raises:
        HostError: PF905, a key is unknown, of the wrong type or out of bounds.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        finding = first_finding(error)
        raise HostError(ErrorCode.SETTINGS_INVALID, finding.sentence, where=f"{where}, key {finding.key}", value=finding.value) from None


def to_toml(model: Settings, heading: str) -> str:
    """The settings as TOML text under a comment. Values are texts, numbers, truths, lists of them, and tables of all those."""
    lines = [f"# {line}" for line in heading.splitlines()]
    tables: list[str] = []
    for key, value in model.model_dump().items():
        if isinstance(value, dict):
            inner = [f"{name} = {_literal(one)}" for name, one in value.items() if one is not None]
            tables += ["", f"[{key}]", *inner] if inner else []
        elif value is not None:
            lines.append(f"{key} = {_literal(value)}")
    lines += tables
    return "\n".join(lines) + "\n"


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_literal(item) for item in value)}]"
    # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is and TOML does not allow.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
