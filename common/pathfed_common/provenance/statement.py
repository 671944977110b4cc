"""What a site states about one update, signed by the site: an in-toto Statement v1 with a predicate of our own.

The statement's subject is the update (by SHA-256); its predicate binds it to run, round, plan, base state, code, privacy event, cumulative
epsilon, ledger head and the site's previous statement. It is a plain JSON object signed byte for byte (DSSE), so whole numbers stay whole.

Sources: https://github.com/in-toto/attestation/blob/v1.0/spec/v1/statement.md, .../envelope.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.provenance.values import Value, decode
from pathfed_common.units import UtcSeconds

IN_TOTO_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://pathfed.dev/update/v1"


@dataclass(frozen=True, kw_only=True)
class Privacy(Value):
    """The privacy event of one update: `steps` Poisson-subsampled Gaussian steps, for each patient (add or remove one).

    Attributes:
        sampling_rate: probability that a patient is drawn in a step, in (0, 1].
        noise_multiplier: noise standard deviation in units of the clip norm.
        clip_norm: bound on the L2 norm of one patient's contribution to a step.
        steps: private steps.
        delta: the plan's delta, at which `epsilon_plan` holds.
    """

    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    delta: float

    def _check(self) -> None:
        if not 0 < self.sampling_rate <= 1 or not 0 < self.delta < 1:
            raise ValueError(f"sampling_rate and delta must be within (0, 1] and (0, 1), got {self.sampling_rate} and {self.delta}")
        if not (self.noise_multiplier > 0 and self.clip_norm > 0 and self.steps >= 1):
            raise ValueError("noise_multiplier, clip_norm and steps must be above 0")


@dataclass(frozen=True, kw_only=True)
class Figures(Value):
    """Noised figures that rode in the same Gaussian release, each with its noise's standard deviation.

    Attributes:
        loss_sum: sum of the drawn patients' clamped losses, plus noise.
        loss_sum_std: standard deviation of that noise.
        patients: number of patients drawn, plus noise.
        patients_std: standard deviation of that noise.
    """

    loss_sum: float
    loss_sum_std: float
    patients: float
    patients_std: float

    def _check(self) -> None:
        if self.loss_sum_std < 0 or self.patients_std < 0:
            raise ValueError("standard deviations must be at least 0")


@dataclass(frozen=True, kw_only=True)
class UpdateStatement(Value):
    """What a site states about one update.

    Attributes:
        site: the site.
        run: the run.
        round_index: 1 for a run's first round.
        plan: digest of the plan.
        base_state: digest of the base state the update was computed on.
        update: digest of the update's bytes: the statement's subject.
        update_bytes: their length.
        privacy: the update's privacy event.
        epsilon_plan: epsilon of all of this plan's releases so far, this one included, at the plan's delta.
        epsilon_total: epsilon of all the site's releases ever, at `delta_total`.
        delta_total: the delta of the site's own policy, fixed for its ledger's life.
        ledger_head: digest of the site's latest ledger entry.
        code: digest of the code the site ran.
        figures: the noised figures released beside the update.
        reply_slot_s: the public time slot the reply waited for, seconds, or None where the site's policy has slots off.
        manifest_commitment: hiding commitment to the cohort, fresh salt each time, opening kept at the site.
        previous: digest of the envelope of the site's previous statement in this run, or None for its first.
        issued_at: UTC seconds of the offer it answers, a public time: that of the sealing would tell how long the round took, and with it
            how many patients were drawn.
    """

    site: SiteName
    run: RunName
    round_index: int
    plan: Digest
    base_state: Digest
    update: Digest
    update_bytes: int
    privacy: Privacy
    epsilon_plan: float
    epsilon_total: float
    delta_total: float
    ledger_head: Digest
    code: Digest
    figures: Figures
    reply_slot_s: float | None
    manifest_commitment: Digest
    previous: Digest | None
    issued_at: UtcSeconds

    def _check(self) -> None:
        if self.round_index < 1 or self.update_bytes < 1:
            raise ValueError("round_index and update_bytes must be at least 1")
        if self.epsilon_plan < 0 or self.epsilon_total < 0:
            raise ValueError("epsilons must be at least 0")
        if not 0 < self.delta_total < 1:
            raise ValueError(f"delta_total must be within (0, 1), got {self.delta_total}")
        if self.reply_slot_s is not None and self.reply_slot_s <= 0:
            raise ValueError(f"reply_slot_s must be above 0 or None, got {self.reply_slot_s}")

    def to_payload(self) -> bytes:
        """The in-toto Statement's canonical bytes."""
        predicate = self.plain()
        subject = predicate.pop("update")
        return digest.canonical(
            {
                "_type": STATEMENT_TYPE,
                "subject": [{"name": self._subject_name, "digest": {"sha256": subject.removeprefix("sha256:")}}],
                "predicateType": PREDICATE_TYPE,
                "predicate": predicate,
            }
        )

    @classmethod
    def from_payload(cls, payload: bytes, *, where: str = "statement") -> Self:
        """Read a statement back from exactly the bytes that `to_payload` gives.

        Raises:
            ProvenanceError: PF601, anything else.
        """
        return decode(payload, cls._from_in_toto, cls.to_payload, what="an update statement", where=where)

    @classmethod
    def _from_in_toto(cls, raw: Any) -> Self:
        # Type, predicate type and subject name are compared byte for byte afterwards, when the value is encoded again.
        update = "sha256:" + raw["subject"][0]["digest"]["sha256"]
        return cls.from_plain({**raw["predicate"], "update": update})

    def to_envelope(self, key: SigningKey) -> bytes:
        """The statement signed by its site (DSSE bytes). The same statement and key give the same bytes."""
        return dsse.seal(self.to_payload(), IN_TOTO_TYPE, key)

    @classmethod
    def from_envelope(cls, data: bytes, key: VerifyKey | Mapping[Digest, VerifyKey], *, where: str = "statement") -> Self:
        """Verify and read a signed statement.

        Args:
            data: the envelope.
            key: the one key that may have signed, or several by key id.
            where: what to call it in errors.

        Raises:
            ProvenanceError: PF602, not signed by `key`; PF601, not a statement of this version.
        """
        return cls.from_payload(dsse.open_envelope(data, payload_type=IN_TOTO_TYPE, keys=key, where=where), where=where)

    @property
    def _subject_name(self) -> str:
        return f"{self.run}/round-{self.round_index:04d}/{self.site}.safetensors"
