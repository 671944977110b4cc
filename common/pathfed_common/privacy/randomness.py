"""Keyed randomness: every draw that privacy rests on comes from here, and from no global generator.

Guarantees:
    - **A stream is a function of a secret and a context.** The key is HKDF-SHA256 (RFC 5869) of a 32-byte secret with the canonical JSON
      of the context as info; the stream is the AES-256-CTR keystream under that key. Equal secret and context give equal draws: a round
      computed again after a crash is the same release. Any other context, be it another base state, round, cohort or code digest,
      gives an independent stream, so its noise can be subtracted from nothing.
    - **Children are independent.** `child(purpose, *parts)` has its own key, derived from this one's; how much was drawn from the parent or
      from a sibling does not matter to it. The key that streams are made with is itself a derived one, so no stream reveals a child's key.
    - **The source cannot be copied by accident**: `repr` hides the key, pickling and copying are refused.
    - **Draws are exact where it matters.** `bernoulli` compares 64-bit integers; its rate is never above the one asked for, and below by
      less than 2^-64. `choose` and `permutation` reject instead of taking remainders: every outcome is equally likely.
    - **Memory is bounded.** Normals come in chunks; the values do not depend on the chunk size.
    - **Noise has a place, not a turn.** `normal_range` and `add_normals` read a stream of their own by index (`gaussian`): the noise of an
      element depends on the key and its index alone, so the shards of a tensor, drawn anywhere in any order, make up the whole.

    | draw | edge | outcome |
    | --- | --- | --- |
    | bernoulli | rate 0 / rate 1 | never / always |
    | normals | the uniform 0 | cannot happen: uniforms are taken at the middle of their 2^-64 cell, so that log(0) is never taken |
    | normals | tails | up to 9.5 standard deviations, beyond which a true normal has mass 2e-21 |
    | choose | k = n / k = 0 | a permutation / empty |

Known limits. Bitwise equality holds on one machine with one set of libraries (numpy's log and cosine may differ in the last bit
elsewhere). Python cannot promise that a key is wiped from memory. Floating-point Gaussian noise is not the real-valued one (Mironov,
CCS 2012): `add_normals`, which all releases take their noise from, adds in fp64 and rounds the *sum* to a coarse public grid.

An object is a stream with a position and belongs to one thread.
"""

import hashlib
import hmac
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from pathfed_common import digest
from pathfed_common.privacy.keystream import Keystream

if TYPE_CHECKING:
    from torch import Tensor, device

    from pathfed_common.privacy.gaussian import GaussianStream

SECRET_BYTES = 32
_SALT = b"pathfed/keyed-randomness/1"
_HASH_BYTES = hashlib.sha256().digest_size
_CHUNK = 1 << 20


def hkdf(secret: bytes, *, salt: bytes, info: bytes, length: int = SECRET_BYTES) -> bytes:
    """HKDF-SHA256: extract, then expand (RFC 5869, sections 2.2 and 2.3).

    Raises:
        ValueError: `length` is outside 1 to 8160 bytes.
    """
    if not 1 <= length <= 255 * _HASH_BYTES:
        raise ValueError(f"length must be 1 to {255 * _HASH_BYTES} bytes, got {length}")
    key = hmac.digest(salt or bytes(_HASH_BYTES), secret, "sha256")
    output, block = b"", b""
    for counter in range(1, -(-length // _HASH_BYTES) + 1):
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        output += block
    return output[:length]


class KeyedRandom:
    """A source of random draws, keyed by a secret and everything the release depends on."""

    __slots__ = ("_key", "_stream")

    def __init__(self, secret: bytes, context: Mapping[str, str | int]) -> None:
        """Key the source.

        Args:
            secret: 32 secret bytes.
            context: everything the release depends on, by name; texts and whole numbers.

        Raises:
            ValueError: the secret is not 32 bytes long, or the context holds something else than texts and whole numbers.
        """
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"secret must be {SECRET_BYTES} bytes, got {len(secret)}")
        for name, value in context.items():
            _check_part(f"context[{name!r}]", value)
        self._key = hkdf(secret, salt=_SALT, info=digest.canonical(dict(context)))
        self._stream = Keystream(hkdf(self._key, salt=_SALT, info=b"stream"))

    def __repr__(self) -> str:
        return "KeyedRandom(<key hidden>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a KeyedRandom is not pickled or copied: a copy would repeat its draws")

    def child(self, purpose: str, *parts: str | int) -> "KeyedRandom":
        """An independent source for one purpose, the same whatever was drawn from this one before.

        Args:
            purpose: what it is for, such as "noise".
            parts: which one of them, such as a parameter's name.

        Raises:
            ValueError: a part is neither a text nor a whole number.
        """
        for part in parts:
            _check_part("part", part)
        child = KeyedRandom.__new__(KeyedRandom)
        child._key = hkdf(self._key, salt=_SALT, info=b"child" + digest.canonical([purpose, *parts]))
        child._stream = Keystream(hkdf(child._key, salt=_SALT, info=b"stream"))
        return child

    def words(self, n: int) -> NDArray[np.uint64]:
        """The next n 64-bit words of the keystream, little endian, shape (n,)."""
        return np.frombuffer(self._stream.read(8 * n), dtype="<u8").astype(np.uint64, copy=False)

    def uniforms(self, n: int) -> NDArray[np.float64]:
        """N draws from [0, 1), on the grid of 2^-53, shape (n,)."""
        return (self.words(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def bernoulli(self, n: int, rate: float) -> NDArray[np.bool_]:
        """N draws that are true with probability `rate`, rounded down to a multiple of 2^-64, shape (n,).

        Raises:
            ValueError: the rate is not within 0 to 1.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be within 0 to 1, got {rate}")
        words = self.words(n)
        threshold = math.floor(Fraction(rate) * 2**64)
        return np.ones(n, np.bool_) if threshold == 2**64 else words < np.uint64(threshold)

    def normal_chunks(self, n: int, *, chunk: int = _CHUNK) -> Iterator[NDArray[np.float64]]:
        """N standard normal draws in fp64, in arrays of at most `chunk` (rounded up to even), in order.

        Box and Muller (1958): two uniforms give two normals. The values do not depend on `chunk`.

        Raises:
            ValueError: n is negative or chunk is not positive.
        """
        if n < 0 or chunk < 1:
            raise ValueError(f"n must not be negative and chunk must be positive, got {n} and {chunk}")
        pairs_a_chunk = -(-chunk // 2)
        for start in range(0, n, 2 * pairs_a_chunk):
            wanted = min(2 * pairs_a_chunk, n - start)
            yield _box_muller(self.words(2 * -(-wanted // 2)))[:wanted]

    def normals(self, n: int) -> NDArray[np.float32]:
        """N standard normal draws, computed in fp64 and rounded to fp32, shape (n,)."""
        values = np.empty(n, np.float32)
        start = 0
        for part in self.normal_chunks(n):
            values[start : start + len(part)] = part
            start += len(part)
        return values

    def normal_range(self, start: int, stop: int, *, chunk: int | None = None, device: "device | str" = "cpu") -> "Iterator[Tensor]":
        """Standard normals `start` to `stop` - 1 of this source's second stream, in fp64 tensors, in order.

        Normal i is the same whatever start, stop, chunk and the number of threads are: a process that holds a shard of a tensor draws
        exactly the noise of its shard. The stream has keys of its own and no position: it moves no draw of the other methods, nor they it.
        Reading a range twice gives the same numbers, so a source's range is for one use.

        Args:
            start: index of the first, not negative.
            stop: index after the last, not below `start`.
            chunk: normals at most in one tensor, rounded up to a multiple of 128; by default (and at most) what is fast on the device.
            device: where they are computed. Another kind of device may give other last bits.

        Raises:
            ValueError: the range is no range, or chunk is not positive.
        """
        import torch

        for part in self._gaussian().chunks(start, stop, chunk=chunk, device=torch.device(device)):
            yield part.clone()

    def add_normals(self, values: "Tensor", std: float, *, start: int = 0) -> None:
        """Add N(0, std^2) to every value in place: std times normal `start` + i of `normal_range` to value i, on the tensor's device.

        Each sum is computed in fp64, rounded to the nearest multiple of `gaussian.grid(std)`, a public power of two below std / 128, and
        then once to the tensor's dtype. Sensitivity does not grow, because rounding comes after the noise, and what is left of the noise's
        own floating-point grid is bounded in docs/decisions/0009-noise.md. Whole numbers are summed modulo 2^32, with std in their unit.
        Memory beside the tensor: some 4 MB on a CPU, 64 MB elsewhere.

        Args:
            values: flat, contiguous; fp32, fp64 or int32.
            std: the noise's std, within 2^-100 to 2^100.
            start: index of the first value's normal; a shard gives its offset in the whole tensor.

        Raises:
            ValueError: values, std or start are none of these.
        """
        self._gaussian().add(values, std, start=start)

    def _gaussian(self) -> "GaussianStream":
        # Imported here: who only samples need not wait for torch.
        from pathfed_common.privacy.gaussian import KEY_BYTES, GaussianStream

        return GaussianStream(hkdf(self._key, salt=_SALT, info=b"normals", length=KEY_BYTES))

    def below(self, bound: int) -> int:
        """A whole number from 0 to bound - 1, every one equally likely.

        Raises:
            ValueError: bound is outside 1 to 2^64.
        """
        if not 1 <= bound <= 2**64:
            raise ValueError(f"bound must be within 1 to 2^64, got {bound}")
        limit = 2**64 - 2**64 % bound
        while True:
            word = int.from_bytes(self._stream.read(8), "little")
            if word < limit:
                return word % bound

    def choose(self, n: int, k: int) -> NDArray[np.int64]:
        """K distinct numbers of 0 to n - 1 in random order, every such sequence equally likely, shape (k,).

        A Fisher-Yates shuffle stopped after k swaps, with only the swapped places kept: time and memory grow with k, not with n.

        Raises:
            ValueError: k is not within 0 to n.
        """
        if not 0 <= k <= n:
            raise ValueError(f"k must be within 0 to n, got k = {k} and n = {n}")
        moved: dict[int, int] = {}
        chosen = np.empty(k, np.int64)
        for place in range(k):
            other = place + self.below(n - place)
            chosen[place] = moved.get(other, other)
            moved[other] = moved.get(place, place)
        return chosen

    def permutation(self, n: int) -> NDArray[np.int64]:
        """The numbers 0 to n - 1 in random order, every order equally likely, shape (n,)."""
        return self.choose(n, n)


def _box_muller(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Pairs of words to pairs of normals; word 2i gives the radius and word 2i + 1 the angle of values 2i and 2i + 1."""
    cells = (words.astype(np.float64) + 0.5) * 2.0**-64
    radius = np.sqrt(-2.0 * np.log(cells[0::2]))
    angle = (2.0 * math.pi) * cells[1::2]
    values = np.empty(len(words), np.float64)
    values[0::2] = radius * np.cos(angle)
    values[1::2] = radius * np.sin(angle)
    return values


def _check_part(name: str, value: object) -> None:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise ValueError(f"{name} must be a text or a whole number, got {type(value).__name__}")
