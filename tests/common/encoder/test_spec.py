"""Encoder shapes without torch: published encoders, bounds, and no heavy import."""

import json
import subprocess
import sys
from math import prod
from typing import Any

import pytest

from pathfed_common.encoder.spec import EncoderSpec, preset, preset_names

#: timm 1.0.31's own counts of these architectures with these arguments, without a classifier; test_timm.py asks timm again.
COUNTS = {
    "vit_tiny_patch16_224": 5_524_416,
    "vit_small_patch16_224": 21_665_664,
    "vit_base_patch16_224": 85_798_656,
    "vit_large_patch16_224": 303_301_632,
    "vit_huge_patch14_reg4_224": 631_239_424,
    "vit_giant_patch14_reg8_depth24_224": 681_394_176,
    "vit_giant_patch14_reg4_224": 1_134_774_272,
    "vit_giant_patch16_224": 1_134_953_984,
    "vit_gigantic_patch14_224": 1_842_775_680,
}


@pytest.mark.parametrize("name", preset_names())
def test_parameter_count_equals_timms(name: str) -> None:
    spec = preset(name)
    assert spec.parameters == COUNTS[name]
    assert sum(prod(shape) for shape in spec.shapes().values()) == COUNTS[name]
    assert spec.dtypes() == dict.fromkeys(spec.shapes(), "float32")


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # What the pages of Virchow2, UNI2-h, H-optimus-0 and Prov-GigaPath state.
        ("vit_huge_patch14_reg4_224", 631.2),
        ("vit_giant_patch14_reg8_depth24_224", 681.4),
        ("vit_giant_patch14_reg4_224", 1134.8),
        ("vit_giant_patch16_224", 1135.0),
    ],
)
def test_published_encoders_have_the_published_counts(name: str, millions: float) -> None:
    assert round(preset(name).parameters / 1e6, 1) == millions


def test_virchow2s_position_embedding_covers_class_and_register_tokens_and_uni2s_does_not() -> None:
    assert preset("vit_huge_patch14_reg4_224").shapes()["pos_embed"] == (1, 261, 1280)
    assert preset("vit_giant_patch14_reg8_depth24_224").shapes()["pos_embed"] == (1, 256, 1536)
    assert preset("vit_giant_patch14_reg4_224").shapes()["blocks.0.mlp.fc2.weight"] == (1536, 4096)


def test_arguments_for_timm_are_json_and_complete_where_timm_has_no_such_architecture() -> None:
    spec = preset("vit_huge_patch14_reg4_224", img_size=392)
    arguments = json.loads(json.dumps(spec.timm_args()))
    assert spec.architecture == "vit_giant_patch14_reg4_dinov2"
    assert (arguments["img_size"], arguments["embed_dim"], arguments["mlp_ratio"], arguments["no_embed_class"]) == (
        392,
        1280,
        5.3375,
        False,
    )
    assert preset("vit_large_patch16_224").timm_args() == {"img_size": 224, "num_classes": 0}


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
