"""The engine is chosen by cost from shapes, or by the plan."""

import pytest
from objectives import SIDE, mae

from pathfed_client.training.compute import Compute, EngineName
from pathfed_client.training.engines.book_keeping import BookKeepingEngine
from pathfed_client.training.engines.choice import (
    TILES_IN_A_PASS,
    LayerUse,
    Shapes,
    book_keeping_cost,
    decide,
    make_engine,
    pass_bytes,
    patients_at_once,
    serial_cost,
    shapes_of,
)
from pathfed_client.training.engines.engine import trainable
from pathfed_client.training.engines.serial import SerialEngine

#: ViT-S of masked autoencoding at 224 px: 12 blocks that see 50 tokens.
SMALL = Shapes(
    layers=tuple(LayerUse(50, i, o) for i, o in ((384, 1152), (384, 384), (384, 1536), (1536, 384)) for _ in range(12)),
    parameters=22_000_000,
    activations=5_000_000,
)


@pytest.mark.parametrize(("k", "book_keeping"), [(1, True), (2, True), (8, False), (16, False)])
def test_book_keeping_is_for_few_tiles(k: int, book_keeping: bool) -> None:
    patients = patients_at_once(SMALL, k, None)
    assert (patients > 1 and book_keeping_cost(SMALL, k, patients) < serial_cost(SMALL, k)) is book_keeping


def test_patients_of_a_pass_stay_within_the_tiles_and_the_memory() -> None:
    for k in (1, 2, 3, 8, 20):
        assert patients_at_once(SMALL, k, 1 << 50) * k <= max(TILES_IN_A_PASS, k)
    limit = pass_bytes(SMALL, 1, 5)
    assert patients_at_once(SMALL, 1, limit) == 4
    assert patients_at_once(SMALL, 1, 1) == 1


def test_shapes_are_those_of_the_layers() -> None:
    model = mae()
    shapes = shapes_of(model, SIDE)
    # 16 patches of which 8 are seen, one class and one register token.
    assert LayerUse(16, 192, 24) in shapes.layers
    assert LayerUse(10, 24, 72) in shapes.layers
    assert shapes.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_plans_engine_is_taken_and_what_is_decided_keys_the_randomness() -> None:
    model = mae()
    kinds: dict[EngineName, type] = {"serial": SerialEngine, "book_keeping": BookKeepingEngine}
    for name, kind in kinds.items():
        decided = decide(model, Compute(engine=name), tiles_per_patient=2, tile_px=SIDE)
        assert decided.decided
        assert decided.context()["engine"] == name
        assert isinstance(make_engine(model, trainable(model), decided, tiles_per_patient=2, tile_px=SIDE), kind)
    automatic = decide(model, Compute(engine="auto"), tiles_per_patient=2, tile_px=SIDE)
    assert automatic == decide(model, Compute(engine="auto"), tiles_per_patient=2, tile_px=SIDE)
    with pytest.raises(ValueError, match="still to be decided"):
        Compute(engine="auto").context()


@pytest.mark.parametrize("changes", [{"engine": "fast"}, {"precision": "float16"}, {"memory_bytes": 0}, {"patients_at_once": 0}])
def test_values_out_of_bounds_are_refused(changes) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Compute(**changes)
