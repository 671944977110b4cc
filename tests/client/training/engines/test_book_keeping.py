"""The book-keeping engine against brute force in fp64: every patient's own gradient by autograd, its norm, and the clipped sum."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from objectives import FORMS, SIDE, Source, some_tiles, unlike_its_start
from torch import Tensor, nn
from torch.nn import functional

from pathfed_client.training import joint_sum
from pathfed_client.training.compute import Compute
from pathfed_client.training.engines import book, passes, taps
from pathfed_client.training.engines.book import Book
from pathfed_client.training.engines.book_keeping import BookKeepingEngine
from pathfed_client.training.engines.choice import decide
from pathfed_client.training.engines.engine import EngineUnfitError, NotContributed, PatientTiles, trainable
from pathfed_client.training.engines.norms import squared_norms
from pathfed_client.training.engines.serial import SerialEngine
from pathfed_client.training.joint_sum import JointSum
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


def gradients_of(total: JointSum) -> dict[str, Tensor]:
    return {name: total.gradient(name) for name in total.integers}


def same_bits(left: JointSum, right: JointSum) -> bool:
    figures = (left.patients, left.loss_units) == (right.patients, right.loss_units)
    return figures and all(torch.equal(left.integers[name], right.integers[name]) for name in right.integers)


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
    engine = BookKeepingEngine(model, trainable(model), patients=5, tiles_per_patient=2)
    same_count = [drawn[place] for place in (0, 1, 3)]
    found = [norm for _, norm in engine._pass(same_count)]
    assert found == pytest.approx([norms[place] for place in (0, 1, 3)], rel=tolerance)
    # Each patient's own gradient, in fp64, before anything is rounded to the sum's lattice.
    for place, exact in enumerate([each[place] for place in (0, 1, 3)]):
        noted = {parameter: gradient.reshape(exact[parameter].shape) for parameter, gradient in engine._book.gradients(place)}
        assert noted.keys() == exact.keys()
        assert distance(noted, exact) < tolerance
    total = JointSum(trainable(model), m)
    assert engine.add(drawn, total) == [None] * 5
    factors = [total.clip_factor(norm) for norm in norms]
    assert min(factors) < 1 == max(factors)
    expected = {
        parameter: sum(factor * gradients[parameter] for factor, gradients in zip(factors, each, strict=True) if parameter in gradients)
        for parameter in set().union(*each)
    }
    off = max(float((total.gradient(parameter) - expected[parameter]).abs().max()) for parameter in expected)
    assert off <= 5 * total.unit * 0.51 + tolerance * m.clip_norm
    assert total.patients == 5
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("planted", [False, True])
def test_a_layer_used_twice_has_cross_terms_in_its_norm(planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
    figures = BookKeepingEngine(model, trainable(model), patients=2, tiles_per_patient=2)._pass(drawn)
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
def test_a_planted_fault_is_refused_at_the_rehearsal(plant, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(Twice())
    drawn = patients(model, [2, 2], torch.float32)
    engine = BookKeepingEngine(model, trainable(model), patients=2, tiles_per_patient=2)
    engine.rehearse(drawn)
    plant(monkeypatch)
    with pytest.raises((EngineUnfitError, RuntimeError)):
        rehearse_twice(engine, drawn)


def rehearse_twice(engine: BookKeepingEngine, drawn: list[PatientTiles]) -> None:
    engine.rehearse(drawn)
    engine.rehearse(drawn)


@pytest.mark.parametrize("planted", [False, True])
def test_norms_are_fine_enough_to_find_one_taken_in_bfloat16(planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(Twice())
    drawn = patients(model, [2] * 6, torch.float32)
    true = [norm_of(gradients) for gradients in brute(model, drawn)]
    if planted:
        norm_in_bfloat16(monkeypatch)
    figures = BookKeepingEngine(model, trainable(model), patients=6, tiles_per_patient=2)._pass(drawn)
    errors = [norm / exact - 1 for (_, norm), exact in zip(figures, true, strict=True)]
    assert (min(errors) > -1e-5 and max(errors) < 1e-4) is not planted


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_patient_that_is_not_finite_leaves_no_trace_in_a_pass(value: float, mechanism) -> None:
    model = moved(Twice())
    drawn = patients(model, [2, 2, 2], torch.float32)
    poison = PatientTiles(torch.full_like(drawn[0].tiles, value), drawn[0].draws)
    engine = BookKeepingEngine(model, trainable(model), patients=4, tiles_per_patient=2)
    with_it, without = (JointSum(trainable(model), mechanism()) for _ in range(2))
    outcomes = engine.add([drawn[0], poison, drawn[1], drawn[2]], with_it)
    engine.add(drawn, without)
    assert outcomes == [None, "loss or gradient is not finite", None, None]
    assert same_bits(with_it, without)
    assert without.patients == 3


def test_a_pass_that_fails_is_taken_patient_by_patient(mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(Twice())
    drawn = patients(model, [2, 2], torch.float32)
    engine = BookKeepingEngine(model, trainable(model), patients=2, tiles_per_patient=2)
    total, expected = (JointSum(trainable(model), mechanism()) for _ in range(2))
    SerialEngine(model, trainable(model)).add(drawn, expected)

    def exhausted(*args: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(engine._twin, "patient_losses", exhausted)
    assert engine.add(drawn, total) == [None, None]
    assert same_bits(total, expected)


class Scaled(nn.Module):
    """A layer that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("layer", [Scaled(), nn.Conv2d(3, 3, 3), nn.GroupNorm(1, 3), type("Sub", (nn.Linear,), {})(3, 3)])
def test_an_owner_without_a_rule_is_refused(layer: nn.Module) -> None:
    model: Any = Twice()
    model.extra = layer
    with pytest.raises(EngineUnfitError, match=r"no rule for the parameter 'extra\."):
        BookKeepingEngine(model, trainable(model), patients=2, tiles_per_patient=2)
    with pytest.raises(EngineUnfitError):
        decide(model, Compute(engine="book_keeping"), tiles_per_patient=1, tile_px=SIDE)
    assert decide(model, Compute(engine="auto"), tiles_per_patient=1, tile_px=SIDE).engine == "serial"


def test_a_parameter_used_outside_its_layer_is_refused_at_the_rehearsal() -> None:
    class Outside(Twice):
        def patient_losses(self, tiles: Tensor, draws: Draws, counts: list[int]) -> Tensor:
            return super().patient_losses(tiles, draws, counts) + self.head.weight.square().sum()

    model = Outside()
    engine = BookKeepingEngine(model, trainable(model), patients=2, tiles_per_patient=2)
    with pytest.raises(EngineUnfitError, match=r"'head.weight' is used outside its layer"):
        engine.rehearse(patients(model, [2, 2], torch.float32))


def test_layers_that_see_crops_before_tiles_are_refused_at_the_rehearsal() -> None:
    class CropsFirst(Twice):
        def patient_losses(self, tiles: Tensor, draws: Draws, counts: list[int]) -> Tensor:
            both = self.head(self.encoder(torch.cat([tiles, tiles.flip(3)]))[:, 0]).square().mean(1)
            mean = (both[: len(tiles)] + 2 * both[len(tiles) :]) / 2
            return torch.stack([of_patient.mean() for of_patient in mean.split(list(counts))])

    model = moved(CropsFirst())
    engine = BookKeepingEngine(model, trainable(model), patients=3, tiles_per_patient=1)
    with pytest.raises((EngineUnfitError, NotContributed)):
        engine.rehearse(patients(model, [1, 1, 1], torch.float32))


@pytest.mark.parametrize("compute", [Compute(), Compute(precision="bfloat16"), Compute(activation_checkpointing=True)], ids=str)
@pytest.mark.parametrize("name", ["mae", "dino-sinkhorn-kde"])
def test_both_engines_agree_under_autocast_and_checkpointing(name, compute: Compute, mechanism) -> None:
    model = unlike_its_start(BUILDERS[name]())
    drawn = patients(model, [2, 2, 2], torch.float32)
    m = mechanism(clip_norm=0.3)
    left, right, plain = (JointSum(trainable(model), m) for _ in range(3))
    engine = BookKeepingEngine(model, trainable(model), compute, patients=3, tiles_per_patient=2)
    engine.rehearse(drawn)
    engine.add(drawn, left)
    SerialEngine(model, trainable(model), compute).add(drawn, right)
    assert distance(gradients_of(left), gradients_of(right)) < (0.02 if compute.precision == "bfloat16" else 1e-4)
    if compute.activation_checkpointing:
        BookKeepingEngine(model, trainable(model), patients=3, tiles_per_patient=2).add(drawn, plain)
        assert same_bits(left, plain)


@quiet_compiler
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_pass_gives_the_same_sum(checkpointing: bool, mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "BACKEND", "aot_eager")
    model = unlike_its_start(BUILDERS["mae"]())
    drawn = patients(model, [2, 2], torch.float32)
    compute = Compute(compile=True, activation_checkpointing=checkpointing)
    engine = BookKeepingEngine(model, trainable(model), compute, patients=2, tiles_per_patient=2)
    compiled, plain = (JointSum(trainable(model), mechanism()) for _ in range(2))
    # A pass that failed would be taken by the serial engine, and prove nothing.
    monkeypatch.setattr(engine, "_serial", None)
    assert engine.add(drawn, compiled) == [None, None]
    assert engine._passes._compiled
    BookKeepingEngine(model, trainable(model), patients=2, tiles_per_patient=2).add(drawn, plain)
    assert distance(gradients_of(compiled), gradients_of(plain)) < 1e-5


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
    engine = BookKeepingEngine(model, trainable(model), patients=2, tiles_per_patient=2)
    engine.add(patients(model, [2, 2], torch.float32), JointSum(trainable(model), mechanism()))
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


# The exact sum


def lattice(total: JointSum) -> Tensor:
    return torch.cat([total.integers[name].flatten() for name in sorted(total.integers)]).to(torch.int64)


def both(model: Any, compute: Compute = Compute()) -> dict[str, Any]:  # noqa: B008  a frozen value
    parameters = trainable(model)
    return {
        "serial": SerialEngine(model, parameters, compute, tiles_per_patient=2),
        "book-keeping": BookKeepingEngine(model, parameters, compute, patients=4, tiles_per_patient=2),
    }


def summed(model: Any, m: Any, engine: Any, chosen: list[PatientTiles]) -> JointSum:
    """The sum of the patients, handed over as the private step does it."""
    total = JointSum(trainable(model), m)
    for start in range(0, len(chosen), engine.patients):
        engine.add(chosen[start : start + engine.patients], total)
    return total


def is_exact(model: Any, m: Any, engine: Any, drawn: list[PatientTiles]) -> bool:
    """Whether each patient's leaving moves the sum by that patient's own lattice vector, just that, of norm within the bound."""
    whole = lattice(summed(model, m, engine, drawn))
    for place, patient in enumerate(drawn):
        moved_by = whole - lattice(summed(model, m, engine, drawn[:place] + drawn[place + 1 :]))
        alone = lattice(summed(model, m, engine, [patient]))
        if not torch.equal(moved_by, alone) or float(moved_by.double().norm()) * m.clip_norm * joint_sum.UNIT_SHARE > m.gradient_bound:
            return False
    return bool(whole.any())


EXACT = [Compute(), Compute(precision="bfloat16")]
#: More than a pass, and patients with fewer tiles among them.
SOME_COUNTS = [2, 2, 1, 2, 2, 2, 3, 2, 2]


@pytest.mark.parametrize("compute", EXACT, ids=lambda compute: compute.precision)
@pytest.mark.parametrize("engine", ["serial", "book-keeping"])
@pytest.mark.parametrize("name", ["twice", "mae", "dino-sinkhorn-kde"])
def test_a_patient_who_leaves_takes_just_that_patients_lattice_vector(name: str, engine: str, compute: Compute, mechanism) -> None:
    model, m = unlike_its_start(BUILDERS[name]()), mechanism(clip_norm=0.3)
    drawn = patients(model, SOME_COUNTS, torch.float32)
    assert is_exact(model, m, both(model, compute)[engine], drawn)


@pytest.mark.parametrize("engine", ["serial", "book-keeping"])
@pytest.mark.parametrize("name", ["twice", "mae", "dino-sinkhorn-kde"])
def test_the_order_of_patients_changes_no_bit_of_the_sum(name: str, engine: str, mechanism) -> None:
    model, m = unlike_its_start(BUILDERS[name]()), mechanism(clip_norm=0.3)
    drawn = patients(model, SOME_COUNTS, torch.float32)
    made = both(model)[engine]
    mixed = [drawn[place] for place in (5, 2, 8, 0, 6, 1, 7, 4, 3)]
    first = summed(model, m, made, drawn)
    assert same_bits(first, summed(model, m, made, drawn[::-1]))
    assert same_bits(first, summed(model, m, made, mixed))
    assert first.patients == len(drawn)


def rounded_once_a_pass(patch: pytest.MonkeyPatch) -> None:
    """The clipped gradients of a pass are added up in float32 and rounded together."""

    def add(self: BookKeepingEngine, chosen: list[PatientTiles], total: JointSum) -> list[str | None]:
        figures = self._pass(chosen)
        sums = {name: torch.zeros(integers.numel()) for name, integers in total.integers.items()}
        for place, (_, norm) in enumerate(figures):
            for name, gradient in self._book.gradients(place):
                sums[name].add_(gradient.flatten(), alpha=total.clip_factor(norm))
        total.add(sums.items(), norm=0.0, loss=0.0)
        total.patients += len(chosen) - 1
        return [None] * len(chosen)

    patch.setattr(BookKeepingEngine, "_add", add)


def kept_in_float32(patch: pytest.MonkeyPatch) -> None:
    """Nothing is rounded to the lattice: float32 sums, whose bits are read as they are."""

    def add(self: JointSum, gradients: Any, *, norm: float, loss: float) -> None:
        for name, gradient in gradients:
            self.integers[name].view(torch.float32).view(-1).add_(gradient.flatten(), alpha=self.clip_factor(norm))

    patch.setattr(JointSum, "add", add)


def clipped_without_room_for_rounding(patch: pytest.MonkeyPatch) -> None:
    """On a lattice so coarse that it shows."""
    patch.setattr(joint_sum, "UNIT_SHARE", 2.0**-12)
    patch.setattr(joint_sum, "_LARGEST_ROUNDING", 1.0)
    patch.setattr(JointSum, "clip_factor", lambda self, norm: min(1.0, self._mechanism.gradient_bound / norm))


def a_pass_mixes_its_patients(patch: pytest.MonkeyPatch) -> None:
    """By the last digits alone: each patient's loss is a little larger the further on in the pass the patient is."""
    original = passes.Passes.patient_losses

    def losses(self: passes.Passes, *arguments: Any) -> Tensor:
        found = original(self, *arguments)
        return found * (1 + 1e-6 * torch.arange(len(found)))

    patch.setattr(passes.Passes, "patient_losses", losses)


@pytest.mark.parametrize("plant", [rounded_once_a_pass, kept_in_float32, clipped_without_room_for_rounding, a_pass_mixes_its_patients])
def test_a_fault_planted_in_the_exact_sum_is_caught(plant, mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    model, m = moved(Twice()), mechanism(clip_norm=0.3)
    drawn = patients(model, [2] * 6, torch.float32)
    assert is_exact(model, m, both(model)["book-keeping"], drawn)
    plant(monkeypatch)
    assert not is_exact(model, m, both(model)["book-keeping"], drawn)


def test_a_pass_has_the_same_shape_whoever_is_in_it(mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    model, m = moved(Twice()), mechanism()
    engine = both(model)["book-keeping"]
    shapes: list[tuple[int, ...]] = []
    original = engine._passes.patient_losses

    def seen(tiles: Tensor, draws: Draws, counts: list[int]) -> Tensor:
        shapes.append((*tiles.shape, *counts))
        return original(tiles, draws, counts)

    monkeypatch.setattr(engine._passes, "patient_losses", seen)
    total = summed(model, m, engine, patients(model, SOME_COUNTS, torch.float32))
    assert total.patients == len(SOME_COUNTS)
    assert set(shapes) == {(8, 3, SIDE, SIDE, 2, 2, 2, 2)}
    assert len(shapes) > 1


def test_a_pass_in_which_a_patients_place_counts_is_refused_at_the_rehearsal(mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(Twice())
    drawn = patients(model, [2] * 4, torch.float32)
    engine = both(model)["book-keeping"]
    engine.rehearse(drawn)
    a_pass_mixes_its_patients(monkeypatch)
    with pytest.raises(EngineUnfitError, match="depends on who shares the pass"):
        engine.rehearse(drawn)
