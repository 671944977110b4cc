"""The mechanism: one patient's whole contribution to one private step, and the noise that covers it.

Neighbouring relation: **add or remove one patient**, with all slides and tiles. A drawn patient contributes one vector

    v = (gradient clipped to C * sqrt(1 - a^2),  a * C / sqrt(2) * loss / loss_bound,  a * C / sqrt(2) * 1)

and one step releases sum(v) + N(0, (sigma * C)^2) in every coordinate, over patients drawn independently with rate q.

Guarantees:
    - |v| <= C: the gradient's part is at most C * sqrt(1 - a^2), the two figures' part at most a * C, and the parts are orthogonal. One
      Gaussian of std sigma * C therefore covers the gradient, the loss and the patient count together, and a step is *one*
      Poisson-subsampled Gaussian event with rate q and noise multiplier sigma. (Clipping the joint vector instead would shrink a
      patient's loss by the gradient's norm, and bias the figure.)
    - Dividing by the public B and scaling figures back are post-processing; the actual count is never used.
    - The std of each released figure is a public constant of the mechanism.

The sum is the client's to make exactly (`pathfed_client.training.joint_sum`); who rounds a patient's vector first clips it to less.

    | patient | contributes |
    | --- | --- |
    | not drawn, without readable tiles, failed | zero in every coordinate, the count included |
    | loss or gradient norm not finite | zero in every coordinate, the count included |
    | gradient norm 0 | zero gradient; loss and count as usual |
    | gradient norm within the bound | the gradient itself |
    | loss below 0 or above loss_bound | the loss clamped to [0, loss_bound] |
    | empty step | noise alone is released |
"""

import math
from dataclasses import dataclass, fields

from pathfed_common.privacy.accounting import PrivacyEvent

#: The clip aims lower than its bound by this share: the fp32 norm and scaling are each off by less than 1e-6.
_ROUNDING_SLACK = 1e-5

#: The largest noise multiplier that a plan may ask for. The sum is kept in 32-bit integers and wraps around at 1024 C a coordinate
#: (`pathfed_client.training.joint_sum`). The largest normal there can be is sqrt(2 * 128 * ln 2) < 13.33 std (`gaussian.extended`), so that
#: noise is within 854 C: no coordinate wraps while the sum before noise is within 170 C there, which takes 170 patients whose whole
#: vectors lie along that one coordinate. From 77 on noise alone could wrap: no loss of privacy, but of the number.
MOST_NOISE = 64.0


@dataclass(frozen=True, kw_only=True)
class PatientMechanism:
    """The public constants of a private step at one site; what is sensitive is an argument, never a field.

    Attributes:
        sampling_rate: q, the probability with which each patient is drawn, in (0, 1].
        noise_multiplier: sigma, the noise's std in units of the clip norm.
        clip_norm: C, the bound on the L2 norm of a patient's whole contribution.
        expected_patients: B, the public denominator of the gradient.
        figure_share: a, the share of C that loss and count ride in, in (0, 1).
        loss_bound: losses are clamped to [0, loss_bound].
    """

    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    expected_patients: float
    figure_share: float
    loss_bound: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{field.name} must be finite and above 0, got {value!r}")
        if self.sampling_rate > 1:
            raise ValueError(f"sampling_rate must be at most 1, got {self.sampling_rate}")
        if self.figure_share >= 1:
            raise ValueError(f"figure_share must be below 1, got {self.figure_share}")

    @property
    def gradient_bound(self) -> float:
        """Largest L2 norm of a patient's gradient in the sum: C * sqrt(1 - a^2)."""
        return self.clip_norm * math.sqrt(1 - self.figure_share**2)

    @property
    def clip_target(self) -> float:
        """What a gradient's norm is brought within, so that no rounding in computing norm and scale takes it over `gradient_bound`."""
        return self.gradient_bound * (1 - _ROUNDING_SLACK)

    @property
    def figure_scale(self) -> float:
        """What one whole figure (a loss at its bound, or one patient) is in the joint vector: a * C / sqrt(2)."""
        return self.figure_share * self.clip_norm / math.sqrt(2)

    @property
    def noise_std(self) -> float:
        """Std of the noise in every coordinate of the joint sum: sigma * C."""
        return self.noise_multiplier * self.clip_norm

    @property
    def gradient_std(self) -> float:
        """Std of the noise in every coordinate of the released gradient: sigma * C / B."""
        return self.noise_std / self.expected_patients

    @property
    def patients_std(self) -> float:
        """Std of the noise in one step's released patient count: sigma * sqrt(2) / a."""
        return self.noise_std / self.figure_scale

    @property
    def loss_sum_std(self) -> float:
        """Std of the noise in one step's released sum of losses: loss_bound * sigma * sqrt(2) / a."""
        return self.loss_bound * self.patients_std

    def clip_factor(self, gradient_norm: float) -> float:
        """The factor, at most 1, that brings a gradient of this norm within `gradient_bound`.

        Raises:
            ValueError: the norm is negative or not finite; such a patient contributes zero and is never clipped.
        """
        if not 0 <= gradient_norm < math.inf:
            raise ValueError(f"gradient_norm must be finite and not negative, got {gradient_norm}")
        target = self.clip_target
        return 1.0 if gradient_norm <= target else target / gradient_norm

    def loss_share(self, loss: float) -> float:
        """A patient's loss as a share of loss_bound, clamped to [0, 1].

        Raises:
            ValueError: the loss is not finite.
        """
        if not math.isfinite(loss):
            raise ValueError(f"loss must be finite, got {loss}")
        return min(max(loss, 0.0), self.loss_bound) / self.loss_bound

    def event(self, steps: int = 1) -> PrivacyEvent:
        """What that many steps cost each patient."""
        return PrivacyEvent(sampling_rate=self.sampling_rate, noise_multiplier=self.noise_multiplier, steps=steps)
