"""The teacher of a self-distilling objective: after each round it moves toward the new state.

    teacher' = m * teacher + (1 - m) * state'

The new state is made of noised sums alone, and so is the teacher: what follows from private results costs no privacy (post-processing).
At a site it is constant, over several local steps too.

The share m is the plan's; with the cosine schedule of DINO (Caron et al. 2021, arXiv:2104.14294, section 3.1) and BYOL (Grill et al. 2020,
arXiv:2006.07733, section 3.2) it rises to 1 in the last round, T rounds in all: m_t = 1 - (1 - m_1) (1 + cos(pi (t-1) / (T-1))) / 2. In the
papers t counts steps, of which there are many more than rounds here: shares near the papers' .99 would leave the teacher where it began.
"""

from decimal import Context, Decimal

import torch
from torch import Tensor

from pathfed_common.plan import TeacherSchedule

_PI = Decimal("3.14159265358979323846264338327950288419716939937510")
#: Decimal arithmetic is exactly rounded by definition, so that, unlike libm's cosine, this has the same bits everywhere.
_EXACT = Context(prec=50)
_TERMS = 24


def share_kept(schedule: TeacherSchedule, *, round_index: int, rounds: int) -> float:
    """m_t of round t = `round_index`, 1 for the first, of that many rounds. A run of one round has the first one's.

    Raises:
        ValueError: the round is not one of them.
    """
    if not 1 <= round_index <= rounds:
        raise ValueError(f"round_index must be from 1 to {rounds}, got {round_index}")
    if schedule.schedule == "constant" or rounds == 1:
        return schedule.momentum
    part = _EXACT.divide(Decimal(round_index - 1), Decimal(rounds - 1))
    fall = _EXACT.divide(_EXACT.add(1, _cosine(_EXACT.multiply(_PI, part))), 2)
    return float(_EXACT.subtract(1, _EXACT.multiply(_EXACT.subtract(1, Decimal(schedule.momentum)), fall)))


def next_teacher(value: Tensor, followed: Tensor, kept: float) -> Tensor:
    """Numbers of the teacher after a round, float32: single float64 operations, rounded once.

    Args:
        value: the teacher's numbers before.
        followed: those of the new state that they follow.
        kept: m, the share of itself that it keeps.
    """
    return value.to(torch.float64).mul(kept).add(followed.to(torch.float64).mul(1 - kept)).to(torch.float32)


def _cosine(angle: Decimal) -> Decimal:
    """Cosine of an angle in [0, pi], by its Taylor series; to 1e-20 and better."""
    term = total = Decimal(1)
    square = _EXACT.multiply(angle, angle)
    for index in range(1, _TERMS):
        term = _EXACT.divide(_EXACT.multiply(term, -square), Decimal((2 * index - 1) * 2 * index))
        total = _EXACT.add(total, term)
    return total
