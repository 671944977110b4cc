"""The encoder: visible patches, independence of tiles, and its own generator."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.encoder.vit import VisionTransformer, sine_positions

_BASE: dict[str, Any] = {"name": "x", "img_size": 48, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
_SPECS = [
    EncoderSpec(**_BASE),
    EncoderSpec(**_BASE, reg_tokens=3, init_values=0.1, mlp="swiglu", no_embed_class=True),
    EncoderSpec(**_BASE, class_token=False),
]


def _images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", _SPECS)
def test_all_patches_kept_equals_the_full_forward(spec: EncoderSpec) -> None:
    encoder = VisionTransformer(spec)
    keep_NK = torch.arange(9).expand(3, -1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(_images(), keep_NK), encoder(_images()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", _SPECS)
def test_hidden_patches_have_no_influence(spec: EncoderSpec) -> None:
    encoder = VisionTransformer(spec)
    images, keep_NK = _images(1), torch.tensor([[1, 4, 8]])
    changed = images.clone()
    changed[:, :, :16, :16] += 5.0  # patch 0
    with torch.no_grad():
        tokens_NTD = encoder(images, keep_NK)
        assert tokens_NTD.shape == (1, spec.prefix_tokens + 3, 24)
        assert torch.equal(encoder(changed, keep_NK), tokens_NTD)
        assert not torch.allclose(encoder(changed), encoder(images), atol=1e-3)


def test_kept_patches_keep_their_places() -> None:
    # Without blocks a token is its patch's projection plus its position, so row and place can be checked one by one.
    encoder = VisionTransformer(_SPECS[0])
    encoder.blocks = nn.Sequential()
    with torch.no_grad():
        full, some = encoder(_images()), encoder(_images(), torch.tensor([[0, 5], [2, 3], [7, 8]]))
    for row, places in enumerate([(0, 5), (2, 3), (7, 8)]):
        torch.testing.assert_close(some[row, 1:], full[row, [1 + place for place in places]])


@pytest.mark.parametrize("spec", _SPECS)
def test_a_tiles_tokens_do_not_depend_on_other_tiles(spec: EncoderSpec) -> None:
    encoder, images = VisionTransformer(spec), _images().requires_grad_()
    (gradient,) = torch.autograd.grad(encoder(images)[1].square().sum(), images)
    assert torch.count_nonzero(gradient[[0, 2]]) == 0
    assert torch.count_nonzero(gradient[1]) > 0


def test_building_leaves_torchs_global_generator_alone() -> None:
    before = torch.get_rng_state()
    for spec in _SPECS:
        VisionTransformer(spec)
    assert torch.equal(torch.get_rng_state(), before)


def test_same_seed_gives_same_weights_and_another_seed_others() -> None:
    first, again, other = (VisionTransformer(_SPECS[1], generator=torch.Generator().manual_seed(seed)).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("spec", _SPECS)
def test_first_weights_have_the_stated_scales(spec: EncoderSpec) -> None:
    state = VisionTransformer(spec).state_dict()
    qkv = state["blocks.1.attn.qkv.weight"]
    assert qkv.abs().max().item() == pytest.approx((6 / (24 + 72)) ** 0.5, rel=0.02)
    assert state["patch_embed.proj.weight"].abs().max().item() == pytest.approx((6 / (24 + 768)) ** 0.5, rel=0.02)
    assert all(torch.count_nonzero(tensor) == 0 for name, tensor in state.items() if name.endswith("bias"))
    assert all(torch.equal(tensor, torch.ones(24)) for name, tensor in state.items() if ".norm" in name and name.endswith("weight"))
    if spec.init_values is not None:
        assert torch.equal(state["blocks.0.ls1.gamma"], torch.full((24,), spec.init_values))


def test_layer_norms_use_timms_epsilon_and_nothing_normalises_over_the_batch() -> None:
    modules = list(VisionTransformer(_SPECS[1]).modules())
    assert {module.eps for module in modules if isinstance(module, nn.LayerNorm)} == {1e-6}
    assert not any(isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.Dropout)) for module in modules)


def test_sine_positions_tell_every_place_apart_by_row_and_column() -> None:
    table = sine_positions(4, 8)
    assert table.shape == (16, 8)
    assert len({tuple(row.tolist()) for row in table}) == 16
    # Places of one row share the half that codes y; places of one column the half that codes x.
    assert torch.equal(table[0:4, 4:], table[0, 4:].expand(4, -1))
    assert torch.equal(table[0::4, :4], table[0, :4].expand(4, -1))
    x = torch.tensor([1.0, 0.01])  # the place x = 1 at both frequencies
    torch.testing.assert_close(table[1, :4], torch.cat([x.sin(), x.cos()]))


@pytest.mark.parametrize("shape", [(1, 3, 48, 40), (3, 48, 48), (1, 1, 48, 48), (1, 3, 0, 48)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\) with H and W multiples of the patch size 16"):
        VisionTransformer(_SPECS[0])(torch.zeros(shape))


def test_bfloat16_stays_close_to_float32() -> None:
    encoder = VisionTransformer(_SPECS[1])
    with torch.no_grad():
        exact = encoder(_images())
        rough = encoder.to(torch.bfloat16)(_images().to(torch.bfloat16))
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)
