"""What of a published checkpoint goes where: names, prefixes, shapes, types, and position embeddings of other sizes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pathfed_common.encoder.positions import resample_positions
from pathfed_common.encoder.published import PREFIXES, Finding, Outcome, converted, match, report
from pathfed_common.encoder.spec import EncoderSpec, Shape
from pathfed_common.encoder.vit import VisionTransformer

_BASE: dict[str, Any] = {"name": "x", "img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 3, "reg_tokens": 2}
_SPEC = EncoderSpec(**_BASE)
_FREE = EncoderSpec(**_BASE, no_embed_class=True)


def _found(spec: EncoderSpec, *, prefix: str = "", dtype: str = "F32") -> dict[str, tuple[str, Shape]]:
    return {prefix + name: (dtype, shape) for name, shape in spec.shapes().items()}


def _names(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.name for finding in findings]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_usual_prefixes_are_found_and_what_lies_beside_the_encoder_is_extra(prefix: str) -> None:
    found = _found(_SPEC, prefix=prefix) | {"head.weight": ("F32", (10, 24)), "student.backbone.cls_token": ("F32", (1, 1, 24))}
    matched = match(_SPEC, found)
    assert matched.prefix == prefix
    assert matched.usable
    assert _names(matched.of(Outcome.MATCHED)) == list(_SPEC.shapes())
    assert _names(matched.of(Outcome.EXTRA)) == ["head.weight", "student.backbone.cls_token"]
    assert matched.counts == {"matched": len(_SPEC.shapes()), "resampled": 0, "missing": 0, "mis-shaped": 0, "extra": 2}


def test_two_whole_encoders_are_not_chosen_between() -> None:
    found = _found(_SPEC, prefix="backbone.") | _found(_SPEC, prefix="teacher.backbone.") | _found(_SPEC, prefix="student.backbone.")
    with pytest.raises(ValueError, match=r"under each of the prefixes \['backbone.', 'teacher.backbone.'\]"):
        match(_SPEC, found)
    for prefix in ("teacher.backbone.", "student.backbone."):
        chosen = match(_SPEC, found, prefix=prefix)
        assert chosen.usable
        assert chosen.prefix == prefix
        assert len(chosen.of(Outcome.EXTRA)) == 2 * len(_SPEC.shapes())


def test_half_an_encoder_beside_a_whole_one_is_extra() -> None:
    found = _found(_SPEC, prefix="model.") | {"cls_token": ("F32", (1, 1, 24))}
    matched = match(_SPEC, found)
    assert (matched.prefix, _names(matched.of(Outcome.EXTRA))) == ("model.", ["cls_token"])


def test_missing_and_misshaped_parameters_are_named_with_both_shapes() -> None:
    found = _found(_SPEC, prefix="model.")
    del found["model.norm.bias"]
    found["model.blocks.1.attn.qkv.weight"] = ("F32", (72, 25))
    found["model.cls_token"] = ("I64", (1, 1, 24))
    matched = match(_SPEC, found)
    assert not matched.usable
    assert matched.of(Outcome.MISSING) == (Finding("norm.bias", Outcome.MISSING, (24,), None, ""),)
    assert matched.of(Outcome.MISSHAPED) == (
        Finding("cls_token", Outcome.MISSHAPED, (1, 1, 24), (1, 1, 24), "I64"),
        Finding("blocks.1.attn.qkv.weight", Outcome.MISSHAPED, (72, 24), (72, 25), "F32"),
    )


@pytest.mark.parametrize(
    ("spec", "shape", "outcome"),
    [
        (_SPEC, (1, 3 + 49, 24), Outcome.RESAMPLED),
        (_SPEC, (1, 3 + 16, 24), Outcome.MATCHED),
        (_FREE, (1, 49, 24), Outcome.RESAMPLED),
        (_SPEC, (1, 49, 24), Outcome.MISSHAPED),  # no square once the tokens are taken off
        (_FREE, (1, 3 + 49, 24), Outcome.MISSHAPED),
        (_SPEC, (1, 3, 24), Outcome.MISSHAPED),
        (_SPEC, (1, 1, 24), Outcome.MISSHAPED),
        (_SPEC, (1, 3 + 49, 25), Outcome.MISSHAPED),
        (_SPEC, (2, 3 + 49, 24), Outcome.MISSHAPED),
        (_SPEC, (3 + 49, 24), Outcome.MISSHAPED),
    ],
)
def test_position_embeddings_of_other_square_grids_are_resampled_and_no_others(spec: EncoderSpec, shape: Shape, outcome: Outcome) -> None:
    matched = match(spec, _found(spec) | {"pos_embed": ("F16", shape)})
    (finding,) = [finding for finding in matched.findings if finding.name == "pos_embed"]
    assert finding == Finding("pos_embed", outcome, spec.shapes()["pos_embed"], shape, "F16")
    assert matched.usable == (outcome is not Outcome.MISSHAPED)


@pytest.mark.parametrize("spec", [_SPEC, _FREE])
def test_a_resampled_encoder_sees_what_the_original_sees_at_that_size(spec: EncoderSpec) -> None:
    published = VisionTransformer(replace(spec, img_size=112))
    state = published.state_dict()
    matched = match(spec, {name: ("F32", tuple(tensor.shape)) for name, tensor in state.items()})
    assert _names(matched.of(Outcome.RESAMPLED)) == ["pos_embed"]
    encoder = VisionTransformer(spec, generator=torch.Generator().manual_seed(1))
    encoder.load_state_dict({finding.name: converted(spec, finding, state[finding.name]) for finding in matched.findings}, strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), published(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_become_float32_without_a_change_that_float32_can_avoid(dtype: torch.dtype) -> None:
    tensor = torch.randn(24, generator=torch.Generator().manual_seed(1)).to(dtype)
    made = converted(_SPEC, Finding("norm.bias", Outcome.MATCHED, (24,), (24,), "F16"), tensor)
    assert made.dtype == torch.float32
    assert torch.equal(made, tensor.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_in_float32_are_refused(value: float) -> None:
    tensor = torch.zeros(24, dtype=torch.float64)
    tensor[3] = value
    with pytest.raises(ValueError, match=r"norm\.bias holds numbers that are not finite"):
        converted(_SPEC, Finding("norm.bias", Outcome.MATCHED, (24,), (24,), "F64"), tensor)
    with pytest.raises(ValueError, match=r"norm\.bias is missing"):
        converted(_SPEC, Finding("norm.bias", Outcome.MISSING, (24,), None, ""), torch.zeros(24))


def test_positions_are_resampled_after_conversion() -> None:
    tensor = torch.randn(1, 49, 24, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    made = converted(_FREE, Finding("pos_embed", Outcome.RESAMPLED, (1, 16, 24), (1, 49, 24), "F16"), tensor)
    assert torch.equal(made, resample_positions(tensor.float(), (7, 7), (4, 4)))


def test_report_folds_blocks_together_where_they_agree() -> None:
    found = _found(_SPEC) | {"blocks.1.norm1.bias": ("F16", (24,)), "odd{}.blocks.x": ("F32", ())}
    del found["norm.bias"]
    rows = {row["tensor"]: row for row in report(match(_SPEC, found).findings)}
    assert rows["blocks.0-2.attn.qkv.weight"] == {
        "tensor": "blocks.0-2.attn.qkv.weight",
        "outcome": "matched",
        "encoder": "72 x 24",
        "file": "F32 72 x 24",
    }
    assert rows["blocks.0,2.norm1.bias"]["file"] == "F32 24"
    assert rows["blocks.1.norm1.bias"]["file"] == "F16 24"
    assert rows["norm.bias"] == {"tensor": "norm.bias", "outcome": "missing", "encoder": "24", "file": ""}
    assert rows["odd{}.blocks.x"]["file"] == "F32 scalar"
