"""Self-distillation in the manner of DINOv2 (Oquab et al. 2023, arXiv:2304.07193).

A student learns to say of a crop of a tile what its teacher, the mean of past students, says of another crop of it (DINO, Caron et al.
2021, arXiv:2104.14294), and of masked patches what the teacher says seeing them (iBOT, Zhou et al. 2022, arXiv:2111.07832); a third term
keeps the tiles' features apart (`spread`).

Guarantees:
    - **A patient's loss depends on that patient's tiles, what was drawn for them, and the weights alone.** Centring and Sinkhorn
      (`teacher_targets`) and the spread term (`spread`) take their statistics over the tiles of one patient, and nothing is remembered from
      one patient to the next: there is no running centre.
    - **The teacher follows private weights only.** It is never trained and does not change at a site, not between local steps either: the
      server step moves it after each round, from the new state, which is after the noise.
    - Shapes depend on the settings and the number of tiles; nothing depends on a number in a tensor.

What differs from the papers, and why:

    | here | in the papers | why |
    | --- | --- | --- |
    | statistics over one patient's tiles | over a batch, centres over past batches | a patient's clipped gradient must be its own |
    | a patient with one tile: class tokens are not centred, nothing is spread | - | nothing is there to compare with |
    | prototypes are a plain linear layer on unit vectors, rows of length 1 at first | weight-normalised | engines have a rule for it |
    | of the two global crops, alike by law, always the first is masked | a random half of them | fixed shapes |
    | the loss is in units of log(prototypes): about 1 at first | nats | one public bound on the loss suits every number of prototypes |
    | temperatures are constant | the teacher's warms up | few rounds |

DINOv3 (Siméoni et al. 2025, arXiv:2508.10104) does without weight normalisation too.

Every layer's leading axis is the tiles, or crops of tiles, tile by tile.

Legend of shape suffixes: N tiles, C channels, H and W pixels, V views (crops of a tile, the two global ones first), L patches,
M places that may be masked, D width, K prototypes.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pathfed_common.encoder.spec import EncoderSpec, Shape
from pathfed_common.encoder.stochastic_depth import drop_path_factors
from pathfed_common.encoder.vit import VisionTransformer, initialise_layers, linear, take_tokens
from pathfed_common.objectives import crops, masking
from pathfed_common.objectives.across import ALONE, Across, fine
from pathfed_common.objectives.objective import Draws, ObjectiveModule, Uniforms
from pathfed_common.objectives.spread import SPREADS
from pathfed_common.objectives.teacher_targets import CENTRINGS, cross_entropy, targets

_GLOBAL = 2


@dataclass(frozen=True, kw_only=True)
class DinoSettings:
    """What shapes the objective.

    Attributes:
        local_crops: small crops of a tile, beside the two global ones.
        local_crop_px: their side, pixels; a multiple of the patch size. A global crop is as large as the tile.
        global_scale: least and greatest share of the tile's area in a global crop.
        local_scale: the same of a local crop.
        crop_aspect: greatest ratio of a box's sides before it is resized to a square.
        colour_jitter: each crop's channels are scaled within 1 ± this and shifted within ± this.
        mask_ratio: least and greatest share of the first global crop's patches that are masked.
        head_dim: width of the heads' hidden layers.
        bottleneck_dim: width of the unit vectors that are compared with prototypes.
        prototypes: outputs of each head.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's.
        centring: "softmax" or "sinkhorn", see `teacher_targets`.
        ibot_weight: of the masked patches' term; the class tokens' term weighs 1.
        spread: "kde" or "koleo", see `spread`.
        spread_weight: of that term.
        drop_path: stochastic depth of the student: the last block's rate.
    """

    local_crops: int
    local_crop_px: int
    global_scale: tuple[float, float]
    local_scale: tuple[float, float]
    crop_aspect: float
    colour_jitter: float
    mask_ratio: tuple[float, float]
    head_dim: int
    bottleneck_dim: int
    prototypes: int
    student_temperature: float
    teacher_temperature: float
    centring: str
    ibot_weight: float
    spread: str
    spread_weight: float
    drop_path: float


class ProjectionHead(nn.Module):
    """Three linear layers with GELU between, onto the unit sphere, then the likeness to each prototype."""

    def __init__(self, width: int, settings: DinoSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.fc1 = linear(width, settings.head_dim)
        self.fc2 = linear(settings.head_dim, settings.head_dim)
        self.fc3 = linear(settings.head_dim, settings.bottleneck_dim)
        self.prototypes = linear(settings.bottleneck_dim, settings.prototypes, bias=False)
        initialise_layers(self, generator)
        with torch.no_grad():
            self.prototypes.weight.normal_(generator=generator)
            self.prototypes.weight.copy_(functional.normalize(self.prototypes.weight, dim=-1))

    def forward(self, tokens_D: Tensor) -> Tensor:
        """Logits (..., K) of tokens (..., D), before any temperature."""
        hidden = functional.gelu(self.fc2(functional.gelu(self.fc1(tokens_D))))
        logits: Tensor = self.prototypes(functional.normalize(fine(self.fc3(hidden)), dim=-1))
        return logits


class MaskToken(nn.Module):
    """What the student sees in place of a masked patch. An engine may give the token once for each image, (N, 1, D)."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        with torch.no_grad():
            self.token.normal_(std=0.02, generator=generator)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """The token for each of these images, (N, 1, D)."""
        return self.token.expand(len(images_NCHW), 1, -1)


class Heads(nn.Module):
    """The heads of the class token (dino) and of the patches (ibot)."""

    def __init__(self, dino: ProjectionHead, ibot: ProjectionHead) -> None:
        super().__init__()
        self.dino, self.ibot = dino, ibot


class StudentHeads(Heads):
    """The student's heads, and its mask token."""

    def __init__(self, width: int, settings: DinoSettings, generator: torch.Generator) -> None:
        super().__init__(ProjectionHead(width, settings, generator), ProjectionHead(width, settings, generator))
        self.mask = MaskToken(width, generator)


class Teacher(nn.Module):
    """The mean of past students; every tensor is named as the student's that it follows. It sees every patch: no mask token."""

    def __init__(self, encoder: VisionTransformer, heads: Heads) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.head = Heads(copy.deepcopy(heads.dino), copy.deepcopy(heads.ibot))
        self.requires_grad_(False)


class SelfDistillation(ObjectiveModule):
    """Student and teacher. State dict: ``encoder.<timm name>``, ``head.<name>`` and ``teacher.<either>``, see `state_shapes`."""

    #: The tiles of a patient are compared, so they are taken together.
    separable: ClassVar[bool] = False

    def __init__(self, spec: EncoderSpec, settings: DinoSettings, *, seed: int = 0) -> None:
        """Build with first weights drawn from a generator of its own; the teacher begins as a copy of the student.

        Raises:
            ValueError: an encoder without a class token, crops that the patches do not divide, or a mask of no or all patches.
        """
        super().__init__()
        if not spec.class_token:
            raise ValueError("self-distillation needs an encoder with a class token")
        if settings.local_crop_px < spec.patch_size or settings.local_crop_px % spec.patch_size:
            raise ValueError(f"local_crop_px must be a multiple of the patch size {spec.patch_size}, got {settings.local_crop_px}")
        self.spec, self.settings = spec, settings
        self.least_masked, self.most_masked = masking.counts(spec.patches, settings.mask_ratio)
        #: Where the patient's other tiles are; engines that spread a patient over processes set it.
        self.across: Across = ALONE
        self._centring, self._spread = CENTRINGS[settings.centring], SPREADS[settings.spread]
        generator = torch.Generator().manual_seed(seed)
        self.encoder = VisionTransformer(spec, generator=generator)
        self.head = StudentHeads(spec.embed_dim, settings, generator)
        self.teacher = Teacher(self.encoder, self.head)

    def draw(self, tiles: int, random: Uniforms) -> Draws:
        """Boxes and colours of every crop, masks, and dropped branches; float32 and int64 tensors on the CPU, tiles first.

        "boxes" (N, V, 4) as `crops.boxes`; "colours" (N, V, 2, 3) as `crops.colours`, where colours are jittered; "places" (N, M) and
        "masked" (N,) as `masking.draw`; "drop" (N, V, 2 * depth), where branches are dropped.
        """
        s, views = self.settings, _GLOBAL + self.settings.local_crops
        counts = ((_GLOBAL, s.global_scale), (s.local_crops, s.local_scale))
        parts = [
            crops.boxes(_numbers(random, tiles * count * crops.BOX_NUMBERS), scale=scale, aspect=s.crop_aspect).reshape(tiles, count, 4)
            for count, scale in counts
        ]
        drawn = {"boxes": torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))}
        if s.colour_jitter:
            colours = crops.colours(_numbers(random, tiles * views * crops.COLOUR_NUMBERS), jitter=s.colour_jitter)
            drawn["colours"] = torch.from_numpy(colours.reshape(tiles, views, 2, 3).astype(np.float32))
        numbers = _numbers(random, tiles * masking.numbers(self.spec.grid))
        places, masked = masking.draw(numbers, grid=self.spec.grid, least=self.least_masked, most=self.most_masked)
        drawn |= {"places": torch.from_numpy(places), "masked": torch.from_numpy(masked)}
        if s.drop_path:
            branches = 2 * self.spec.depth
            factors = drop_path_factors(_numbers(random, tiles * views * branches), tiles * views, self.spec.depth, s.drop_path)
            drawn["drop"] = factors.view(tiles, views, branches)
        return drawn

    def loss(self, tiles_NCHW: Tensor, draws: Draws) -> Tensor:
        """The patient's loss, in units of log(prototypes); of a part of the patient's tiles (`across`), its share of it.

        Raises:
            ValueError: no tile, in no part.
        """
        return self.patient_losses(tiles_NCHW, draws, (len(tiles_NCHW),))[0]

    def patient_losses(self, tiles_NCHW: Tensor, draws: Draws, counts: Sequence[int]) -> Tensor:
        """Each patient's loss, (P,): one pass through the networks for all, then each patient's statistics over its own rows."""
        outputs = self._outputs(tiles_NCHW, {name: drawn.to(tiles_NCHW.device) for name, drawn in draws.items()})
        parts = [output.split(list(counts)) for output in outputs]
        # Products of statistics stay in float32 under autocast.
        with torch.autocast(tiles_NCHW.device.type, enabled=False):
            return torch.stack([self._patient_loss(_Outputs(*part)) for part in zip(*parts, strict=True)])

    def pictures(self, tiles_NCHW: Tensor, draws: Draws) -> Mapping[str, NDArray[np.uint8]]:
        """How like each patch of a tile is to the whole of it, in the teacher (white: most): nothing here can paint a tile."""
        grey: NDArray[np.uint8] = (self.likeness(tiles_NCHW)[:, 0] * 255).round().to(torch.uint8).cpu().numpy()
        return {"each patch's likeness to the tile as a whole": np.repeat(grey[..., None], 3, axis=-1)}

    @torch.no_grad()
    def likeness(self, tiles_NCHW: Tensor) -> Tensor:
        """Cosine of each patch token and the class token of the teacher, from the tile's least (0) to its greatest (1): (N, 1, H, W)."""
        tokens_NTD = functional.normalize(fine(self.teacher.encoder(tiles_NCHW)), dim=-1)
        cosine_NL = (tokens_NTD[:, self.spec.prefix_tokens :] * tokens_NTD[:, :1]).sum(-1)
        least, most = cosine_NL.amin(1, keepdim=True), cosine_NL.amax(1, keepdim=True)
        shown = ((cosine_NL - least) / (most - least).clamp(min=1e-12)).view(-1, 1, self.spec.grid, self.spec.grid)
        return shown.repeat_interleave(self.spec.patch_size, 2).repeat_interleave(self.spec.patch_size, 3)

    def _outputs(self, tiles_NCHW: Tensor, draws: Draws) -> "_Outputs":
        global_NVCHW, local_NVCHW = self._crops(tiles_NCHW, draws)
        places_NM, drop_NVB = draws["places"], draws.get("drop")
        hidden_NM = torch.arange(self.most_masked, device=places_NM.device) < draws["masked"][:, None]
        masked_NL = torch.zeros(len(tiles_NCHW), self.spec.patches, dtype=torch.bool, device=places_NM.device)
        masked_NL = masked_NL.scatter(1, places_NM, hidden_NM)
        masked_BL = torch.stack([masked_NL, torch.zeros_like(masked_NL)], dim=1).flatten(0, 1)
        global_BCHW, prefix = global_NVCHW.flatten(0, 1), self.spec.prefix_tokens
        seen_NVTD = self.encoder(
            global_BCHW,
            masked_NL=masked_BL,
            mask_token_D=self.head.mask(global_BCHW),
            drop_ND=None if drop_NVB is None else drop_NVB[:, :_GLOBAL].flatten(0, 1),
        ).unflatten(0, (-1, _GLOBAL))
        classes_NVD = [seen_NVTD[:, :, 0]]
        if self.settings.local_crops:
            drop = None if drop_NVB is None else drop_NVB[:, _GLOBAL:].flatten(0, 1)
            local_BTD = self.encoder(local_NVCHW.flatten(0, 1), drop_ND=drop)
            classes_NVD.append(local_BTD[:, 0].unflatten(0, (-1, self.settings.local_crops)))
        with torch.no_grad():
            whole_NVTD = self.teacher.encoder(global_BCHW).unflatten(0, (-1, _GLOBAL))
            teacher_class_NVK = self.teacher.head.dino(whole_NVTD[:, :, 0])
            teacher_patch_NMK = self.teacher.head.ibot(take_tokens(whole_NVTD[:, 0, prefix:], places_NM))
        return _Outputs(
            class_NVK=fine(self.head.dino(torch.cat(classes_NVD, dim=1))),
            patch_NMK=fine(self.head.ibot(take_tokens(seen_NVTD[:, 0, prefix:], places_NM))),
            features_NVD=fine(seen_NVTD[:, :, 0]),
            teacher_class_NVK=fine(teacher_class_NVK),
            teacher_patch_NMK=fine(teacher_patch_NMK),
            # Masked places of a tile weigh 1 together.
            weights_NM=hidden_NM / draws["masked"][:, None],
        )

    def _crops(self, tiles_NCHW: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        boxes_NV4, colours = draws["boxes"], draws.get("colours")
        sides = ((slice(None, _GLOBAL), self.spec.img_size), (slice(_GLOBAL, None), self.settings.local_crop_px))
        cut = [crops.cut(tiles_NCHW, boxes_NV4[:, part], side) for part, side in sides]
        if colours is not None:
            cut = [crops.recolour(made, colours[:, part]) for made, (part, _) in zip(cut, sides, strict=True)]
        return cut[0], cut[1]

    def _patient_loss(self, out: "_Outputs") -> Tensor:
        """One patient's loss from its rows alone, or this part's share of it."""
        s, across = self.settings, self.across
        _, tiles = across.place(len(out.class_NVK))
        if tiles < 1:
            raise ValueError("a loss needs at least one tile")
        taught_NVK = targets(self._centring, out.teacher_class_NVK, s.teacher_temperature, across, alone=tiles == 1)
        dino = _class_loss(taught_NVK, out.class_NVK, s.student_temperature) / tiles
        taught_NMK = targets(self._centring, out.teacher_patch_NMK, s.teacher_temperature, across)
        ibot = (cross_entropy(taught_NMK, out.patch_NMK, s.student_temperature) * out.weights_NM).sum() / tiles
        spread = (self._spread(out.features_NVD[:, 0], across) + self._spread(out.features_NVD[:, 1], across)) / _GLOBAL
        total = dino + s.ibot_weight * ibot + s.spread_weight * spread
        return total / ((1 + s.ibot_weight) * math.log(s.prototypes))


class _Outputs(NamedTuple):
    """What the networks say of some tiles, each tensor's first axis the tiles'; float32 or finer."""

    class_NVK: Tensor  # noqa: N815
    patch_NMK: Tensor  # noqa: N815
    features_NVD: Tensor  # noqa: N815
    teacher_class_NVK: Tensor  # noqa: N815
    teacher_patch_NMK: Tensor  # noqa: N815
    weights_NM: Tensor  # noqa: N815


def _class_loss(taught_NVK: Tensor, student_NVK: Tensor, temperature: float) -> Tensor:
    """Sum over the tiles of the mean cross-entropy over all pairs of a global crop of the teacher's and another crop of the student's."""
    log_NVK = functional.log_softmax(student_NVK / temperature, dim=-1)
    pairs_NAV = -torch.einsum("nak,nvk->nav", taught_NVK, log_NVK)
    other_AV = 1 - torch.eye(_GLOBAL, log_NVK.shape[1], dtype=pairs_NAV.dtype, device=pairs_NAV.device)
    return (pairs_NAV * other_AV).sum() / (_GLOBAL * (log_NVK.shape[1] - 1))


def _numbers(random: Uniforms, count: int) -> NDArray[np.float64]:
    return np.asarray(random.uniforms(count), dtype=np.float64)


def state_shapes(spec: EncoderSpec, settings: DinoSettings) -> dict[str, Shape]:
    """Shape of every tensor of a `SelfDistillation`, by its name in the state dict, without building it; the teacher's are not trained."""
    encoder = {f"encoder.{name}": shape for name, shape in spec.shapes().items()}
    s = settings
    layers: dict[str, Shape] = {}
    for name, outputs, inputs in (
        ("fc1", s.head_dim, spec.embed_dim),
        ("fc2", s.head_dim, s.head_dim),
        ("fc3", s.bottleneck_dim, s.head_dim),
    ):
        layers |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    layers["prototypes.weight"] = (s.prototypes, s.bottleneck_dim)
    heads = {f"head.{head}.{name}": shape for head in ("dino", "ibot") for name, shape in layers.items()}
    followed = encoder | heads
    return followed | {"head.mask.token": (1, 1, spec.embed_dim)} | {f"teacher.{name}": shape for name, shape in followed.items()}
