"""Standard normals in fp64 from cipher bits, at any place of a stream, on any device.

Normals 2p and 2p + 1 are made of word p of two keystreams (Box and Muller, 1958):

    u = (word p of the radius stream, 63 bits) / 2^63          r = sqrt(-2 ln u)
    t = (word p of the angle stream, 64 bits) / 2^64 turns     z[2p] = r cos 2 pi t,  z[2p + 1] = r sin 2 pi t

Guarantees:
    - **A normal depends on the keys and its index alone**, bit for bit on one kind of device with one set of libraries: not on where a
      range starts or stops, on chunks, or on the number of threads. Pairs are computed in groups that start at a multiple of `_GROUP`,
      and in pieces that torch divides between threads at such multiples only, so that each pair meets the same vector instructions.
    - **Normal to the tails.** Where u would have fewer than 40 leading bits of its own (one pair in 2^23), 64 bits of a third stream
      extend it. Values reach 13.3 standard deviations, beyond which a normal has mass 2e-40.
    - **Precise.** A value is within r * 2^-49 + 2^-52 / r of the real number that its bits stand for. docs/decisions/0009-noise.md
      says what that bounds.

Cosine and sine cost most in Box-Muller. The angle's lowest 12 bits choose one of 4096 directions from a table; the rest, taken as a
signed fraction of a table step, turns it by less than 0.0008, where three terms of the series of the cosine and two of the sine are
exact to 2^-58. The low bits are in the fraction too, where they weigh 2^-61.

Legend: P pairs.
"""

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from pathfed_common.privacy.keystream import BLOCK_WORDS, WORD_BYTES, Keystream, KeystreamBuffer

#: Bytes of key for the three streams.
KEY_BYTES = 96
#: Pairs are computed in whole groups of this many, from a multiple of it: no vector instruction ever sees a rest.
_GROUP = 64
#: Pairs at most in one piece on a CPU: torch divides no less than 2^15 numbers between threads, so a piece in two at most, and half of
#: whole groups still ends where a vector ends. (It divides a logarithm finer; MKL's gives the same bits everywhere, as tests show.)
_CPU_PIECE = 1 << 16
#: On other devices a piece is larger, for starting an operation costs more there.
_DEVICE_PIECE = 1 << 20

_DTYPES = (torch.float32, torch.float64, torch.int32)
_DIRECTIONS = 1 << 12
_HALF_STEP = math.pi / _DIRECTIONS
_RADIUS_MASK = 2**63 - 1
#: A radius word below this is extended.
_TAIL = 1 << 40
#: 2^-63, less one part in 2^53: a word that rounds up to 2^63 becomes the number below 1, and the logarithm is never 0.
_RADIUS_SCALE = 2.0**-63 * (1 - 2.0**-53)
_ANGLE_SCALE = 2.0**-63 * _HALF_STEP


class GaussianStream:
    """The normals of one key. It keeps no position: every range is read by its indices."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"key must be {KEY_BYTES} bytes, got {len(key)}")
        self._radius_key, self._angle_key, self._tail_key = key[:32], key[32:64], key[64:]

    def chunks(self, start: int, stop: int, *, chunk: int | None = None, device: torch.device) -> Iterator[Tensor]:
        """Normals `start` to `stop` - 1 in order, fp64, as views of one buffer: each is good until the next is asked for.

        Args:
            start: index of the first normal, not negative.
            stop: index after the last, not below `start`.
            chunk: normals at most in one tensor, rounded up to a multiple of 128, and bounded by what keeps the guarantees.
            device: where they are computed.

        Raises:
            ValueError: the range is no range, or chunk is not positive.
        """
        if not 0 <= start <= stop or (chunk is not None and chunk < 1):
            raise ValueError(f"a range must be 0 <= start <= stop with a positive chunk, got {start}, {stop} and {chunk}")
        if start == stop:
            return
        first, last = start // (2 * _GROUP) * _GROUP, -(-stop // (2 * _GROUP)) * _GROUP
        piece = min(_pairs_in_piece(chunk, device), last - first)
        radius, angle = _Words(self._radius_key, first, piece), _Words(self._angle_key, first, piece)
        transform = BoxMuller(piece, device)
        for pair in range(first, last, piece):
            if (pairs := min(piece, last - pair)) < piece:
                transform = BoxMuller(pairs, device)
            radii, angles = radius.take(pairs), angle.take(pairs)
            normals = transform(radii, angles, self._tails(radii, pair))
            yield normals[max(start - 2 * pair, 0) : stop - 2 * pair]

    def add(self, values: Tensor, std: float, *, start: int) -> None:
        """Add std * normal `start` + i to value i in place and round the sums to a public grid; see `KeyedRandom.add_normals`.

        Raises:
            ValueError: values are not a flat, contiguous tensor of fp32, fp64 or int32, or std is not within 2^-100 to 2^100
                (2^36 for int32, whose grid must divide 2^32).
        """
        if values.dim() != 1 or not values.is_contiguous() or values.dtype not in _DTYPES:
            raise ValueError(f"values must be flat, contiguous and fp32, fp64 or int32, got {values.dtype} of shape {tuple(values.shape)}")
        if values.dtype == torch.int32 and std > 2.0**36:
            raise ValueError(f"std must be at most 2^36 for whole numbers modulo 2^32, got {std}")
        unit = grid(std) if values.dtype.is_floating_point else max(grid(std), 1.0)
        # Adding and taking away 1.5 * 2^52 units leaves the nearest multiple of the unit, ties to even: fp64 holds nothing finer there.
        shift = 1.5 * 2.0**52 * unit
        done = 0
        for normals in self.chunks(start, start + len(values), device=values.device):
            part = values[done : done + len(normals)]
            # Scaled first, for a fused scale-and-add may round otherwise in the rest of a range that is no multiple of a vector.
            sums = normals.mul_(std).add_(part).add_(shift).sub_(shift)
            part.copy_(sums if part.dtype.is_floating_point else sums.to(torch.int64))
            done += len(normals)

    def _tails(self, radii_P: Tensor, first: int) -> dict[int, float]:
        """The extended uniforms of the words that are in the tail, by place; the words are masked to 63 bits in place."""
        radii_P.bitwise_and_(_RADIUS_MASK)
        if int(radii_P.min()) >= _TAIL:
            return {}
        places = [int(place) for place in torch.nonzero(radii_P < _TAIL)[:, 0]]
        return {place: extended(int(radii_P[place]), self._tail_word(first + place)) for place in places}

    def _tail_word(self, pair: int) -> int:
        block = Keystream(self._tail_key, first_word=pair - pair % BLOCK_WORDS).read(BLOCK_WORDS * WORD_BYTES)
        return int.from_bytes(block[pair % BLOCK_WORDS * WORD_BYTES :][:WORD_BYTES], "little")


class BoxMuller:
    """Words to normals, so many pairs a call, in buffers and views made once: 64 bytes a pair, words included, should fit a cache."""

    def __init__(self, pairs: int, device: torch.device) -> None:
        self._table = _directions(device)
        self._radius, self._square = (torch.empty(pairs, dtype=torch.float64, device=device) for _ in range(2))
        self._turns, self._normals = (torch.empty(pairs, dtype=torch.complex128, device=device) for _ in range(2))
        # Cosines and sines of the small angles lie where the turns come to lie when they are no longer needed.
        self._cosine, self._sine = self._turns.view(torch.float64).view(2, pairs)
        pairs_P2 = torch.view_as_real(self._normals)
        self._real, self._imaginary, self._flat = pairs_P2[:, 0], pairs_P2[:, 1], pairs_P2.view(-1)

    def __call__(self, radii_P: Tensor, angles_P: Tensor, tails: Mapping[int, float]) -> Tensor:
        """Normals of pairs of words: fp64, shape (2P,), good until the next call.

        Args:
            radii_P: radius words, 0 to 2^63 - 1, int64.
            angles_P: angle words, int64; they may be overwritten.
            tails: uniforms that replace those of the radius words at these places.
        """
        radius, square, cosine, sine = self._radius, self._square, self._cosine, self._sine
        _radii(radii_P, tails, radius, square)
        places_P = _small_angles(angles_P.to(square.device), cosine, sine, square)
        # r cos = r + r (cos - 1): the cosine of a small angle is known more precisely by what it lacks.
        torch.addcmul(radius, radius, cosine, out=self._real)
        torch.mul(radius, sine, out=self._imaginary)
        torch.index_select(self._table, 0, places_P, out=self._turns)
        self._normals.mul_(self._turns)
        return self._flat


def _radii(radii_P: Tensor, tails: Mapping[int, float], radius: Tensor, square: Tensor) -> None:
    """Radii from words, into `radius`."""
    square.copy_(radii_P).mul_(_RADIUS_SCALE)
    for place, uniform in tails.items():
        square[place] = uniform
    square.log_().mul_(-2.0)
    # As x * (1 / sqrt x): torch.sqrt is MKL's on a CPU, and takes twice as long.
    torch.rsqrt(square, out=radius)
    radius.mul_(square)


def _small_angles(angles_P: Tensor, cosine: Tensor, sine: Tensor, square: Tensor) -> Tensor:
    """Cosine - 1 and sine of the small angles from words, and the places in the table that are left of the words."""
    sine.copy_(angles_P).mul_(_ANGLE_SCALE)
    torch.mul(sine, sine, out=square)
    torch.mul(square, -1 / 2, out=cosine).addcmul_(square, square, value=1 / 24)
    sine.addcmul_(square, sine, value=-1 / 6)
    return angles_P.bitwise_and_(_DIRECTIONS - 1)


class _Words:
    """Words of one keystream, piece by piece, as an int64 tensor on the CPU over the cipher's own buffer."""

    def __init__(self, key: bytes, first: int, piece: int) -> None:
        self._stream, self._buffer = Keystream(key, first_word=first), KeystreamBuffer(piece)
        self._words = torch.frombuffer(self._buffer.words, dtype=torch.int64)

    def take(self, pairs: int) -> Tensor:
        """The next words, good until the next call."""
        self._buffer.fill(self._stream, pairs)
        return self._words if pairs == len(self._words) else self._words[:pairs]


def grid(std: float) -> float:
    """The unit that noised sums are rounded to: the power of two from std / 256 up to, not including, std / 128.

    Raises:
        ValueError: std is not within 2^-100 to 2^100, where fp32 holds every multiple that matters.
    """
    if not 2.0**-100 <= std <= 2.0**100:
        raise ValueError(f"std must be within 2^-100 to 2^100, got {std}")
    fraction, exponent = math.frexp(std)
    return math.ldexp(1.0, exponent - (9 if fraction == 1 / 2 else 8))


def extended(radius_word: int, tail_word: int) -> float:
    """The uniform of a radius word of 63 bits followed by a word of 64, at the middle of its 2^-127 cell: never 0."""
    return ((radius_word << 65) + 2 * tail_word + 1) / 2**128


def _pairs_in_piece(chunk: int | None, device: torch.device) -> int:
    most = _CPU_PIECE if device.type == "cpu" else _DEVICE_PIECE
    return most if chunk is None else min(most, -(-chunk // (2 * _GROUP)) * _GROUP)


@lru_cache(maxsize=8)
def _directions(device: torch.device) -> Tensor:
    """The table: e^(i 2 pi j / 4096), complex128, shape (4096,). Python's own cosine: the same whatever torch is."""
    turns = [2 * math.pi * j / _DIRECTIONS for j in range(_DIRECTIONS)]
    return torch.tensor([complex(math.cos(turn), math.sin(turn)) for turn in turns], dtype=torch.complex128, device=device)
