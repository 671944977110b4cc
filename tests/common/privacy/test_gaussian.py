"""Normals by index: exact places, precision against arbitrary-precision arithmetic, tails, the grid of noised sums."""

import math
from collections.abc import Callable
from typing import Any

import mpmath  # type: ignore[import-untyped]  # torch needs it; it ships no types
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfed_common.privacy import gaussian
from pathfed_common.privacy.gaussian import BoxMuller, GaussianStream, extended, grid
from pathfed_common.privacy.randomness import KeyedRandom

CPU = torch.device("cpu")
SECRET = bytes(range(32))
# Two pieces and a rest, so that ranges cross pieces.
LENGTH = 2 * (1 << 17) + 5_000


def source(**context: str | int) -> KeyedRandom:
    return KeyedRandom(SECRET, context)


def whole(random: KeyedRandom, start: int, stop: int, **options: Any) -> torch.Tensor:
    return torch.cat([torch.empty(0, dtype=torch.float64), *random.normal_range(start, stop, **options)])


@pytest.fixture(scope="module")
def stream() -> torch.Tensor:
    return whole(source(draw="range"), 0, LENGTH)


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_range_in_any_chunks_is_that_part_of_the_whole(stream: torch.Tensor, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, LENGTH))
    stop = data.draw(st.integers(start, min(LENGTH, start + data.draw(st.sampled_from([3, 200, 200_000])))))
    chunk = data.draw(st.one_of(st.none(), st.integers(max(1, (stop - start) // 20), LENGTH)))
    assert torch.equal(whole(source(draw="range"), start, stop, chunk=chunk), stream[start:stop])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_number_of_threads_changes_no_bit(threads: Callable[[int], None], stream: torch.Tensor, count: int) -> None:
    threads(count)
    assert torch.equal(whole(source(draw="range"), 0, LENGTH), stream)
    assert torch.equal(whole(source(draw="range"), 777, LENGTH - 333), stream[777 : LENGTH - 333])


@pytest.mark.parametrize("chunk", [1, 128, 129, 1000])
def test_chunks_are_no_longer_than_asked(chunk: int) -> None:
    parts = list(source().normal_range(0, 3000, chunk=chunk))
    assert all(len(part) <= -(-chunk // 128) * 128 for part in parts)
    assert all(part.dtype == torch.float64 for part in parts)


def test_a_range_far_out_is_reached_at_once() -> None:
    far = 2 * 10**15
    assert torch.equal(whole(source(), far, far + 300)[100:], whole(source(), far + 100, far + 300))


def test_ranges_move_no_other_draw_and_are_moved_by_none() -> None:
    random = source(draw="both")
    before = whole(random, 10, 500)
    sequential = random.normals(1000)
    assert torch.equal(before, whole(random, 10, 500))
    assert np.array_equal(sequential, source(draw="both").normals(1000))
    assert abs(np.corrcoef(whole(random, 0, 1000).numpy(), sequential)[0, 1]) < 0.15


@pytest.mark.parametrize("arguments", [(-1, 2), (3, 2)])
def test_a_range_that_is_none_is_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a range must be"):
        list(source().normal_range(*arguments))


def test_a_chunk_of_nothing_and_a_short_key_are_refused() -> None:
    with pytest.raises(ValueError, match="positive chunk"):
        list(source().normal_range(0, 2, chunk=0))
    with pytest.raises(ValueError, match="key must be 96 bytes"):
        GaussianStream(SECRET)


def test_the_stream_is_the_published_one() -> None:
    # Known answers: any other layout of keys, words or angles fails. The last bits of a logarithm may differ between processors.
    assert whole(source(round=1), 0, 8).tolist() == pytest.approx(
        [
            -0.11034408761169236,
            2.2299398402003954,
            0.08532099469984102,
            -0.669924296338695,
            1.0142182332483578,
            -0.9469142845510572,
            1.7735060086067826,
            0.2043869131459754,
        ],
        rel=1e-13,
    )
    assert whole(source(round=1), 1_000_003, 1_000_006).tolist() == pytest.approx(
        [0.597488576236681, 1.6262312855812648, -1.2495587854527617], rel=1e-13
    )


def test_noised_sums_are_the_published_ones_bit_for_bit() -> None:
    values = torch.zeros(8)
    source(round=1).add_normals(values, 1.0)
    assert values.tolist() == [-0.109375, 2.23046875, 0.0859375, -0.671875, 1.015625, -0.9453125, 1.7734375, 0.203125]
    values = torch.arange(4, dtype=torch.float32) / 3
    source(round=1).add_normals(values, 0.3, start=999)
    assert [value.hex() for value in values.tolist()] == [
        "-0x1.6c00000000000p-2",
        "-0x1.8c00000000000p-3",
        "0x1.6e00000000000p-2",
        "0x1.b000000000000p-1",
    ]


def exact_pair(uniform: mpmath.mpf, angle_word: int) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """Radius, cosine part and sine part of what the bits stand for, to 60 digits: low bits of the angle choose the table's direction."""
    low = angle_word % gaussian._DIRECTIONS
    turn = (mpmath.mpf(2 * low) + mpmath.mpf(angle_word) / 2**63) * mpmath.pi / gaussian._DIRECTIONS
    radius = mpmath.sqrt(-2 * mpmath.log(uniform))
    return radius, radius * mpmath.cos(turn), radius * mpmath.sin(turn)


def largest_error(radii: list[int], angles: list[int], tails: dict[int, float]) -> float:
    """The largest error in units of the promised bound."""
    normals = BoxMuller(len(radii), CPU)(torch.tensor(radii), torch.tensor(angles), tails).tolist()
    worst = 0.0
    with mpmath.workdps(60):
        for place, (radius_word, angle_word) in enumerate(zip(radii, angles, strict=True)):
            uniform = mpmath.mpf(tails.get(place, 0.0)) or mpmath.mpf(radius_word) / 2**63
            radius, cosine, sine = exact_pair(uniform, angle_word)
            error = max(abs(normals[2 * place] - cosine), abs(normals[2 * place + 1] - sine))
            worst = max(worst, float(error / (radius * mpmath.mpf(2) ** -49 + mpmath.mpf(2) ** -52 / radius)))
    return worst


def words() -> tuple[list[int], list[int]]:
    random = source(draw="words")
    small = [int(word) >> shift for word, shift in zip(random.words(800), list(range(1, 24)) * 40, strict=False)]
    near_one = [2**63 - 1 - (int(word) >> shift) for word, shift in zip(random.words(800), list(range(2, 52)) * 40, strict=False)]
    angles = [int(word) - 2**63 for word in random.words(len(small) + len(near_one))]
    return small + near_one, angles


def test_values_are_within_the_promised_error_of_what_their_bits_stand_for() -> None:
    assert largest_error(*words(), {}) < 1


def test_the_error_check_rejects_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    table = gaussian._directions(CPU).to(torch.complex64).to(torch.complex128)
    monkeypatch.setattr(gaussian, "_directions", lambda device: table)
    assert largest_error(*words(), {}) > 1e3


def test_extreme_words_give_finite_values() -> None:
    radii = [2**63 - 1, 2**63 - 1, 2**63 - 1024, 2**40, 0, 0]
    angles = [0, -(2**63), 2**63 - 1, 1, 2**62, 5]
    tails = {4: extended(0, 0), 5: extended(0, 2**64 - 1)}
    normals = BoxMuller(6, CPU)(torch.tensor(radii), torch.tensor(angles), tails)
    assert normals.isfinite().all()
    radius = torch.linalg.vector_norm(normals.view(-1, 2), dim=1)
    assert float(radius[0]) == pytest.approx(math.sqrt(2 * 2.0**-53))
    assert float(radius[4]) == pytest.approx(math.sqrt(-2 * math.log(2.0**-128)))
    assert largest_error(radii[4:], angles[4:], {0: tails[4], 1: tails[5]}) < 1


def test_all_directions_come_out() -> None:
    # One pair for each direction of the table, turned to either side by up to half a step: the turns cover the circle once.
    low = torch.arange(gaussian._DIRECTIONS)
    angles = torch.cat([low - 2**63, low, low + (2**63 - gaussian._DIRECTIONS)])
    normals = BoxMuller(len(angles), CPU)(torch.full_like(angles, 2**62), angles, {}).view(-1, 2)
    turns = torch.sort(torch.remainder(torch.atan2(normals[:, 1], normals[:, 0]) / (2 * math.pi), 1)).values
    gaps = turns.diff() * gaussian._DIRECTIONS
    assert float(gaps.max()) == pytest.approx(0.5, abs=1e-6)


def test_radius_angle_and_tail_have_keys_of_their_own() -> None:
    # Not to be seen in the numbers: radius and angle use other bits of their words most.
    keys = [bytes([number]) * 32 for number in (1, 2, 3, 4)]
    own, angled, radial = (
        torch.cat([part.clone() for part in GaussianStream(b"".join(key)).chunks(0, 256, device=CPU)]).view(-1, 2)
        for key in (keys[:3], [keys[0], keys[3], keys[2]], [keys[3], *keys[1:3]])
    )
    assert torch.allclose(torch.linalg.vector_norm(own, dim=1), torch.linalg.vector_norm(angled, dim=1))
    assert torch.allclose(torch.atan2(own[:, 1], own[:, 0]), torch.atan2(radial[:, 1], radial[:, 0]))
    assert not torch.isclose(own, angled).any()
    assert not torch.isclose(own, radial).any()
    drawn = source()._gaussian()
    assert len({drawn._radius_key, drawn._angle_key, drawn._tail_key, source()._key}) == 4


def test_a_radius_in_the_tail_is_extended_by_the_word_of_its_own_pair() -> None:
    stream = GaussianStream(bytes(range(96)))
    radii = torch.tensor([2**62, 12345, -(2**63) + 7, 2**40])
    tails = stream._tails(radii, 64)
    assert set(tails) == {1, 2}
    assert radii.tolist() == [2**62, 12345, 7, 2**40]
    assert tails[1] == (12345 * 2**65 + 2 * stream._tail_word(65) + 1) / 2**128
    assert len({stream._tail_word(pair) for pair in range(64, 72)}) == 8
    assert 7 * 2.0**-63 < tails[2] < 8 * 2.0**-63


def test_tails_of_a_stream_are_extended(monkeypatch: pytest.MonkeyPatch, stream: torch.Tensor) -> None:
    # With a high threshold, so that there are some: only the bits below the 63rd change, so values stay nearly the same.
    monkeypatch.setattr(gaussian, "_TAIL", 1 << 55)
    extended_stream = whole(source(draw="range"), 0, LENGTH)
    changed = (extended_stream != stream).nonzero()[:, 0]
    assert 100 < len(changed) < 2 * LENGTH / 2 * 2.0**-8 * 1.2
    assert torch.allclose(extended_stream, stream, rtol=1e-12, atol=1e-12)
    middle = 2 * (int(changed[len(changed) // 2]) // 2)
    assert torch.equal(whole(source(draw="range"), middle - 1, middle + 3), extended_stream[middle - 1 : middle + 3])


@pytest.mark.parametrize(
    ("std", "unit"), [(1.0, 2.0**-8), (0.5, 2.0**-9), (1.5, 2.0**-7), (1.999, 2.0**-7), (2.0**-100, 2.0**-108), (2.0**100, 2.0**92)]
)
def test_the_grid_is_the_power_of_two_from_a_256th_to_a_128th_of_the_std(std: float, unit: float) -> None:
    assert grid(std) == unit
    assert std / 256 <= grid(std) < std / 128


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, 2.0**101, 2.0**-101])
def test_a_std_that_is_none_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="std must be within"):
        source().add_normals(torch.zeros(2), std)


@pytest.mark.parametrize(
    "values", [torch.zeros(2, 2), torch.zeros(4)[::2], torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)]
)
def test_values_of_another_shape_or_kind_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="values must be flat"):
        source().add_normals(values, 1.0)


def test_whole_numbers_refuse_a_std_that_fills_them() -> None:
    with pytest.raises(ValueError, match=r"at most 2\^36"):
        source().add_normals(torch.zeros(2, dtype=torch.int32), 2.0**37)


def values_of(kind: torch.dtype, n: int) -> torch.Tensor:
    return torch.from_numpy(source(draw="values").normals(n) * 1000).to(kind)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("std", [0.037, 1.0, 700.0])
def test_noise_is_added_in_fp64_and_rounded_to_the_grid_once(kind: torch.dtype, std: float) -> None:
    values = values_of(kind, 10_001)
    unit = grid(std) if kind.is_floating_point else max(1.0, grid(std))
    expected = torch.round((values.double() + std * whole(source(draw="add"), 33, 10_034)) / unit) * unit
    source(draw="add").add_normals(values, std, start=33)
    assert torch.equal(values, expected.to(kind))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int32])
def test_shards_make_up_the_whole_bit_for_bit(kind: torch.dtype) -> None:
    n = (1 << 17) + 4321
    at_once, sharded = values_of(kind, n), values_of(kind, n)
    source(draw="shards").add_normals(at_once, 3.3)
    for start, stop in [(100_000, n), (0, 1), (1, 77), (77, 100_000)]:
        source(draw="shards").add_normals(sharded[start:stop], 3.3, start=start)
    assert torch.equal(at_once, sharded)


def test_whole_numbers_wrap_around() -> None:
    values = torch.tensor([2**31 - 1, -(2**31), 0, 5] * 500, dtype=torch.int32)
    std = 2.0**20
    exact = values.double() + std * whole(source(draw="wrap"), 0, len(values))
    source(draw="wrap").add_normals(values, std)
    difference = (values.double() - exact + 2**31) % 2**32 - 2**31
    assert float(difference.abs().max()) <= grid(std) / 2


def test_an_empty_tensor_stays_empty() -> None:
    source().add_normals(torch.zeros(0), 1.0)
    assert len(whole(source(), 7, 7)) == 0
