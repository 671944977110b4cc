"""Adapters: nothing at first, plain linear layers beside the frozen ones, and one merged weight in the same bits everywhere."""

from fractions import Fraction

import pytest
import torch

from pathfed_common.encoder.adapters import Adapters, adapter_shapes, attach, is_adapter, matrices_of, merged
from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.encoder.vit import VisionTransformer

SPEC = EncoderSpec(name="tiny", img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, mlp="swiglu", mlp_ratio=3.0, init_values=0.5)
ADAPTERS = Adapters(rank=3, scale=0.75, first_block=1)


def encoder(adapters: Adapters | None = None) -> VisionTransformer:
    made = VisionTransformer(SPEC, generator=torch.Generator().manual_seed(2))
    if adapters is not None:
        attach(made, adapters, torch.Generator().manual_seed(3))
    return made


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_with_b_zero_the_encoder_computes_what_it_did_without() -> None:
    plain, adapted = encoder(), encoder(ADAPTERS)
    assert torch.equal(plain(images()), adapted(images()))
    assert all(torch.equal(tensor, adapted.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_names_and_shapes_are_known_without_building() -> None:
    beside = {name: tuple(tensor.shape) for name, tensor in encoder(ADAPTERS).state_dict().items() if is_adapter(name)}
    assert beside == adapter_shapes(SPEC, ADAPTERS)
    assert encoder(ADAPTERS).state_dict().keys() == SPEC.shapes().keys() | beside.keys()
    assert not any(name.startswith("blocks.0.") for name in beside)
    found = {name: matrices_of(name, ADAPTERS) for name in SPEC.shapes()}
    assert {matrix for pair in found.values() if pair for matrix in pair} == beside.keys()


def test_the_merged_encoder_computes_what_the_adapted_one_does() -> None:
    adapted, plain = encoder(ADAPTERS), encoder()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_b" in name:
                parameter.normal_(std=0.1, generator=generator)
    state = adapted.state_dict()
    pairs = {name: matrices_of(name, ADAPTERS) for name in SPEC.shapes()}
    whole = dict(state)
    for name, pair in pairs.items():
        if pair is not None:
            a, b = (state[each] for each in pair)
            whole[name] = merged(state[name].flatten(), a, b, 0.75).view(SPEC.shapes()[name])
    whole = {name: whole[name] for name in SPEC.shapes()}
    plain.load_state_dict(whole, strict=True)
    assert not torch.allclose(encoder()(images()), adapted(images()), atol=1e-3)
    torch.testing.assert_close(plain(images()), adapted(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_merging_is_one_order_of_single_operations(threads: int) -> None:
    """Against exact fractions, rounded to float64 where the arithmetic rounds, and to float32 once."""
    generator = torch.Generator().manual_seed(5)
    weight, a, b = torch.randn(5, 7, generator=generator), torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = merged(weight.flatten(), a, b, 0.3)
    torch.set_num_threads(before)
    for i in range(5):
        for j in range(7):
            total = 0.0
            for k in range(3):
                total = float(Fraction(total) + Fraction(float(b[i, k])) * Fraction(float(a[k, j])))
            expected = torch.tensor(float(weight[i, j]) + total * 0.3, dtype=torch.float64).float()
            assert found[7 * i + j] == expected
    part = merged(weight.flatten()[9:20], a, b, 0.3, start=9)
    assert torch.equal(part, found[9:20])


def test_a_zero_b_changes_no_bit_of_the_weight() -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(5))
    assert torch.equal(merged(weight.flatten(), torch.randn(3, 7), torch.zeros(5, 3), 2.0), weight.flatten())
