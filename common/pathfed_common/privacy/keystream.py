"""The keystream that every draw is made of: AES-256 in counter mode, which can be read from any place.

Block j of the stream is AES-256 of the 128-bit big-endian number j (NIST SP 800-38A, section 6.5, with a counter that starts at zero):
to seek is to start at another number. A key is used for one stream and nothing else, so no block of it stands for two things.
"""

_BLOCK_BYTES = 16
WORD_BYTES = 8
#: Words in one block of the cipher; a stream is entered between blocks.
BLOCK_WORDS = _BLOCK_BYTES // WORD_BYTES
#: What is enciphered, a part at a time that stays in a core's first cache.
_ZEROS = memoryview(bytes(1 << 15))


class Keystream:
    """The stream of one key, from one of its words on."""

    __slots__ = ("_update", "_update_into")

    def __init__(self, key: bytes, *, first_word: int = 0) -> None:
        """Enter the stream of a key.

        Args:
            key: 32 bytes, used for nothing else.
            first_word: number of the 64-bit word that comes next, a multiple of 2.

        Raises:
            ValueError: the word is negative or within a block of the cipher.
        """
        if first_word < 0 or first_word % BLOCK_WORDS:
            raise ValueError(f"first_word must be a multiple of {BLOCK_WORDS} and not negative, got {first_word}")
        # Imported here: encoder, objectives and the private step must import on a host that has torch and numpy alone.
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        counter = (first_word // BLOCK_WORDS).to_bytes(_BLOCK_BYTES, "big")
        context = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()
        self._update, self._update_into = context.update, context.update_into

    def read(self, n: int) -> bytes:
        """The next n bytes."""
        return self._update(bytes(n))


class KeystreamBuffer:
    """A place to read up to `words` words of a stream into, again and again: nothing is allocated a second time."""

    def __init__(self, words: int) -> None:
        # The cipher asks for room for one more block, short of a byte, than it writes.
        self._room = memoryview(bytearray(words * WORD_BYTES + _BLOCK_BYTES - 1))
        #: The place itself: words, little endian.
        self.words = self._room[: words * WORD_BYTES]

    def fill(self, stream: Keystream, words: int) -> None:
        """Put the next words of a stream there, from the start on."""
        size = words * WORD_BYTES
        for start in range(0, size, len(_ZEROS)):
            stream._update_into(_ZEROS[: size - start], self._room[start:])
