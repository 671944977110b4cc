"""Our encoder is timm's: names, shapes, order, outputs, and loading an export in timm itself.

`timm_reference.json` holds what timm 1.0.31 gives, so that these comparisons always run. Where timm can be imported (a CPU build of torch
needs two operators of torchvision declared first), the file is checked against it, and an export is loaded by timm's own loader.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pathfed_common import model
from pathfed_common.encoder import weights
from pathfed_common.encoder.spec import EncoderSpec, preset
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


def _fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that any machine can make again: sines, different for each tensor and without a pattern over rows."""
    filled = {}
    for index, (name, shape) in enumerate(shapes.items()):
        places = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float64)
        filled[name] = (0.3 * torch.sin(places * 1.7 + index)).to(torch.float32).reshape(shape)
    return filled


def _images() -> Tensor:
    return torch.sin(torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) * 0.37).to(torch.float32).reshape(2, 3, 32, 32)


def _summary(tokens_NTD: Tensor) -> dict[str, Any]:
    return {"shape": list(tokens_NTD.shape), "values": [round(float(value), 6) for value in tokens_NTD.flatten()[::29]]}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(_REFERENCE.read_text())
    return loaded


def test_tiny_has_timms_names_shapes_and_order(reference: dict[str, Any]) -> None:
    expected = [(name, tuple(shape)) for name, shape in reference["vit_tiny_patch16_224"]]
    assert list(preset("vit_tiny_patch16_224").shapes().items()) == expected


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
    with torch.no_grad():
        ours = _summary(encoder(_images()))
    expected = reference["tokens"][case]
    assert ours["shape"] == expected["shape"]
    assert ours["values"] == pytest.approx(expected["values"], abs=2e-5)


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed; its names and outputs are checked against the frozen reference")
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
    return timm.models.VisionTransformer(num_classes=0, **arguments)


def _timm_reference(timm: Any) -> dict[str, Any]:
    tiny = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    tokens = {}
    for case in _CASES:
        encoder = _timm_encoder(timm, case)
        encoder.load_state_dict(_fill({name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}), strict=True)
        with torch.no_grad():
            tokens[case] = _summary(encoder.eval().forward_features(_images()))
    return {"vit_tiny_patch16_224": [[name, list(tensor.shape)] for name, tensor in tiny.state_dict().items()], "tokens": tokens}


def test_frozen_reference_is_what_timm_gives(timm: Any, reference: dict[str, Any]) -> None:
    current = _timm_reference(timm)
    assert current["vit_tiny_patch16_224"] == reference["vit_tiny_patch16_224"]
    for case, expected in reference["tokens"].items():
        assert current["tokens"][case]["values"] == pytest.approx(expected["values"], abs=2e-5)


@pytest.mark.parametrize("case", _CASES)
def test_tokens_equal_timms_for_the_same_weights(timm: Any, case: str) -> None:
    ours = VisionTransformer(EncoderSpec(name=case, **_SMALL, **_CASES[case][0]))
    theirs = _timm_encoder(timm, case).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(_images()), theirs.forward_features(_images()), rtol=0, atol=1e-6)


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
