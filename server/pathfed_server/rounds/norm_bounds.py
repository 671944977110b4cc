"""How long an honest update can be: what clipping, noise and the number of steps allow.

An update is the mean over T steps of (sum over K_t drawn patients of vectors of norm at most C_g, plus noise of std s = sigma * C in each
of d coordinates) / B, where C_g = C * sqrt(1 - a^2). The T noises are independent Gaussians, so their sum has std s * sqrt(T), and

    |noise part| = s * sqrt(T) * X / (T * B), X^2 chi-square with d degrees of freedom;
    |patients' part| <= C_g * K / (T * B), K = sum of the K_t.

By the triangle inequality an honest update's norm lies within |noise part| -/+ |patients' part|. Each of three tails has a third of the
stated false-refusal probability, x = ln(3 / probability):

    - X^2 <= d + 2 sqrt(d x) + 2 x and X^2 >= d - 2 sqrt(d x), each but with probability e^-x
      (Laurent and Massart 2000, "Adaptive estimation of a quadratic functional by model selection", Lemma 1).
    - K is a sum of independent draws of mean m <= headroom * T * B, so K < m + x / 3 + sqrt(x^2 / 9 + 2 m x) but with probability e^-x
      (Chernoff's bound in Bernstein's form; Boucheron, Lugosi and Massart 2013, "Concentration Inequalities", section 2.8).

What the wire's rounding then does to the norm:

    - bfloat16, to the nearest: a share of at most 2^-8.
    - int8: number i of update u becomes u_i + e_i, with e_i of mean 0 over the site's coins and independent. With s_i its block's scale,
      the expected square of the whole is |u|^2 + sum Var(e_i), and sum Var(e_i) <= sum s_i^2 / 4 <= k |u|^2 / 4 with k = 256 / 127^2,
      because a block of at most 256 numbers has a largest magnitude of 127 s_i. A square (u_i + e_i)^2 has two possible values, which
      differ by at most 2 |u_i| s_i + s_i^2. With S the largest scale, Hoeffding's inequality (1963, Theorem 2) gives

          |u|^2 - c |u| <= |u + e|^2 <= (1 + k / 4) |u|^2 + c |u|,    c = S sqrt((4 + k) x),

      each but with probability e^-x. S is a 127th of the largest |u_i|, which is at most n sqrt(2 (ln d + x)) + |patients' part| for noise
      of std n in each coordinate, but with probability e^-x. These are six tails in all, and x = ln(6 / probability).

`headroom` is there because the rate is q = B / N for the number N a site *declares* at least; with headroom h the bounds hold for a site of
up to h * N patients.
"""

import math
from dataclasses import dataclass

from pathfed_common import wire_format
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.wire_format import WireType

#: An honest update is refused for its norm at most this often: once in 10^9 updates.
FALSE_REFUSAL = 1e-9
#: A site may hold up to this many times the patients it declares.
COHORT_HEADROOM = 4.0
#: fp32 rounding in clipping, summing and scaling together stays below this share.
_FP32_SHARE = 1e-4
_FP32_ULP = 2.0**-24
#: Half a unit in the last place of a bfloat16, as a share of the number.
_BF16_SHARE = 2.0**-8
#: k above, and what a scale may be too large by: it is rounded up to a float32, as the norms of shorter blocks are.
_INT8_SHARE = (1 + 1e-5) * wire_format.BLOCK / wire_format.LARGEST**2
_INT8_SCALE = (1 + 1e-5) / wire_format.LARGEST


@dataclass(frozen=True)
class NormBounds:
    """L2 norms that an honest update stays within, `least` <= norm <= `most`.

    Below `least` an update holds less noise than its statement says, above `most` something that no clipped patient can contribute.
    `least` is 0 where the patients' part could cancel the noise; it bites for encoders, whose d is in the millions.
    """

    least: float
    most: float


def norm_bounds(
    mechanism: PatientMechanism,
    *,
    steps: int,
    dimension: int,
    wire: WireType,
    base_norm: float = 0.0,
    local_learning_rate: float = 1.0,
    false_refusal: float = FALSE_REFUSAL,
    headroom: float = COHORT_HEADROOM,
) -> NormBounds:
    """The bounds for one update.

    Args:
        mechanism: the step's public constants (sigma, C, a, B).
        steps: T, private steps in the round.
        dimension: d, numbers in the update.
        wire: the format that the update was rounded to.
        base_norm: L2 norm of the base state; with several steps the update is a difference of fp32 states of about that norm.
        local_learning_rate: step size of the site's own SGD, which that difference is divided by.
        false_refusal: probability with which an honest update falls outside.
        headroom: patients a site may hold, as a multiple of those it declares.

    Raises:
        ValueError: an argument is out of bounds.
    """
    if steps < 1 or dimension < 1 or not 0 < false_refusal < 1 or headroom < 1 or base_norm < 0 or local_learning_rate <= 0:
        raise ValueError(f"out of bounds: {steps=}, {dimension=}, {false_refusal=}, {headroom=}, {base_norm=}, {local_learning_rate=}")
    x = math.log((6 if wire == "int8" else 3) / false_refusal)
    drawn = headroom * steps * mechanism.expected_patients
    drawn += x / 3 + math.sqrt(x * x / 9 + 2 * drawn * x)
    patients = mechanism.gradient_bound * drawn / (steps * mechanism.expected_patients)
    noise = mechanism.gradient_std / math.sqrt(steps)
    spread = 2 * math.sqrt(dimension * x)
    most = noise * math.sqrt(dimension + spread + 2 * x) + patients
    least = noise * math.sqrt(max(0.0, dimension - spread)) - patients
    share = _FP32_SHARE + (_BF16_SHARE if wire == "bfloat16" else 0.0)
    rounding = 0.0
    if steps > 1:
        # T local steps and one subtraction, each rounded in fp32 at about the state's size, then divided by T times the step size.
        moved = steps * local_learning_rate
        rounding = 2 * _FP32_ULP * (steps + 1) * (base_norm + moved * most) / moved
    bounds = NormBounds(least=max(0.0, least * (1 - share) - rounding), most=most * (1 + share) + rounding)
    if wire != "int8":
        return bounds
    largest = (noise * math.sqrt(2 * (math.log(dimension) + x)) + patients) * (1 + share) + rounding
    return _rounded(bounds, _INT8_SCALE * largest * math.sqrt((4 + _INT8_SHARE) * x))


def _rounded(bounds: NormBounds, spread: float) -> NormBounds:
    """Bounds after the rounding to int8; `spread` is c above."""
    least = math.sqrt(max(0.0, bounds.least * (bounds.least - spread)))
    return NormBounds(least=least, most=math.sqrt(bounds.most * ((1 + _INT8_SHARE / 4) * bounds.most + spread)))
