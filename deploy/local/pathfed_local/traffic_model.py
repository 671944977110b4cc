"""How long a round takes, and what the server sends and receives, before anybody has bought a line.

A model, not a measurement: docs/scale.md says which of its figures were measured and which are assumed. The stages of a round follow each
other; inside a stage all sites work at the same time and share the server's line evenly:

    download      max(a site's bytes / its line, all sites' bytes / the server's line)
    compute       private steps of the slowest site, its trial of the base state included
    wait          half a reply slot, on average
    upload        as the download, with the update's bytes
    admission     reading and checking what has not been checked while others were still sending, and the last update
    aggregation   all updates read once
    server step   states and optimiser read and written

Lines are in Mbit/s as providers sell them; `EFFICIENCY` of that carries our bytes. Sizes are bytes, rates GB/s = 1e9 bytes a second.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.model import state_shapes, update_shapes
from pathfed_common.plan import Plan
from pathfed_server.rounds.server_step import SLOTS

#: Bytes of one number of an update on the way. int8 carries a float32 scale for each block of 256.
WIRE_BYTES: Final[Mapping[str, float]] = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 256}
#: Base states travel as the server has them.
STATE_BYTES: Final = 4.0
#: Share of a line's bits that are ours: Ethernet, IP, TCP and TLS take the rest (1,448 of 1,538 bytes of a full frame).
EFFICIENCY: Final = 0.94


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one site moves in a round, and what the server works on.

    Attributes:
        down: bytes to each site.
        up: bytes from each site.
        state_numbers: of the state.
        trained_numbers: of it, those that an update has.
        slots: that the server optimiser keeps of every trained number.
    """

    down: float
    up: float
    state_numbers: float
    trained_numbers: float
    slots: int = 2

    @classmethod
    def of_numbers(cls, numbers: float, wire: str, *, slots: int = 2) -> "Load":
        """All of a model is trained and travels."""
        return cls.of_part(numbers, numbers, wire, slots=slots)

    @classmethod
    def of_part(cls, numbers: float, trained: float, wire: str, *, slots: int = 2) -> "Load":
        """A part is trained; of the rest each site has a copy already, which the downlink's deduplication finds."""
        return cls(down=trained * STATE_BYTES, up=trained * WIRE_BYTES[wire], state_numbers=numbers, trained_numbers=trained, slots=slots)

    @classmethod
    def of_plan(cls, plan: Plan) -> "Load":
        """The first round of a plan: the whole state goes down."""
        numbers = sum(math.prod(shape) for shape in state_shapes(plan).values())
        trained = sum(math.prod(shape) for shape in update_shapes(plan).values())
        return cls(
            down=numbers * STATE_BYTES,
            up=trained * WIRE_BYTES[plan.wire.dtype],
            state_numbers=numbers,
            trained_numbers=trained,
            slots=len(SLOTS[plan.server_optimiser.name]),
        )


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Lines and machines. docs/scale.md has the source of every default.

    Attributes:
        sites: that take part in a round.
        site_mbit_s: each site's line, one way.
        server_mbit_s: the server's line, one way.
        compute_s: private steps of a round at the slowest site.
        slot_s: reply slot.
        admission_gb_s: of updates checked: digest, numbers, norm.
        aggregation_gb_s: of updates read into the mean.
        step_gb_s: of states and optimiser read and written by the server's step.
    """

    sites: int = 50
    site_mbit_s: float = 100.0
    server_mbit_s: float = 1000.0
    compute_s: float = 60.0
    slot_s: float = 0.0
    admission_gb_s: float = 0.3
    aggregation_gb_s: float = 0.5
    step_gb_s: float = 0.3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least_is_zero = field.name in ("compute_s", "slot_s")
            if not math.isfinite(value) or value < 0 or (value == 0 and not least_is_zero):
                raise HostError(
                    ErrorCode.SETTINGS_INVALID,
                    "a number that no line or machine has",
                    where=f"--{field.name.replace('_', '-')}",
                    value=value,
                    remedy="give a finite number above 0" + (", or 0" if least_is_zero else ""),
                )


@dataclass(frozen=True, kw_only=True)
class RoundTime:
    """A round's stages, seconds, and the server's traffic, bytes."""

    download_s: float
    compute_s: float
    wait_s: float
    upload_s: float
    admission_s: float
    aggregation_s: float
    step_s: float
    sent: float
    received: float

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage, in their order."""
        return {field.name.removesuffix("_s"): getattr(self, field.name) for field in fields(self) if field.name.endswith("_s")}

    @property
    def total_s(self) -> float:
        """The round."""
        return sum(self.stages.values())

    @property
    def bottleneck(self) -> str:
        """The stage that takes longest."""
        stages = self.stages
        return max(stages, key=lambda name: stages[name])


def round_time(load: Load, conditions: Conditions) -> RoundTime:
    """A round under the conditions."""
    sites, upload_s = conditions.sites, _transfer_s(load.up, conditions)
    checking_s = load.up / (conditions.admission_gb_s * 1e9)
    # State and slots are read, written, and read once more for their digests; the mean is read.
    touched = STATE_BYTES * (3 * load.state_numbers + (1 + 3 * load.slots) * load.trained_numbers)
    return RoundTime(
        download_s=_transfer_s(load.down, conditions),
        compute_s=conditions.compute_s,
        wait_s=conditions.slot_s / 2,
        upload_s=upload_s,
        admission_s=max(0.0, (sites - 1) * checking_s - upload_s) + checking_s,
        aggregation_s=sites * load.up / (conditions.aggregation_gb_s * 1e9),
        step_s=touched / (conditions.step_gb_s * 1e9),
        sent=sites * load.down,
        received=sites * load.up,
    )


def _transfer_s(size: float, conditions: Conditions) -> float:
    """Seconds until every site has its bytes, or has sent them."""
    slowest = max(size / conditions.site_mbit_s, conditions.sites * size / conditions.server_mbit_s)
    return slowest * 8 / 1e6 / EFFICIENCY


def limiting_line(conditions: Conditions) -> str:
    """Whose line bounds transfers: "server" or "site"."""
    return "server" if conditions.sites * conditions.site_mbit_s > conditions.server_mbit_s else "site"


@dataclass(frozen=True)
class Variant:
    """One way to go about the same model."""

    name: str
    load: Load


def variants(numbers: float, *, slots: int = 2) -> tuple[Variant, ...]:
    """A model of so many numbers in every way it can travel: number types, half of it frozen, adapters of 1%."""
    return (
        Variant("float32", Load.of_numbers(numbers, "float32", slots=slots)),
        Variant("bfloat16", Load.of_numbers(numbers, "bfloat16", slots=slots)),
        Variant("int8", Load.of_numbers(numbers, "int8", slots=slots)),
        Variant("int8, half frozen", Load.of_part(numbers, numbers / 2, "int8", slots=slots)),
        Variant("int8, adapters of 1%", Load.of_part(numbers, numbers / 100, "int8", slots=slots)),
    )
