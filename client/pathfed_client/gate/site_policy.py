"""The hospital's own limits, applied at the site to every plan and offer. A plan may ask for less, never for more."""

from typing import Literal

from pydantic import Field

from pathfed_common.errors import ErrorCode, PrivacyError
from pathfed_common.plan import Plan
from pathfed_common.settings import Settings


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
    #: Most that the site sends, Mbit/s (10^6 bits), over all connections to the server. Left out: no limit.
    upload_mbit_per_s: float | None = Field(default=None, gt=0, le=100_000)
    #: Processes that read slides ahead of training. 0: training reads for itself, and a slide that crashes its decoder ends the client.
    tile_workers: int = Field(default=1, ge=0, le=256)

    @property
    def names_gpus(self) -> bool:
        """Whether the device it asks for may be missing on a machine."""
        return self.device.startswith("cuda") or (self.device == "auto" and self.devices > 1)


def check_plan(policy: SitePolicy, plan: Plan, declared_patients: int, epsilon_of_plan: float) -> None:
    """Refuse a plan this site's policy does not allow.

    Args:
        policy: the site's policy.
        plan: the plan to approve.
        declared_patients: the site's public lower bound of its cohort size.
        epsilon_of_plan: epsilon of all the plan's steps at the policy's delta.

    Raises:
        PlanError: the plan expects more patients a step than the site declares.
        PrivacyError: PF307, a whole run would cost more than the policy's largest epsilon.
    """
    plan.sampling_rate(declared_patients)
    # Written so that a NaN, which compares false with everything, refuses.
    if not epsilon_of_plan <= policy.max_epsilon:
        raise PrivacyError(
            ErrorCode.POLICY_FORBIDS,
            "a whole run of this plan would cost a patient more than this site's policy allows",
            where="policy.toml, key max_epsilon",
            value=f"{epsilon_of_plan:.4g} > {policy.max_epsilon:g} at delta {policy.delta:g}",
            remedy="ask the operator for more noise, fewer rounds or fewer patients a step; or raise max_epsilon",
        )
