"""Whether the tensors in a record's states and exported encoder are what its plan and its last state make them.

Reads files, through `encoder.weights`; the documents were checked before.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from pathfed_common import digest, model
from pathfed_common.encoder import weights
from pathfed_common.encoder.blocks import BlockReader, FileBlocks, spans
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.provenance import record
from pathfed_common.provenance.consistency import Contents
from pathfed_common.released_encoder import ReleasedEncoder

Faults = Iterator[ProvenanceError]


def shape_faults(folder: Path, contents: Contents, rounds: range | tuple[int, ...]) -> Faults:
    """States that the manifest does not list, or whose tensors are not those of the plan's model.

    Args:
        folder: the record.
        contents: its documents.
        rounds: rounds whose states are looked at.
    """
    shapes = model.state_shapes(contents.plan)
    expected = {name: (torch.float32, shape) for name, shape in sorted(shapes.items())}
    for index in rounds:
        path = record.state_path(index)
        if contents.manifest.entry(path) is None:
            yield ProvenanceError(ErrorCode.RECORD_INCOMPLETE, "a round's state is missing", where=path)
        elif _header(folder / path) != expected:
            yield ProvenanceError(ErrorCode.RECORD_CHANGED, "the state's tensors are not those of the plan's model", where=path)


def frozen_faults(folder: Path, contents: Contents, rounds: range | tuple[int, ...]) -> Faults:
    """States in which a tensor that the plan does not train, or a teacher's copy of one, is not the first state's, bit for bit.

    Args:
        folder: the record; its states have the plan's tensors.
        contents: its documents.
        rounds: rounds whose states are looked at.
    """
    is_trained = model.trained(contents.plan)
    kept = [name for name in model.state_shapes(contents.plan) if not is_trained(name.removeprefix(model.TEACHER_PREFIX))]
    if not kept:
        return
    first = weights.reader(folder / record.state_path(0))
    for index in rounds:
        path = record.state_path(index)
        here = weights.reader(folder / path)
        changed = next((name for name in kept if not torch.equal(here(name).view(torch.uint8), first(name).view(torch.uint8))), None)
        if changed is not None:
            yield ProvenanceError(ErrorCode.RECORD_CHANGED, "a tensor that the plan does not train has changed", where=path, value=changed)


def exported_faults(folder: Path, contents: Contents) -> Faults:
    """An exported encoder that is half there, or not the last state's bit for bit (with a running average: not the last round's).

    None is no fault.
    """
    exported = [contents.manifest.entry(path) for path in (record.ENCODER, record.ENCODER_CONFIG)]
    if exported.count(None) == 1:
        yield ProvenanceError(ErrorCode.RECORD_INCOMPLETE, "weights or configuration of the exported encoder is missing", where="encoder")
    elif None not in exported:
        yield from _encoder_faults(folder, contents)


def _encoder_faults(folder: Path, contents: Contents) -> Faults:
    state, encoder = folder / record.state_path(contents.manifest.rounds), folder / record.ENCODER
    shapes = model.encoder_spec(contents.plan).shapes()
    if _header(encoder) != {name: (torch.float32, shape) for name, shape in sorted(shapes.items())} or _header(state) is None:
        yield ProvenanceError(
            ErrorCode.RECORD_CHANGED, "the exported encoder's tensors are not those of the plan's encoder", where=record.ENCODER
        )
        return
    if contents.plan.server_optimiser.ema:
        yield from _average_faults(contents)
    else:
        yield from _state_faults(FileBlocks(encoder), ReleasedEncoder(contents.plan, FileBlocks(state)))
    if (folder / record.ENCODER_CONFIG).read_bytes() != digest.canonical(model.timm_config(contents.plan)):
        yield ProvenanceError(
            ErrorCode.RECORD_CHANGED, "the exported encoder's configuration is not the plan's", where=record.ENCODER_CONFIG
        )


def _average_faults(contents: Contents) -> Faults:
    entry, due = contents.manifest.entry(record.ENCODER), contents.rounds[-1][0].average if contents.rounds else None
    if entry is None or entry.digest != due:
        yield ProvenanceError(
            ErrorCode.RECORD_CHANGED, "the exported encoder is not the average that the last round names", where=record.ENCODER, value=due
        )


def _state_faults(encoder: BlockReader, due: BlockReader) -> Faults:
    for name, shape in due.shapes.items():
        # Compared as bytes: a NaN equals itself here, and zero does not equal minus zero.
        pairs = ((encoder.read(name, *span), due.read(name, *span)) for span in spans(prod(shape)))
        if not all(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) for ours, theirs in pairs):
            yield ProvenanceError(
                ErrorCode.RECORD_CHANGED, "the exported encoder is not the last state's", where=record.ENCODER, value=name
            )


def _header(path: Path) -> dict[str, tuple[torch.dtype, weights.Shape]] | None:
    try:
        return weights.header(path)
    except ValueError:
        return None
