"""Our encoder is timm's: names, shapes, order, outputs, and loading an export in timm itself.

timm comes with the extra `dev`; a CPU build of torch needs two operators of torchvision declared before it imports. `timm_reference.json`
holds what timm 1.0.31 gives, so that the first comparisons run on a host without timm too; with it, the file is checked against timm.
`python tests/common/encoder/test_timm.py` writes the file again, for a new release of timm.
"""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pathfed_common import digest, model
from pathfed_common.encoder import weights
from pathfed_common.encoder.spec import EncoderSpec, preset, preset_names
from pathfed_common.encoder.vit import VisionTransformer
from pathfed_common.plan import Plan

_REFERENCE = Path(__file__).parent / "timm_reference.json"
_SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
#: Our fields, and timm's arguments for the same encoder where they differ.
_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "swiglu": (
        {"reg_tokens": 4, "init_values": 0.1, "mlp": "swiglu", "mlp_ratio": 5.3375},
        {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"},
    ),
    "no-embed-class": ({"reg_tokens": 2, "no_embed_class": True, "init_values": 0.5}, {}),
    "no-class-token": ({"class_token": False, "qkv_bias": False}, {"global_pool": "avg", "fc_norm": False}),
}
#: Images of other sizes than the encoder's: smaller, larger, not square.
_SIZES = [(16, 16), (48, 48), (32, 80), (96, 16)]
#: Largest difference between our tokens and timm's of the same weights; tokens are of the order of 1.
_CLOSE = 2e-6


def _fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that any machine can make again: sines, different for each tensor and without a pattern over rows."""
    filled = {}
    for index, (name, shape) in enumerate(shapes.items()):
        places = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float64)
        filled[name] = (0.3 * torch.sin(places * 1.7 + index)).to(torch.float32).reshape(shape)
    return filled


def _images(height: int = 32, width: int = 32) -> Tensor:
    values = torch.sin(torch.arange(2 * 3 * height * width, dtype=torch.float64) * 0.37)
    return values.to(torch.float32).reshape(2, 3, height, width)


def _summary(tokens_NTD: Tensor) -> dict[str, Any]:
    return {"shape": list(tokens_NTD.shape), "values": [round(float(value), 6) for value in tokens_NTD.flatten()[::29]]}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(_REFERENCE.read_text())
    return loaded


def _listed(shapes: Mapping[str, Sequence[int]]) -> str:
    """Names, shapes and order in one short text."""
    return digest.of_value([[name, list(shape)] for name, shape in shapes.items()])


@pytest.mark.parametrize("name", preset_names())
def test_presets_have_timms_names_shapes_and_order(name: str, reference: dict[str, Any]) -> None:
    assert _listed(preset(name).shapes()) == reference["presets"][name]


@pytest.mark.parametrize("case", _CASES)
def test_module_has_the_specs_names_shapes_and_order(case: str) -> None:
    spec = EncoderSpec(name=case, **_SMALL, **_CASES[case][0])
    state = VisionTransformer(spec).state_dict()
    assert [(name, tuple(tensor.shape)) for name, tensor in state.items()] == list(spec.shapes().items())


@pytest.mark.parametrize("case", _CASES)
def test_tokens_equal_timms_frozen_ones(case: str, reference: dict[str, Any]) -> None:
    spec = EncoderSpec(name=case, **_SMALL, **_CASES[case][0])
    encoder = VisionTransformer(spec)
    encoder.load_state_dict(_fill(spec.shapes()), strict=True)
    for height, width in [(32, 32), *_SIZES]:
        with torch.no_grad():
            ours = _summary(encoder(_images(height, width)))
        expected = reference["tokens"][case][f"{height}x{width}"]
        assert ours["shape"] == expected["shape"]
        assert ours["values"] == pytest.approx(expected["values"], abs=2e-5)


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    if importlib.util.find_spec("timm") is None:
        if os.environ.get("CI"):
            pytest.fail("timm comes with the extra dev")
        pytest.skip("timm is not installed; its names and outputs are checked against the frozen reference")
    yield from _imported_timm()


def _imported_timm() -> Iterator[Any]:
    library = None
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        # PyPI's torchvision does not load its operators on a CPU build of torch, and then refuses to import for want of them.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield importlib.import_module("timm")
    del library


def _timm_encoder(timm: Any, case: str) -> Any:
    ours, theirs = _CASES[case]
    arguments = {**_SMALL, **ours, **theirs}
    arguments.pop("mlp", None)
    if "mlp_layer" in arguments:
        arguments |= {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    return timm.models.VisionTransformer(num_classes=0, dynamic_img_size=True, **arguments)


def _timm_preset(timm: Any, name: str) -> Any:
    spec = preset(name)
    with torch.device("meta"):
        return timm.create_model(spec.architecture, **spec.timm_args())


def _timm_reference(timm: Any) -> dict[str, Any]:
    tokens = {}
    for case in _CASES:
        encoder = _timm_encoder(timm, case)
        encoder.load_state_dict(_fill({name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}), strict=True)
        with torch.no_grad():
            tokens[case] = {
                f"{height}x{width}": _summary(encoder.eval().forward_features(_images(height, width)))
                for height, width in [(32, 32), *_SIZES]
            }
    presets = {
        name: _listed({key: tensor.shape for key, tensor in _timm_preset(timm, name).state_dict().items()}) for name in preset_names()
    }
    return {"presets": presets, "tokens": tokens}


def test_frozen_reference_is_what_timm_gives(timm: Any, reference: dict[str, Any]) -> None:
    current = _timm_reference(timm)
    assert current["presets"] == reference["presets"]
    for case, sizes in reference["tokens"].items():
        for size, expected in sizes.items():
            assert current["tokens"][case][size]["values"] == pytest.approx(expected["values"], abs=2e-5)


@pytest.mark.parametrize("name", preset_names())
def test_presets_have_timms_parameter_count(timm: Any, name: str) -> None:
    assert preset(name).parameters == sum(parameter.numel() for parameter in _timm_preset(timm, name).parameters())


@pytest.mark.parametrize("case", _CASES)
def test_tokens_equal_timms_for_the_same_weights(timm: Any, case: str) -> None:
    ours = VisionTransformer(EncoderSpec(name=case, **_SMALL, **_CASES[case][0]))
    theirs = _timm_encoder(timm, case).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        for height, width in [(32, 32), *_SIZES]:
            images = _images(height, width)
            torch.testing.assert_close(ours(images), theirs.forward_features(images), rtol=0, atol=_CLOSE)


@pytest.mark.parametrize("case", _CASES)
def test_gradients_equal_timms_for_an_image_of_another_size(timm: Any, case: str) -> None:
    ours = VisionTransformer(EncoderSpec(name=case, **_SMALL, **_CASES[case][0]))
    theirs = _timm_encoder(timm, case).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = _images(48, 80)
    for tokens_NTD in (ours(images), theirs.forward_features(images)):
        tokens_NTD.pow(3).mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", ["plain", "swiglu"])
def test_fixed_drops_are_what_timms_drop_path_does(timm: Any, case: str) -> None:
    # timm draws from torch's global generator, a number for each tile and branch; fed with its draws, ours gives the same tokens.
    ours = VisionTransformer(EncoderSpec(name=case, **_SMALL, **_CASES[case][0]))
    theirs = _timm_encoder(timm, case).train()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    drawn: list[Tensor] = []

    def note(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        drawn.append((out / given[0]).flatten(1)[:, 0])

    for block in theirs.blocks:
        for branch in ("drop_path1", "drop_path2"):
            setattr(block, branch, timm.layers.DropPath(0.5))
            getattr(block, branch).register_forward_hook(note)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = theirs.forward_features(_images()).detach()
    factors_ND = torch.stack(drawn, dim=1).detach().round()
    assert set(factors_ND.unique().tolist()) == {0.0, 2.0}
    with torch.no_grad():
        torch.testing.assert_close(ours(_images(), drop_ND=factors_ND), expected, rtol=0, atol=_CLOSE)


@pytest.mark.parametrize("name", [name for name in preset_names() if preset(name).mlp == "swiglu"])
def test_exported_giants_load_in_timm_from_their_config_alone(timm: Any, name: str, tmp_path: Path) -> None:
    # The giants' layouts, two blocks deep and narrow: same architecture, same kinds of arguments.
    spec = replace(preset(name), depth=2, embed_dim=48, num_heads=3, img_size=2 * preset(name).patch_size)
    ours = VisionTransformer(spec).eval()
    (tmp_path / "model.safetensors").write_bytes(weights.dump(ours.state_dict(), {"format": "pt"}))
    (tmp_path / "config.json").write_text(json.dumps(model.timm_config_of(spec, mpp=0.5)))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert [(key, tuple(tensor.shape)) for key, tensor in theirs.state_dict().items()] == list(spec.shapes().items())
    images = _images(spec.img_size, spec.img_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.forward_features(images), rtol=0, atol=_CLOSE)


def test_exported_folder_loads_in_timm(timm: Any, plan: Plan, tmp_path: Path) -> None:
    whole = model.initial_state(plan)
    state = {name.removeprefix(model.ENCODER_PREFIX): tensor for name, tensor in whole.items() if name.startswith(model.ENCODER_PREFIX)}
    (tmp_path / "model.safetensors").write_bytes(weights.dump(state, {"format": "pt"}))
    (tmp_path / "config.json").write_text(json.dumps(model.timm_config(plan)))
    encoder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    loaded = encoder.state_dict()
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    by_hand = model.timm_config(plan)
    encoder = timm.create_model(str(by_hand["architecture"]), **dict(by_hand["model_args"]))  # type: ignore[call-overload]
    encoder.load_state_dict(state, strict=True)


if __name__ == "__main__":
    _REFERENCE.write_text(json.dumps(_timm_reference(next(_imported_timm())), indent=1) + "\n")
