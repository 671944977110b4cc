"""The book: what a backward pass leaves of each layer: patients' norms come of it first, and their gradients, layer by layer, afterwards.

A linear layer's gradient for a patient is G^T A, with A the inputs and G the output gradients of the patient's S rows (tiles times tokens).
Book-keeping (Bu et al. 2023, arXiv:2210.00038, "Differentially Private Optimization on Large Model at Small Cost") computes the norms first
and then one weighted product for all patients. Here the second part is a product for each patient, of one layer at a time: only a patient's
own numbers can be rounded so that the sum changes by them alone when the patient leaves (`training.joint_sum`). It is as many
multiplications. For the norm there are two ways (ghost norm: Li et al. 2022, arXiv:2110.05679, section 4):

    | way | while | cost | what is kept until the clip factors are known |
    | --- | --- | --- | --- |
    | Gram: ||G^T A||^2 = sum(A A^T * G G^T) | S < d_in d_out / (d_in + d_out) | 2 S^2 (d_in + d_out) | A and G |
    | G^T A itself | else | 2 S d_in d_out, done once | G^T A, which is smaller than A and G just then |

**A layer used several times in a pass has the sum over its uses as gradient**, so uses are joined along S before the Gram matrices are
taken, or their products added up: norms of uses do not add.

Everything here is computed in fp32, or fp64 where the pass was in fp64, whatever the pass's type: products of bfloat16 factors are exact
in fp32.

**Norms do not come out too small.** Terms of a Gram sum may cancel, and then fp32's rounding weighs more. Of independent roundings with
unit u = 2^-24 a sum of d products is off by more than 8 sqrt(d) u of its size with a probability below 1e-13 (Higham and Mary 2019, SIAM J
Sci Comput 41:A2815); an allowance of that size for both matrices is added, 16 sqrt(d) u sum_i |a_i|^2 |g_i|^2.

Legend of shape suffixes: N rows of a layer's input (tiles, or crops of tiles), P patients, S a patient's rows in a layer, I inputs and
O outputs of a layer, n numbers of a parameter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pathfed_client.training.engines.engine import EngineUnfitError
from pathfed_client.training.engines.norms import fine, squared_norms

#: Whole numbers with as many bytes as a number.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_numbers = count()
#: Books in use by number: a compiled graph can carry a number, not an object.
_books: "WeakValueDictionary[int, Book]" = WeakValueDictionary()


@dataclass
class MatrixEntry:
    """What was noted of one linear layer.

    Attributes:
        weight: the weight's name, or None where it is not trained.
        bias: the bias's name, or None where there is none or it is not trained.
        uses: inputs (P, S, I) and output gradients (P, S, O) of each use, while the Gram way is the cheaper one.
        whole: the weight's gradient for each patient, (P, O, I), once it is not.
    """

    weight: str | None
    bias: str | None
    uses: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    whole: Tensor | None = None

    def note(self, inputs_PSI: Tensor, gradients_PSO: Tensor) -> None:
        """Take down one use."""
        if self.whole is None:
            self.uses.append((inputs_PSI, gradients_PSO))
            rows = sum(inputs.shape[1] for inputs, _ in self.uses)
            if gram_is_cheaper(rows, inputs_PSI.shape[2], gradients_PSO.shape[2]):
                return
            self.whole = sum((_product(*use) for use in self.uses[1:]), start=_product(*self.uses[0]))
            self.uses.clear()
        else:
            self.whole.baddbmm_(fine(gradients_PSO).transpose(1, 2), fine(inputs_PSI))

    def squared_norms(self) -> Tensor:
        """Squared norm of each patient's gradient of the weight, fp64 (P,)."""
        if self.whole is not None:
            return squared_norms(self.whole.flatten(1))
        inputs_PSI, gradients_PSO = self.joined()
        gram_PSS = torch.bmm(inputs_PSI, inputs_PSI.transpose(1, 2))
        gram_PSS.mul_(torch.bmm(gradients_PSO, gradients_PSO.transpose(1, 2)))
        unit = torch.finfo(gram_PSS.dtype).eps / 2
        allowance = 16 * unit * max(inputs_PSI.shape[2], gradients_PSO.shape[2]) ** 0.5
        squares_P = gram_PSS.sum((1, 2), dtype=torch.float64).clamp_(min=0)
        out: Tensor = squares_P + allowance * gram_PSS.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
        return out

    def joined(self) -> tuple[Tensor, Tensor]:
        """All uses one after the other along S."""
        inputs, gradients = zip(*self.uses, strict=True)
        return fine(torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]), fine(
            torch.cat(gradients, 1) if len(gradients) > 1 else gradients[0]
        )

    def gradient(self, place: int) -> Tensor:
        """The gradient (O, I) of the patient at that place."""
        if self.whole is not None:
            return self.whole[place]
        inputs_SI, gradients_SO = (fine(torch.cat([use[side][place] for use in self.uses])) for side in (0, 1))
        return gradients_SO.t() @ inputs_SI

    @property
    def noted(self) -> list[Tensor]:
        """What there is of each patient: tensors (P, ...)."""
        return [tensor for use in self.uses for tensor in use] if self.whole is None else [self.whole]


@dataclass
class RowsEntry:
    """Parameters whose gradient a pass gives tile by tile.

    Attributes:
        names: of the parameters, in the order in which they are noted.
    """

    names: tuple[str, ...]


class Book:
    """What one pass leaves; used again for the next. Sensitive."""

    def __init__(self) -> None:
        """Start an empty book."""
        self.number = next(_numbers)
        _books[self.number] = self
        self.entries: list[MatrixEntry | RowsEntry] = []
        #: Name to each patient's gradient (P, n), of the parameters that are noted tile by tile.
        self.rows: dict[str, Tensor] = {}
        self.patients = 0

    def __repr__(self) -> str:
        return "Book(<sensitive>)"

    def entry(self, entry: MatrixEntry | RowsEntry) -> int:
        """Give a layer its place, whose number `note` takes."""
        self.entries.append(entry)
        return len(self.entries) - 1

    def open(self, patients: int) -> None:
        """Begin a pass over that many patients, with equally many tiles each."""
        self.close()
        self.patients = patients

    def close(self) -> None:
        """Forget the pass."""
        self.patients = 0
        self.rows.clear()
        for entry in self.entries:
            if isinstance(entry, MatrixEntry):
                entry.uses.clear()
                entry.whole = None

    def note(self, place: int, tensors: Sequence[Tensor]) -> None:
        """Take down one use of a layer: for a linear layer inputs (N, ..., I) and output gradients (N, ..., O), else gradients (N, ...).

        Raises:
            EngineUnfitError: the N rows cannot be the patients' tiles.
        """
        entry = self.entries[place]
        by_patient = [self._by_patient(tensor) for tensor in tensors]
        if isinstance(entry, RowsEntry):
            for name, gradients in zip(entry.names, by_patient, strict=True):
                self._add_row(name, fine(gradients).sum(1))
            return
        inputs_PSI, gradients_PSO = (tensor.flatten(1, -2) for tensor in by_patient)
        if entry.bias is not None:
            self._add_row(entry.bias, gradients_PSO.sum(1, dtype=fine(gradients_PSO[:0]).dtype))
        if entry.weight is not None:
            entry.note(inputs_PSI, gradients_PSO)

    def squared_norms(self) -> Tensor:
        """Squared norm of each patient's whole gradient, fp64 (P,); never too small, see above."""
        parts = [squared_norms(rows) for rows in self.rows.values()]
        parts += [entry.squared_norms() for entry in self._used()]
        return torch.stack(parts).sum(0) if parts else torch.zeros(self.patients, dtype=torch.float64)

    def gradients(self, place: int) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of one patient's parameters, computed one after the other, as their numbers lie in the parameter.

        Args:
            place: the patient's among those of the pass.
        """
        for name, rows_Pn in self.rows.items():
            yield name, rows_Pn[place]
        for entry in self._used():
            if entry.weight is not None:
                yield entry.weight, entry.gradient(place)

    def fingerprints(self) -> Tensor:
        """Sums of the bits of what was noted of each patient, int64 (n, P): the same where the same was noted, bit for bit."""
        noted = [*self.rows.values(), *(tensor for entry in self._used() for tensor in entry.noted)]
        return torch.stack([tensor.contiguous().view(_BITS[tensor.element_size()]).flatten(1).sum(1) for tensor in noted])

    def _used(self) -> Iterator[MatrixEntry]:
        """The linear layers of which something was noted."""
        return (entry for entry in self.entries if isinstance(entry, MatrixEntry) and entry.noted)

    def _by_patient(self, tensor: Tensor) -> Tensor:
        """(N, ...) as (P, N / P, ...): tiles of one patient lie together."""
        if not self.patients or len(tensor) == 0 or len(tensor) % self.patients:
            raise EngineUnfitError(f"a layer saw {len(tensor)} rows, which are not the tiles of {self.patients} patients")
        out: Tensor = tensor.detach().unflatten(0, (self.patients, -1))
        return out

    def _add_row(self, name: str, gradients: Tensor) -> None:
        rows_Pn = gradients.reshape(self.patients, -1)
        self.rows[name] = self.rows[name] + rows_Pn if name in self.rows else rows_Pn


def gram_is_cheaper(rows: int, inputs: int, outputs: int) -> bool:
    """Whether a patient's norm costs less by the Gram way, for that many rows of a patient in a layer of these widths."""
    return rows * (inputs + outputs) < inputs * outputs


def book(number: int) -> Book:
    """The book of that number."""
    return _books[number]


def _product(inputs_PSI: Tensor, gradients_PSO: Tensor) -> Tensor:
    return torch.bmm(fine(gradients_PSO).transpose(1, 2), fine(inputs_PSI))
