"""Which scanned slides a plan's cohort holds, and with which weight their tiles are drawn. Pure.

Rules are applied when a cohort is made, not when slides are scanned: they decide nothing about a slide's tiles, so that a plan with other
rules needs no slide read again. The cohort's digest depends on what they leave, and on the weights.

| attribute of the slide | named in `cohort.include` | named in `cohort.exclude` |
| --- | --- | --- |
| has one of the values | in | out |
| has another value | out | in |
| is not known | out | out: nobody can say that it is not one of them |
"""

import math
from collections.abc import Collection, Mapping

from pathfed_common.cohort_rules import ATTRIBUTES, normal_value
from pathfed_common.plan import CohortPlan


def outside(plan: CohortPlan, attributes: Mapping[str, str]) -> str | None:
    """The attribute by which a slide is outside a plan's rules, or None where it is inside.

    Args:
        plan: the cohort rules.
        attributes: of the slide, by name, in normal form; `acquired` is YYYY-MM-DD.
    """
    for name in ATTRIBUTES:
        value = attributes.get(name)
        allowed, barred = getattr(plan.include, name), getattr(plan.exclude, name)
        if (allowed and not _among(value, allowed)) or (barred and (value is None or _among(value, barred))):
            return name
    first, last = plan.include.acquired_from, plan.include.acquired_until
    if first or last:
        day = attributes.get("acquired")
        if day is None or (first and day < first) or (last and day > last):
            return "acquired"
    return None


def tile_weight(plan: CohortPlan, attributes: Mapping[str, str]) -> float:
    """Weight of each tile of a slide: the product of all weights that fit, 1 where none does; never 0 and always finite."""
    return math.prod(
        (rule.weight for rule in plan.tile_weights if attributes.get(rule.attribute) == normal_value(rule.value)),
        start=1.0,
    )


def _among(value: str | None, values: Collection[str]) -> bool:
    return value in {normal_value(one) for one in values}
