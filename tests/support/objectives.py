"""Every objective in every form that treats patients' tiles differently, on a small encoder. A new objective gets a row in `FORMS`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.objectives.dino import DinoSettings, SelfDistillation
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.objectives.objective import Draws, ObjectiveModule

SIDE = 32
SPEC = EncoderSpec(name="tiny", img_size=SIDE, patch_size=8, embed_dim=24, depth=1, num_heads=3, reg_tokens=1)


class Source:
    """A random source with a seed of its own, which counts what it gives."""

    def __init__(self, *seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self.taken = 0

    def uniforms(self, n: int, /) -> NDArray[np.float64]:
        self.taken += n
        return self._generator.random(n)


def dino_settings(**changes: Any) -> DinoSettings:
    values: dict[str, Any] = {
        "local_crops": 2,
        "local_crop_px": 16,
        "global_scale": (0.5, 1.0),
        "local_scale": (0.1, 0.5),
        "crop_aspect": 4 / 3,
        "colour_jitter": 0.2,
        "mask_ratio": (0.1, 0.5),
        "head_dim": 32,
        "bottleneck_dim": 16,
        "prototypes": 24,
        "student_temperature": 0.1,
        "teacher_temperature": 0.05,
        "centring": "softmax",
        "ibot_weight": 1.0,
        "spread": "kde",
        "spread_weight": 0.3,
        "drop_path": 0.2,
    }
    return DinoSettings(**{**values, **changes})


def mae(spec: EncoderSpec = SPEC) -> ObjectiveModule:
    return MaskedAutoencoder(spec, mask_ratio=0.5, decoder_dim=16, decoder_depth=1, decoder_heads=2, normalise_target=True)


def dino(centring: str, spread: str) -> Callable[[], ObjectiveModule]:
    return lambda: SelfDistillation(SPEC, dino_settings(centring=centring, spread=spread))


FORMS: dict[str, Callable[[], ObjectiveModule]] = {
    "mae": mae,
    **{f"dino-{centring}-{spread}": dino(centring, spread) for centring in ("softmax", "sinkhorn") for spread in ("kde", "koleo")},
}


def unlike_its_start(model: ObjectiveModule, seed: int = 5) -> ObjectiveModule:
    """The model with every weight moved a little, so that a teacher is not its student's copy and no two of anything are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def some_tiles(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def joined(parts: list[Draws]) -> Draws:
    """Several patients' draws, one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
