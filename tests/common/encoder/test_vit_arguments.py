"""What a caller may ask of a forward: other image sizes, masked patches, dropped branches, recomputed activations, one compiled graph."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pathfed_common.encoder.positions import resample_positions
from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.encoder.stochastic_depth import drop_path_factors, drop_rates
from pathfed_common.encoder.vit import LayerScale, VisionTransformer

_BASE: dict[str, Any] = {"name": "x", "img_size": 48, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
_SPECS = [
    EncoderSpec(**_BASE),
    EncoderSpec(**_BASE, reg_tokens=3, init_values=0.1, mlp="swiglu", no_embed_class=True),
    EncoderSpec(**_BASE, class_token=False),
]
_RICH = EncoderSpec(**_BASE, reg_tokens=2, init_values=0.5, mlp="swiglu")


def _images(n: int = 3, height: int = 48, width: int = 48) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def _draws(n: int, seed: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).random(n)


def _gradients(encoder: VisionTransformer, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    encoder.zero_grad()
    run().pow(3).sum().backward()  # not the squares: a normed token's have nearly the same sum, whatever the token
    return {name: parameter.grad.clone() for name, parameter in encoder.named_parameters() if parameter.grad is not None}


# ---- other image sizes ----


@pytest.mark.parametrize("spec", _SPECS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 96), (96, 48)])
def test_any_multiple_of_the_patch_size_is_taken(spec: EncoderSpec, height: int, width: int) -> None:
    tokens_NTD = VisionTransformer(spec)(_images(2, height, width))
    assert tokens_NTD.shape == (2, spec.prefix_tokens + height * width // 256, 24)


@pytest.mark.parametrize("spec", _SPECS)
def test_resampled_position_embedding_gets_its_whole_gradient(spec: EncoderSpec) -> None:
    encoder = VisionTransformer(spec)
    gradients = _gradients(encoder, lambda: encoder(_images(2, 32, 64)))
    assert torch.count_nonzero(gradients["pos_embed"]) == gradients["pos_embed"].numel()


@pytest.mark.parametrize("new", [(2, 2), (6, 3), (3, 9), (7, 7), (5, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resampling_is_torchs_bicubic_with_antialias_forward_and_backward(new: tuple[int, int], dtype: torch.dtype) -> None:
    old = (5, 4)
    positions = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(2), dtype=dtype, requires_grad=True)
    image = positions.reshape(2, *old, 8).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(image, size=new, mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(2, -1, 8)
    ours = resample_positions(positions, old, new)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    got, wanted = (torch.autograd.grad((value * weight).sum(), positions)[0] for value in (ours, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


def test_same_grid_gives_the_very_tensor_and_a_wrong_one_is_refused() -> None:
    positions = torch.zeros(1, 9, 4)
    assert resample_positions(positions, (3, 3), (3, 3)) is positions
    with pytest.raises(ValueError, match=r"positions must be \(N, 16, D\)"):
        resample_positions(positions, (4, 4), (3, 3))


def test_autocast_does_not_make_resampling_coarse() -> None:
    positions = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        rough = resample_positions(positions, (3, 3), (5, 2))
    assert torch.equal(rough, resample_positions(positions, (3, 3), (5, 2)))


# ---- masked patches ----


@pytest.mark.parametrize("spec", _SPECS)
def test_masked_patches_have_no_influence_and_the_mask_token_stands_in_their_places(spec: EncoderSpec) -> None:
    encoder, images, token = VisionTransformer(spec), _images(2), torch.full((24,), 0.3)
    masked_NL = torch.zeros(2, 9, dtype=torch.bool)
    masked_NL[0, [0, 5]] = True
    changed = images.clone()
    changed[0, :, :16, :16] += 5.0  # patch 0 of tile 0
    with torch.no_grad():
        tokens_NTD = encoder(images, masked_NL=masked_NL, mask_token_D=token)
        assert torch.equal(encoder(changed, masked_NL=masked_NL, mask_token_D=token), tokens_NTD)
        assert torch.equal(tokens_NTD[1], encoder(images)[1])
        assert not torch.allclose(tokens_NTD[0], encoder(images)[0], atol=1e-3)
        encoder.blocks = nn.Sequential()  # so that a token is its patch and its position
        count = spec.prefix_tokens
        bare = encoder(images, masked_NL=masked_NL, mask_token_D=token)[0, count:]
        position = encoder.pos_embed[0, encoder.pos_embed.shape[1] - 9 :]
        for place in (0, 5):
            torch.testing.assert_close(bare[place], encoder.norm(token + position[place]))


def test_mask_token_gets_its_gradient_from_masked_places_alone() -> None:
    encoder, token = VisionTransformer(_SPECS[0]), torch.zeros(24, requires_grad=True)
    none = torch.zeros(2, 9, dtype=torch.bool)
    encoder(_images(2), masked_NL=none, mask_token_D=token).pow(3).sum().backward()
    assert token.grad is not None
    assert torch.count_nonzero(token.grad) == 0
    encoder(_images(2), masked_NL=~none, mask_token_D=token).pow(3).sum().backward()
    assert torch.count_nonzero(token.grad) > 0


def test_masking_goes_with_hiding() -> None:
    encoder, token, keep_NK = VisionTransformer(_SPECS[0]), torch.full((24,), 0.3), torch.tensor([[1, 4], [2, 8]])
    masked_NL = torch.zeros(2, 9, dtype=torch.bool)
    masked_NL[:, 4] = True
    encoder.blocks = nn.Sequential()
    with torch.no_grad():
        full = encoder(_images(2), masked_NL=masked_NL, mask_token_D=token)
        some = encoder(_images(2), keep_NK, masked_NL=masked_NL, mask_token_D=token)
    torch.testing.assert_close(some[0, 1:], full[0, [2, 5]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masked_NL": torch.zeros(2, 9, dtype=torch.bool)}, "go together"),
        ({"mask_token_D": torch.zeros(24)}, "go together"),
        ({"masked_NL": torch.zeros(2, 8, dtype=torch.bool), "mask_token_D": torch.zeros(24)}, r"masked_NL must have shape \(2, 9\)"),
        ({"masked_NL": torch.zeros(2, 9, dtype=torch.bool), "mask_token_D": torch.zeros(1, 24)}, r"mask_token_D must have shape \(24,\)"),
        ({"drop_ND": torch.ones(2, 2)}, r"drop_ND must have shape \(2, 4\)"),
        ({"drop_ND": torch.ones(1, 4)}, r"drop_ND must have shape \(2, 4\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTransformer(_SPECS[0])(_images(2), **arguments)


# ---- stochastic depth ----


def test_drop_rates_grow_linearly_with_depth() -> None:
    assert drop_rates(4, 0.4).tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])
    assert drop_rates(1, 0.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("depth", "rate"), [(0, 0.1), (2, 1.0), (2, -0.1), (2, float("nan"))])
def test_impossible_drop_rates_are_refused(depth: int, rate: float) -> None:
    with pytest.raises(ValueError, match=r"depth must|rate must"):
        drop_rates(depth, rate)


def test_factors_are_zero_as_often_as_the_rates_say_and_one_on_average() -> None:
    tiles, depth, rate = 20_000, 3, 0.6
    factors = drop_path_factors(_draws(tiles * 2 * depth), tiles, depth, rate)
    assert factors.dtype == torch.float32
    assert factors.shape == (tiles, 2 * depth)
    rates = torch.from_numpy(drop_rates(depth, rate))
    # Five standard errors of a share, and of the mean of factors whose variance is rate / (1 - rate).
    assert torch.all(((factors == 0).double().mean(0) - rates).abs() < 5 * (rates * (1 - rates) / tiles).sqrt())
    assert torch.all((factors.double().mean(0) - 1).abs() < 5 * (rates / (1 - rates) / tiles).sqrt())
    kept = {round(float(value), 5) for value in factors.unique()}
    assert kept == {0.0, *(round(1 / (1 - share), 5) for share in (0.2, 0.4, 0.6))}
    # Branches are drawn independently of each other.
    correlation = torch.corrcoef((factors == 0).double().T) - torch.eye(2 * depth)
    assert correlation.abs().max() < 5 / tiles**0.5


def test_a_tiles_factors_come_from_its_own_numbers() -> None:
    numbers = _draws(3 * 4)
    all_tiles = drop_path_factors(numbers, 3, 2, 0.5)
    assert torch.equal(drop_path_factors(numbers[4:8], 1, 2, 0.5)[0], all_tiles[1])
    assert torch.equal(drop_path_factors(numbers, 3, 2, 0.0), torch.ones(3, 4))
    with pytest.raises(ValueError, match="uniforms must be 12 numbers"):
        drop_path_factors(numbers[:-1], 3, 2, 0.5)


@pytest.mark.parametrize("spec", _SPECS)
def test_factors_of_one_leave_the_tokens_as_they_are(spec: EncoderSpec) -> None:
    encoder = VisionTransformer(spec)
    with torch.no_grad():
        assert torch.equal(encoder(_images(), drop_ND=torch.ones(3, 4)), encoder(_images()))


def test_each_column_scales_its_own_branch() -> None:
    encoder, images = VisionTransformer(_RICH), _images(1)
    with torch.no_grad():
        for column in range(4):
            factors = torch.ones(1, 4)
            factors[0, column] = 2.0
            other = VisionTransformer(_RICH)
            branch = f"blocks.{column // 2}.ls{column % 2 + 1}.gamma"
            # LayerScale is the last thing on a branch: twice its gamma is a factor of 2.
            state = encoder.state_dict()
            other.load_state_dict(state | {branch: state[branch] * 2})
            torch.testing.assert_close(encoder(images, drop_ND=factors), other(images), rtol=0, atol=1e-5)


def test_a_tiles_drops_do_not_touch_other_tiles() -> None:
    encoder, factors = VisionTransformer(_RICH), drop_path_factors(_draws(12), 3, 2, 0.9)
    changed = factors.clone()
    changed[1] = 1 - changed[1]
    with torch.no_grad():
        before, after = encoder(_images(), drop_ND=factors), encoder(_images(), drop_ND=changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1], atol=1e-3)


def test_branch_dropped_for_every_tile_gets_gradients_that_are_zero() -> None:
    encoder, factors = VisionTransformer(_RICH), torch.ones(3, 4)
    factors[:, 3] = 0.0
    gradients = _gradients(encoder, lambda: encoder(_images(), drop_ND=factors))
    assert set(gradients) == {name for name, _ in encoder.named_parameters()}
    dropped = {name for name in gradients if name.startswith(("blocks.1.mlp", "blocks.1.norm2", "blocks.1.ls2"))}
    assert all((torch.count_nonzero(gradient) == 0) == (name in dropped) for name, gradient in gradients.items())


# ---- engines ----


@pytest.mark.parametrize("spec", [*_SPECS, _RICH])
def test_every_parameter_belongs_to_a_layer_that_engines_have_a_rule_for(spec: EncoderSpec) -> None:
    encoder = VisionTransformer(spec)
    owners = {type(module) for module in encoder.modules() if list(module.parameters(recurse=False))}
    assert owners <= {nn.Linear, nn.Conv2d, nn.LayerNorm, LayerScale, VisionTransformer}
    own = {name for name, _ in encoder.named_parameters(recurse=False)}
    assert own <= {"cls_token", "reg_token", "pos_embed"}


def test_tokens_given_one_to_a_tile_carry_each_tiles_own_gradient() -> None:
    encoder, images = VisionTransformer(_RICH), _images(3, 32, 64)
    names = ("cls_token", "reg_token", "pos_embed")
    single = {name: parameter.detach() for name, parameter in encoder.named_parameters()}
    spread = {name: single[name].expand(3, -1, -1).clone().requires_grad_() for name in names}
    torch.func.functional_call(encoder, single | spread, (images,)).pow(3).sum().backward()
    for row in range(3):
        alone = _gradients(encoder, partial(encoder, images[row : row + 1]))
        for name in names:
            gradient = spread[name].grad
            assert gradient is not None
            torch.testing.assert_close(gradient[row], alone[name][0], rtol=1e-4, atol=1e-5)


def _arguments(spec: EncoderSpec) -> dict[str, Tensor]:
    masked_NL = torch.arange(8).expand(3, -1) % 3 == 0
    token = torch.full((spec.embed_dim,), 0.3)
    return {"masked_NL": masked_NL, "mask_token_D": token, "drop_ND": drop_path_factors(_draws(6 * spec.depth), 3, spec.depth, 0.5)}


def _as_float32(encoder: Callable[..., Tensor], images: Tensor, arguments: dict[str, Tensor]) -> Tensor:
    return encoder(images, **arguments).float()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("spec", [_SPECS[0], _RICH])
def test_recomputed_activations_change_no_bit(spec: EncoderSpec, autocast: bool) -> None:
    plain, saving = VisionTransformer(spec), VisionTransformer(spec, activation_checkpointing=True)
    images, arguments = _images(3, 32, 64), _arguments(spec)
    results = []
    for encoder in (plain, saving):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(_gradients(encoder, partial(_as_float32, encoder, images, arguments)))
            results[-1]["tokens"] = encoder(images, **arguments).detach()
    assert list(results[0]) == list(results[1])
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_checkpointing_keeps_less_and_can_be_switched() -> None:
    encoder = VisionTransformer(replace(_RICH, depth=6))
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel()
        return tensor

    for on in (False, True, False):
        encoder.checkpoint_blocks(on)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            encoder(_images())
    assert kept[0] == kept[2]
    assert kept[1] < kept[0] / 3


def test_full_forward_works_under_bfloat16_autocast() -> None:
    encoder, arguments = VisionTransformer(_RICH), _arguments(_RICH)
    images = _images(3, 32, 64)
    with torch.no_grad():
        exact = encoder(images, **arguments)
        with torch.autocast("cpu", torch.bfloat16):
            rough = encoder(images, **arguments)
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)
    assert not torch.equal(rough.float(), exact)


def test_whole_model_in_bfloat16_takes_every_argument() -> None:
    encoder, arguments = VisionTransformer(_RICH).to(torch.bfloat16), _arguments(_RICH)
    assert encoder(_images(3, 32, 64).to(torch.bfloat16), **arguments).dtype == torch.bfloat16


def _compiled_equals_eager(spec: EncoderSpec, arguments: dict[str, Tensor], *, checkpointing: bool, autocast: bool) -> None:
    torch.compiler.reset()
    encoder = VisionTransformer(spec, activation_checkpointing=checkpointing)
    compiled = torch.compile(encoder, fullgraph=True, dynamic=False, backend="aot_eager")
    images = _images(3, 32, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = _gradients(encoder, partial(_as_float32, encoder, images, arguments))
        graph = _gradients(encoder, partial(_as_float32, compiled, images, arguments))
    assert eager.keys() == graph.keys()
    for name, tensor in eager.items():
        scale = float(tensor.abs().max())
        torch.testing.assert_close(graph[name], tensor, rtol=0, atol=(0.05 if autocast else 1e-4) * scale, msg=name)


@pytest.mark.parametrize(("spec", "checkpointing", "autocast"), [(_SPECS[0], False, False), (_RICH, True, True)])
def test_forward_and_backward_compile_to_one_graph(spec: EncoderSpec, checkpointing: bool, autocast: bool) -> None:
    _compiled_equals_eager(spec, _arguments(spec), checkpointing=checkpointing, autocast=autocast)


def test_hidden_patches_compile_to_one_graph() -> None:
    keep_NK = torch.tensor([[0, 3], [2, 7], [1, 5]])
    _compiled_equals_eager(_RICH, {"keep_NK": keep_NK}, checkpointing=False, autocast=True)


def test_two_image_sizes_compile_to_one_graph_each() -> None:
    torch.compiler.reset()
    encoder = VisionTransformer(_SPECS[0])
    compiled = torch.compile(encoder, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        for first, second in pairwise([(48, 48), (32, 32), (48, 48)]):
            for height, width in (first, second):
                torch.testing.assert_close(compiled(_images(2, height, width)), encoder(_images(2, height, width)), rtol=0, atol=1e-6)


# torch's own imports warn of themselves.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning", "ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_forward_compiles_with_inductor() -> None:
    torch.compiler.reset()
    spec = replace(_SPECS[0], depth=1)
    encoder, arguments = VisionTransformer(spec), _arguments(spec)
    with torch.no_grad():
        compiled = torch.compile(encoder, fullgraph=True, dynamic=False)(_images(3, 32, 64), **arguments)
        torch.testing.assert_close(compiled, encoder(_images(3, 32, 64), **arguments), rtol=0, atol=1e-5)
