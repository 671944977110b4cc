"""Private keys of people, in files under a passphrase: written and opened by the commands of both sides.

A passphrase comes from the terminal, from a file's first line, or from standard input; never from the command line, which shells keep and
other processes of the machine may read.
"""

import sys
from pathlib import Path

import typer

from pathfed_common import files
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.provenance.keys import SigningKey

SHORTEST = 8
_ENCRYPTED = b"ENCRYPTED"


def open_key(path: Path, passphrase_from: str | None) -> SigningKey:
    """A person's private key; the passphrase is asked for where the file has one and none is given.

    Raises:
        HostError: PF906, the file is missing, open to others, no such key, or the passphrase is another; PF904, the passphrase's file.
    """
    pem = files.read_secret(path)
    try:
        return SigningKey.from_pem(pem, _passphrase(passphrase_from, path) if _ENCRYPTED in pem else None)
    except HostError as error:
        raise HostError(error.code, error.what, where=path, value=error.value, remedy=error.remedy) from None


def write_key(path: Path, key: SigningKey, passphrase_from: str | None) -> None:
    """Write a person's private key under a passphrase, for its owner's eyes (0600).

    Raises:
        HostError: PF904, something is there already, or it cannot be written; PF906, the passphrase is shorter than `SHORTEST`.
    """
    if path.exists() or path.is_symlink():
        raise HostError(ErrorCode.HOME_UNUSABLE, "something is there already and is left as it is", where=path, remedy="name another file")
    passphrase = _passphrase(passphrase_from, path, twice=True)
    if len(passphrase) < SHORTEST:
        raise HostError(ErrorCode.KEY_FILE, f"a passphrase has at least {SHORTEST} bytes", where=path, value=f"{len(passphrase)} bytes")
    files.write_atomic(path, key.to_pem(passphrase), secret=True)


def _passphrase(source: str | None, path: Path, *, twice: bool = False) -> bytes:
    if source == "-":
        return sys.stdin.buffer.readline().rstrip(b"\r\n")
    if source is not None:
        return files.read_given(Path(source)).split(b"\n", 1)[0].rstrip(b"\r")
    if not sys.stdin.isatty():
        raise HostError(
            ErrorCode.KEY_FILE,
            "the key's passphrase is needed, and there is no terminal to ask for it",
            where=path,
            remedy="give --passphrase-from a file, or - for standard input",
        )
    return str(typer.prompt(f"Passphrase of {path}", hide_input=True, confirmation_prompt=twice)).encode()
