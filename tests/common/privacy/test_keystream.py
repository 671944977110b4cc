"""The keystream: published vectors, seeking."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common.privacy.keystream import Keystream, KeystreamBuffer

KEY = bytes(range(32))

# NIST SP 800-38A, appendix F.5.5 (CTR-AES256): the key, the initial counter block and the four output blocks.
NIST_KEY = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
NIST_COUNTER = 0xF0F1F2F3F4F5F6F7F8F9FAFBFCFDFEFF
NIST_BLOCKS = (
    "0bdf7df1591716335e9a8b15c860c5025a6e699d536119065433863c8f657b941bc12c9c01610d5d0d8bd6a3378eca622956e1c8693536b1bee99c73a31576b6"
)


def test_keystream_gives_the_blocks_of_the_nist_vector() -> None:
    assert Keystream(bytes.fromhex(NIST_KEY), first_word=2 * NIST_COUNTER).read(64).hex() == NIST_BLOCKS


def test_keystream_gives_the_blocks_of_a_published_vector_from_zero_on() -> None:
    # McGrew and Viega's GCM specification, test case 14 (zero key, zero counter start): the hash key is AES-256 of block 0, the
    # ciphertext of a zero plaintext is that of counter 2.
    stream = Keystream(bytes(32)).read(48)
    assert stream[:16].hex() == "dc95c078a2408989ad48a21492842087"
    assert stream[32:].hex() == "cea7403d4d606b6e074ec5d3baf39d18"


@given(block=st.integers(0, 200), blocks=st.integers(1, 50))
def test_entering_the_stream_later_gives_the_same_bytes(block: int, blocks: int) -> None:
    whole = Keystream(KEY).read(16 * 250)
    assert Keystream(KEY, first_word=2 * block).read(16 * blocks) == whole[16 * block : 16 * (block + blocks)]


def test_a_buffer_takes_the_words_that_reading_gives_and_is_used_again() -> None:
    buffer, stream = KeystreamBuffer(8), Keystream(KEY)
    buffer.fill(stream, 8)
    first = bytes(buffer.words)
    buffer.fill(stream, 4)
    assert first + bytes(buffer.words)[:32] == Keystream(KEY).read(96)


def test_a_long_buffer_is_filled_part_by_part() -> None:
    buffer = KeystreamBuffer(10_000)
    buffer.fill(Keystream(KEY), 10_000)
    assert bytes(buffer.words) == Keystream(KEY).read(80_000)


@pytest.mark.parametrize("word", [-2, 1, 3])
def test_a_place_within_a_block_is_refused(word: int) -> None:
    with pytest.raises(ValueError, match="first_word must be a multiple of 2"):
        Keystream(KEY, first_word=word)
