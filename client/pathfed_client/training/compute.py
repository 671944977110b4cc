"""How a site computes its steps: the plan's compute section as training takes it, and what of it keys the randomness."""

from dataclasses import dataclass
from typing import Literal

EngineName = Literal["auto", "serial", "book_keeping"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How gradients are computed. Nothing here changes what is private; all but the memory changes the last bits of a sum.

    Attributes:
        engine: "serial", "book_keeping", or "auto" for the cheaper one (`engines.choice`).
        precision: number type of the forward and backward pass; weights, norms, sums and noise are float32 or finer whatever it is.
        activation_checkpointing: compute a block's activations again in the backward pass instead of keeping them.
        compile: compile the pass of a whole microbatch (`engines.passes`).
        memory_bytes: memory that activations may take, or None where nothing is known.
        patients_at_once: patients in one pass of the book-keeping engine; None until `engines.choice.decide` has said.
    """

    engine: EngineName = "serial"
    precision: Precision = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    memory_bytes: int | None = None
    patients_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("auto", "serial", "book_keeping"):
            raise ValueError(f"engine must be 'auto', 'serial' or 'book_keeping', got {self.engine!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")
        for name in ("memory_bytes", "patients_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")

    @property
    def decided(self) -> bool:
        """Whether it names an engine and all that its bits depend on."""
        return self.engine == "serial" or (self.engine == "book_keeping" and self.patients_at_once is not None)

    def context(self) -> dict[str, str | int]:
        """What of it the bits of a release depend on, for the context of `KeyedRandom`.

        Raises:
            ValueError: the engine is still to be decided.
        """
        if not self.decided:
            raise ValueError(f"the engine is still to be decided, got {self.engine!r} with patients_at_once {self.patients_at_once}")
        return {
            "engine": self.engine,
            "patients_at_once": 1 if self.engine == "serial" else (self.patients_at_once or 1),
            "precision": self.precision,
            "activation_checkpointing": int(self.activation_checkpointing),
            "compile": int(self.compile),
        }
