"""Adapters of low rank: small matrices beside the linear layers of an encoder that stays as it is (Hu et al. 2021, arXiv:2106.09685).

    y = W x + b + scale * B (A x)        A: (rank, inputs), random at first;  B: (outputs, rank), zero at first

Guarantees:
    - **With B = 0 an encoder computes what it did without**: the adapter adds exactly zero.
    - A and B are plain linear layers, `lora_a` and `lora_b` within the layer: every engine has its rule for them. W and b keep their names.
    - `merged` gives the one weight that computes the same, W + scale * B A, in single float64 operations in a fixed order, rounded to
      float32 once: the same bits on every machine, whatever its matrix multiplication does.

Legend of shape suffixes: O outputs and I inputs of a layer, R rank, n numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathfed_common.encoder.spec import EncoderSpec, Shape
from pathfed_common.encoder.vit import VisionTransformer, linear

_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_A, _B, _WEIGHT = ".lora_a.weight", ".lora_b.weight", ".weight"


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Which adapters an encoder has.

    Attributes:
        rank: R, at least 1.
        scale: what B A is multiplied by.
        first_block: the first block whose layers have one; the blocks after it have them too.
    """

    rank: int
    scale: float
    first_block: int = 0


class AdaptedLinear(nn.Module):
    """A linear layer with an adapter beside it. Its own parameters are those of the layer it was made of."""

    bias: Tensor | None

    def __init__(self, base: nn.Linear, adapters: Adapters, generator: torch.Generator) -> None:
        """Take a layer's parameters over; A is drawn uniformly within 1 / sqrt(inputs), B is zero."""
        super().__init__()
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.scale = adapters.scale
        self.lora_a = linear(base.in_features, adapters.rank, bias=False)
        self.lora_b = linear(adapters.rank, base.out_features, bias=False)
        with torch.no_grad():
            bound = base.in_features**-0.5
            self.lora_a.weight.uniform_(-bound, bound, generator=generator)
            self.lora_b.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """See `nn.Linear`."""
        out: Tensor = functional.linear(x, self.weight, self.bias) + self.scale * self.lora_b(self.lora_a(x))
        return out


def attach(encoder: VisionTransformer, adapters: Adapters, generator: torch.Generator) -> None:
    """Put adapters into an encoder, in place. What is trained is for the caller to say."""
    for block in list(encoder.blocks)[adapters.first_block :]:
        for layer in _LAYERS:
            part, name = layer.split(".")
            owner = getattr(block, part)
            setattr(owner, name, AdaptedLinear(getattr(owner, name), adapters, generator))


def adapter_shapes(spec: EncoderSpec, adapters: Adapters) -> dict[str, Shape]:
    """Shape of every adapter's matrices, by their names in the encoder's state dict."""
    found: dict[str, Shape] = {}
    for index in range(adapters.first_block, spec.depth):
        for layer in _LAYERS:
            outputs, inputs = spec.block_shapes()[f"{layer}{_WEIGHT}"]
            found[f"blocks.{index}.{layer}{_A}"] = (adapters.rank, inputs)
            found[f"blocks.{index}.{layer}{_B}"] = (outputs, adapters.rank)
    return found


def is_adapter(name: str) -> bool:
    """Whether a tensor of that name is a matrix of an adapter."""
    return name.endswith((_A, _B))


def matrices_of(name: str, adapters: Adapters) -> tuple[str, str] | None:
    """Names of A and B beside the weight of that name, or None where it has no adapter."""
    parts = name.removesuffix(_WEIGHT).split(".")
    adapted = name.endswith(_WEIGHT) and parts[0] == "blocks" and ".".join(parts[2:]) in _LAYERS and int(parts[1]) >= adapters.first_block
    return (name.removesuffix(_WEIGHT) + _A, name.removesuffix(_WEIGHT) + _B) if adapted else None


def merged(weights_n: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, *, start: int = 0) -> Tensor:
    """W + scale * B A, float32: products of float32 are exact in float64, and are added rank by rank.

    Args:
        weights_n: numbers of the flattened W that follow each other.
        a_RI: A.
        b_OR: B.
        scale: what the product is multiplied by.
        start: place of the first of them in W.
    """
    places_n = torch.arange(start, start + len(weights_n))
    rows_n, columns_n = places_n // a_RI.shape[1], places_n % a_RI.shape[1]
    product_n = torch.zeros(len(weights_n), dtype=torch.float64)
    for a_I, b_O in zip(a_RI.to(torch.float64), b_OR.to(torch.float64).t(), strict=True):
        product_n.add_(b_O[rows_n].mul_(a_I[columns_n]))
    return weights_n.to(torch.float64).add_(product_n.mul_(scale)).to(torch.float32)
