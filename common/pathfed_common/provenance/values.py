"""Signed values: frozen dataclasses with one canonical JSON form each.

A subclass of `Value` lists its fields with types; everything else follows. Every field is checked when the value is made, whether by our
own code or from bytes: names, digests and keys have their form, whole numbers stay whole, numbers are finite. Reading is strict: exactly
the fields, exactly the types, and bytes that are not the value's own canonical form are refused.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import RunName, SiteName, run_name, site_name
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.units import UtcSeconds

_LONGEST_TEXT = 100_000
#: `X | None` is one or the other, depending on what X is.
_OPTIONAL = (UnionType, Union)

T = TypeVar("T")
V = TypeVar("V", bound="Value")


@dataclass(frozen=True, kw_only=True)
class Value:
    """Base of signed values.

    Fields may be str, bool, int, float, Digest, SiteName, RunName, UtcSeconds, VerifyKey, another Value, `X | None` or `tuple[X, ...]`.
    Whole numbers are at least 0; texts have at most 100,000 characters.
    """

    def __post_init__(self) -> None:
        for name, kind in _fields(type(self)).items():
            given = getattr(self, name)
            checked = kind.check(name, given)
            # A whole number given for a float field becomes a float, so that equal values have equal bytes.
            if checked is not given:
                object.__setattr__(self, name, checked)
        self._check()

    def _check(self) -> None:
        """Bounds that go beyond a field's type; raises ValueError. For subclasses."""

    def plain(self) -> dict[str, Any]:
        """The value as a JSON object."""
        return {
            name: getattr(self, name) if kind.plain is None else kind.plain(getattr(self, name))
            for name, kind in _fields(type(self)).items()
        }

    @classmethod
    def from_plain(cls, raw: object) -> Self:
        """The value of a JSON object.

        Raises:
            ValueError: other fields, another type, or a value out of bounds.
        """
        kinds = _fields(cls)
        if not isinstance(raw, dict) or set(raw) != set(kinds):
            raise ValueError(f"{cls.__name__} has exactly the fields {sorted(kinds)}")
        return cls(**{name: kind.build(raw[name]) for name, kind in kinds.items()})


def decode(payload: bytes, build: Callable[[Any], T], encode: Callable[[T], bytes], *, what: str, where: str) -> T:
    """Read a value from its canonical bytes.

    Raises:
        ProvenanceError: PF601, not the canonical bytes of such a value.
    """
    try:
        value = build(json.loads(payload.decode("ascii")))
        canonical = encode(value)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise ProvenanceError(ErrorCode.RECORD_CHANGED, f"not {what} of this version: {error}", where=where) from None
    if canonical != payload:
        raise ProvenanceError(ErrorCode.RECORD_CHANGED, f"not the canonical bytes of {what}", where=where)
    return value


def decode_value(cls: type[V], payload: bytes, where: str) -> V:
    """Read a value whose bytes are the canonical form of its JSON object.

    Raises:
        ProvenanceError: PF601, they are not.
    """
    return decode(payload, cls.from_plain, lambda value: digest.canonical(value.plain()), what=f"a {cls.__name__}", where=where)


@dataclass(frozen=True)
class _Kind:
    """How a field of one type is read from JSON, and checked. Made once a type: a record has millions of fields.

    Attributes:
        build: the field's value from JSON; what is not built here is left for `check` to judge.
        check: the value, checked, given the field's name; raises ValueError.
        plain: the field's JSON value; None where that is the value itself.
    """

    build: Callable[[Any], Any]
    check: Callable[[str, Any], Any]
    plain: Callable[[Any], Any] | None = None


def _fields(cls: type[Value]) -> dict[str, _Kind]:
    if cls not in _KINDS:
        hints = get_type_hints(cls)
        _KINDS[cls] = {field.name: _kind(hints[field.name]) for field in fields(cls)}
    return _KINDS[cls]


#: Names and kinds of each class's fields, resolved once.
_KINDS: dict[type[Value], dict[str, _Kind]] = {}


def _kind(hint: Any) -> _Kind:
    if get_origin(hint) in _OPTIONAL:
        return _optional(_kind(next(option for option in get_args(hint) if option is not NoneType)))
    if get_origin(hint) is tuple:
        return _tuple(_kind(get_args(hint)[0]))
    if hint in _CHECKS:
        return _Kind(lambda raw: raw, _CHECKS[hint])
    if hint is VerifyKey:
        return _Kind(VerifyKey.from_text, _instance(hint), VerifyKey.to_text)
    if issubclass(hint, Value):
        return _Kind(hint.from_plain, _instance(hint), lambda value: value.plain())
    raise TypeError(f"a signed value has no fields of type {hint}")


def _optional(inner: _Kind) -> _Kind:
    plain = inner.plain
    return _Kind(
        lambda raw: None if raw is None else inner.build(raw),
        lambda name, value: None if value is None else inner.check(name, value),
        None if plain is None else lambda value: None if value is None else plain(value),
    )


def _tuple(inner: _Kind) -> _Kind:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, tuple):
            raise ValueError(f"{name} must be a tuple")
        return tuple(inner.check(name, item) for item in value)

    plain = inner.plain
    return _Kind(
        lambda raw: tuple(inner.build(item) for item in raw) if isinstance(raw, list) else raw,
        check,
        list if plain is None else lambda value: [plain(item) for item in value],
    )


def _instance(kind: type) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be {kind.__name__}, got {type(value).__name__}")
        return value

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _time(name: str, value: Any) -> float:
    if _number(name, value) <= 0:
        raise ValueError(f"{name} must be UTC seconds, got {value!r}")
    return float(value)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise ValueError(f"{name} must be a text of at most {_LONGEST_TEXT} characters")
    return value


def _form(parse: Callable[[str], str]) -> Callable[[str, Any], str]:
    return lambda name, value: parse(_text(name, value))


_CHECKS: dict[Any, Callable[[str, Any], Any]] = {
    str: _text,
    bool: _flag,
    int: _whole,
    float: _number,
    Digest: _form(digest.parse),
    SiteName: _form(site_name),
    RunName: _form(run_name),
    UtcSeconds: _time,
}
