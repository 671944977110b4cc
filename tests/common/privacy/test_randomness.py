"""Keyed randomness: published vectors, exactness, independence, distribution."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pathfed_common.privacy import keystream, randomness
from pathfed_common.privacy.randomness import KeyedRandom, hkdf

SECRET = bytes(range(32))


def source(**context: str | int) -> KeyedRandom:
    return KeyedRandom(SECRET, context)


# RFC 5869, appendix A.1 to A.3 (SHA-256): ikm, salt, info, length, okm.
RFC_5869 = [
    (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        42,
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        82,
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    ("0b" * 22, "", "", 42, "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"),
]


@pytest.mark.parametrize(("ikm", "salt", "info", "length", "okm"), RFC_5869)
def test_hkdf_gives_the_vectors_of_rfc_5869(ikm: str, salt: str, info: str, length: int, okm: str) -> None:
    assert hkdf(bytes.fromhex(ikm), salt=bytes.fromhex(salt), info=bytes.fromhex(info), length=length).hex() == okm


def test_equal_secret_and_context_give_equal_draws() -> None:
    assert np.array_equal(source(round=1, run="a").normals(100), KeyedRandom(SECRET, {"run": "a", "round": 1}).normals(100))


@pytest.mark.parametrize("other", [{"round": 2, "base": "x"}, {"round": 1, "base": "y"}, {"round": "1", "base": "x"}, {"round": 1}])
def test_any_other_context_gives_independent_normals(other: dict[str, str | int]) -> None:
    left, right = source(round=1, base="x").normals(20_000), KeyedRandom(SECRET, other).normals(20_000)
    assert abs(float(np.corrcoef(left, right)[0, 1])) < 0.035


def test_another_secret_gives_independent_normals() -> None:
    left, right = source(round=1).normals(20_000), KeyedRandom(bytes(32), {"round": 1}).normals(20_000)
    assert abs(float(np.corrcoef(left, right)[0, 1])) < 0.035


def test_children_do_not_depend_on_what_was_drawn_and_are_independent_of_parent_and_siblings() -> None:
    parent = source(round=1)
    before = parent.child("noise", "a").normals(20_000)
    own = parent.normals(20_000)
    assert np.array_equal(before, parent.child("noise", "a").normals(20_000))
    others = [parent.child("noise", "b"), parent.child("noise"), parent.child("masks", "a"), parent.child("noise", "a", 0)]
    streams = [before, own, *(other.normals(20_000) for other in others)]
    off_diagonal = np.corrcoef(np.stack(streams)) - np.eye(len(streams))
    assert np.abs(off_diagonal).max() < 0.035


def test_parts_of_a_child_do_not_run_together() -> None:
    parent = source()
    children = [parent.child("ab", "c"), parent.child("a", "bc"), parent.child("abc"), parent.child("ab", 1), parent.child("ab", "1")]
    draws = [tuple(child.words(2)) for child in children]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33)])
def test_secret_of_another_length_is_refused(secret: bytes) -> None:
    with pytest.raises(ValueError, match="secret must be 32 bytes"):
        KeyedRandom(secret, {})


@pytest.mark.parametrize("value", [1.5, True, None, b"x"])
def test_context_of_other_types_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must be a text or a whole number"):
        KeyedRandom(SECRET, {"a": value})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="must be a text or a whole number"):
        source().child("noise", value)  # type: ignore[arg-type]


def test_repr_hides_the_key_and_copies_are_refused() -> None:
    random = source(round=1)
    assert repr(random) == "KeyedRandom(<key hidden>)"
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(random)
    with pytest.raises(TypeError, match="not pickled"):
        copy.deepcopy(random)


def test_uniforms_are_uniform() -> None:
    values = source(draw="u").uniforms(100_000)
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-4


def test_normals_are_standard_normal() -> None:
    values = source(draw="n").normals(400_000)
    assert values.dtype == np.float32
    assert stats.kstest(values, "norm").pvalue > 1e-4
    assert abs(values.mean(dtype=np.float64)) < 0.008
    assert values.std(dtype=np.float64) == pytest.approx(1, abs=0.006)
    assert stats.skew(values) == pytest.approx(0, abs=0.02)
    assert stats.kurtosis(values) == pytest.approx(0, abs=0.04)


@pytest.mark.parametrize("scale", [2 / 3, 3 / 2])
def test_the_normality_check_rejects_another_scale(scale: float) -> None:
    assert stats.kstest(source(draw="n").normals(400_000) * scale, "norm").pvalue < 1e-10


def test_both_halves_of_a_pair_and_neighbours_are_uncorrelated() -> None:
    values = source(draw="n").normals(200_000).astype(np.float64)
    for lag in (1, 2):
        assert abs(float(np.corrcoef(values[:-lag], values[lag:])[0, 1])) < 0.012
    radius = values**2
    assert abs(float(np.corrcoef(radius[0::2], radius[1::2])[0, 1])) < 0.016


@settings(deadline=None, max_examples=40)
@given(n=st.integers(0, 3000), chunk=st.integers(1, 700))
def test_normals_do_not_depend_on_the_chunk_size(n: int, chunk: int) -> None:
    parts = list(source(draw="c").normal_chunks(n, chunk=chunk))
    assert all(len(part) <= chunk + chunk % 2 for part in parts)
    joined = np.concatenate([np.empty(0), *parts])
    assert np.array_equal(joined.astype(np.float32), source(draw="c").normals(n))


def test_extreme_words_give_finite_normals() -> None:
    words = np.array([0, 0, 2**64 - 1, 2**64 - 1, 0, 2**63], np.uint64)
    values = randomness._box_muller(words)
    assert np.isfinite(values).all()
    assert np.abs(values).max() == pytest.approx(9.49, abs=0.01)


def test_bernoulli_compares_whole_numbers_exactly() -> None:
    random = source(draw="b")
    words = source(draw="b").words(1000)
    assert np.array_equal(random.bernoulli(1000, 0.25), words < np.uint64(2**62))


def test_bernoulli_has_its_rate_at_the_edges_and_between() -> None:
    assert not source().bernoulli(1000, 0.0).any()
    assert source().bernoulli(1000, 1.0).all()
    drawn = int(source().bernoulli(100_000, 0.03).sum())
    assert stats.binomtest(drawn, 100_000, 0.03).pvalue > 1e-4
    assert stats.binomtest(drawn, 100_000, 0.03 * 1.5).pvalue < 1e-10


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_bernoulli_refuses_a_rate_outside_0_to_1(rate: float) -> None:
    with pytest.raises(ValueError, match="rate must be within 0 to 1"):
        source().bernoulli(1, rate)


@given(n=st.integers(0, 60), data=st.data())
def test_choose_gives_distinct_numbers_below_n(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    chosen = source(n=n, k=k).choose(n, k)
    assert len(set(chosen.tolist())) == k
    assert all(0 <= number < n for number in chosen)


def test_every_ordered_choice_is_equally_likely() -> None:
    random = source(draw="choose")
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        chosen = tuple(random.choose(4, 2).tolist())
        counts[chosen] = counts.get(chosen, 0) + 1
    assert len(counts) == 12
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_below_rejects_instead_of_taking_the_remainder(monkeypatch: pytest.MonkeyPatch) -> None:
    # With bound 3, the word 2^64 - 1 is past the last whole multiple: taken as a remainder it would favour 0.
    words = iter([(2**64 - 1).to_bytes(8, "little"), (7).to_bytes(8, "little")])
    monkeypatch.setattr(keystream.Keystream, "read", lambda self, n: next(words))
    assert source().below(3) == 1


def test_permutation_holds_every_number_once() -> None:
    assert sorted(source().permutation(500).tolist()) == list(range(500))


@pytest.mark.parametrize(
    "call", [lambda r: r.choose(3, 4), lambda r: r.below(0), lambda r: r.below(2**64 + 1), lambda r: list(r.normal_chunks(-1))]
)
def test_impossible_draws_are_refused(call) -> None:
    with pytest.raises(ValueError, match="must"):
        call(source())


@pytest.mark.parametrize("length", [0, 255 * 32 + 1])
def test_hkdf_refuses_a_length_it_cannot_give(length: int) -> None:
    with pytest.raises(ValueError, match="length must be"):
        hkdf(b"x", salt=b"", info=b"", length=length)
