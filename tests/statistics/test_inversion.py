"""Closed-form inversion of an update (APRIL, Lu et al. 2022, arXiv:2112.14087): a smoke test that noise is really on.

The position embedding's gradient is, for each patch that the encoder sees, the gradient G at its token; the patch embedding's is G^T X. So
X, the patches' pixels, follow by least squares from any noiseless gradient, clipped or not, when there are no more patches than widths. The
attack is run on what the real private step releases for one patient with one tile, by an attacker who knows what was drawn.

    | objective | what the attacker inverts | engines | number types |
    | --- | --- | --- | --- |
    | MAE | the visible patches | serial, book-keeping | float32, bfloat16 |
    | DINO | all patches, where every crop is the whole tile; the mask token's gradient tells the masked patch's views apart | both | both |

Other plans of DINO add crops of several places into one position's gradient, which the closed form does not undo; that protects nobody who
counts on it, and the noise is the same.
"""

import math
from collections.abc import Callable

import pytest
import torch
from objectives import dino_settings, unlike_its_start
from torch import Tensor

from pathfed_client.training.compute import Compute
from pathfed_client.training.engines.choice import make_engine
from pathfed_client.training.engines.engine import PatientTiles, trainable
from pathfed_client.training.private_step import private_step
from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.objectives.dino import SelfDistillation
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.objectives.objective import Draws, ObjectiveModule
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

SIDE, PATCH, WIDTH = 64, 16, 64
SPEC = EncoderSpec(name="small", img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=4)
RANGE = 4.0  # normalised pixels lie within -2 to 2

COMPUTES = {
    f"{engine}-{precision}": Compute(engine=engine, precision=precision, patients_at_once=2 if engine == "book_keeping" else None)
    for engine in ("serial", "book_keeping")
    for precision in ("float32", "bfloat16")
}


def mae() -> ObjectiveModule:
    return MaskedAutoencoder(SPEC, mask_ratio=0.5, decoder_dim=32, decoder_depth=1, decoder_heads=4, normalise_target=False, seed=1)


def dino() -> ObjectiveModule:
    """Every crop is the whole tile, and one patch of the first is masked: the plan that gives most away."""
    whole = dino_settings(
        local_crops=0, global_scale=(1.0, 1.0), crop_aspect=1.0, colour_jitter=0.0, mask_ratio=(0.01, 0.1), drop_path=0.0, spread_weight=0.0
    )
    return unlike_its_start(SelfDistillation(SPEC, whole, seed=1))


OBJECTIVES: dict[str, Callable[[], ObjectiveModule]] = {"mae": mae, "dino": dino}


@pytest.fixture(scope="module", params=OBJECTIVES)
def model(request: pytest.FixtureRequest) -> ObjectiveModule:
    return OBJECTIVES[request.param]()


@pytest.fixture(params=COMPUTES)
def compute(request: pytest.FixtureRequest) -> Compute:
    return COMPUTES[request.param]


def smooth_tile(seed: int) -> Tensor:
    coarse = torch.from_numpy(KeyedRandom(bytes(32), {"tile": seed}).normals(3 * 8 * 8)).reshape(1, 3, 8, 8)
    return torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(-2, 2)


def drawn_for(model: ObjectiveModule, seed: int) -> Draws:
    draws = model.draw(1, KeyedRandom(bytes(32), {"mask": seed}))
    # No crop is mirrored: a position then shows the same pixels in each.
    return {name: tensor.abs() if name == "boxes" else tensor for name, tensor in draws.items()}


def attack(model: ObjectiveModule, compute: Compute, seed: int, sigma: float) -> tuple[float, float]:
    """PSNR in dB of the patches that the attacker gets back from a release, and of grey patches."""
    tile, drawn = smooth_tile(seed), drawn_for(model, seed)
    mechanism = PatientMechanism(
        sampling_rate=1.0, noise_multiplier=sigma, clip_norm=0.5, expected_patients=1.0, figure_share=0.3, loss_bound=4.0
    )
    parameters, random = trainable(model), KeyedRandom(bytes(range(32)), {"s": seed})
    engine = make_engine(model, parameters, compute, tiles_per_patient=1, tile_px=SIDE)
    released = private_step(model, parameters, [lambda: PatientTiles(tile, drawn)], mechanism, random, engine=engine).gradients
    tokens_LD = released["encoder.pos_embed"][0, 1:].double()
    seen = torch.arange(len(tokens_LD))
    if "keep" in drawn:
        seen = drawn["keep"][0]
    else:
        (hidden,) = drawn["places"][0, : int(drawn["masked"][0])].tolist()
        # Of this position the patch embedding saw one view, the mask token the other.
        tokens_LD[hidden] -= released["head.mask.token"].double().flatten()
    weights_DP = released["encoder.patch_embed.proj.weight"].flatten(1).double()
    found = torch.linalg.lstsq(tokens_LD[seen].T, weights_DP).solution.clamp(-2, 2)
    patches = torch.nn.functional.unfold(tile, PATCH, stride=PATCH)[0].T[seen]

    def psnr(guess: Tensor) -> float:
        return 10 * math.log10(RANGE**2 / max(float((guess - patches).square().mean()), 1e-30))

    return psnr(found), psnr(torch.zeros_like(patches))


def check_grey(model: ObjectiveModule, compute: Compute, sigma: float) -> None:
    """The attacker gets no more than a grey tile."""
    for seed in range(3):
        found, grey = attack(model, compute, seed, sigma)
        assert found < grey + 1


@pytest.mark.parametrize("sigma", [0.01, 1.0])
def test_with_noise_it_gives_no_more_than_a_grey_tile(sigma: float, model: ObjectiveModule, compute: Compute) -> None:
    check_grey(model, compute, sigma)


@pytest.mark.parametrize("share", [1e-9, 1e-6], ids=["no-noise", "next-to-no-noise"])
def test_without_noise_a_clipped_update_gives_the_tile_away(
    share: float, model: ObjectiveModule, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control, and the planted fault: the attack works, and the check above sees it."""
    monkeypatch.setattr(PatientMechanism, "noise_std", property(lambda self: share * self.noise_multiplier * self.clip_norm))
    # 13.5 dB is grey. Numbers of 8 bits lose some of it.
    assert min(attack(model, compute, seed, 1.0)[0] for seed in range(3)) > 35
    with pytest.raises(AssertionError):
        check_grey(model, compute, 1.0)
