"""Wire formats: bytes of an update, what its rounding adds beside the noise, and how fast it is written and read.

Each format writes and reads the same noised release of an encoder, in turn, so that other work on the machine falls on all of them:

    write     `wire_format.chunks` to bytes, one thread's CPU time
    read      `open_update(...).read` of every number in blocks, as aggregation does it
    check     `open_update(...).rounding()`, which admission does beside the norm
    rounding  true L2 norm of what rounding added, and the stated bound, as shares of the noise's

(quick)   ViT-Ti
(full)    ViT-S
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks._harness import Target, arguments, finish, interleaved, machine, tell

from pathfed_client.training.joint_sum import release
from pathfed_common import model
from pathfed_common.encoder.blocks import spans
from pathfed_common.plan import Plan
from pathfed_common.privacy.randomness import KeyedRandom
from pathfed_common.wire_format import WIRE_TYPES, WireType, chunks, file_bytes, open_update

_SIZES = ("vit_small_patch16_224", "vit_large_patch16_224", "vit_giant_patch14_reg4_224")


def main() -> int:
    """Measure; exit status 0 if int8 is a quarter of float32 and its rounding at most 1.5% of the noise."""
    options = arguments(__doc__)
    torch.set_num_threads(1)
    plan = _plan("vit_tiny_patch16_224" if options.quick else "vit_small_patch16_224")
    update = _noise(plan)
    figures: dict[str, Any] = {"machine": machine(), "encoder": plan.encoder.preset}
    with tempfile.TemporaryDirectory() as folder:
        paths = {dtype: Path(folder) / dtype for dtype in WIRE_TYPES}
        sides: dict[str, Callable[[int], Sequence[float]]] = {
            f"write_{dtype}": partial(_write, update, dtype, paths[dtype]) for dtype in paths
        }
        sides |= {f"read_{dtype}": partial(_read, paths[dtype]) for dtype in paths}
        sides |= {f"check_{dtype}": partial(_check, paths[dtype]) for dtype in paths}
        seconds = interleaved(sides, 2 if options.quick else 5, tell)
        count = sum(tensor.numel() for tensor in update.values())
        for name, blocks in seconds.items():
            figures[f"{name}_M_a_second"] = round(count / min(second for block in blocks for second in block) / 1e6, 1)
        for dtype in WIRE_TYPES:
            figures |= _error(plan, update, dtype, paths[dtype])
    sizes = {name: {dtype: round(file_bytes(model.update_shapes(_plan(name)), dtype) / 1e6, 1) for dtype in WIRE_TYPES} for name in _SIZES}
    figures |= {
        "megabytes": sizes,
        "int8_share": round(file_bytes(model.update_shapes(plan), "int8") / file_bytes(model.update_shapes(plan), "float32"), 4),
    }
    return finish("wire_formats", figures, {"int8_share": Target("<=", 0.26), "stated_int8": Target("<=", 0.015)})


def _plan(preset: str) -> Plan:
    privacy = {"expected_patients": 512.0, "noise_multiplier": 1.1, "clip_norm": 1.0, "epsilon_limit": 8.0}
    return Plan.model_validate({"name": "x", "privacy": privacy, "rounds": {"count": 1}, "encoder": {"preset": preset}})


def _noise(plan: Plan) -> dict[str, Tensor]:
    """A step without patients, as it is released: beside the noise, the sum of clipped gradients is nothing in any one number."""
    random, mechanism = KeyedRandom(bytes(32), {"purpose": "benchmark"}), plan.mechanism(20_000)
    shapes = model.update_shapes(plan)
    return {name: release(torch.zeros(shape, dtype=torch.int32), mechanism, random.child("noise", name)) for name, shape in shapes.items()}


def _timed(work: Callable[[], object]) -> list[float]:
    began = time.thread_time()
    work()
    return [time.thread_time() - began]


def _write(update: dict[str, Tensor], dtype: WireType, path: Path, block: int) -> list[float]:
    random = KeyedRandom(bytes(32), {"purpose": "wire", "block": block})
    return _timed(lambda: path.write_bytes(b"".join(chunks(update, dtype, random))))


def _read(path: Path, _: int) -> list[float]:
    def read() -> None:
        opened = open_update(path)
        for name, shape in opened.shapes.items():
            for start, stop in spans(prod(shape)):
                opened.read(name, start, stop)

    return _timed(read)


def _check(path: Path, _: int) -> list[float]:
    return _timed(lambda: open_update(path).rounding())


def _error(plan: Plan, update: dict[str, Tensor], dtype: WireType, path: Path) -> dict[str, Any]:
    opened, noise = open_update(path), model.noise_norm(plan)
    squares = sum(float((opened.read(n, 0, t.numel()).double() - t.flatten().double()).square().sum()) for n, t in update.items())
    return {f"true_{dtype}": round(squares**0.5 / noise, 6), f"stated_{dtype}": round(opened.rounding() / noise, 6)}


if __name__ == "__main__":
    sys.exit(main())
