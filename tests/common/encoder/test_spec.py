"""Encoder shapes without torch: published encoders, bounds, and no heavy import."""

import subprocess
import sys
from math import prod
from typing import Any

import pytest

from pathfed_common.encoder.spec import EncoderSpec, preset

_GIANT: dict[str, Any] = {"embed_dim": 1536, "num_heads": 24, "mlp": "swiglu", "init_values": 1e-5}


@pytest.mark.parametrize(
    ("spec", "millions"),
    [
        # Parameter counts that timm and the encoders' own pages state.
        (preset("vit_tiny_patch16_224"), 5.5),
        (preset("vit_small_patch16_224"), 21.7),
        (preset("vit_base_patch16_224"), 85.8),
        (preset("vit_large_patch16_224"), 303.3),
        (
            EncoderSpec(
                name="virchow2",
                img_size=224,
                patch_size=14,
                embed_dim=1280,
                depth=32,
                num_heads=16,
                mlp_ratio=5.3375,
                mlp="swiglu",
                reg_tokens=4,
                init_values=1e-5,
            ),
            631.2,
        ),
        (
            EncoderSpec(
                name="uni2-h", img_size=224, patch_size=14, depth=24, mlp_ratio=5.33334, reg_tokens=8, no_embed_class=True, **_GIANT
            ),
            681.4,
        ),
        (
            EncoderSpec(
                name="h-optimus-0", img_size=224, patch_size=14, depth=40, mlp_ratio=5.33334, reg_tokens=4, no_embed_class=True, **_GIANT
            ),
            1134.8,
        ),
        (EncoderSpec(name="gigapath", img_size=224, patch_size=16, depth=40, mlp_ratio=5.33334, **_GIANT), 1135.0),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_parameter_count_equals_the_published_one(spec: EncoderSpec, millions: float) -> None:
    assert round(sum(prod(shape) for shape in spec.shapes().values()) / 1e6, 1) == millions


def test_preset_takes_another_tile_size() -> None:
    spec = preset("vit_tiny_patch16_224", img_size=96)
    assert (spec.grid, spec.patches, spec.prefix_tokens) == (6, 36, 1)
    assert spec.shapes()["pos_embed"] == (1, 37, 192)


@pytest.mark.parametrize("change", [{"name": "vit_nano"}, {"img_size": 100}])
def test_unknown_preset_and_cut_patches_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no encoder preset|multiple of patch_size"):
        preset(**{"name": "vit_tiny_patch16_224", **change})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depth", 0),
        ("num_heads", 5),
        ("embed_dim", 18),
        ("mlp", "relu"),
        ("mlp_ratio", 0.0),
        ("reg_tokens", -1),
        ("init_values", 0.0),
        ("img_size", 0),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(field: str, value: object) -> None:
    fields: dict[str, Any] = {"name": "x", "img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3}
    with pytest.raises(ValueError, match=field):
        EncoderSpec(**{**fields, field: value})


def test_odd_hidden_width_is_refused_for_swiglu() -> None:
    with pytest.raises(ValueError, match="even for swiglu"):
        EncoderSpec(name="x", img_size=32, patch_size=16, embed_dim=12, depth=1, num_heads=3, mlp_ratio=1.25, mlp="swiglu")


def test_spec_needs_no_torch_and_objectives_need_no_pydantic() -> None:
    script = (
        "import sys; import pathfed_common.encoder.spec; assert 'torch' not in sys.modules;"
        "import pathfed_common.objectives.mae, pathfed_common.encoder.weights;"
        "assert not {'pydantic', 'timm', 'torchvision', 'cryptography', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
