"""The private step beside the same step without privacy: time and peak memory, as ratios.

The step without privacy takes the same microbatches, k tiles each, and adds their gradients up in `.grad` (float32) by plain backward.
Each side takes the same patients. Times are CPU seconds of the process (one thread), or seconds until the device is done; the sides
take turns in one process, block by block, and a ratio is the median over blocks. Peak memory is what a process of its own adds to
its resident size (GPU: allocated bytes) from before the model is built to the end of a step: torch alone takes more than a small model.

Beside it, opacus' GradSampleModule (hooks). It refuses buffers, and modules of its own fallback with several arguments, and the head of
masked autoencoding has both; so that row is the encoder alone, all patches visible, with a plain loss, for every side.

    --quick     ViT-Ti at 112 px, k = 1 and 8
    (full)      ViT-Ti and ViT-S at 224 px, k = 1, 2, 4, 8, 16; with a GPU also ViT-L and ViT-H in bfloat16, compiled
"""

import functools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks._harness import Target, arguments, finish, interleaved, machine, tell

from pathfed_client.training.compute import Compute
from pathfed_client.training.engines.book_keeping import BookKeepingEngine
from pathfed_client.training.engines.choice import TILES_IN_A_PASS, decide, make_engine
from pathfed_client.training.engines.engine import Engine, PatientTiles, trainable
from pathfed_client.training.engines.serial import SerialEngine
from pathfed_client.training.joint_sum import JointSum
from pathfed_common.encoder.spec import EncoderSpec, preset
from pathfed_common.encoder.vit import VisionTransformer
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

PRESETS = {
    "ti": "vit_tiny_patch16_224",
    "s": "vit_small_patch16_224",
    "l": "vit_large_patch16_224",
    "h": "vit_huge_patch14_224",
}
ENGINES = ("plain", "serial", "book_keeping")
MECHANISM = PatientMechanism(
    sampling_rate=1.0, noise_multiplier=1.0, clip_norm=1.0, expected_patients=16.0, figure_share=0.3, loss_bound=2.0
)


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        encoder: key of `PRESETS`.
        px: side of a tile, pixels.
        k: tiles of a patient.
        device: torch's name of it.
        precision: number type of the pass.
        compile: whether it is compiled.
        encoder_only: the encoder with a plain loss in place of masked autoencoding.
    """

    encoder: str
    px: int
    k: int
    device: str = "cpu"
    precision: Any = "float32"
    compile: bool = False
    encoder_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.encoder}_{self.px}_k{self.k}" + ("_encoder" if self.encoder_only else "") + ("" if self.device == "cpu" else "_gpu")

    @property
    def patients(self) -> int:
        """Patients of a measured step: whole passes of the book-keeping engine, and eight at least, for a step makes its sum once."""
        return max(TILES_IN_A_PASS // self.k, 8)


class EncoderOnly(torch.nn.Module):
    """The encoder; a tile's loss is the mean square of its tokens against fixed numbers."""

    separable = True

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.encoder = VisionTransformer(spec)

    def draw(self, tiles: int, random: KeyedRandom) -> dict[str, torch.Tensor]:
        return {}

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Each tile's loss."""
        tokens: torch.Tensor = self.encoder(tiles)
        return (tokens - tokens.detach().roll(1, -1)).square().mean((1, 2))

    def loss(self, tiles: torch.Tensor, draws: object) -> torch.Tensor:
        return self(tiles).mean()

    def patient_losses(self, tiles: torch.Tensor, draws: object, counts: Sequence[int]) -> torch.Tensor:
        return torch.stack([losses.mean() for losses in self(tiles).split(list(counts))])


def build(setting: Setting) -> tuple[Any, list[PatientTiles]]:
    """The objective as plans have it by default, and patients."""
    spec = preset(PRESETS[setting.encoder], img_size=setting.px)
    objective: Any = EncoderOnly(spec)
    if not setting.encoder_only:
        objective = MaskedAutoencoder(spec, mask_ratio=0.75, decoder_dim=128, decoder_depth=2, decoder_heads=4, normalise_target=True)
    objective.to(setting.device)
    patients = []
    for number in range(setting.patients):
        random = KeyedRandom(bytes(32), {"patient": number})
        pixels = torch.from_numpy(random.normals(setting.k * 3 * setting.px**2)).reshape(setting.k, 3, setting.px, setting.px)
        draws = {name: tensor.to(setting.device) for name, tensor in objective.draw(setting.k, random).items()}
        patients.append(PatientTiles(pixels.to(setting.device), draws))
    return objective, patients


def make_step(engine: str, setting: Setting) -> Callable[[], None]:
    """A step over all patients of the setting, up to the sum."""
    objective, patients = build(setting)
    parameters = trainable(objective)
    compute = Compute(precision=setting.precision, compile=setting.compile)
    if engine == "plain":
        return _plain_step(objective, patients, setting)
    if engine == "opacus_hooks":
        return _opacus_step(objective, patients)
    made: Engine
    if engine == "auto":
        auto = replace(compute, engine="auto")
        made = make_engine(objective, parameters, auto, tiles_per_patient=setting.k, tile_px=setting.px)
    elif engine == "serial":
        made = SerialEngine(objective, parameters, compute, tiles_per_patient=setting.k)
    else:
        at_once = max(TILES_IN_A_PASS // setting.k, 1)
        made = BookKeepingEngine(objective, parameters, compute, patients=at_once, tiles_per_patient=setting.k)

    def step() -> None:
        total = JointSum(parameters, MECHANISM)
        for start in range(0, len(patients), made.patients):
            failed = [outcome for outcome in made.add(patients[start : start + made.patients], total) if outcome is not None]
            if failed:
                raise RuntimeError(f"a patient contributed zero: {failed}")

    return step


def _plain_step(objective: Any, patients: list[PatientTiles], setting: Setting) -> Callable[[], None]:
    loss_of = torch.compile(objective.loss, dynamic=False) if setting.compile else objective.loss

    def step() -> None:
        objective.zero_grad(set_to_none=True)
        for patient in patients:
            with torch.autocast(setting.device, dtype=torch.bfloat16, enabled=setting.precision == "bfloat16"):
                loss = loss_of(patient.tiles, patient.draws)
            torch.autograd.backward(loss)
            float(loss.detach())

    return step


def _opacus_step(objective: EncoderOnly, patients: list[PatientTiles]) -> Callable[[], None]:
    """Opacus with the *tile* as its unit: a pass over a patient's tiles, each tile's gradient clipped, the sum added up."""
    from opacus.grad_sample import GradSampleModule

    module = GradSampleModule(objective, loss_reduction="mean")
    parameters = list(objective.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]

    def step() -> None:
        for patient in patients:
            module.zero_grad(set_to_none=True)
            torch.autograd.backward(module(patient.tiles.clone().requires_grad_()).mean())
            samples: list[torch.Tensor] = [vars(parameter)["grad_sample"] for parameter in parameters]
            norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples]).norm(dim=0)
            factors = (1.0 / (norms + 1e-6)).clamp(max=1.0)
            for total, sample in zip(sums, samples, strict=True):
                total.add_(torch.einsum("n,n...->...", factors, sample))

    return step


def times(setting: Setting, engines: tuple[str, ...], blocks: int) -> dict[str, list[float]]:
    """Seconds of a step by each engine, block by block, in turns."""
    steps = {engine: make_step(engine, setting) for engine in engines}
    gpu = setting.device != "cpu"

    def measure(step: Callable[[], None], block: int) -> list[float]:
        repeats = 3 if gpu else 1
        began = time.perf_counter() if gpu else time.process_time()
        for _ in range(repeats):
            step()
        if gpu:
            torch.cuda.synchronize()
        return [((time.perf_counter() if gpu else time.process_time()) - began) / repeats]

    for step in steps.values():
        step()
    found = interleaved({engine: functools.partial(measure, step) for engine, step in steps.items()}, blocks, lambda text: None)
    return {engine: [values[0] for values in lists] for engine, lists in found.items()}


def peak_bytes(engine: str, setting: Setting) -> int:
    """What two steps add to a fresh process' peak."""
    if setting.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = make_step(engine, setting)
        step()
        step()
        return torch.cuda.max_memory_allocated() - before
    child = [sys.executable, str(Path(__file__)), "--memory-of", json.dumps([engine, vars(setting)])]
    return int(subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_own_peak(engine: str, setting: Setting) -> None:
    """In a child: warm torch up on something small, then measure."""
    warm = torch.nn.Linear(8, 8)
    warm(torch.ones(2, 8)).sum().backward()
    if engine.startswith("opacus"):
        import opacus.grad_sample  # noqa: F401
    # "5" sets the peak back to what is resident now (proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_resident_bytes()
    step = make_step(engine, setting)
    step()
    step()
    print(_peak_resident_bytes() - before)


def _peak_resident_bytes() -> int:
    """Of this process alone. `ru_maxrss` would not do: a child starts with its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure(setting: Setting, blocks: int, others: tuple[str, ...]) -> dict[str, float]:
    """Ratios of one setting by figure."""
    objective, _ = build(setting)
    auto = Compute(engine="auto", precision=setting.precision)
    chosen = decide(objective, auto, tiles_per_patient=setting.k, tile_px=setting.px)
    del objective
    if chosen.engine != "serial":
        others = ("auto", *others)
    seconds = times(setting, (*ENGINES, *others), blocks)
    bytes_ = {engine: peak_bytes(engine, setting) for engine in (*ENGINES, *others)}
    figures: dict[str, float] = {f"plain_ms_{setting.name}": round(1e3 * statistics.median(seconds["plain"]) / setting.patients, 1)}
    for engine in (*ENGINES[1:], *others):
        ratios = [mine / plain for mine, plain in zip(seconds[engine], seconds["plain"], strict=True)]
        figures[f"time_{engine}_{setting.name}"] = round(statistics.median(ratios), 3)
        figures[f"memory_{engine}_{setting.name}"] = round(bytes_[engine] / bytes_["plain"], 3)
    if chosen.engine == "serial":
        figures |= {f"{kind}_auto_{setting.name}": figures[f"{kind}_serial_{setting.name}"] for kind in ("time", "memory")}
    tell(f"{setting.name}: auto is {chosen.engine} with {chosen.patients_at_once or 1} at once; {figures}")
    return figures


def settings(quick: bool) -> list[Setting]:
    """What is measured."""
    if quick:
        return [Setting("ti", 112, k) for k in (1, 8)] + [Setting("ti", 112, 8, encoder_only=True)]
    found = [Setting(encoder, 224, k) for encoder in ("ti", "s") for k in (1, 2, 4, 8, 16)] + [Setting("s", 112, 8, encoder_only=True)]
    if torch.cuda.is_available():
        found += [Setting(encoder, 224, k, "cuda", "bfloat16", True) for encoder in ("l", "h") for k in (1, 4, 16)]
    return found


def targets(rows: list[Setting]) -> dict[str, Target]:
    """The bounds that the issue sets."""
    bounds: dict[str, Target] = {}
    for row in [row for row in rows if not row.encoder_only]:
        few = 1.05 if row.device == "cpu" else 1.10
        bounds[f"time_auto_{row.name}"] = Target("<=", few if row.k >= (8 if row.device == "cpu" else 16) else 1.15)
        bounds[f"memory_auto_{row.name}"] = Target("<=", 1.15)
    return bounds


def main() -> int:
    """Measure and print."""
    given = arguments(
        __doc__,
        ("--memory-of", {"help": "measure one engine's memory in this process (used by the benchmark itself)"}),
        ("--only", {"action": "append", "metavar": "ROW", "help": "measure this row of the full table alone, such as ti_224_k1"}),
    )
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch|opacus")
    if given.memory_of:
        engine, values = json.loads(given.memory_of)
        print_own_peak(engine, Setting(**values))
        return 0
    rows = [row for row in settings(given.quick) if not given.only or row.name in given.only]
    figures: dict[str, Any] = {}
    for row in rows:
        others = ("opacus_hooks",) if row.encoder_only else ()
        figures |= measure(row, 3 if given.quick else 5, others)
    return finish("private_step", {**figures, **machine()}, targets(rows))


if __name__ == "__main__":
    sys.exit(main())
