"""Where a site trains: which devices its policy names, whether they are there, and how much of their memory may be taken.

Draws are made on the CPU whatever the device; tiles and masks are moved to it, results come back.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pathfed_common.errors import ErrorCode, HostError

_GB = 10**9
#: What training holds of a trained parameter beside its weight: gradient and sum.
BESIDE = 2
#: A model that takes more than this share of a device's memory with gradients and sums leaves too little for activations.
_SHARE = 0.5


def resolve(device: str) -> torch.device:
    """The device a policy names: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        HostError: PF910, it is not there.
        ValueError: another word.
    """
    return resolve_all(device, 1)[0]


def resolve_all(device: str, count: int) -> tuple[torch.device, ...]:
    """The devices on which so many ranks compute: GPUs from the first on, or the CPU that many times.

    Raises:
        HostError: PF910, they are not there, or "cuda:N", which is one GPU, is to be several.
        ValueError: another word, or no device.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    kind, colon, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    there = gpus()
    if kind == "cpu" or (kind == "auto" and not there):
        return (torch.device("cpu"),) * count
    if number and count > 1:
        raise _missing("one GPU was named, and several are to compute", f"device {device}, devices {count}")
    first = int(number) if number else 0
    if first + count > there:
        wanted = f"GPU {number}" if number else f"{count} GPU{'s' if count > 1 else ''}"
        raise _missing("the policy names a GPU that is not there", f"{wanted}; torch {torch.__version__} sees {there}")
    return tuple(torch.device("cuda", first + place) for place in range(count))


def gpus() -> int:
    """GPUs that torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def limit_memory(device: torch.device, most: int) -> None:
    """Let this process take at most so many bytes of a GPU's memory: torch raises `OutOfMemoryError` beyond. No effect on the CPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)


def memory_bytes(device_memory_gb: float | None) -> int | None:
    """A policy's limit in bytes."""
    return None if device_memory_gb is None else int(device_memory_gb * _GB)


def fits_one(held_bytes: int, devices: Sequence[torch.device], most: int | None) -> bool:
    """Whether each device has room for a whole copy, in half of what may be taken of the smallest of them.

    On the CPU without a limit every model fits: processes of one machine have the same memory either way.

    Args:
        held_bytes: weights, and gradients and sums of those that are trained.
        devices: one for each process.
        most: bytes that may be taken of each.
    """
    rooms = [torch.cuda.get_device_properties(device).total_memory for device in devices if device.type == "cuda"]
    if most is not None:
        rooms.append(most)
    return not rooms or held_bytes <= _SHARE * min(rooms)


def parameter_bytes(objective: nn.Module, *, trained: bool = False) -> int:
    """Bytes of a model's parameters, or of the trained ones alone."""
    return sum(each.numel() * each.element_size() for each in objective.parameters() if each.requires_grad or not trained)


def held_bytes(objective: nn.Module) -> int:
    """Bytes that training holds beside the activations: weights, and gradients and sums of those that are trained."""
    return parameter_bytes(objective) + BESIDE * parameter_bytes(objective, trained=True)


def _missing(what: str, value: str) -> HostError:
    remedy = "correct device or devices in policy.toml; nvidia-smi shows the GPUs, CUDA_VISIBLE_DEVICES may hide some"
    return HostError(ErrorCode.DEVICE_MISSING, what, where="policy.toml, key device", value=value, remedy=remedy)
