"""What a plan may ask of a slide's attributes: which slides count, and with which weight their tiles are drawn.

A site knows a slide's attributes from columns of its patient list; they never leave it. The rules are public. Values are compared in one
normal form (`normal_value`), so that `Lung ` in a list is `lung` in a plan.
"""

import unicodedata
from datetime import date
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

#: Attributes that a rule may name. The day of acquisition is an attribute too, with rules of its own.
Attribute = Literal["organ", "cancer_type", "stain", "block", "scanner"]
ATTRIBUTES: tuple[Attribute, ...] = ("organ", "cancer_type", "stain", "block", "scanner")

MAX_VALUES = 256
MAX_WEIGHTS = 1024

Value = Annotated[str, Field(min_length=1, max_length=200)]
Values = Annotated[tuple[Value, ...], Field(strict=False, max_length=MAX_VALUES)]


def normal_value(text: str) -> str:
    """The form in which attribute values are compared: case, width and white space do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class _Rules(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _says_something(cls, value: object) -> object:
        if isinstance(value, tuple) and any(isinstance(one, str) and not normal_value(one) for one in value):
            raise ValueError("a value must hold more than white space")
        return value


class CohortExclude(_Rules):
    """Slides with these values are out, and so is a slide that does not have the attribute: nobody can say that it is not one of them."""

    #: Organs that are out.
    organ: Values = ()
    #: Cancer types that are out.
    cancer_type: Values = ()
    #: Stains that are out.
    stain: Values = ()
    #: Names of blocks that are out.
    block: Values = ()
    #: Scanners that are out.
    scanner: Values = ()


class CohortInclude(_Rules):
    """A slide must have one of these values of each attribute named here; a slide that does not have the attribute is out."""

    #: Organs of which one must be the slide's; empty for any, as below.
    organ: Values = ()
    #: Cancer types of which one must be the slide's.
    cancer_type: Values = ()
    #: Stains of which one must be the slide's.
    stain: Values = ()
    #: Names of blocks of which one must be the slide's.
    block: Values = ()
    #: Scanners of which one must be the slide's.
    scanner: Values = ()
    #: First day of acquisition, YYYY-MM-DD; empty for any.
    acquired_from: str = ""
    #: Last day of acquisition, YYYY-MM-DD; empty for any.
    acquired_until: str = ""

    @field_validator("acquired_from", "acquired_until")
    @classmethod
    def _day(cls, value: str) -> str:
        if value and (len(value) != len("YYYY-MM-DD") or not _is_day(value)):
            raise ValueError(f"must be a day as YYYY-MM-DD, got {value!r}")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.acquired_from and self.acquired_until and self.acquired_from > self.acquired_until:
            raise ValueError(f"acquired_from must not be after acquired_until, got {self.acquired_from} and {self.acquired_until}")
        return self


class TileWeight(_Rules):
    """A list of tables, each `[[cohort.tile_weights]]`: within a patient, tiles of slides with this value are drawn with this weight.

    Weights of several rules that fit a slide multiply; where none fits, the weight is 1. The more weight the rarer slides have, the less
    they are drowned; how much a patient counts, and what that costs, does not change. `client/pathfed_client/cohort/sampling.py` states
    the exact law.
    """

    #: The attribute, a column of the sites' patient lists.
    attribute: Attribute
    #: Its value; case, width and white space do not count.
    value: Value
    #: How likely each tile of such a slide is, beside a tile with weight 1.
    weight: Annotated[float, Field(ge=1e-3, le=1e3)]


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def contradiction(include: CohortInclude, exclude: CohortExclude) -> str | None:
    """The first attribute and value that are both included and excluded, or None."""
    for name in ATTRIBUTES:
        both = {normal_value(value) for value in getattr(include, name)} & {normal_value(value) for value in getattr(exclude, name)}
        if both:
            return f"{name} {min(both)!r}"
    return None
