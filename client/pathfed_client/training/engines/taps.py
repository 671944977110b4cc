"""Taps: a twin of an objective whose layers note inputs and output gradients in a book, and compute no gradient of their parameters.

The twin is made of copies of the objective's modules that share its parameters and buffers; the objective itself is not touched. Where a
layer has a rule, its copy runs the same arithmetic through a tap: an autograd function that in the backward pass gives the input's
gradient, notes the rest, and gives no gradient to parameters. So a pass over the twin leaves `.grad` None everywhere, and a parameter
that has one after all was used outside its layer: a fault that `engines.book_keeping` refuses.

    | owner of parameters | rule |
    | --- | --- |
    | nn.Linear | inputs and output gradients |
    | nn.Conv2d whose windows do not overlap (kernel = stride, no padding) | the same, of the linear layer that it is |
    | nn.LayerNorm over one axis | gradients of scale and shift, summed in each tile |
    | those of `ROWS` | the parameter is given once a tile, and so gets a gradient a tile |
    | anything else | refused |

**Rows.** A layer's leading axis must be the tiles, or crops of them, those of one patient lying together. `book_keeping`'s rehearsal
compares norms with the serial engine's, and refuses an objective that orders them otherwise.

**Why this holds under torch.compile, checkpointing and autocast.** A compiler sees a tap as ordinary operations and one opaque one,
`pathfed::note`, which gives the gradient of a leaf that every tap has as input, so that it is not dropped; merging equal operations is
off (`engines.passes`); what it notes is copied there, because a compiler uses memory again. Checkpointed blocks run forward twice and
backward once, and only the backward notes. Under autocast a tap casts its inputs as autocast would, before the autograd function, so
that what is noted is what was multiplied.

Legend of shape suffixes: N rows of a layer's input (tiles or crops of tiles), L patches, I inputs and O outputs of a layer, D width.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from pathfed_client.training.engines import book as books
from pathfed_client.training.engines.book import Book, MatrixEntry, RowsEntry
from pathfed_client.training.engines.engine import EngineUnfitError
from pathfed_common.encoder.vit import LayerScale, VisionTransformer
from pathfed_common.objectives.dino import MaskToken
from pathfed_common.objectives.mae import MaeHead

#: Modules whose parameters may be given once for each row of the forward's first argument: their exact type, to the names.
#: A vector becomes (N, 1, D), a tensor with a leading axis of 1 becomes (N, ...).
ROWS: dict[type[nn.Module], tuple[str, ...]] = {
    LayerScale: ("gamma",),
    VisionTransformer: ("cls_token", "reg_token", "pos_embed"),
    MaeHead: ("mask_token",),
    MaskToken: ("token",),
}


@torch.library.custom_op("pathfed::note", mutates_args=())
def _note_op(tensors: Sequence[Tensor], number: int, place: int) -> Tensor:
    # A compiler uses the memory of these tensors again once this has returned.
    books.book(number).note(place, [tensor.clone() for tensor in tensors])
    return tensors[0].new_zeros((), dtype=torch.float32)


@_note_op.register_fake
def _(tensors: Sequence[Tensor], number: int, place: int) -> Tensor:
    return tensors[0].new_zeros((), dtype=torch.float32)


def _note(tensors: Sequence[Tensor], number: int, place: int) -> Tensor | None:
    """Note, and give the leaf's gradient: under a compiler a zero that keeps the note alive, else none."""
    if torch.compiler.is_compiling():
        out: Tensor = _note_op(list(tensors), number, place)
        return out
    books.book(number).note(place, tensors)
    return None


class _Linear(Function):
    """y = x W^T + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Tensor, number: int, place: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.number, ctx.place = number, place
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        noted = _note((x, gradient), ctx.number, ctx.place)
        return (gradient @ weight if ctx.needs_input_grad[0] else None), None, None, noted, None, None


class _LayerNorm(Function):
    """Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, leaf: Tensor, number: int, place: int) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.number, ctx.place = number, place
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, bias, mean, rstd = ctx.saved_tensors
        scaled = (x - mean) * rstd * gradient
        noted = _note((_over_tokens(scaled), _over_tokens(gradient)), ctx.number, ctx.place)
        shape = x.shape[-1:]
        inner = torch.ops.aten.native_layer_norm_backward(gradient, x, shape, mean, rstd, weight, bias, [True, False, False])[0]
        return inner, None, None, None, noted, None, None


class _Rows(Function):
    """A parameter, once for each row."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, leaf: Tensor, rows: int, number: int, place: int) -> Tensor:
        ctx.number, ctx.place = number, place
        view = parameter.view(1, 1, -1) if parameter.ndim == 1 else parameter
        given = view.expand(rows, *view.shape[1:])
        # A compiled graph would hand an alias of the parameter out as a view made outside of this function, and the gradient would miss it.
        return given.clone() if torch.compiler.is_compiling() else given

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        return None, _note((gradient,), ctx.number, ctx.place), None, None, None


def _over_tokens(values: Tensor) -> Tensor:
    """Summed over all axes but the first and the last."""
    return values.flatten(1, -2).sum(1) if values.ndim > 2 else values


class _Tapped:
    """What a tapped module knows: the book's number, its place in it, and the leaf."""

    number: int
    place: int
    leaf: Tensor


class _TappedLinear(_Tapped, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        """See `nn.Linear`."""
        return _linear(self, input, self.weight, self.bias)


class _TappedConv2d(_Tapped, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        """See `nn.Conv2d`; (N, O, H', W') as a view of the linear layer's (N, L, O)."""
        n, channels, height, width = input.shape
        high, wide = self.kernel_size
        rows, columns = height // high, width // wide
        windows = input[:, :, : rows * high, : columns * wide].reshape(n, channels, rows, high, columns, wide)
        patches_NLI = windows.permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, channels * high * wide)
        out_NLO = _linear(self, patches_NLI, self.weight.flatten(1), self.bias)
        out: Tensor = out_NLO.transpose(1, 2).unflatten(2, (rows, columns))
        return out


class _TappedLayerNorm(_Tapped, nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        """See `nn.LayerNorm`; in float32 under autocast, as torch does it."""
        x = input.float() if torch.is_autocast_enabled(input.device.type) else input
        out: Tensor = _LayerNorm.apply(x, self.weight, self.bias, self.eps, self.leaf, self.number, self.place)  # type: ignore[no-untyped-call]
        return out


def _linear(module: _Tapped, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = _Linear.apply(x, weight, bias, module.leaf, module.number, module.place)  # type: ignore[no-untyped-call]
    return out


def tapped(objective: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[nn.Module, Book]:
    """A twin of the objective and the book that its passes are noted in.

    Args:
        objective: stays as it is; its modules must stay the same for as long as the twin is used.
        parameters: its trainable parameters by name.

    Raises:
        EngineUnfitError: a trainable parameter's owner has no rule.
    """
    book = Book()
    names = {id(parameter): name for name, parameter in parameters.items()}
    device = next(iter(parameters.values())).device
    leaf = torch.zeros((), device=device, requires_grad=True)
    twins: dict[int, nn.Module] = {}

    def twin(module: nn.Module, path: str) -> nn.Module:
        if id(module) in twins:
            return twins[id(module)]
        made = twins[id(module)] = copy.copy(module)
        made.__dict__.update(
            _parameters=dict(module._parameters),
            _buffers=dict(module._buffers),
            _modules={name: None if child is None else twin(child, f"{path}{name}.") for name, child in module._modules.items()},
        )
        trained = {last: names[id(p)] for last, p in module._parameters.items() if p is not None and id(p) in names}
        if trained:
            _tap(made, trained, book, leaf, path)
        return made

    return twin(objective, ""), book


def _tap(module: nn.Module, trained: dict[str, str], book: Book, leaf: Tensor, path: str) -> None:
    """Make a twin's module a tapped one; `trained` are its trained parameters, their own names to their whole names."""
    kind = type(module)
    rule = _RULES.get(kind)
    if rule is None or not rule(module, trained):
        first = next(iter(trained.values()))
        raise EngineUnfitError(f"no rule for the parameter {first!r} of a {kind.__name__}: its patient gradients cannot be book-kept")
    if kind in ROWS:
        _tap_rows(module, trained, book, leaf)
        return
    made: Any = module
    if kind is nn.LayerNorm:
        made.__class__ = _TappedLayerNorm
        place = book.entry(RowsEntry((trained["weight"], trained["bias"])))
    else:
        made.__class__ = _TappedLinear if kind is nn.Linear else _TappedConv2d
        place = book.entry(MatrixEntry(trained.get("weight"), trained.get("bias")))
    made.__dict__.update(number=book.number, place=place, leaf=leaf)


def _tap_rows(module: nn.Module, trained: dict[str, str], book: Book, leaf: Tensor) -> None:
    """Give the module's parameters once for each row of what its forward gets first."""
    kind = type(module)
    places = {last: book.entry(RowsEntry((name,))) for last, name in trained.items()}

    def forward(self: Any, first: Tensor, *rest: Any, **named: Any) -> Any:
        self.__dict__["tapped_rows"] = len(first)
        return kind.forward(self, first, *rest, **named)

    def given(last: str) -> Callable[[Any], Tensor]:
        def get(self: Any) -> Tensor:
            rows: Tensor = _Rows.apply(self._parameters[last], leaf, self.tapped_rows, book.number, places[last])  # type: ignore[no-untyped-call]
            return rows

        return get

    members: dict[str, Any] = {last: property(given(last)) for last in trained}
    module.__class__ = type(f"_Tapped{kind.__name__}", (kind,), {**members, "forward": forward})


def _plain_conv(module: nn.Module, trained: Mapping[str, str]) -> bool:
    if not isinstance(module, nn.Conv2d):
        return False
    plain = module.kernel_size == module.stride and module.dilation == (1, 1) and module.groups == 1
    return plain and module.padding in ((0, 0), "valid")


def _plain_norm(module: nn.Module, trained: Mapping[str, str]) -> bool:
    return isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and set(trained) == {"weight", "bias"}


def _has_rows(module: nn.Module, trained: Mapping[str, str]) -> bool:
    return set(trained) <= set(ROWS[type(module)])


def _any(module: nn.Module, trained: Mapping[str, str]) -> bool:
    return True


#: A module's exact type, to whether its parameters can be book-kept. A subclass may compute something else, and has no rule.
_RULES: dict[type[nn.Module], Callable[[nn.Module, Mapping[str, str]], bool]] = {
    nn.Linear: _any,
    nn.Conv2d: _plain_conv,
    nn.LayerNorm: _plain_norm,
    **dict.fromkeys(ROWS, _has_rows),
}
