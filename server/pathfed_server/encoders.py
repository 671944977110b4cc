"""Checkpoints that plans start from: published encoders, brought into pathfed's form once and named by their digest from then on.

    <home>/checkpoints/<64 hex digits>.safetensors    float32, timm's names, the canonical form of `encoder.weights`

A file is read by the safetensors library alone. Pickles (.bin, .pt, .pth) can run code when they are opened, and are refused.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from pathfed_common import digest, files
from pathfed_common.encoder import weights
from pathfed_common.encoder.published import Finding, Match, Outcome, converted, match, report
from pathfed_common.encoder.spec import EncoderSpec, Shape
from pathfed_common.errors import ErrorCode, HostError, PlanError
from pathfed_common.model import encoder_spec
from pathfed_common.part_file import file_digest
from pathfed_common.plan import Plan
from pathfed_server.home import ServerHome

_PICKLE_NAMES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NAMED = 12


@dataclass(frozen=True)
class Imported:
    """A checkpoint in the server's home.

    Attributes:
        digest: what a plan's `encoder.init_from` names it by.
        path: where it is.
        match: what became of the file's tensors.
    """

    digest: digest.Digest
    path: Path
    match: Match


def import_checkpoint(
    home: ServerHome, file: Path, spec: EncoderSpec, *, prefix: str | None = None, tell: Callable[[Match], None] = lambda _: None
) -> Imported:
    """Bring a published checkpoint into the server's home; whole or not at all, one tensor in memory at a time.

    Args:
        home: the server's.
        file: a safetensors file.
        spec: the encoder it is for, and the image size.
        prefix: see `published.match`.
        tell: told what matched, before anything is refused for it.

    Raises:
        PlanError: PF107, not a safetensors file; PF108, it is not this encoder, or holds numbers that are not finite.
        HostError: PF904, it cannot be read, or the home cannot be written; PF901, the disk is full.
    """
    _refuse_pickle(file)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: _header(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            matched = _matched(spec, found, prefix, file)
            tell(matched)
            _refuse_unfit(matched, file)

            def tensor(name: str) -> Tensor:
                return _converted(spec, finding[name], opened.get_tensor(matched.prefix + name), file)

            finding = {one.name: one for one in matched.findings}
            return _stored(home, spec, tensor, matched)
    except SafetensorError as error:
        raise PlanError(
            ErrorCode.CHECKPOINT_UNREADABLE,
            f"not a safetensors file, or a damaged one: {error}",
            where=file,
            remedy="download it again and compare its checksum with the publisher's",
        ) from None


class StoredEncoder(Mapping[str, Tensor]):
    """The tensors of a checkpoint in the server's home by timm's names, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._names, self._read = weights.header(path), weights.reader(path)

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stored_encoder(home: ServerHome, plan: Plan) -> StoredEncoder | None:
    """The weights that a plan's encoder starts from; None: random ones. Their digest and shapes are checked.

    Raises:
        PlanError: PF109, the server does not have them, they have changed on the disk, or they are another encoder's.
    """
    if not plan.encoder.init_from:
        return None
    path = home.checkpoint(digest.parse(plan.encoder.init_from))
    try:
        found = file_digest(path)
    except OSError as error:
        raise _unusable(plan, f"the server does not have this checkpoint: {error.strerror}", path, _import_again(plan)) from None
    if not digest.equal(found, plan.encoder.init_from):
        raise _unusable(plan, f"the checkpoint has changed on the disk: its digest is {found}", path, _import_again(plan))
    try:
        stored = weights.header(path)
    except ValueError as error:
        raise _unusable(plan, f"not a checkpoint as an import leaves it: {error}", path, _import_again(plan)) from None
    wanted = {name: (torch.float32, shape) for name, shape in encoder_spec(plan).shapes().items()}
    other = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
    if other:
        named = ", ".join(other[:_NAMED]) + (f" and {len(other) - _NAMED} more" if len(other) > _NAMED else "")
        raise _unusable(plan, f"the checkpoint is another encoder's, or one for other tiles: {named} differ", path, _import_again(plan))
    return StoredEncoder(path)


def _refuse_pickle(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            start = opened.read(9)
    except OSError as error:
        raise HostError(ErrorCode.HOME_UNUSABLE, f"cannot be read: {error.strerror}", where=file) from None
    # torch's own files are zips of pickles. A pickle starts with the byte 80, as a safetensors file may too, whose header starts with {.
    pickled = start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[8:] != b"{")
    if pickled or file.suffix.lower() in _PICKLE_NAMES:
        raise PlanError(
            ErrorCode.CHECKPOINT_UNREADABLE,
            "a pickle can run any code when it is opened, so it is not opened",
            where=file,
            remedy="take the publisher's .safetensors file",
        )


def _header(part: object) -> tuple[str, Shape]:
    # The library types its slices as Any.
    return str(part.get_dtype()), tuple(int(side) for side in part.get_shape())  # type: ignore[attr-defined]


def _matched(spec: EncoderSpec, found: Mapping[str, tuple[str, Shape]], prefix: str | None, file: Path) -> Match:
    try:
        return match(spec, found, prefix=prefix)
    except ValueError as error:
        raise PlanError(ErrorCode.CHECKPOINT_UNFIT, str(error), where=file, remedy="say which is meant with --prefix") from None


def _refuse_unfit(matched: Match, file: Path) -> None:
    if matched.usable:
        return
    faults = report(matched.of(Outcome.MISSING, Outcome.MISSHAPED))
    named = "; ".join(
        f"{row['tensor']} {row['outcome']}: wanted {row['encoder']}, found {row['file'] or 'none'}" for row in faults[:_NAMED]
    )
    raise PlanError(
        ErrorCode.CHECKPOINT_UNFIT,
        f"the checkpoint is not this encoder: {len(matched.of(Outcome.MISSING))} parameters are missing and "
        f"{len(matched.of(Outcome.MISSHAPED))} mis-shaped, under the prefix {matched.prefix!r}",
        where=file,
        value=named + (f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""),
    )


def _converted(spec: EncoderSpec, finding: Finding, tensor: Tensor, file: Path) -> Tensor:
    try:
        return converted(spec, finding, tensor)
    except ValueError as error:
        raise PlanError(ErrorCode.CHECKPOINT_UNFIT, str(error), where=file, remedy="take the publisher's original file") from None


def _stored(home: ServerHome, spec: EncoderSpec, tensor: Callable[[str], Tensor], matched: Match) -> Imported:
    state = sha256()

    def noted() -> Iterator[bytes]:
        for chunk in weights.encoder_chunks(spec.shapes(), tensor):
            state.update(chunk)
            yield chunk

    try:
        files.make_folder(home.checkpoints, mode=0o700)
    except OSError as error:
        raise files.disk_error(error, home.checkpoints) from error
    # The name is known when the last byte is written.
    unnamed = home.checkpoints / f"importing-{os.getpid()}"
    try:
        files.write_atomic(unnamed, noted())
        named = digest.Digest(f"sha256:{state.hexdigest()}")
        unnamed.replace(home.checkpoint(named))
    finally:
        unnamed.unlink(missing_ok=True)
    files.sync_folder(home.checkpoints)
    return Imported(digest=named, path=home.checkpoint(named), match=matched)


def _unusable(plan: Plan, what: str, path: Path, remedy: str) -> PlanError:
    return PlanError(ErrorCode.CHECKPOINT_UNAVAILABLE, what, where=path, value=plan.encoder.init_from, remedy=remedy)


def _import_again(plan: Plan) -> str:
    return (
        f"import the published file with `pathfed-server encoder import FILE --preset {plan.encoder.preset} "
        f"--tile-px {plan.cohort.tile_px}`, and let encoder.init_from name the digest it prints"
    )
