"""Closed-form inversion of an update (APRIL, Lu et al. 2022, arXiv:2112.14087): a smoke test that noise is really on.

The position embedding's gradient is, for each visible patch, the gradient G at its token; the patch embedding's is G^T X. So X, the
patches' pixels, follow by least squares, exactly, from any noiseless gradient, clipped or not, when there are no more visible patches
than widths. The attack is run on what the real private step releases for one patient with one tile.
"""

import math

import numpy as np
import pytest
import torch

from pathfed_client.training.engines.engine import PatientTiles, trainable
from pathfed_client.training.private_step import private_step
from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

SIDE, PATCH, WIDTH = 64, 16, 64
RANGE = 4.0  # normalised pixels lie within -2 to 2


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    spec = EncoderSpec(name="small", img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=4)
    return MaskedAutoencoder(spec, mask_ratio=0.5, decoder_dim=32, decoder_depth=1, decoder_heads=4, normalise_target=False, seed=1)


def smooth_tile(seed: int) -> torch.Tensor:
    coarse = torch.from_numpy(KeyedRandom(bytes(32), {"tile": seed}).normals(3 * 8 * 8)).reshape(1, 3, 8, 8)
    return torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(-2, 2)


def attack(model: MaskedAutoencoder, seed: int, sigma: float) -> tuple[float, float]:
    """PSNR in dB of the visible patches that the attacker gets back from a release, and of grey patches."""
    tile, drawn = smooth_tile(seed), model.draw(1, KeyedRandom(bytes(32), {"mask": seed}))
    keep = drawn["keep"]
    clip = PatientMechanism(
        sampling_rate=1.0, noise_multiplier=sigma, clip_norm=0.5, expected_patients=1.0, figure_share=0.3, loss_bound=4.0
    )
    release = private_step(model, trainable(model), [lambda: PatientTiles(tile, drawn)], clip, KeyedRandom(bytes(range(32)), {"s": seed}))
    tokens = release.gradients["encoder.pos_embed"][0, 1:][keep[0]].double()
    weights = release.gradients["encoder.patch_embed.proj.weight"].flatten(1).double()
    found = torch.linalg.lstsq(tokens.T, weights).solution.clamp(-2, 2)
    patches = torch.nn.functional.unfold(tile, PATCH, stride=PATCH)[0].T[keep[0]]

    def psnr(guess: torch.Tensor) -> float:
        return 10 * math.log10(RANGE**2 / max(float((guess - patches).square().mean()), 1e-30))

    return psnr(found), psnr(torch.zeros_like(patches))


def test_without_noise_a_clipped_update_gives_the_tile_away(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientMechanism, "noise_std", property(lambda self: 1e-9))
    assert np.median([attack(model, seed, 1.0)[0] for seed in range(3)]) > 60


@pytest.mark.parametrize("sigma", [0.01, 1.0])
def test_with_noise_it_gives_no_more_than_a_grey_tile(sigma: float, model) -> None:
    for seed in range(3):
        found, grey = attack(model, seed, sigma)
        assert found < grey + 1
