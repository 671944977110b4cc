"""The book-keeping engine against brute force in fp64: every patient's own gradient by autograd, its norm, and the clipped sum."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from objectives import FORMS, SIDE, Source, some_tiles, unlike_its_start
from torch import Tensor, nn
from torch.nn import functional

from pathfed_client.training.compute import Compute
from pathfed_client.training.engines import book, passes, taps
from pathfed_client.training.engines.book import Book
from pathfed_client.training.engines.book_keeping import BookKeepingEngine
from pathfed_client.training.engines.choice import decide
from pathfed_client.training.engines.engine import EngineUnfitError, JointSum, NotContributed, PatientTiles, trainable
from pathfed_client.training.engines.norms import squared_norms
from pathfed_client.training.engines.serial import SerialEngine
from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.encoder.stochastic_depth import drop_path_factors
from pathfed_common.encoder.vit import VisionTransformer, initialise_layers, linear
from pathfed_common.objectives.objective import Draws


class Twice(nn.Module):
    """An encoder with every kind of layer, used on whole tiles and on smaller ones: each layer's gradient is a sum over two uses."""

    separable: ClassVar[bool] = True
    SPEC = EncoderSpec(
        name="twice", img_size=SIDE, patch_size=8, embed_dim=24, depth=2, num_heads=3, reg_tokens=2, init_values=0.5, mlp="swiglu"
    )

    def __init__(self) -> None:
        super().__init__()
        self.encoder = VisionTransformer(self.SPEC)
        self.head = linear(24, 8)
        initialise_layers(self.head, torch.Generator().manual_seed(1))

    def draw(self, tiles: int, random: Any) -> Draws:
        return {"drop": drop_path_factors(random.uniforms(tiles * 4), tiles, 2, 0.4)}

    def loss(self, tiles: Tensor, draws: Draws) -> Tensor:
        return self.patient_losses(tiles, draws, [len(tiles)])[0]

    def patient_losses(self, tiles: Tensor, draws: Draws, counts: list[int]) -> Tensor:
        small = functional.avg_pool2d(tiles, 2)
        whole, part = self.encoder(tiles, drop_ND=draws["drop"]), self.encoder(small)
        losses = self.head(whole).sin().flatten(1).mean(1) + (self.head(part[:, 0]) ** 2).mean(1)
        return torch.stack([of_patient.mean() for of_patient in losses.split(list(counts))])


def moved(model: Any) -> Any:
    return unlike_its_start(model)


def patients(model: Any, counts: list[int], dtype: torch.dtype = torch.float64) -> list[PatientTiles]:
    made = []
    for number, count in enumerate(counts):
        draws = model.draw(count, Source(3, number))
        cast = {name: drawn.to(dtype) if drawn.is_floating_point() else drawn for name, drawn in draws.items()}
        made.append(PatientTiles(some_tiles(count, seed=number).to(dtype) * 2.0 ** (number - 1), cast))
    return made


def brute(model: Any, drawn: list[PatientTiles]) -> list[dict[str, Tensor]]:
    names = list(trainable(model))
    found = []
    for patient in drawn:
        gradients = torch.autograd.grad(model.loss(patient.tiles, patient.draws), list(trainable(model).values()), allow_unused=True)
        found.append({name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None})
    return found


def norm_of(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def fine_sum(model: nn.Module) -> JointSum:
    """A sum in fp64, so that no rounding hides a fault."""
    total = JointSum(trainable(model))
    total.gradients = {name: gradient.double() for name, gradient in total.gradients.items()}
    return total


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Relative distance of two sums."""
    return norm_of({name: left[name].double() - right[name].double() for name in right}) / norm_of(right)


#: Torch's compiler makes an object of `torch.autograd.Function`, which torch warns of.
quiet_compiler = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

BUILDERS: dict[str, Callable[[], Any]] = {"twice": Twice, **FORMS}
WAYS: dict[str, Callable[[int, int, int], bool] | None] = {
    "by cost": None,
    "always Gram": lambda rows, inputs, outputs: True,
    "never Gram": lambda rows, inputs, outputs: False,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BUILDERS)
def test_norms_and_the_clipped_sum_are_those_of_brute_force(name, way, mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    if WAYS[way] is not None:
        monkeypatch.setattr(book, "gram_is_cheaper", WAYS[way])
    model = unlike_its_start(BUILDERS[name]()).double()
    drawn = patients(model, [2, 2, 3, 2, 1])
    # MAE and DINO take their losses in fp32 or finer; MAE's is fp32.
    tolerance = 1e-5 if name == "mae" else 1e-6 if name.startswith("dino") else 1e-9
    each = brute(model, drawn)
    norms = [norm_of(gradients) for gradients in each]
    m = mechanism(clip_norm=sorted(norms)[2])
    engine = BookKeepingEngine(model, trainable(model), m, patients=5)
    same_count = [drawn[place] for place in (0, 1, 3)]
    found = [norm for _, norm in engine._pass(same_count)]
    assert found == pytest.approx([norms[place] for place in (0, 1, 3)], rel=tolerance)
    total = fine_sum(model)
    assert engine.add(drawn, total) == [None] * 5
    factors = [m.clip_factor(norm) for norm in norms]
    assert min(factors) < 1 == max(factors)
    expected = {
        parameter: sum(factor * gradients[parameter] for factor, gradients in zip(factors, each, strict=True) if parameter in gradients)
        for parameter in set().union(*each)
    }
    # Factors are handed over in fp32.
    assert distance(total.gradients, expected) < max(tolerance, 1e-6)
    assert total.patients == 5
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("planted", [False, True])
def test_a_layer_used_twice_has_cross_terms_in_its_norm(planted: bool, mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: uses taken as independent, their squared norms added."""
    original = book.MatrixEntry.squared_norms

    def independent(self: book.MatrixEntry) -> Tensor:
        return torch.stack([original(book.MatrixEntry(self.weight, self.bias, [use])) for use in self.uses]).sum(0)

    monkeypatch.setattr(book, "gram_is_cheaper", WAYS["always Gram"])
    if planted:
        monkeypatch.setattr(book.MatrixEntry, "squared_norms", independent)
    model = moved(Twice())
    drawn = patients(model, [2, 2], torch.float32)
    true = [norm_of(gradients) for gradients in brute(model, drawn)]
    figures = BookKeepingEngine(model, trainable(model), mechanism(), patients=2)._pass(drawn)
    close = [norm == pytest.approx(exact, rel=1e-4) for (_, norm), exact in zip(figures, true, strict=True)]
    assert all(close) is not planted


def gram_on_wrong_axes(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: book.MatrixEntry) -> Tensor:
        inputs, gradients = (torch.cat(parts, 1) for parts in zip(*self.uses, strict=True))
        return (inputs.square().sum((1, 2)) * gradients.square().sum((1, 2))).double()

    patch.setattr(book, "gram_is_cheaper", WAYS["always Gram"])
    patch.setattr(book.MatrixEntry, "squared_norms", wrong)


def a_factor_for_each_tile(patch: pytest.MonkeyPatch) -> None:
    """Patients' norms from a book that takes every tile for a patient."""
    original = Book.open
    patch.setattr(Book, "open", lambda self, patients: original(self, 2 * patients))


def stale_norm(patch: pytest.MonkeyPatch) -> None:
    """What the last pass left is not forgotten."""
    patch.setattr(Book, "close", lambda self: None)


def norm_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    def coarse(self: Book) -> Tensor:
        total = torch.zeros(self.patients, dtype=torch.bfloat16)
        for rows in self.rows.values():
            total += squared_norms(rows).bfloat16()
        for entry in self.entries:
            if isinstance(entry, book.MatrixEntry) and (entry.uses or entry.whole is not None):
                total += entry.squared_norms().bfloat16()
        return total.double()

    patch.setattr(Book, "squared_norms", coarse)


def residual_gradients_scaled_in_place(patch: pytest.MonkeyPatch) -> None:
    """Output gradients are scaled where they lie while the backward pass still needs them."""
    original = book.MatrixEntry.note

    def note(self: book.MatrixEntry, inputs: Tensor, gradients: Tensor) -> None:
        original(self, inputs, gradients.clone())
        gradients.mul_(0.5)

    patch.setattr(book.MatrixEntry, "note", note)


@pytest.mark.parametrize("plant", [gram_on_wrong_axes, a_factor_for_each_tile, stale_norm, residual_gradients_scaled_in_place])
def test_a_planted_fault_is_refused_at_the_rehearsal(plant, mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(Twice())
    drawn = patients(model, [2, 2], torch.float32)
    engine = BookKeepingEngine(model, trainable(model), mechanism(), patients=2)
    engine.rehearse(drawn)
    plant(monkeypatch)
    with pytest.raises((EngineUnfitError, RuntimeError)):
        rehearse_twice(engine, drawn)


def rehearse_twice(engine: BookKeepingEngine, drawn: list[PatientTiles]) -> None:
    engine.rehearse(drawn)
    engine.rehearse(drawn)


@pytest.mark.parametrize("planted", [False, True])
def test_norms_are_fine_enough_to_find_one_taken_in_bfloat16(planted: bool, mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(Twice())
    drawn = patients(model, [2] * 6, torch.float32)
    true = [norm_of(gradients) for gradients in brute(model, drawn)]
    if planted:
        norm_in_bfloat16(monkeypatch)
    figures = BookKeepingEngine(model, trainable(model), mechanism(), patients=6)._pass(drawn)
    errors = [norm / exact - 1 for (_, norm), exact in zip(figures, true, strict=True)]
    assert (min(errors) > -1e-5 and max(errors) < 1e-4) is not planted


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_patient_that_is_not_finite_leaves_no_trace_in_a_pass(value: float, mechanism) -> None:
    model = moved(Twice())
    drawn = patients(model, [2, 2, 2], torch.float32)
    poison = PatientTiles(torch.full_like(drawn[0].tiles, value), drawn[0].draws)
    engine = BookKeepingEngine(model, trainable(model), mechanism(), patients=4)
    with_it, without = JointSum(trainable(model)), JointSum(trainable(model))
    outcomes = engine.add([drawn[0], poison, drawn[1], drawn[2]], with_it)
    engine.add(drawn, without)
    assert outcomes == [None, "loss or gradient is not finite", None, None]
    assert all(torch.equal(with_it.gradients[name], without.gradients[name]) for name in without.gradients)
    assert (with_it.patients, with_it.loss_shares) == (without.patients, without.loss_shares)


def test_a_pass_that_fails_is_taken_patient_by_patient(mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(Twice())
    drawn = patients(model, [2, 2], torch.float32)
    engine = BookKeepingEngine(model, trainable(model), mechanism(), patients=2)
    total, expected = JointSum(trainable(model)), JointSum(trainable(model))
    SerialEngine(model, trainable(model), mechanism()).add(drawn, expected)

    def exhausted(*args: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(engine._twin, "patient_losses", exhausted)
    assert engine.add(drawn, total) == [None, None]
    assert all(torch.equal(total.gradients[name], expected.gradients[name]) for name in expected.gradients)


class Scaled(nn.Module):
    """A layer that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("layer", [Scaled(), nn.Conv2d(3, 3, 3), nn.GroupNorm(1, 3), type("Sub", (nn.Linear,), {})(3, 3)])
def test_an_owner_without_a_rule_is_refused(layer: nn.Module, mechanism) -> None:
    model: Any = Twice()
    model.extra = layer
    with pytest.raises(EngineUnfitError, match=r"no rule for the parameter 'extra\."):
        BookKeepingEngine(model, trainable(model), mechanism(), patients=2)
    with pytest.raises(EngineUnfitError):
        decide(model, Compute(engine="book_keeping"), tiles_per_patient=1, tile_px=SIDE)
    assert decide(model, Compute(engine="auto"), tiles_per_patient=1, tile_px=SIDE).engine == "serial"


def test_a_parameter_used_outside_its_layer_is_refused_at_the_rehearsal(mechanism) -> None:
    class Outside(Twice):
        def patient_losses(self, tiles: Tensor, draws: Draws, counts: list[int]) -> Tensor:
            return super().patient_losses(tiles, draws, counts) + self.head.weight.square().sum()

    model = Outside()
    engine = BookKeepingEngine(model, trainable(model), mechanism(), patients=2)
    with pytest.raises(EngineUnfitError, match=r"'head.weight' is used outside its layer"):
        engine.rehearse(patients(model, [1, 1], torch.float32))


def test_layers_that_see_crops_before_tiles_are_refused_at_the_rehearsal(mechanism) -> None:
    class CropsFirst(Twice):
        def patient_losses(self, tiles: Tensor, draws: Draws, counts: list[int]) -> Tensor:
            both = self.head(self.encoder(torch.cat([tiles, tiles.flip(3)]))[:, 0]).square().mean(1)
            mean = (both[: len(tiles)] + 2 * both[len(tiles) :]) / 2
            return torch.stack([of_patient.mean() for of_patient in mean.split(list(counts))])

    model = moved(CropsFirst())
    engine = BookKeepingEngine(model, trainable(model), mechanism(), patients=3)
    with pytest.raises((EngineUnfitError, NotContributed)):
        engine.rehearse(patients(model, [1, 1, 1], torch.float32))


@pytest.mark.parametrize("compute", [Compute(), Compute(precision="bfloat16"), Compute(activation_checkpointing=True)], ids=str)
@pytest.mark.parametrize("name", ["mae", "dino-sinkhorn-kde"])
def test_both_engines_agree_under_autocast_and_checkpointing(name, compute: Compute, mechanism) -> None:
    model = unlike_its_start(BUILDERS[name]())
    drawn = patients(model, [2, 2, 2], torch.float32)
    m = mechanism(clip_norm=0.3)
    left, right, plain = (JointSum(trainable(model)) for _ in range(3))
    engine = BookKeepingEngine(model, trainable(model), m, compute, patients=3)
    engine.rehearse(drawn)
    engine.add(drawn, left)
    SerialEngine(model, trainable(model), m, compute).add(drawn, right)
    assert distance(left.gradients, right.gradients) < (0.02 if compute.precision == "bfloat16" else 1e-4)
    if compute.activation_checkpointing:
        BookKeepingEngine(model, trainable(model), m, patients=3).add(drawn, plain)
        assert all(torch.equal(left.gradients[key], plain.gradients[key]) for key in plain.gradients)


@quiet_compiler
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_pass_gives_the_same_sum(checkpointing: bool, mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "BACKEND", "aot_eager")
    model = unlike_its_start(BUILDERS["mae"]())
    drawn = patients(model, [2, 2], torch.float32)
    compute = Compute(compile=True, activation_checkpointing=checkpointing)
    engine = BookKeepingEngine(model, trainable(model), mechanism(), compute, patients=2, tiles_per_patient=2)
    compiled, plain = JointSum(trainable(model)), JointSum(trainable(model))
    # A pass that failed would be taken by the serial engine, and prove nothing.
    monkeypatch.setattr(engine, "_serial", None)
    assert engine.add(drawn, compiled) == [None, None]
    assert engine._passes._compiled
    BookKeepingEngine(model, trainable(model), mechanism(), patients=2).add(drawn, plain)
    assert distance(compiled.gradients, plain.gradients) < 1e-5


@quiet_compiler
def test_equal_notes_are_taken_as_often_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that merges equal operations would lose one of two uses with equal inputs and gradients."""

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def loss(self, x: Tensor, draws: Draws) -> Tensor:
            return self.layer(x).sum() + self.layer(x).sum()

    monkeypatch.setattr(passes, "BACKEND", "aot_eager")
    model = Same()
    twin, kept = taps.tapped(model, trainable(model))
    kept.open(2)
    torch.autograd.backward(passes.Passes(twin, Compute(compile=True), tiles=2).loss(torch.ones(2, 3, 4), {}))
    assert kept.rows["layer.bias"].tolist() == [[6.0] * 4] * 2


def test_the_objective_is_as_it_was(mechanism) -> None:
    model = Twice()
    before = {name: (type(module), tuple(module.__dict__)) for name, module in model.named_modules()}
    engine = BookKeepingEngine(model, trainable(model), mechanism(), patients=2)
    engine.add(patients(model, [1, 1], torch.float32), JointSum(trainable(model)))
    assert {name: (type(module), tuple(module.__dict__)) for name, module in model.named_modules()} == before


def test_norms_never_come_out_too_small_where_terms_cancel() -> None:
    """Rows that come in pairs of opposite sign: the Gram sum's terms are far larger than the sum."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, 32, generator=generator)
    inputs = torch.cat([inputs, inputs], 1)
    gradients = torch.randn(64, 8, 32, generator=generator)
    gradients = torch.cat([gradients, -gradients + 1e-5 * torch.randn(64, 8, 32, generator=generator)], 1)
    found = book.MatrixEntry("w", None, [(inputs, gradients)]).squared_norms()
    true = torch.bmm(gradients.double().transpose(1, 2), inputs.double()).square().sum((1, 2))
    assert (found >= true).all()


def test_both_engines_sums_differ_by_one_patient_by_at_most_the_bound(mechanism) -> None:
    model = moved(Twice())
    drawn = patients(model, [2, 2, 2, 2], torch.float32)
    m = mechanism(clip_norm=0.01)
    engine = BookKeepingEngine(model, trainable(model), m, patients=4)
    sums = []
    for leaving in (None, 0, 3):
        total = JointSum(trainable(model))
        engine.add([patient for place, patient in enumerate(drawn) if place != leaving], total)
        sums.append(total)
    for left, right in pairwise([sums[1], sums[0], sums[2]]):
        shift = norm_of({name: left.gradients[name].double() - right.gradients[name].double() for name in left.gradients})
        assert 0.9 * m.gradient_bound < shift <= m.gradient_bound * (1 + 1e-6)
