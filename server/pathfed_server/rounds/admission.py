"""Admission: what an update must be before it counts. Cheap checks first, then one pass over the bytes and one over the tensors.

| in this order | otherwise |
| --- | --- |
| the statement is signed by the site's evidence key and can be read | PF504, PF405 |
| it names this site, run and plan | PF504 |
| it names this round and base state | PF509 |
| it states the plan's mechanism for the site's declared patients: rate, noise, clip norm, steps, delta, noise of the figures | PF517 |
| its figures are such as patients and that noise give (an honest site's are not once in 10^11 rounds) | PF517 |
| the file has the stated length and digest | PF505 |
| it holds exactly the plan's tensors: names, shapes, wire dtype | PF506 |
| every number is finite | PF507 |
| int8 numbers are such as rounding gives: scales not below 0, the largest number of a block 126 or 127 | PF550 |
| its norm is one that clipping and noise allow (`norm_bounds`: an honest update is refused once in 10^9) | PF508 |

That a site is still enrolled and its approval stands (PF518, PF530, PF565), that it sends one update a round (PF509), and in time (PF561),
is `collection`'s to see. An operator may overrule the norm alone (`refusals`). Memory: one block.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from pathfed_common import digest, wire_format
from pathfed_common.digest import Digest
from pathfed_common.encoder import weights as tensor_files
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import RunName
from pathfed_common.part_file import file_digest
from pathfed_common.plan import Plan
from pathfed_common.provenance.statement import Figures, UpdateStatement
from pathfed_server.rounds.norm_bounds import NormBounds, norm_bounds
from pathfed_server.rounds.norms import l2_norm
from pathfed_server.rounds.participants import Participant

#: Room for the header of an update, beside its numbers: 512 bytes a tensor and 64 kB.
_HEADER_PER_TENSOR, _HEADER_FIXED = 512, 65_536
#: Stated stds of figures are computed in float64 by sites, step by step.
_STD_TOLERANCE = 1e-9
#: How many standard deviations of its noise a figure may lie beside what patients give: a Gaussian lies beyond 7 once in 8 * 10^11.
_FIGURE_STDS = 7.0
#: More patients than any hospital draws in a step. A figure without a bound would be summed up, drawn and printed as whatever a site says.
_MOST_PATIENTS = 1e9


@dataclass(frozen=True, kw_only=True)
class RoundTerms:
    """What every update of a round must fit.

    Attributes:
        run: the run.
        round_index: 1 for the first.
        plan: the plan.
        plan_digest: its digest.
        base_state: digest of the round's base state.
        base_norm: L2 norm of the base state's trained tensors.
        shapes: shape of each of the update's tensors, by name.
    """

    run: RunName
    round_index: int
    plan: Plan
    plan_digest: Digest
    base_state: Digest
    base_norm: float
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def layout(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of an update's file, by name."""
        return wire_format.layout(self.shapes, self.plan.wire.dtype)

    @property
    def dimension(self) -> int:
        """How many numbers an update has."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def most_bytes(self) -> int:
        """Largest file that an update may be: its numbers, and room for a header."""
        numbers = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.layout.values())
        return numbers + _HEADER_FIXED + _HEADER_PER_TENSOR * len(self.layout)

    def bounds(self, participant: Participant) -> NormBounds:
        """The norms an honest update of this site may have."""
        rounds = self.plan.rounds
        return norm_bounds(
            participant.mechanism,
            steps=rounds.steps,
            dimension=self.dimension,
            wire=self.plan.wire.dtype,
            base_norm=self.base_norm,
            local_learning_rate=rounds.local_learning_rate,
        )


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """An update that counts.

    Attributes:
        statement: what the site states of it.
        envelope: the signed statement's bytes.
        norm: its L2 norm.
        rounding: bound on the L2 norm of what the wire format's rounding added (`wire_format`).
    """

    statement: UpdateStatement
    envelope: bytes
    norm: float
    rounding: float

    @property
    def statement_digest(self) -> Digest:
        """Digest of the envelope, which names the statement."""
        return digest.of_bytes(self.envelope)


@dataclass(frozen=True)
class Refused:
    """An update that does not count.

    Attributes:
        code: why.
        detail: more about it, for the server's own log.
    """

    code: ErrorCode
    detail: str


class _RefusalError(Exception):
    """Carries a refusal out of the checks."""

    def __init__(self, code: ErrorCode, detail: str) -> None:
        super().__init__(detail)
        self.refused = Refused(code, detail)


def admit(
    terms: RoundTerms, participant: Participant, *, envelope: bytes, update: Path, waived: frozenset[str] = frozenset()
) -> Admitted | Refused:
    """Decide on one update.

    Args:
        terms: what the round's updates must fit.
        participant: the site, as the transport authenticated it and as it was asked.
        envelope: the signed statement (DSSE bytes).
        update: the spooled file.
        waived: codes that an operator has overruled; only that of the norm (PF508) is looked at, every other check holds whatever it says.

    Raises:
        OSError: the spooled file cannot be read, a fault of ours and not the site's.
    """
    try:
        statement = _open(participant, envelope)
        _check_names(terms, participant, statement)
        _check_privacy(terms, participant, statement)
        _check_bytes(terms, statement, update)
        bounds = None if ErrorCode.UPDATE_NORM in waived else terms.bounds(participant)
        norm, rounding = _check_numbers(terms, bounds, update)
    except _RefusalError as refusal:
        return refusal.refused
    return Admitted(statement=statement, envelope=envelope, norm=norm, rounding=rounding)


def _open(participant: Participant, envelope: bytes) -> UpdateStatement:
    try:
        return UpdateStatement.from_envelope(envelope, participant.key)
    except ProvenanceError as error:
        code = ErrorCode.UPDATE_SIGNATURE if error.code is ErrorCode.RECORD_SIGNATURE else ErrorCode.MESSAGE_MALFORMED
        raise _RefusalError(code, error.what) from None


def _check_names(terms: RoundTerms, participant: Participant, statement: UpdateStatement) -> None:
    signed_for = (statement.site, statement.run, statement.plan)
    if signed_for != (participant.site, terms.run, terms.plan_digest):
        raise _RefusalError(ErrorCode.UPDATE_SIGNATURE, f"signed for {signed_for}")
    if statement.round_index != terms.round_index:
        raise _RefusalError(ErrorCode.UPDATE_STALE, f"for round {statement.round_index}, this is {terms.round_index}")
    if not digest.equal(statement.base_state, terms.base_state):
        raise _RefusalError(ErrorCode.UPDATE_STALE, f"made on base state {statement.base_state}")


def _check_privacy(terms: RoundTerms, participant: Participant, statement: UpdateStatement) -> None:
    stated, mechanism, steps = statement.privacy, participant.mechanism, terms.plan.rounds.steps
    wanted = {
        "sampling_rate": (stated.sampling_rate, mechanism.sampling_rate),
        "noise_multiplier": (stated.noise_multiplier, mechanism.noise_multiplier),
        "clip_norm": (stated.clip_norm, mechanism.clip_norm),
        "steps": (stated.steps, steps),
        "delta": (stated.delta, terms.plan.privacy.delta),
    }
    for name, (found, due) in wanted.items():
        if found != due:
            raise _RefusalError(ErrorCode.UPDATE_PRIVACY, f"states {name} {found}, the plan gives {due}")
    stds = {
        "loss_sum_std": (statement.figures.loss_sum_std, mechanism.loss_sum_std),
        "patients_std": (statement.figures.patients_std, mechanism.patients_std),
    }
    for name, (found, one_step) in stds.items():
        if not math.isclose(found, one_step * math.sqrt(steps), rel_tol=_STD_TOLERANCE):
            raise _RefusalError(ErrorCode.UPDATE_PRIVACY, f"states {name} {found}, the plan gives {one_step * math.sqrt(steps)}")
    _check_figures(terms, statement.figures)


def _check_figures(terms: RoundTerms, figures: Figures) -> None:
    """Each drawn patient counts once and has a loss of 0 to `loss_bound`; noise comes on top."""
    bound, steps = terms.plan.privacy.loss_bound, terms.plan.rounds.steps
    room = _FIGURE_STDS * figures.patients_std
    if not -room <= figures.patients <= _MOST_PATIENTS * steps + room:
        raise _RefusalError(ErrorCode.UPDATE_PRIVACY, f"states {figures.patients:.6g} patients")
    # The loss of those that were drawn, at most; with the noise of both figures, which are independent.
    most = bound * figures.patients + _FIGURE_STDS * math.hypot(figures.loss_sum_std, bound * figures.patients_std)
    if not -_FIGURE_STDS * figures.loss_sum_std <= figures.loss_sum <= most:
        raise _RefusalError(ErrorCode.UPDATE_PRIVACY, f"states a loss of {figures.loss_sum:.6g} for {figures.patients:.6g} patients")


def _check_bytes(terms: RoundTerms, statement: UpdateStatement, update: Path) -> None:
    size = update.stat().st_size
    if size != statement.update_bytes:
        raise _RefusalError(ErrorCode.UPDATE_DIGEST, f"{size} bytes came, {statement.update_bytes} were signed")
    if size > terms.most_bytes:
        raise _RefusalError(ErrorCode.UPDATE_SHAPE, f"{size} bytes are more than the plan's tensors need")
    if not digest.equal(file_digest(update), statement.update):
        raise _RefusalError(ErrorCode.UPDATE_DIGEST, "the bytes do not have the signed digest")


def _check_numbers(terms: RoundTerms, bounds: NormBounds | None, update: Path) -> tuple[float, float]:
    """Norm and rounding of an update whose tensors and numbers are fit."""
    try:
        found = tensor_files.header(update)
    except ValueError as error:
        raise _RefusalError(ErrorCode.UPDATE_SHAPE, str(error)) from None
    if found != terms.layout:
        different = sorted(name for name in {*found, *terms.layout} if found.get(name) != terms.layout.get(name))
        raise _RefusalError(ErrorCode.UPDATE_SHAPE, f"{len(different)} tensors differ from the plan's, the first is {different[0][:80]!r}")
    norm = file_norm(update)
    if not math.isfinite(norm):
        raise _RefusalError(ErrorCode.UPDATE_NOT_FINITE, "a number is not finite")
    try:
        rounding = wire_format.open_update(update).rounding()
    except ValueError as error:
        raise _RefusalError(ErrorCode.UPDATE_QUANTISED, str(error)[:200]) from None
    if bounds is not None and not bounds.least <= norm <= bounds.most:
        raise _RefusalError(ErrorCode.UPDATE_NORM, f"norm {norm:.6g} is outside [{bounds.least:.6g}, {bounds.most:.6g}]")
    return norm, rounding


def file_norm(path: Path, *, only: Callable[[str], bool] = lambda _: True) -> float:
    """L2 norm over the tensors of a file, see `norms.l2_norm`; not finite exactly when one of their numbers is not.

    Args:
        path: the file.
        only: which tensors count, by name.

    Raises:
        ValueError: not such a file.
        OSError: the file cannot be read.
    """
    return l2_norm(wire_format.open_update(path), only=only)
