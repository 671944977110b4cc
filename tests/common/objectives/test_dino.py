"""Self-distillation: draws from the passed source, a loss that is the patient's own, a teacher that is not trained, a model that learns.

That no form of it mixes patients is in tests/statistics/test_objectives.py.
"""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from objectives import FORMS, SPEC, Source, dino_settings, joined, some_tiles, unlike_its_start
from torch import Tensor

from pathfed_common.encoder.spec import EncoderSpec
from pathfed_common.objectives import dino
from pathfed_common.objectives.dino import SelfDistillation
from pathfed_common.objectives.objective import Draws
from pathfed_common.objectives.teacher_targets import plain

DINO_FORMS = [name for name in FORMS if name.startswith("dino")]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model(**changes: Any) -> SelfDistillation:
    return SelfDistillation(SPEC, dino_settings(**changes))


def test_everything_random_comes_from_the_passed_source() -> None:
    made, torch_before, numpy_before = model(), torch.get_rng_state(), repr(np.random.get_state())
    first, again, other = (made.draw(3, Source(seed)) for seed in (7, 7, 8))
    assert set(first) == {"boxes", "colours", "places", "masked", "drop"}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if name != "masked")
    losses = [made.loss(some_tiles(3), first) for _ in range(2)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert repr(np.random.get_state()) == numpy_before


def test_a_draw_takes_a_fixed_count_of_numbers_and_has_fixed_shapes() -> None:
    sources = [Source(seed) for seed in range(20)]
    drawn = [model().draw(5, source) for source in sources]
    assert len({source.taken for source in sources}) == 1
    assert len({tuple((name, value.shape, value.dtype) for name, value in draws.items()) for draws in drawn}) == 1
    assert all(len(value) == 5 for value in drawn[0].values())
    assert set(model(colour_jitter=0.0, drop_path=0.0).draw(1, Source(1))) == {"boxes", "places", "masked"}


def test_one_tile_after_the_other_draws_what_no_tile_draws() -> None:
    draws = model().draw(0, Source(1))
    assert all(len(value) == 0 for value in draws.values())
    with pytest.raises(ValueError, match="at least one tile"):
        model().loss(some_tiles(1)[:0], draws)


@pytest.mark.parametrize("form", DINO_FORMS)
@pytest.mark.parametrize("tiles", [some_tiles(1), torch.full((1, 3, 32, 32), 2.0), torch.full((4, 3, 32, 32), 2.0), 50 * some_tiles(2)])
def test_few_equal_and_loud_tiles_have_finite_losses_and_gradients(form: str, tiles: Tensor) -> None:
    made = unlike_its_start(FORMS[form]())
    loss = made.loss(tiles, made.draw(len(tiles), Source(2)))
    torch.autograd.backward(loss)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in made.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("form", DINO_FORMS)
def test_every_trained_parameter_takes_part_and_no_teachers_does(form: str) -> None:
    made = unlike_its_start(FORMS[form]())
    torch.autograd.backward(made.loss(some_tiles(3), made.draw(3, Source(3))))
    without = {name for name, parameter in made.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert without == {name for name, _ in made.named_parameters() if name.startswith("teacher.")}
    assert all(parameter.requires_grad is not name.startswith("teacher.") for name, parameter in made.named_parameters())


def test_the_teacher_begins_as_a_copy_and_follows_all_but_the_mask_token() -> None:
    state = model().state_dict()
    followed = {name: tensor for name, tensor in state.items() if f"teacher.{name}" in state}
    assert {name for name in state if not name.startswith("teacher.") and name not in followed} == {"head.mask.token"}
    assert all(torch.equal(tensor, state[f"teacher.{name}"]) for name, tensor in followed.items())
    assert all(tensor.data_ptr() != state[f"teacher.{name}"].data_ptr() for name, tensor in followed.items())


def test_shapes_are_known_without_building() -> None:
    state = model().state_dict()
    shapes = dino.state_shapes(SPEC, dino_settings())
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert list(state) == list(shapes)


def test_masked_patches_are_hidden_from_the_student_and_from_nobody_else() -> None:
    """A pixel of a masked patch moves what the student says of the first crop through the teacher's side alone."""
    made = unlike_its_start(model(colour_jitter=0.0, drop_path=0.0, local_crops=0)).double()
    assert isinstance(made, SelfDistillation)
    draws = dict(made.draw(1, Source(4)))
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
    draws |= {"boxes": whole.expand(1, 2, 4), "masked": torch.tensor([made.most_masked])}
    tiles = some_tiles(1).double()
    hidden = torch.zeros(SPEC.patches).scatter(0, draws["places"][0], 1.0).view(1, 1, SPEC.grid, SPEC.grid)
    pixels = hidden.repeat_interleave(SPEC.patch_size, 2).repeat_interleave(SPEC.patch_size, 3).double()
    before, after = made._outputs(tiles, draws), made._outputs(tiles + pixels, draws)
    assert torch.equal(before.class_NVK[:, 0], after.class_NVK[:, 0])
    assert torch.equal(before.patch_NMK, after.patch_NMK)
    assert not torch.allclose(before.class_NVK[:, 1], after.class_NVK[:, 1])
    assert not torch.allclose(before.teacher_patch_NMK, after.teacher_patch_NMK)


def test_the_class_loss_is_the_mean_over_pairs_of_different_crops() -> None:
    generator = torch.Generator().manual_seed(1)
    taught = torch.randn(3, 2, 7, generator=generator).softmax(-1)
    student = torch.randn(3, 5, 7, generator=generator)
    expected = 0.0
    for tile in range(3):
        pairs = [(a, v) for a in range(2) for v in range(5) if a != v]
        expected += sum(-float(taught[tile, a] @ (student[tile, v] / 0.1).log_softmax(-1)) for a, v in pairs) / len(pairs)
    assert float(dino._class_loss(taught, student, 0.1)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", DINO_FORMS)
def test_bfloat16_keeps_the_statistics_in_float32(form: str) -> None:
    made = unlike_its_start(FORMS[form]())
    tiles, draws = some_tiles(3), made.draw(3, Source(5))
    exact = made.loss(tiles, draws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = made.loss(tiles, draws)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0)


def test_a_loss_is_one_graph() -> None:
    made = unlike_its_start(model(centring="sinkhorn"))
    tiles, draws = some_tiles(2), made.draw(2, Source(6))
    torch._dynamo.reset()
    compiled = torch.compile(made.loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tiles, draws), made.loss(tiles, draws), rtol=1e-5, atol=0)


class Half:
    """One of two threads that hold a patient's tiles; they meet at every call."""

    def __init__(self, part: int, meeting: threading.Barrier, table: dict[int, Any]) -> None:
        self.part, self.meeting, self.table = part, meeting, table

    def place(self, rows: int, /) -> tuple[int, int]:
        counts = self._exchange(rows)
        return sum(counts[: self.part]), sum(counts)

    def sum(self, values: Tensor, /) -> Tensor:
        first, second = self._exchange(values.detach())
        both: Tensor = first + second
        return both

    def gather(self, rows: Tensor, /) -> Tensor:
        return torch.cat(self._exchange(rows))

    def _exchange(self, value: Any) -> list[Any]:
        self.table[self.part] = value
        self.meeting.wait(10)
        both = [self.table[0], self.table[1]]
        self.meeting.wait(10)
        return both


@pytest.mark.parametrize("form", DINO_FORMS)
@pytest.mark.parametrize("split", [(2, 3), (1, 0), (0, 4)])
def test_parts_of_a_patient_in_two_places_add_up_to_its_loss_and_gradient(form: str, split: tuple[int, int]) -> None:
    whole = unlike_its_start(FORMS[form]()).double()
    assert isinstance(whole, SelfDistillation)
    tiles = some_tiles(sum(split)).double()
    draws = whole.draw(sum(split), Source(7))
    parameters = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    loss = whole.loss(tiles, draws)
    expected = torch.autograd.grad(loss, parameters)
    meeting, table, found = threading.Barrier(2), {}, {}

    def part(index: int) -> None:
        half = SelfDistillation(SPEC, whole.settings).double()
        half.load_state_dict(whole.state_dict())
        # Both halves train the same parameters, so that one backward sums over the parts, as a collective backward would.
        half.encoder, half.head = whole.encoder, whole.head
        half.across = Half(index, meeting, table)
        rows = slice(0, split[0]) if index == 0 else slice(split[0], None)
        found[index] = half.loss(tiles[rows], {name: drawn[rows] for name, drawn in draws.items()})

    threads = [threading.Thread(target=part, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = found[0] + found[1]
    torch.testing.assert_close(together, loss, rtol=1e-10, atol=0)
    for mine, due in zip(torch.autograd.grad(together, parameters), expected, strict=True):
        torch.testing.assert_close(mine, due, rtol=1e-7, atol=1e-10)


def trained(made: SelfDistillation, steps: int) -> tuple[float, float]:
    """Adam on eight painted tiles without privacy, the teacher following: loss over the first loss, and the tiles' mean cosine."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    waves = [torch.sin(0.25 * (index + 1) * (rows if index % 2 else columns)) for index in range(8)]
    tiles = torch.stack(waves)[:, None].repeat(1, 3, 1, 1) * torch.linspace(0.5, 1.5, 3).view(1, 3, 1, 1)
    source, test_draws, state = Source(8), made.draw(8, Source(9)), made.state_dict()
    optimiser = torch.optim.AdamW([parameter for parameter in made.parameters() if parameter.requires_grad], lr=2e-3)
    first = made.loss(tiles, test_draws).item()
    for _ in range(steps):
        optimiser.zero_grad()
        torch.autograd.backward(made.loss(tiles, made.draw(8, source)))
        optimiser.step()
        for name, tensor in state.items():
            if name.startswith("teacher."):
                tensor.mul_(0.95).add_(state[name.removeprefix("teacher.")], alpha=0.05)
    with torch.no_grad():
        features = torch.nn.functional.normalize(made.teacher.encoder(tiles)[:, 0], dim=-1)
    alike = (features @ features.T)[~torch.eye(8, dtype=torch.bool)].mean()
    return made.loss(tiles, test_draws).item() / first, float(alike)


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_training_lowers_the_loss_and_keeps_tiles_apart(centring: str) -> None:
    lowered, alike = trained(model(centring=centring, drop_path=0.0, spread_weight=0.05), 120)
    assert lowered < 0.7
    assert alike < 0.4  # 0.35 before


def test_without_centring_and_spread_all_tiles_become_alike() -> None:
    """The fault that the two are there against: the loss falls all the better, and the features are worth nothing."""
    made = model(drop_path=0.0, spread_weight=0.0)
    made._centring = plain
    lowered, alike = trained(made, 60)
    assert lowered < 0.7
    assert alike > 0.7


@pytest.mark.parametrize(
    ("spec", "changes", "named"),
    [
        (EncoderSpec(name="x", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, class_token=False), {}, "class token"),
        (SPEC, {"local_crop_px": 12}, "multiple of the patch size 8, got 12"),
        (SPEC, {"local_crop_px": 0}, "multiple of the patch size 8, got 0"),
        (SPEC, {"mask_ratio": (0.0, 0.05)}, "some but not all of 16 patches"),
        (SPEC, {"mask_ratio": (0.0, 1.0)}, "some but not all of 16 patches"),
    ],
)
def test_settings_that_cannot_work_are_refused(spec: EncoderSpec, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SelfDistillation(spec, dino_settings(**changes))


def test_pictures_show_how_like_the_whole_each_patch_is() -> None:
    made = unlike_its_start(model())
    tiles = some_tiles(3)
    draws: Draws = joined([made.draw(3, Source(1))])
    ((caption, pictures),) = made.pictures(tiles, draws).items()
    assert "likeness" in caption
    assert pictures.shape == (3, 32, 32, 3)
    assert pictures.dtype == np.uint8
    for picture in pictures:
        assert (picture.min(), picture.max()) == (0, 255)
        patches = picture.reshape(4, 8, 4, 8, 3)
        assert (patches == patches[:, :1, :, :1]).all()
