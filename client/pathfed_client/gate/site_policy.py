"""The hospital's own limits, applied at the site to every plan and offer. A plan may ask for less, never for more.

A policy is read again for every offer: what is changed counts from the next round on, for plans that were approved before as well. Keys
that are left out allow what was allowed before there was such a key, so that old policy files keep their meaning.
"""

from typing import Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from pathfed_client.gate import hours as opening
from pathfed_common.encoder.spec import preset
from pathfed_common.errors import ErrorCode, PathfedError, PlanError, PrivacyError, TransportError
from pathfed_common.plan import EncoderPlan, Plan
from pathfed_common.provenance import cosigned
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.settings import Settings

OBJECTIVES = ("mae", "dino")
ENCODERS: tuple[str, ...] = get_args(EncoderPlan.model_fields["preset"].annotation)


class SitePolicy(Settings):
    """`policy.toml` of a site."""

    #: Largest epsilon a patient of this site may ever spend, over all plans and runs.
    max_epsilon: float = Field(gt=0, le=1000)
    #: The delta at which this site's ledger states epsilon. Fixed for the ledger's whole life.
    delta: float = Field(gt=0, le=1e-3)
    #: Reply at the plan's public time slots. Off: the time of a reply may tell how many patients were drawn; for demos and benchmarks only.
    reply_slots: bool = True
    #: CPU threads training may use.
    threads: int = Field(default=1, ge=1, le=1024)
    #: Where training runs: "auto" (the first GPU if there is one, else the CPU), "cuda", "cuda:N" for the GPU of that number, or "cpu".
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda|cuda:(0|[1-9][0-9]{0,2}))$")
    #: How many devices compute a round together: that many GPUs from the first on, or, on the CPU, that many processes.
    devices: int = Field(default=1, ge=1, le=64)
    #: With several devices: "sharded", the model is cut among them and they share each patient's tiles; "replicated", each has a copy and
    #: patients of its own; "auto": sharded where a copy does not fit well into one device.
    sharding: Literal["auto", "sharded", "replicated"] = "auto"
    #: Most memory of a device that training may take, GB (10^9 bytes). Left out: all of it. On the CPU it decides how many tiles are taken
    #: at once, and is no hard limit.
    device_memory_gb: float | None = Field(default=None, gt=0, le=10_000)
    #: Processes that read slides ahead of training. 0: training reads for itself, and a slide that crashes its decoder ends the client.
    tile_workers: int = Field(default=1, ge=0, le=256)
    #: Most memory of the machine that each of the client's computing processes may take, GB (10^9 bytes). Left out: all of it.
    memory_gb: float | None = Field(default=None, ge=1, le=100_000)
    #: Most that the client sends to the server, Mbit/s (10^6 bits), over all connections. Left out: as much as the line takes.
    #: Mind the plans' deadlines: an update of 2 GB takes 53 minutes at 5 Mbit/s.
    bandwidth_mbit_s: float | None = Field(default=None, ge=0.5, le=1_000_000)
    #: Most disk that base states of earlier rounds may take, GB (10^9 bytes); the one of the present round is kept whatever it takes. Their
    #: unchanged parts need not travel again.
    base_state_cache_gb: float = Field(default=20.0, ge=0, le=1_000_000)
    #: Largest epsilon that one whole plan may cost a patient of this site, at `delta`. Left out: `max_epsilon` alone bounds it.
    max_epsilon_per_plan: float | None = Field(default=None, gt=0, le=1000)
    #: Objectives that plans may have, of "mae" and "dino". Left out: all.
    objectives: tuple[str, ...] | None = None
    #: Encoders that plans may train, by `encoder.preset`. Left out: all.
    encoders: tuple[str, ...] | None = None
    #: Most parameters that a plan's encoder may have. Left out: any number.
    max_parameters: int | None = Field(default=None, ge=1)
    #: When rounds may begin, "HH:MM-HH:MM" by the clock of `time_zone`; an end before the beginning is the next day's. Empty: always.
    hours: str = opening.ALWAYS
    #: Saturdays and Sundays: the same hours ("as_other_days"), the whole day ("all_day"), or no round begins ("never").
    weekends: opening.Weekends = "as_other_days"
    #: The time zone of `hours` and `weekends`, by its name in the tz database, such as "Europe/Berlin".
    time_zone: str = "UTC"
    #: Public keys (`ed25519:...`) of operators whose signatures under a plan count, beside the server's. Empty: the server's suffices.
    operators: tuple[str, ...] = ()
    #: How many of these operators must have signed a plan. Left out: one, where operators are named.
    operator_signatures: int | None = Field(default=None, ge=1)
    #: Whether two approvers (`pathfed-site approvers`), each with a key of their own, must sign an approval before it counts.
    second_person: bool = False

    @field_validator("objectives", "encoders", "operators", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        """A list, as TOML gives it."""
        return tuple(value) if isinstance(value, list) else value

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return _known(value, OBJECTIVES)

    @field_validator("encoders")
    @classmethod
    def _known_encoders(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return _known(value, ENCODERS)

    @field_validator("hours")
    @classmethod
    def _readable_hours(cls, value: str) -> str:
        if value != opening.ALWAYS:
            opening.window(value)
        return value

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        opening.zone(value)
        return value

    @field_validator("operators")
    @classmethod
    def _keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            try:
                VerifyKey.from_text(text)
            except ValueError as error:
                raise ValueError(f"must be a list of public keys, ed25519:<base64>, got {text!r}: {error}") from None
        if len(set(value)) != len(value):
            raise ValueError(f"must name each key once, got {', '.join(value)}")
        return value

    @field_validator("operator_signatures")
    @classmethod
    def _enough_operators(cls, value: int | None, info: ValidationInfo) -> int | None:
        operators = info.data.get("operators")
        if operators is not None and value is not None and value > len(operators):
            raise ValueError(f"must be at most the number of keys in operators, {len(operators)}, got {value}")
        return value

    @property
    def operator_keys(self) -> tuple[VerifyKey, ...]:
        """The operators' keys."""
        return tuple(VerifyKey.from_text(text) for text in self.operators)

    @property
    def operators_needed(self) -> int:
        """How many of the operators must have signed a plan."""
        return min(1, len(self.operators)) if self.operator_signatures is None else self.operator_signatures

    @property
    def names_gpus(self) -> bool:
        """Whether the device it asks for may be missing on a machine."""
        return self.device.startswith("cuda") or (self.device == "auto" and self.devices > 1)


def check_plan(policy: SitePolicy, plan: Plan, declared_patients: int, epsilon_of_plan: float) -> None:
    """Refuse a plan this site's policy does not allow.

    Args:
        policy: the site's policy.
        plan: the plan to approve, or to train for.
        declared_patients: the site's public lower bound of its cohort size.
        epsilon_of_plan: epsilon of all the plan's steps at the policy's delta.

    Raises:
        PlanError: the plan expects more patients a step than the site declares.
        PrivacyError: PF307, a whole run would cost more than the policy allows in all or for a plan; or the policy does not allow the
            plan's objective or encoder.
    """
    plan.sampling_rate(declared_patients)
    _check_epsilon("max_epsilon", policy.max_epsilon, policy.delta, epsilon_of_plan)
    if policy.max_epsilon_per_plan is not None:
        _check_epsilon("max_epsilon_per_plan", policy.max_epsilon_per_plan, policy.delta, epsilon_of_plan)
    _check_among("objectives", policy.objectives, plan.objective.name)
    _check_among("encoders", policy.encoders, plan.encoder.preset)
    parameters = preset(plan.encoder.preset, img_size=plan.cohort.tile_px).parameters
    if policy.max_parameters is not None and parameters > policy.max_parameters:
        raise _forbidden("the plan's encoder has more parameters than", "max_parameters", f"{parameters} > {policy.max_parameters}")


def check_operators(policy: SitePolicy, signed_plan: bytes) -> None:
    """Refuse a plan that too few of the operators whom this site trusts have signed.

    Raises:
        PlanError: PF106, fewer signatures of `policy.operators` than the policy asks for.
    """
    found = cosigned.parse(signed_plan, where="signed plan").signed_by(policy.operator_keys)
    if len(found) < policy.operators_needed:
        raise PlanError(
            ErrorCode.PLAN_NOT_AUTHENTIC,
            "too few of the operators whom this site's policy names have signed the plan",
            where="policy.toml, key operator_signatures",
            value=f"{len(found)} of {policy.operators_needed}",
            remedy="ask the operators to sign it (`pathfed-server plan cosign`) and take the plan again",
        )


def check_hours(policy: SitePolicy, now: float) -> None:
    """Refuse to begin a round outside the policy's hours; `now` in UTC seconds.

    Raises:
        TransportError: PF441, it is outside them.
    """
    if not opening.may_begin(policy.hours, policy.weekends, policy.time_zone, now):
        raise TransportError(
            ErrorCode.OUTSIDE_HOURS,
            "no round begins at this hour at this site",
            where="policy.toml, keys hours, weekends and time_zone",
            value=f"{policy.hours or 'always'}, weekends {policy.weekends}, {policy.time_zone}",
            remedy="nothing was charged; wait, or change the policy",
        )


def _known(value: tuple[str, ...] | None, allowed: tuple[str, ...]) -> tuple[str, ...] | None:
    if value is not None and (not value or not set(value) <= set(allowed)):
        raise ValueError(f"must be a list of one or more of {', '.join(allowed)}, got {', '.join(value) or 'none'}")
    return value


def _check_epsilon(key: str, most: float, delta: float, epsilon: float) -> None:
    # Written so that a NaN, which compares false with everything, refuses.
    if not epsilon <= most:
        raise _forbidden(
            "a whole run of this plan would cost a patient more than",
            key,
            f"{epsilon:.4g} > {most:g} at delta {delta:g}",
            f"ask the operator for more noise, fewer rounds or fewer patients a step; or raise {key}",
        )


def _check_among(key: str, allowed: tuple[str, ...] | None, value: str) -> None:
    if allowed is not None and value not in allowed:
        raise _forbidden("the plan asks for something else than", key, f"{value}; allowed: {', '.join(allowed)}")


def _forbidden(what: str, key: str, value: str, remedy: str | None = None) -> PathfedError:
    return PrivacyError(
        ErrorCode.POLICY_FORBIDS, f"{what} this site's policy allows", where=f"policy.toml, key {key}", value=value, remedy=remedy
    )
