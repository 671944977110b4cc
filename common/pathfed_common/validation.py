"""What pydantic found wrong, as one plain sentence with key, value and bound."""

from dataclasses import dataclass
from enum import Enum, auto

from pydantic import ValidationError


class Fault(Enum):
    """The kinds of fault a person can put right."""

    UNKNOWN_KEY = auto()
    WRONG_TYPE = auto()
    OUT_OF_BOUNDS = auto()
    IMPOSSIBLE = auto()


@dataclass(frozen=True)
class Finding:
    """The first fault of a value.

    Attributes:
        fault: its kind.
        key: dotted path of the key, empty for the whole value.
        sentence: what is wrong, with the bound; says how many more faults there are.
        value: the offending value as text, or None.
    """

    fault: Fault
    key: str
    sentence: str
    value: str | None


#: Keys that hold one of several tables, by the table's own `name`.
ONE_OF_SEVERAL = frozenset({"objective"})
_BOUNDS = frozenset({"ge", "gt", "le", "lt", "multiple_of", "pattern", "expected", "max_length", "min_length"})


def _key(place: tuple[int | str, ...]) -> str:
    """The dotted key of pydantic's place. After a key that holds one of several tables pydantic puts which of them it took."""
    parts = [part for index, part in enumerate(place) if index == 0 or place[index - 1] not in ONE_OF_SEVERAL]
    return ".".join(str(part) for part in parts)


def first_finding(error: ValidationError) -> Finding:
    """The first fault pydantic reports, in pathfed's words."""
    first = error.errors()[0]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    key, kind, context = _key(first["loc"]), first["type"], first.get("ctx", {})
    if kind == "union_tag_invalid":
        # The table's own `name` says which of several tables it is.
        sentence = f"Input should be one of {context['expected_tags']}{more}"
        return Finding(Fault.OUT_OF_BOUNDS, f"{key}.name", sentence, repr(first["input"]["name"]))
    if kind == "extra_forbidden":
        return Finding(Fault.UNKNOWN_KEY, key, f"unknown key{more}", repr(first["input"]))
    if kind == "value_error":
        return Finding(Fault.IMPOSSIBLE, key, f"{context['error']}{more}", None)
    if kind == "missing":
        return Finding(Fault.WRONG_TYPE, key, f"the key is required{more}", None)
    bounded = not _BOUNDS.isdisjoint(context) or kind == "finite_number"
    return Finding(Fault.OUT_OF_BOUNDS if bounded else Fault.WRONG_TYPE, key, first["msg"] + more, repr(first["input"]))
