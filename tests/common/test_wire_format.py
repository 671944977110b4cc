"""The formats an update travels in: exact sizes, unbiased rounding, the same bytes for the same key, and nothing hostile believed."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pathfed_common import digest, wire_format
from pathfed_common.encoder import weights
from pathfed_common.files import write_atomic
from pathfed_common.privacy.randomness import KeyedRandom
from pathfed_common.wire_format import BLOCK, WIRE_TYPES, WireType, chunks, file_bytes, layout, open_update, quantise

SHAPES = {"encoder.w": (30, 40), "encoder.b": (7,), "head.one": (1,), "head.exact": (2, BLOCK)}


def key(number: int = 0) -> KeyedRandom:
    return KeyedRandom(bytes(32), {"purpose": "test", "number": number})


def some(seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) * scale for name, shape in SHAPES.items()}


def written(folder: Path, update: dict[str, Tensor], dtype: WireType, random: KeyedRandom | None = None) -> Path:
    write_atomic(folder / "update", chunks(update, dtype, random or key()))
    return folder / "update"


def whole(path: Path) -> dict[str, Tensor]:
    opened = open_update(path)
    return {name: opened.read(name, 0, math.prod(shape)).view(shape) for name, shape in opened.shapes.items()}


def steps(values: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float64]:
    """Each number in units of its block's scale."""
    return values.astype(np.float64) / np.repeat(scales.astype(np.float64), BLOCK)[: len(values)]


# Size and layout


@pytest.mark.parametrize("dtype", WIRE_TYPES)
def test_every_update_has_the_stated_size(tmp_path: Path, dtype: WireType) -> None:
    made = [some(1), some(2, 1e-20), {name: torch.zeros(shape) for name, shape in SHAPES.items()}]
    assert {written(tmp_path, update, dtype).stat().st_size for update in made} == {file_bytes(SHAPES, dtype)}
    assert weights.header(tmp_path / "update") == layout(SHAPES, dtype)
    assert open_update(tmp_path / "update").shapes == SHAPES


def test_int8_takes_a_byte_a_number_and_four_a_block() -> None:
    shapes = {"w": (1000, 1024)}
    assert file_bytes(shapes, "int8") - file_bytes({"w": (1, 1)}, "int8") == pytest.approx(1_024_000 * (1 + 4 / BLOCK), abs=64)


def test_a_tensor_named_as_anothers_scales_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.scale"):
        layout({"a": (3,), "a.scale": (1,)}, "int8")


def test_float32_is_not_rounded_and_bfloat16_to_the_nearest(tmp_path: Path) -> None:
    update = some()
    assert all(torch.equal(found, update[name]) for name, found in whole(written(tmp_path, update, "float32")).items())
    half = whole(written(tmp_path, update, "bfloat16"))
    assert all(torch.equal(found, update[name].bfloat16().float()) for name, found in half.items())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(WIRE_TYPES))
def test_any_part_reads_as_it_does_in_the_whole(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: WireType) -> None:
    path = tmp_path_factory.getbasetemp() / f"parts-{dtype}"
    if not path.exists():
        write_atomic(path, chunks(some(), dtype, key()))
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    start = data.draw(st.integers(0, math.prod(SHAPES[name])))
    stop = data.draw(st.integers(start, math.prod(SHAPES[name])))
    assert torch.equal(open_update(path).read(name, start, stop), whole(path)[name].flatten()[start:stop])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    opened = open_update(written(tmp_path, some(), "int8"))
    for name, start, stop in (("head.two", 0, 1), ("encoder.b", 0, 8), ("encoder.b", -1, 3), ("encoder.b", 4, 3)):
        with pytest.raises(ValueError, match=name):
            opened.read(name, start, stop)
    write_atomic(tmp_path / "other", weights.dump({"a": torch.zeros(3, dtype=torch.int64)}, {}))
    with pytest.raises(ValueError, match="no update has"):
        open_update(tmp_path / "other")


# int8


def test_int8_bytes_are_the_same_on_every_machine() -> None:
    """Single IEEE operations and a cipher: these digests hold wherever they are computed."""
    values = (np.arange(2000, dtype=np.float32) * np.float32(0.37) % np.float32(11.0) - np.float32(5.0)) / np.float32(3.0)
    numbers, scales = quantise(values, key().child("wire rounding", "w"))
    assert digest.of_bytes(numbers.tobytes() + scales.astype("<f4").tobytes()) == KNOWN


KNOWN = "sha256:d51832679113e0938656d51b2d5fbf02b2c81f5abeb2b6d8c691b4f2b56cf9b2"


def test_the_same_key_gives_the_same_bytes_and_another_key_or_name_other_coins(tmp_path: Path) -> None:
    update = some()
    first = written(tmp_path, update, "int8", key(1)).read_bytes()
    torch.rand(3)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist())  # type: ignore[index]
    source = key(1)
    source.words(17)  # what else was drawn does not matter
    assert written(tmp_path, dict(reversed(update.items())), "int8", source).read_bytes() == first
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert written(tmp_path, update, "int8", key(2)).read_bytes() != first
    twins = weights.load(b"".join(chunks({"a": update["encoder.w"], "b": update["encoder.w"]}, "int8", key())))
    assert torch.equal(twins["a.scale"], twins["b.scale"])
    assert 0.2 < float((twins["a"] != twins["b"]).float().mean()) < 0.45  # 2 f (1 - f) for an even f is a third


def test_pieces_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(5 * BLOCK + 9, generator=torch.Generator().manual_seed(4)).numpy()
    numbers, scales = quantise(values, key())
    monkeypatch.setattr(wire_format, "_PIECE", 2 * BLOCK)
    again = quantise(values, key())
    assert np.array_equal(numbers, again[0])
    assert np.array_equal(scales, again[1])


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=40))
def test_a_block_is_within_127_scales_and_every_number_within_one_of_itself(drawn: list[float]) -> None:
    values = np.array(drawn, np.float32)
    numbers, scales = quantise(values, key())
    if not values.any():
        assert scales[0] == 0
        assert not numbers.any()
        return
    assert np.abs(numbers.astype(np.int64)).max() <= 127
    assert (np.abs(numbers - steps(values, scales)) < 1).all()
    if scales[0] >= np.finfo(np.float32).tiny:
        assert np.abs(numbers.astype(np.int64)).max() >= wire_format.LEAST_LARGEST
    whole_steps = steps(values, scales)
    exact = whole_steps == np.rint(whole_steps)
    assert np.array_equal(numbers[exact], whole_steps[exact]), "what needs no rounding is not rounded"


def test_rounding_has_no_bias_and_the_variance_of_a_coin() -> None:
    """300,000 coins for each place between two whole numbers: 0.0028 is three standard deviations of the mean."""
    places = np.array([0.03, 0.25, 0.5, 0.9, -0.03, -0.4, -0.75, 41.3, -99.6])
    count = 300_000
    for number, place in enumerate(places):
        values = np.full((count // 255, BLOCK), place, np.float32)
        values[:, 0] = 127.0
        numbers, scales = quantise(values.reshape(-1), key(number))
        assert set(scales.tolist()) == {1.0}
        coins = numbers.reshape(-1, BLOCK)[:, 1:].astype(np.float64) - float(np.float32(place))
        share = place - math.floor(place)
        assert abs(coins.mean()) < 4 * math.sqrt(share * (1 - share) / coins.size)
        assert coins.var() == pytest.approx(share * (1 - share), rel=0.03)


def test_rounding_to_the_nearest_would_be_found() -> None:
    """The test above is fine enough: with the nearest number the mean is off by 0.3 where 0.003 is allowed."""
    place = 0.3
    assert abs(np.rint(place) - place) > 50 * 4 * math.sqrt(0.3 * 0.7 / 300_000)


def test_coins_of_neighbours_are_independent() -> None:
    values = np.full((2000, BLOCK), 0.5, np.float32)
    values[:, 0] = 127.0
    numbers, _ = quantise(values.reshape(-1), key())
    coins = numbers.reshape(-1, BLOCK)[:, 1:].astype(np.float64) - 0.5
    flat = coins.reshape(-1)
    for lag in (1, 2, 255):
        assert abs(float(np.corrcoef(flat[:-lag], flat[lag:])[0, 1])) < 0.006


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_spoils_its_block_and_no_other(bad: float) -> None:
    values = torch.randn(3 * BLOCK, generator=torch.Generator().manual_seed(1)).numpy()
    clean = quantise(values, key())
    values[BLOCK + 5] = bad
    numbers, scales = quantise(values, key())
    assert np.isnan(scales).tolist() == [False, True, False]
    assert not numbers[BLOCK : 2 * BLOCK].any()
    assert np.array_equal(np.delete(numbers, slice(BLOCK, 2 * BLOCK)), np.delete(clean[0], slice(BLOCK, 2 * BLOCK)))


# The stated rounding error


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 1.75), ("int8", 1.3)])
def test_the_stated_rounding_bounds_the_true_one_and_is_not_far_above_it(tmp_path: Path, dtype: WireType, most: float) -> None:
    update = {"w": torch.randn(300_000, generator=torch.Generator().manual_seed(3)) * 0.01}
    path = written(tmp_path, update, dtype)
    true = float((whole(path)["w"].double() - update["w"].double()).norm())
    assert true < open_update(path).rounding() < most * true


def test_the_int8_rounding_of_noise_is_a_hundredth_of_it(tmp_path: Path) -> None:
    update = {"w": torch.randn(300_000, generator=torch.Generator().manual_seed(3))}
    noise = math.sqrt(300_000)
    assert open_update(written(tmp_path, update, "float32")).rounding() == 0
    assert 0.0010 < open_update(written(tmp_path, update, "bfloat16")).rounding() / noise < 0.0035
    assert 0.009 < open_update(written(tmp_path, update, "int8")).rounding() / noise < 0.0125


HOSTILE = {
    "a negative scale": lambda made: made["encoder.w.scale"].__setitem__(1, -made["encoder.w.scale"][1]),
    "minus zero": lambda made: (made["encoder.b.scale"].fill_(-0.0), made["encoder.b"].zero_()),
    "numbers without a scale": lambda made: made["encoder.b.scale"].zero_(),
    "a scale that no number reaches": lambda made: made["encoder.w"][: BLOCK // 40 + 1].clamp_(-100, 100),
    "a scale without numbers": lambda made: made["encoder.b"].zero_(),
    "-128": lambda made: made["encoder.w"].view(-1).__setitem__(3, -128),
    "NaN for a scale": lambda made: made["encoder.w.scale"].__setitem__(0, math.nan),
    "infinity for a scale": lambda made: made["head.one.scale"].fill_(math.inf),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_numbers_and_scales_that_rounding_cannot_give_are_refused(tmp_path: Path, what: str) -> None:
    made = weights.load(written(tmp_path, some(), "int8").read_bytes())
    HOSTILE[what](made)
    write_atomic(tmp_path / "hostile", weights.dump(made, {}))
    with pytest.raises(ValueError, match="has the scale"):
        open_update(tmp_path / "hostile").rounding()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1, 3, 255, 256, 257, 1000]), exponent=st.integers(-30, 30))
def test_what_an_honest_site_writes_is_never_refused(tmp_path_factory: pytest.TempPathFactory, seed: int, size: int, exponent: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    path = tmp_path_factory.getbasetemp() / "honest"
    write_atomic(path, chunks({"w": values}, "int8", key(seed)))
    assert math.isfinite(open_update(path).rounding())
