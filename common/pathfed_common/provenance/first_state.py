"""Whether a run started where its plan says: state 0 against the checkpoint that the plan names, and against its public seed.

- **Weights that the plan names** (`encoder.init_from`) are checked by digest. An encoder's file has one canonical form, so the tensors
  of the state give the very bytes that an import stored, and the digest of these is what the plan names. A teacher starts as a copy
  of the encoder, and is checked likewise. Nothing but the record is needed.
- **Weights drawn from the seed** (all others, `encoder.init_seed`) are drawn again and compared. That takes as much memory as the model,
  once. Releases of torch and processors may round a draw differently, so tensors count as drawn when they agree within `ROUNDING` of
  the largest number of the tensor, and the verdict tells that they are not equal. The draw is the same for torch 2.11 to 2.13.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pathfed_common import digest, model
from pathfed_common.encoder import weights
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.plan import Plan
from pathfed_common.provenance import record

#: How far a number may be from one drawn again, as a share of its tensor's largest. Float32 rounds at 6e-8.
ROUNDING = 1e-5

_WHERE = record.state_path(0)


@dataclass(frozen=True)
class FirstState:
    """What was found.

    Attributes:
        faults: what is wrong.
        note: what is worth knowing and not wrong, or None.
    """

    faults: tuple[ProvenanceError, ...]
    note: str | None = None


def check_first_state(state: Path, plan: Plan, *, redraw: bool) -> FirstState:
    """Compare a state with the plan's start.

    Args:
        state: the file; its tensors have the names, shapes and types of the plan's.
        plan: the plan.
        redraw: also draw again what the seed gives.

    Returns:
        What was found: PF630 for weights that are not the plan's.
    """
    faults = list(_imported_faults(state, plan))
    if not redraw:
        return FirstState(tuple(faults), "the first state's random weights were not drawn again")
    rounded = []
    for name, drawn in _drawn(plan).items():
        found = weights.read_tensor(state, name)
        if torch.equal(found.view(torch.uint8), drawn.contiguous().view(torch.uint8)):
            continue
        if not _agree(found, drawn):
            faults.append(
                ProvenanceError(
                    ErrorCode.FIRST_STATE,
                    f"the first state's weights are not those that the plan's seed gives with torch {torch.__version__}",
                    where=_WHERE,
                    value=name,
                    remedy="where the server's torch is another release, verify with that one before you judge",
                )
            )
            break  # one of them says it all
        rounded.append(name)
    note = f"the first state was drawn elsewhere: {len(rounded)} tensors agree with the seed's but for rounding" if rounded else None
    return FirstState(tuple(faults), note)


def _imported_faults(state: Path, plan: Plan) -> Iterator[ProvenanceError]:
    wanted = plan.encoder.init_from
    if not wanted:
        return
    for prefix in model.encoder_prefixes(plan):
        found = _encoder_digest(state, plan, prefix)
        if not digest.equal(found, wanted):
            yield ProvenanceError(
                ErrorCode.FIRST_STATE,
                f"the run did not start from the checkpoint that its plan names: {prefix.removesuffix('.')} has another digest",
                where=_WHERE,
                value=f"{found}, plan {wanted}",
            )


def _encoder_digest(state: Path, plan: Plan, prefix: str) -> digest.Digest:
    """Digest of the file that holds an encoder alone, made of the state's tensors whose names start with `prefix`."""
    read = weights.reader(state)
    return digest.of_chunks(weights.encoder_chunks(model.encoder_spec(plan).shapes(), lambda name: read(prefix + name)))


def _drawn(plan: Plan) -> dict[str, Tensor]:
    """The tensors of the first state that the seed gives, by name."""
    seeded = plan.model_copy(update={"encoder": plan.encoder.model_copy(update={"init_from": ""})})
    names = model.encoder_spec(plan).shapes() if plan.encoder.init_from else {}
    # Adapters are drawn, whatever the encoder starts from.
    given = {prefix + name for prefix in model.encoder_prefixes(plan) for name in names}
    return {name: tensor for name, tensor in model.initial_state(seeded).items() if name not in given}


def _agree(found: Tensor, drawn: Tensor) -> bool:
    # A difference that is no number agrees with nothing.
    return bool((found - drawn).abs().max() <= ROUNDING * drawn.abs().max())
