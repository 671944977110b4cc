"""The plan: one frozen, validated value with everything that shapes training or privacy.

An operator writes a plan as TOML. `load_plan` turns it into a `Plan`; `Plan.canonical_bytes` and `Plan.digest` name it for good. A site
approves a plan by its digest and trains for no other. Nothing that shapes training or privacy lives outside the plan, but for two public
facts of each site: its declared lower bound of patients, and whether it replies at time slots (both are stated in the records).
"""

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from pathfed_common import digest
from pathfed_common.cohort_rules import MAX_WEIGHTS, CohortExclude, CohortInclude, TileWeight, contradiction, normal_value
from pathfed_common.encoder.spec import preset
from pathfed_common.errors import ErrorCode, PlanError
from pathfed_common.ids import site_name
from pathfed_common.privacy.mechanism import MOST_NOISE, PatientMechanism
from pathfed_common.validation import Fault, first_finding

Name = Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _one_zero(cls, value: object) -> object:
        """-0.0 equals 0.0 but is spelled otherwise, and equal plans have equal bytes."""
        return 0.0 if isinstance(value, float) and value == 0 else value


class AdaptersPlan(_Section):
    """Adapters of low rank beside an encoder that keeps its weights (LoRA, Hu et al. 2021): they and the objective's head are trained."""

    #: Rank of the matrices beside each linear layer of attention and MLP; 0: no adapters, the encoder itself is trained.
    rank: Annotated[int, Field(ge=0, le=256)] = 0
    #: What their product is multiplied by where it is added: W + scale * B A.
    scale: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0


class EncoderPlan(_Section):
    """Which encoder is trained, and from what."""

    #: Shape of the encoder; which published encoders have which is in the operators' guide.
    preset: Literal[
        "vit_tiny_patch16_224",
        "vit_small_patch16_224",
        "vit_base_patch16_224",
        "vit_large_patch16_224",
        "vit_huge_patch14_reg4_224",
        "vit_giant_patch14_reg8_depth24_224",
        "vit_giant_patch14_reg4_224",
        "vit_giant_patch16_224",
        "vit_gigantic_patch14_224",
    ] = "vit_tiny_patch16_224"
    #: Public seed of what starts with random weights: the objective's head, and the encoder unless `init_from` is given.
    init_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    #: Digest of the imported checkpoint (`pathfed-server encoder import`) that the encoder starts from; empty: from random weights.
    init_from: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    #: The patch embedding, the tokens, the positions and the first so many blocks keep their weights; 0: all are trained. What keeps its
    #: weights carries no noise, and is not sent. With adapters: the blocks without one.
    freeze_blocks: Annotated[int, Field(ge=0, le=100)] = 0
    #: Adapters; a table of its own, described below.
    adapters: AdaptersPlan = AdaptersPlan()

    @property
    def part(self) -> str:
        """What of the encoder is trained, and so travels, in words for people."""
        blocks = "block" if self.freeze_blocks == 1 else f"{self.freeze_blocks} blocks"
        if self.adapters.rank:
            where = f", none in the first {blocks}" if self.freeze_blocks else ""
            return f"adapters of rank {self.adapters.rank} alone{where}; the encoder's own weights neither change nor travel"
        if self.freeze_blocks:
            return f"all but the patch embedding and the first {blocks}, which neither change nor travel"
        return "all of it"


@dataclass(frozen=True, kw_only=True)
class TeacherSchedule:
    """How an objective's teacher follows the state after each round.

    Attributes:
        momentum: of the first round.
        schedule: "constant", or "cosine": rising to 1 in the last round.
    """

    momentum: float
    schedule: Literal["constant", "cosine"]


class _Objective(_Section):
    def settings(self) -> dict[str, Any]:
        """What shapes the model, by the names that its file in `pathfed_common.objectives` gives it."""
        return self.model_dump(exclude={"name"})

    def check(self, *, tile_px: int, patch_px: int) -> None:
        """Raise ValueError where the settings do not fit each other, or the tiles and patches, sides in pixels."""
        raise NotImplementedError

    @property
    def summary(self) -> str:
        """Its main settings in a few words, for people."""
        raise NotImplementedError

    @property
    def teacher(self) -> TeacherSchedule | None:
        """How the teacher moves, or None without one."""
        return None


class MaePlan(_Objective):
    """Masked autoencoding (He et al. 2022). It is separable: a tile's loss depends on that tile alone."""

    #: Masked autoencoding.
    name: Literal["mae"] = "mae"
    #: Share of a tile's patches that the encoder does not see.
    mask_ratio: Annotated[float, Field(ge=0.1, le=0.95)] = 0.75
    #: Width of the small decoder that predicts the hidden patches. It is trained with the encoder but is no part of it.
    decoder_dim: Annotated[int, Field(ge=32, le=2048, multiple_of=32)] = 128
    #: Transformer blocks of the decoder.
    decoder_depth: Annotated[int, Field(ge=1, le=16)] = 2
    #: Attention heads of the decoder.
    decoder_heads: Annotated[int, Field(ge=1, le=64)] = 4
    #: Normalise each patch's target pixels by their own mean and variance, as the paper does.
    normalise_target: bool = True

    def check(self, *, tile_px: int, patch_px: int) -> None:
        """See `_Objective.check`."""
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"objective.decoder_dim must be a multiple of objective.decoder_heads, got {self.decoder_dim} and {self.decoder_heads}"
            )
        patches = (tile_px // patch_px) ** 2
        if not 1 <= patches - int(patches * self.mask_ratio) < patches:
            raise ValueError(f"objective.mask_ratio {self.mask_ratio} must hide some but not all of the {patches} patches of a tile")

    @property
    def summary(self) -> str:
        """See `_Objective.summary`."""
        return f"{self.mask_ratio:.0%} of patches hidden"


class DinoPlan(_Objective):
    """Self-distillation in the manner of DINOv2 (Oquab et al. 2023): crops, masked patches, and a teacher that follows the encoder.

    Whatever is compared or averaged lies within one patient's tiles. The released encoder is the teacher's. The loss is stated in units of
    log(prototypes): it begins between 1 and 2, which is what `privacy.loss_bound` has to leave room for.
    """

    #: Self-distillation.
    name: Literal["dino"] = "dino"
    #: Small crops of each tile, beside two as large as the tile.
    local_crops: Annotated[int, Field(ge=0, le=16)] = 8
    #: Side of a small crop, pixels; a multiple of the encoder's patch size and at most the tile's side.
    local_crop_px: Annotated[int, Field(ge=14, le=512)] = 112
    #: Least share of the tile's area that a large crop shows.
    global_scale_min: Annotated[float, Field(ge=0.05, le=1)] = 0.32
    #: Greatest share of the tile's area that a large crop shows.
    global_scale_max: Annotated[float, Field(ge=0.05, le=1)] = 1.0
    #: Least share of the tile's area that a small crop shows.
    local_scale_min: Annotated[float, Field(ge=0.01, le=1)] = 0.05
    #: Greatest share of the tile's area that a small crop shows.
    local_scale_max: Annotated[float, Field(ge=0.01, le=1)] = 0.32
    #: Greatest ratio of a crop's sides before it is made square; 1 keeps every shape in tissue as it is.
    crop_aspect: Annotated[float, Field(ge=1, le=2)] = 1.05
    #: Each crop's colour channels are scaled within 1 ± this and shifted within ± this; 0 for none.
    colour_jitter: Annotated[float, Field(ge=0, le=1)] = 0.2
    #: Least share of masked patches in one of the two large crops.
    mask_ratio_min: Annotated[float, Field(ge=0, le=0.9)] = 0.1
    #: Greatest share of masked patches.
    mask_ratio_max: Annotated[float, Field(ge=0.05, le=0.9)] = 0.5
    #: Width of the heads' hidden layers. The heads are trained with the encoder but are no part of it.
    head_dim: Annotated[int, Field(ge=16, le=8192)] = 1024
    #: Width of the vectors that are compared with prototypes.
    bottleneck_dim: Annotated[int, Field(ge=8, le=2048)] = 256
    #: Prototypes of each of the two heads. They carry noise like everything trained; the papers' 65,536 are for training without it.
    prototypes: Annotated[int, Field(ge=16, le=262_144)] = 4096
    #: Temperature of the student's softmax.
    student_temperature: Annotated[float, Field(ge=0.01, le=1)] = 0.1
    #: Temperature of the teacher's softmax: lower than the student's, so that its targets are sharper.
    teacher_temperature: Annotated[float, Field(ge=0.01, le=1)] = 0.07
    #: What keeps the teacher from giving one answer to everything: the mean taken off ("softmax"), or Sinkhorn-Knopp ("sinkhorn").
    centring: Literal["softmax", "sinkhorn"] = "sinkhorn"
    #: Weight of the masked patches' term (iBOT); the class tokens' term weighs 1.
    ibot_weight: Annotated[float, Field(gt=0, le=10)] = 1.0
    #: What keeps a patient's tiles apart: kernel density with a von Mises-Fisher kernel ("kde"), or nearest neighbours ("koleo").
    spread: Literal["kde", "koleo"] = "kde"
    #: Weight of that term.
    spread_weight: Annotated[float, Field(ge=0, le=10)] = 0.05
    #: Stochastic depth: share of tiles for which the last block is skipped; earlier blocks less.
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    #: Share of itself that the teacher keeps in a round (of the first round, with the cosine schedule).
    teacher_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    #: "constant", or "cosine": the share rises to 1 in the last round.
    teacher_schedule: Literal["constant", "cosine"] = "cosine"

    def settings(self) -> dict[str, Any]:
        """See `_Objective.settings`; the least and the greatest of a range come as one pair."""
        plain = self.model_dump(exclude={"name", "teacher_momentum", "teacher_schedule"})
        pairs = {name: (plain.pop(f"{name}_min"), plain.pop(f"{name}_max")) for name in _RANGES}
        return plain | pairs

    def check(self, *, tile_px: int, patch_px: int) -> None:
        """See `_Objective.check`."""
        for name in _RANGES:
            least, most = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if least > most:
                raise ValueError(f"objective.{name}_min must be at most objective.{name}_max, got {least} and {most}")
        if self.local_crop_px % patch_px:
            raise ValueError(f"objective.local_crop_px must be a multiple of the encoder's patch size {patch_px}, got {self.local_crop_px}")
        if self.local_crop_px > tile_px:
            raise ValueError(f"objective.local_crop_px must be at most cohort.tile_px, got {self.local_crop_px} and {tile_px}")
        if self.teacher_temperature > self.student_temperature:
            raise ValueError(
                "objective.teacher_temperature must be at most objective.student_temperature, "
                f"got {self.teacher_temperature} and {self.student_temperature}"
            )
        patches = (tile_px // patch_px) ** 2
        if not 1 <= int(patches * self.mask_ratio_max) < patches:
            raise ValueError(
                f"objective.mask_ratio_max {self.mask_ratio_max} must mask some but not all of the {patches} patches of a tile"
            )

    @property
    def summary(self) -> str:
        """See `_Objective.summary`."""
        return f"2 large and {self.local_crops} small crops a tile, {self.prototypes} prototypes, {self.centring}, {self.spread}"

    @property
    def teacher(self) -> TeacherSchedule:
        """See `_Objective.teacher`."""
        return TeacherSchedule(momentum=self.teacher_momentum, schedule=self.teacher_schedule)


_RANGES = ("global_scale", "local_scale", "mask_ratio")


def _objective_name(value: object) -> str:
    """Which objective a table is of: its `name`, or the default's where it has none, or is no table and refused as such."""
    name = value.get("name", "mae") if isinstance(value, dict) else getattr(value, "name", "mae")
    return name if isinstance(name, str) else repr(name)


#: The self-supervised objective; its `name` says which keys there are.
ObjectivePlan = Annotated[
    Annotated[MaePlan, Tag("mae")] | Annotated[DinoPlan, Tag("dino")],
    Discriminator(_objective_name),
]


class QualityPlan(_Section):
    """Which parts of a slide are left out though they show tissue, and when a whole slide is.

    The defaults stand where sharp, unmarked tissue of real slides is kept; the measurements are in the modules of `pathfed_client.slides`.
    """

    #: Leave out pen marks.
    pen_marks: bool = True
    #: Leave out folds.
    folds: bool = True
    #: A fold is at least this many times as dense (optical density) as the slide's median tissue.
    fold_darkness: Annotated[float, Field(ge=1.2, le=10)] = 2.5
    #: A tile is left out when a larger share of its area is pen mark or fold.
    artefact_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    #: A tile is in focus from this sharpness on: mean step between pixels over mean step between blocks of 4 x 4. 0 takes everything.
    min_sharpness: Annotated[float, Field(ge=0, le=1)] = 0.36
    #: A slide is refused when a smaller share of its sampled tiles is in focus. 0 refuses none.
    sharp_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    #: A tile is left out when a larger share of its blocks of 16 x 16 pixels is of one colour, as undecodable regions are.
    flat_share: Annotated[float, Field(ge=0, le=1)] = 0.6


class CohortPlan(_Section):
    """Which tiles of which slides a site contributes."""

    #: Resolution at which tiles are read, um/px.
    mpp: Annotated[float, Field(ge=0.1, le=8)] = 0.5
    #: A slide level within this share of `mpp` needs no upsampling; a slide coarser than `mpp * (1 + tolerance)` is refused.
    mpp_tolerance: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    #: Side of a square tile at `mpp`, pixels.
    tile_px: Annotated[int, Field(ge=32, le=1024)] = 224
    #: Play of a tile, pixels at `mpp`: it is cut, at a place drawn anew each time, from a square (source) larger by this. Where a slide is
    #: stored in tiles of its own, sources are the nearest whole number or whole part of those. 0: always cut at the same places.
    play_px: Annotated[int, Field(ge=0, le=1024)] = 32
    #: Tiles drawn for a drawn patient (k), across all slides of that patient.
    tiles_per_patient: Annotated[int, Field(ge=1, le=1024)] = 4
    #: Smallest share of a tile's area that must be tissue.
    tissue_share: Annotated[float, Field(ge=0, le=1)] = 0.4
    #: Pen marks, folds and focus.
    quality: QualityPlan = QualityPlan()
    #: Slides that count, by attributes; a table of its own, described below.
    include: CohortInclude = CohortInclude()
    #: Slides that are out, by attributes; a table of its own, described below.
    exclude: CohortExclude = CohortExclude()
    #: Public weights with which tiles are drawn within a patient; tables of their own, described below.
    tile_weights: Annotated[tuple[TileWeight, ...], Field(strict=False, max_length=MAX_WEIGHTS)] = ()

    @model_validator(mode="after")
    def _rules_agree(self) -> Self:
        both = contradiction(self.include, self.exclude)
        if both is not None:
            raise ValueError(f"cohort.include and cohort.exclude both name {both}")
        named = [(rule.attribute, normal_value(rule.value)) for rule in self.tile_weights]
        twice = next((name for name in named if named.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"cohort.tile_weights gives {twice[0]} {twice[1]!r} two weights")
        return self

    @property
    def source_px(self) -> int:
        """Side of a source, pixels at `mpp`, where nothing speaks for another."""
        return self.tile_px + self.play_px


class AugmentationPlan(_Section):
    """How a tile is changed before training sees it, by draws of its own. Where it is cut from its source is `cohort.source_px`'s."""

    #: Mirror left-right and top-bottom, each with probability 1/2.
    flips: bool = True
    #: Turn by 0, 90, 180 or 270 degrees.
    quarter_turns: bool = True
    #: Move haematoxylin, eosin and residual density each by a factor within 1 ± this and an offset within ± this; 0 for none.
    hed_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class PrivacyPlan(_Section):
    """What leaves a site is differentially private for each patient under add-or-remove of one patient."""

    #: Whose presence is protected: one patient, with all slides and tiles.
    unit: Literal["patient"] = "patient"
    #: Expected patients in one step at one site (B): the public denominator.
    expected_patients: Annotated[float, Field(ge=1, le=1e7)]
    #: Noise standard deviation in units of the clip norm (sigma). With more than 64 the whole numbers that the sum is kept in could wrap
    #: around: that costs no privacy, but ruins the update. Less noise with a larger B or fewer steps does as well.
    noise_multiplier: Annotated[float, Field(gt=0, le=MOST_NOISE)]
    #: Bound on the L2 norm of one patient's whole contribution (C).
    clip_norm: Annotated[float, Field(gt=0, le=1e6)]
    #: Share a of the clip norm that loss and patient count ride in; the gradient keeps sqrt(1 - a^2).
    figure_share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    #: Losses are clamped to [0, loss_bound] before release.
    loss_bound: Positive = 2.0
    #: The delta at which the plan's limit is stated.
    delta: Annotated[float, Field(gt=0, le=1e-3)] = 1e-6
    #: A site stops when this plan's own releases would cost a patient more than this epsilon.
    epsilon_limit: Positive


class ComputePlan(_Section):
    """How sites compute an update. No choice here changes what is private; each changes the last bits, and so belongs to the plan."""

    #: "serial": one patient's tiles at a time. "book_keeping": several patients in one pass, for few tiles a patient. "auto": the cheaper.
    engine: Literal["auto", "serial", "book_keeping"] = "auto"
    #: Number type of the forward and backward pass; weights, norms, sums and noise are float32 or finer whatever it is.
    precision: Literal["float32", "bfloat16"] = "float32"
    #: Compute a block's activations again in the backward pass instead of keeping them.
    activation_checkpointing: bool = False
    #: Compile the forward and backward pass (torch.compile); wants a C++ compiler at the site on CPU.
    compile: bool = False


class RoundsPlan(_Section):
    """How many rounds, and when one counts."""

    #: Rounds of the run.
    count: Annotated[int, Field(ge=1, le=1_000_000)]
    #: Private steps a site takes in one round. One: the noised sum is the update. Several: the site steps locally, each step charged.
    steps: Annotated[int, Field(ge=1, le=1000)] = 1
    #: Step size of a site's own SGD when `steps` is above one.
    local_learning_rate: Positive = 0.1
    #: A round is closed this long after its offer, seconds.
    deadline_s: Annotated[float, Field(ge=5, le=7 * 86400)] = 600
    #: Fewest admitted updates with which a round counts.
    quorum: Annotated[int, Field(ge=1, le=10_000)] = 2
    #: Most sites asked in a round; they take turns by a public rule (`pathfed_common.turns`). 0: all that may take part.
    ask_at_most: Annotated[int, Field(ge=0, le=10_000)] = 0
    #: A round is closed once this many updates are admitted. 0: it waits for every site that was asked, or for the deadline.
    enough: Annotated[int, Field(ge=0, le=10_000)] = 0
    #: What becomes of an update that comes after the deadline. `same_base`: it is kept, and counts where the round fails and is offered
    #: again on the same base state; it has been charged for already.
    late: Literal["discard", "same_base"] = "discard"
    #: Replies leave at whole multiples of this time after the offer, seconds, so that their time tells nothing of the patients drawn.
    reply_slot_s: Annotated[float, Field(ge=0.5, le=86400)] = 5.0

    @model_validator(mode="after")
    def _round_can_count(self) -> Self:
        for key, most in (("ask_at_most", self.ask_at_most), ("enough", self.enough)):
            if most and most < self.quorum:
                raise ValueError(f"rounds.{key} must be 0 or at least rounds.quorum, got {most} and {self.quorum}")
        if self.ask_at_most and self.enough > self.ask_at_most:
            raise ValueError(f"rounds.enough must be at most rounds.ask_at_most, got {self.enough} and {self.ask_at_most}")
        return self


class ServerOptimiserPlan(_Section):
    """How the server turns the averaged update into the next encoder."""

    #: Momentum SGD, SGD with Nesterov's momentum (the outer step of DiLoCo), or Adam with decoupled weight decay.
    name: Literal["sgd", "nesterov", "adamw"] = "adamw"
    #: Step size of the server.
    learning_rate: Positive = 1e-3
    #: Decay of the running mean of updates (beta1 of AdamW).
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    #: Decay of AdamW's running mean of squares; SGD has none.
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    #: Added to AdamW's root mean square, so that it is never divided by zero.
    epsilon: Positive = 1e-8
    #: Weight decay a round: decoupled in AdamW, added to the update in SGD.
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    #: Above 0, a running average of the encoder is released in place of the last round's; it keeps this share of itself in a round. It
    #: begins as the first encoder, whose share in it is this to the power of the rounds.
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.name == "nesterov" and self.momentum == 0:
            raise ValueError('server_optimiser.momentum must be above 0 for "nesterov", got 0')
        return self


class AggregationPlan(_Section):
    """How the updates of a round become one. The rules work on released numbers, so none costs privacy."""

    #: "mean": weighted by `site_weights`. "trimmed_mean": the same, of each number without its `trim` largest and smallest values among
    #: the sites. "norm_weighted": a site's weight is multiplied by min(1, median / norm) of the norms of the round's updates.
    rule: Literal["mean", "trimmed_mean", "norm_weighted"] = "mean"
    #: How many values "trimmed_mean" leaves out at each end, and how many hostile sites it bears; `rounds.quorum` must be above twice this.
    trim: Annotated[int, Field(ge=1, le=1000)] = 1


class WirePlan(_Section):
    """How an update's numbers travel. Rounding happens after the noise, so it costs no privacy."""

    #: Number type of a sent update; "int8": blocks of 256 numbers with a scale each, rounded up or down by a coin, without bias.
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"


class Plan(_Section):
    """A whole plan. Equal plans have equal canonical bytes and digests."""

    #: Version of the plan format.
    version: Literal[1] = 1
    #: What people call the plan; its digest is what names it for good.
    name: Name
    encoder: EncoderPlan = EncoderPlan()
    objective: ObjectivePlan = MaePlan()
    cohort: CohortPlan = CohortPlan()
    augmentation: AugmentationPlan = AugmentationPlan()
    privacy: PrivacyPlan
    compute: ComputePlan = ComputePlan()
    rounds: RoundsPlan
    aggregation: AggregationPlan = AggregationPlan()
    server_optimiser: ServerOptimiserPlan = ServerOptimiserPlan()
    wire: WirePlan = WirePlan()
    #: Public weight of each site in the average; sites not named here weigh 1.
    site_weights: dict[str, Positive] = {}

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        spec = preset(self.encoder.preset)
        patch_px = spec.patch_size
        if self.encoder.freeze_blocks >= spec.depth:
            raise ValueError(
                f"encoder.freeze_blocks must leave one of the encoder's {spec.depth} blocks to train, got {self.encoder.freeze_blocks}"
            )
        if self.encoder.adapters.rank >= spec.embed_dim:
            raise ValueError(f"encoder.adapters.rank must be below the encoder's width {spec.embed_dim}, got {self.encoder.adapters.rank}")
        if self.cohort.tile_px % patch_px:
            raise ValueError(f"cohort.tile_px must be a multiple of the encoder's patch size {patch_px}, got {self.cohort.tile_px}")
        self.objective.check(tile_px=self.cohort.tile_px, patch_px=patch_px)
        if self.rounds.reply_slot_s > self.rounds.deadline_s:
            raise ValueError(
                f"rounds.reply_slot_s must be at most rounds.deadline_s, got {self.rounds.reply_slot_s} and {self.rounds.deadline_s}"
            )
        if self.aggregation.rule == "trimmed_mean" and self.rounds.quorum <= 2 * self.aggregation.trim:
            raise ValueError(
                f"rounds.quorum must be above twice aggregation.trim, or nothing may be left, got {self.rounds.quorum} and "
                f"{self.aggregation.trim}"
            )
        if self.server_optimiser.ema and self.objective.teacher is not None:
            raise ValueError(
                "server_optimiser.ema must be 0 where the objective has a teacher, which is a running average and is released, got "
                f"{self.server_optimiser.ema}"
            )
        for name in self.site_weights:
            site_name(name)
        return self

    def canonical_bytes(self) -> bytes:
        """Canonical JSON of the whole plan, defaults written out."""
        return digest.canonical(self.model_dump(mode="json"))

    @property
    def digest(self) -> digest.Digest:
        """Digest of the canonical bytes: the plan's name for good."""
        return digest.of_bytes(self.canonical_bytes())

    @property
    def total_steps(self) -> int:
        """Private steps of a site that takes part in every round."""
        return self.rounds.count * self.rounds.steps

    def sampling_rate(self, declared_patients: int) -> float:
        """q = B / N_public for a site that declares at least `declared_patients` patients.

        Raises:
            PlanError: B is above the declared number; the site cannot take part.
        """
        rate = self.privacy.expected_patients / declared_patients if declared_patients > 0 else math.inf
        if rate > 1:
            raise PlanError(
                ErrorCode.PLAN_IMPOSSIBLE,
                "the plan expects more patients a step than the site declares",
                where="privacy.expected_patients",
                value=f"{self.privacy.expected_patients:g} > {declared_patients}",
                remedy="lower privacy.expected_patients, or leave this site out",
            )
        return rate

    def mechanism(self, declared_patients: int) -> PatientMechanism:
        """The private step's public constants at a site that declares at least `declared_patients` patients.

        Raises:
            PlanError: PF105, see `sampling_rate`.
        """
        return PatientMechanism(
            sampling_rate=self.sampling_rate(declared_patients),
            noise_multiplier=self.privacy.noise_multiplier,
            clip_norm=self.privacy.clip_norm,
            expected_patients=self.privacy.expected_patients,
            figure_share=self.privacy.figure_share,
            loss_bound=self.privacy.loss_bound,
        )


def load_plan(text: str, *, where: PurePath | str) -> Plan:
    """Read a plan from TOML text; `where` names its source in errors.

    Raises:
        PlanError: not TOML, an unknown key, a wrong type, a value out of bounds, or an impossible combination.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(ErrorCode.PLAN_UNREADABLE, f"not TOML: {error}", where=where) from None
    return _validated(raw, where=where)


def plan_from_bytes(data: bytes, *, where: str) -> Plan:
    """Read a plan back from its canonical bytes.

    Raises:
        PlanError: the bytes are not the canonical form of a valid plan.
    """
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise PlanError(ErrorCode.PLAN_UNREADABLE, f"not JSON: {error}", where=where) from None
    plan = _validated(raw, where=where)
    if plan.canonical_bytes() != data:
        raise PlanError(ErrorCode.PLAN_NOT_AUTHENTIC, "the plan's bytes are not in canonical form", where=where)
    return plan


def _validated(raw: object, *, where: PurePath | str) -> Plan:
    try:
        return Plan.model_validate(raw)
    except ValidationError as error:
        raise _plan_error(error, where) from None


_CODES = {
    Fault.UNKNOWN_KEY: ErrorCode.PLAN_UNKNOWN_KEY,
    Fault.WRONG_TYPE: ErrorCode.PLAN_WRONG_TYPE,
    Fault.OUT_OF_BOUNDS: ErrorCode.PLAN_OUT_OF_BOUNDS,
    Fault.IMPOSSIBLE: ErrorCode.PLAN_IMPOSSIBLE,
}


def _plan_error(error: ValidationError, where: PurePath | str) -> PlanError:
    finding = first_finding(error)
    place = f"{where}, key {finding.key}" if finding.key else str(where)
    return PlanError(_CODES[finding.fault], finding.sentence, where=place, value=finding.value)
