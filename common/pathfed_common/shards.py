"""How a file is cut for the way: shards of 64 MiB, each named by its digest, and the manifest that lists them.

    file      |------- shard 0 -------|------- shard 1 -------|-- shard 2 --|
    offset    0                       64 MiB                  128 MiB       size

The file keeps its name, the digest of all its bytes: that is what offers and statements sign. A manifest is a claim of whoever sends it:
shards are verified against it while they arrive, and the whole file against its name before it is used. So a lie in a manifest costs a
transfer, and nothing else. Equal bytes at the same place of two files are one shard, which travels once.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias

from pathfed_common import digest
from pathfed_common.digest import Digest

#: Bytes on the way, which nobody keeps.
Piece: TypeAlias = bytes | memoryview

SHARD_BYTES: Final = 64 * 2**20
#: Bytes of one message on the way: the size at which gRPC moves most (docs/benchmarks).
PIECE_BYTES: Final = 2**20
#: Largest file, bytes: a float32 state of 68 thousand million parameters. Its manifest has 4,096 shards and 128 kB.
LARGEST_FILE: Final = 2**38


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a file consists of.

    Attributes:
        file: digest of the whole file.
        size: its length, bytes.
        shards: digest of each shard, in order.

    Raises:
        ValueError: a size out of bounds, or another number of shards than it takes.
    """

    file: Digest
    size: int
    shards: tuple[Digest, ...]

    def __post_init__(self) -> None:
        digest.parse(self.file)
        if not 1 <= self.size <= LARGEST_FILE:
            raise ValueError(f"size must be 1 to {LARGEST_FILE} bytes, got {self.size}")
        if len(self.shards) != shard_count(self.size):
            raise ValueError(f"{self.size} bytes are {shard_count(self.size)} shards, got {len(self.shards)}")
        for shard in self.shards:
            digest.parse(shard)

    def extent(self, index: int) -> tuple[int, int]:
        """First and last-plus-one byte of a shard.

        Raises:
            ValueError: there is no such shard.
        """
        if not 0 <= index < len(self.shards):
            raise ValueError(f"index must be 0 to {len(self.shards) - 1}, got {index}")
        return index * SHARD_BYTES, min(self.size, (index + 1) * SHARD_BYTES)

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return digest.canonical({"file": self.file, "size": self.size, "shards": list(self.shards)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a manifest back.

        Raises:
            ValueError: not a manifest.
        """
        try:
            raw: dict[str, Any] = json.loads(data)
            return cls(file=raw["file"], size=int(raw["size"]), shards=tuple(raw["shards"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a manifest: {error}") from None


def shard_count(size: int) -> int:
    """How many shards a file of that many bytes has."""
    return -(-size // SHARD_BYTES)


def pieces_of(start: int, end: int) -> Iterable[tuple[int, int]]:
    """The messages that carry bytes `start` to `end` (excluded) of a shard: first and last-plus-one byte of each."""
    for first in range(start, end, PIECE_BYTES):
        yield first, min(end, first + PIECE_BYTES)
