"""How large an encoder trains on this device, how fast, and what a round of the largest ones costs.

Measured, on the first GPU if there is one and else on the CPU: for each preset that fits, tiles per second and model-FLOPs utilisation of
masked autoencoding with and without privacy (same microbatch, in turn, in this process), and peak memory on a GPU. Utilisation is counted
against what this device reaches on a large square matrix product in the same number type, measured here, not against a data sheet.

On paper, beside it: seconds of one site's round for the largest presets, from counted FLOPs (`_flops.py`) and an assumed utilisation.

    python tests/benchmarks/scale.py [--quick]

There is no target: the figures stand in docs/benchmarks.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks._flops import distillation_step_flops, mae_step_flops
from tests.benchmarks._harness import arguments, finish, tell

from pathfed_client.training.compute import Compute
from pathfed_client.training.engines.choice import make_engine
from pathfed_client.training.engines.engine import PatientTiles, trainable
from pathfed_client.training.engines.passes import Passes
from pathfed_client.training.joint_sum import JointSum
from pathfed_common.encoder.spec import EncoderSpec, preset
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

#: Largest first; the first that trains is the largest preset of this device.
ON_GPU = (
    "vit_gigantic_patch14_224",
    "vit_giant_patch16_224",
    "vit_giant_patch14_reg4_224",
    "vit_huge_patch14_reg4_224",
    "vit_large_patch16_224",
)
ON_CPU = ("vit_base_patch16_224", "vit_small_patch16_224", "vit_tiny_patch16_224")
MAE: dict[str, Any] = {"mask_ratio": 0.75, "decoder_dim": 512, "decoder_depth": 4}
MECHANISM = PatientMechanism(
    sampling_rate=0.1, noise_multiplier=1.0, clip_norm=1.0, expected_patients=8.0, figure_share=0.3, loss_bound=2.0
)

#: A round on paper: patients a site draws (B), tiles a patient (k), an H100's dense bf16 FLOP/s and the share of it that training reaches.
PATIENTS, TILES, UTILISATION, PEAK = 1000, 16, 0.4, 990e12


@dataclass(frozen=True)
class Measured:
    """One preset: tiles per second, and bytes at the peak (0 on a CPU)."""

    private: float
    plain: float
    peak_bytes: int
    flops: float


def matmul_flops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a square matrix product."""
    left = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(5):
        times.append(timed(device, lambda: left @ left))
    return 2 * side**3 / min(times)


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds of one call; on a GPU until it is done there, on a CPU of processor time, so that other processes count little."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - began
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(spec: EncoderSpec, compute: Compute, device: torch.device, *, tiles: int, patients: int, blocks: int) -> Measured:
    """Private and plain step in turn on random tiles."""
    objective = MaskedAutoencoder(spec, **MAE, decoder_heads=8, normalise_target=True).to(device).train()
    parameters = trainable(objective)
    draws = objective.draw(tiles, KeyedRandom(bytes(32), {"benchmark": "scale"}))
    batch = PatientTiles(
        torch.randn(tiles, 3, spec.img_size, spec.img_size, generator=torch.Generator().manual_seed(0)).to(device),
        {name: drawn.to(device) for name, drawn in draws.items()},
    )
    engine = make_engine(objective, parameters, compute, tiles_per_patient=tiles, tile_px=spec.img_size)
    total = JointSum(parameters, MECHANISM)
    # The plain step accumulates in the parameters' own gradients; it runs through the same pass (autocast, compiling, checkpointing).
    passes = Passes(objective, compute, tiles=tiles)

    def private() -> None:
        for _ in range(patients):
            assert engine.add([batch], total) == [None]

    def plain() -> None:
        for _ in range(patients):
            passes.loss(batch.tiles, batch.draws).backward()

    for work in (private, plain):
        work()
    objective.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        private()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    times: dict[str, list[float]] = {"private": [], "plain": []}
    for _ in range(blocks):
        times["private"].append(timed(device, private))
        times["plain"].append(timed(device, plain))
        objective.zero_grad(set_to_none=True)
    rate = {name: patients * tiles / statistics.median(values) for name, values in times.items()}
    return Measured(rate["private"], rate["plain"], peak, mae_step_flops(spec, **MAE))


def on_paper() -> dict[str, float]:
    """Seconds of a round's training at one site, and tera-FLOPs a tile."""
    figures: dict[str, float] = {}
    for name in ("vit_huge_patch14_reg4_224", "vit_giant_patch14_reg4_224", "vit_gigantic_patch14_224"):
        spec = preset(name)
        costs = {
            "mae": mae_step_flops(spec, **MAE),
            "dino": distillation_step_flops(spec, local_crops=8, local_px=98),
        }
        for (objective, cost), gpus in itertools.product(costs.items(), (1, 8)):
            figures[f"paper_{name}_{objective}_tflop_a_tile"] = round(cost / 1e12, 3)
            figures[f"paper_{name}_{objective}_{gpus}gpu_s"] = round(cost * PATIENTS * TILES / (PEAK * UTILISATION * gpus), 1)
        # Weights, gradient and sum at 4 bytes each, and the teacher's weights with self-distillation.
        figures[f"paper_{name}_state_gb"] = round(spec.parameters * 12 / 1e9, 1)
        figures[f"paper_{name}_state_dino_gb"] = round(spec.parameters * 16 / 1e9, 1)
    return figures


def main() -> int:
    options = arguments(__doc__)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    torch.set_num_threads(1)
    compute = Compute(engine="serial", precision="bfloat16" if gpu else "float32", compile=gpu)
    tiles, patients, blocks = (16, 4, 5) if gpu else ((4, 1, 3) if options.quick else (8, 1, 5))
    peak = matmul_flops(device, torch.bfloat16 if gpu else torch.float32, 8192 if gpu else 1024)
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu, 1 thread",
        "matmul_tflops": round(peak / 1e12, 3),
    }
    presets = ON_GPU if gpu else (ON_CPU[-1:] if options.quick else ON_CPU)
    for name in presets:
        try:
            found = measure(preset(name), compute, device, tiles=tiles, patients=patients, blocks=blocks)
        except torch.OutOfMemoryError:
            tell(f"{name} does not fit")
            torch.cuda.empty_cache()
            continue
        tell(f"{name}: {found.private:.1f} tiles/s private, {found.plain:.1f} plain")
        figures.setdefault("largest", name)
        figures[f"{name}_tiles_per_s"] = round(found.private, 2)
        figures[f"{name}_tiles_per_s_plain"] = round(found.plain, 2)
        figures[f"{name}_time_ratio"] = round(found.plain / found.private, 3)
        figures[f"{name}_mfu"] = round(found.private * found.flops / peak, 3)
        figures[f"{name}_mfu_plain"] = round(found.plain * found.flops / peak, 3)
        if gpu:
            figures[f"{name}_peak_gb"] = round(found.peak_bytes / 1e9, 1)
    return finish("scale", {**figures, **on_paper()}, {})


if __name__ == "__main__":
    sys.exit(main())
