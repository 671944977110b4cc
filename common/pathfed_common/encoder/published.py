"""Fit a published checkpoint to an encoder: which of its tensors belong where, and what has to be done to them.

Published files differ in harmless ways: names carry the prefix of the module that held the encoder, numbers are float16, images had another
size, and a classifier or an objective's head lies beside the encoder. All of that is settled here by name and shape; what cannot be settled
so is never guessed.

    | in the file | outcome |
    | --- | --- |
    | a tensor of the wanted name and shape, floating point | matched; converted to float32 |
    | the position embedding of another square grid, same width | resampled, bicubic with antialias |
    | a tensor of the wanted name, but of another shape or not floating point | mis-shaped: the checkpoint is not usable |
    | no tensor of the wanted name | missing: not usable |
    | a tensor the encoder has no place for | extra: left out |
    | the whole encoder under several prefixes | refused: the caller has to choose |
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from pathfed_common.encoder.positions import resample_positions
from pathfed_common.encoder.spec import EncoderSpec, Shape

#: What stands before an encoder's names in the files of common training codes.
PREFIXES = ("", "model.", "encoder.", "backbone.", "module.", "teacher.backbone.")
_FLOATS = ("F64", "F32", "F16", "BF16")
_POSITIONS = "pos_embed"


class Outcome(StrEnum):
    """What becomes of a tensor."""

    MATCHED = "matched"
    RESAMPLED = "resampled"
    MISSING = "missing"
    MISSHAPED = "mis-shaped"
    EXTRA = "extra"


@dataclass(frozen=True)
class Finding:
    """One tensor of the encoder or of the file.

    Attributes:
        name: within the encoder; the name in the file for extra ones.
        outcome: what becomes of it.
        wanted: the encoder's shape, None for extra ones.
        found: the file's shape, None for missing ones.
        dtype: the file's number type as safetensors spells it, "" for missing ones.
    """

    name: str
    outcome: Outcome
    wanted: Shape | None
    found: Shape | None
    dtype: str


@dataclass(frozen=True)
class Match:
    """What became of every tensor of the encoder, in the encoder's order, and then of every extra one.

    Attributes:
        prefix: what the file writes before the encoder's names.
        findings: one for each tensor.
    """

    prefix: str
    findings: tuple[Finding, ...]

    def of(self, *outcomes: Outcome) -> tuple[Finding, ...]:
        """The findings with one of these outcomes."""
        return tuple(finding for finding in self.findings if finding.outcome in outcomes)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors had each outcome."""
        return {outcome.value: len(self.of(outcome)) for outcome in Outcome}

    @property
    def usable(self) -> bool:
        """Whether every tensor of the encoder is there."""
        return not self.of(Outcome.MISSING, Outcome.MISSHAPED)


def match(spec: EncoderSpec, found: Mapping[str, tuple[str, Shape]], *, prefix: str | None = None) -> Match:
    """Say what becomes of every tensor of a checkpoint.

    Args:
        spec: the encoder that is wanted, for the image size that is wanted.
        found: number type (safetensors' name) and shape of every tensor of the file.
        prefix: what stands before the encoder's names; None: the one of `PREFIXES` under which the whole encoder lies, or, if none holds
            the whole, the one that holds most of it.

    Raises:
        ValueError: the whole encoder lies under several prefixes.
    """
    start = _prefix(spec, found) if prefix is None else prefix
    findings = [_finding(spec, name, wanted, found.get(start + name)) for name, wanted in spec.shapes().items()]
    taken = {start + finding.name for finding in findings}
    extra = [Finding(name, Outcome.EXTRA, None, shape, dtype) for name, (dtype, shape) in sorted(found.items()) if name not in taken]
    return Match(prefix=start, findings=(*findings, *extra))


def converted(spec: EncoderSpec, finding: Finding, tensor: Tensor) -> Tensor:
    """The encoder's tensor, made of the file's: float32, the position embedding resampled where its finding says so.

    Raises:
        ValueError: the finding is not a matched or resampled one, or a number is not finite in float32.
    """
    if finding.outcome not in (Outcome.MATCHED, Outcome.RESAMPLED):
        raise ValueError(f"{finding.name} is {finding.outcome}")
    exact = tensor.detach().to(torch.float32)
    if not torch.isfinite(exact).all():
        raise ValueError(f"{finding.name} holds numbers that are not finite in float32")
    if finding.outcome is Outcome.MATCHED:
        return exact.contiguous()
    before = _old_grid(spec, exact.shape)
    count = exact.shape[1] - before**2
    patches = resample_positions(exact[:, count:], (before, before), (spec.grid, spec.grid))
    return torch.cat([exact[:, :count], patches], dim=1)


def _prefix(spec: EncoderSpec, found: Mapping[str, tuple[str, Shape]]) -> str:
    names = spec.shapes()
    present = {prefix: sum(prefix + name in found for name in names) for prefix in PREFIXES}
    whole = [prefix for prefix in PREFIXES if present[prefix] == len(names)]
    if len(whole) > 1:
        raise ValueError(f"the whole encoder lies under each of the prefixes {whole}")
    return whole[0] if whole else max(PREFIXES, key=present.__getitem__)


def _finding(spec: EncoderSpec, name: str, wanted: Shape, found: tuple[str, Shape] | None) -> Finding:
    if found is None:
        return Finding(name, Outcome.MISSING, wanted, None, "")
    dtype, shape = found
    if dtype not in _FLOATS:
        outcome = Outcome.MISSHAPED
    elif shape == wanted:
        outcome = Outcome.MATCHED
    else:
        outcome = Outcome.RESAMPLED if name == _POSITIONS and _old_grid(spec, shape) else Outcome.MISSHAPED
    return Finding(name, outcome, wanted, shape, dtype)


def _old_grid(spec: EncoderSpec, shape: Shape) -> int:
    """Side of the square grid that a position embedding of that shape was made for; 0 if it was made for none."""
    if len(shape) != 3 or shape[0] != 1 or shape[2] != spec.embed_dim:
        return 0
    patches = shape[1] - (0 if spec.no_embed_class else spec.prefix_tokens)
    side = math.isqrt(max(patches, 0))
    return side if side * side == patches else 0


def report(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """Findings as rows for people, name by name with both shapes.

    Tensors that differ in the number of their block alone share a row: ``blocks.0-31.attn.qkv.weight``.
    """
    rows: dict[tuple[str, str, Outcome, Shape | None, Shape | None, str], list[int]] = {}
    for finding in findings:
        before, block, after = _block(finding.name)
        rows.setdefault((before, after, finding.outcome, finding.wanted, finding.found, finding.dtype), []).append(block)
    return [
        {
            "tensor": before + _ranges(blocks) + after,
            "outcome": outcome.value,
            "encoder": _told(wanted),
            "file": f"{dtype} {_told(found)}".strip(),
        }
        for (before, after, outcome, wanted, found, dtype), blocks in rows.items()
    ]


def _block(name: str) -> tuple[str, int, str]:
    """A name in three: what stands before its block's number, that number (-1 for a name outside the blocks), and what stands after."""
    parts = re.fullmatch(r"((?:.*\.)?blocks\.)([0-9]{1,4})(\..*)", name)
    return (name, -1, "") if parts is None else (parts[1], int(parts[2]), parts[3])


def _ranges(numbers: list[int]) -> str:
    """Numbers in short, 0-3,5; nothing for names outside the blocks."""
    runs: list[list[int]] = []
    for number in sorted(number for number in numbers if number >= 0):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _told(shape: Shape | None) -> str:
    if shape is None:
        return ""
    return " x ".join(map(str, shape)) or "scalar"
