"""Ranks are real processes on the CPU that talk by gloo. What they release equals what a single process releases."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from faulty_ranks import Adapted, Brittle, build
from scipy.stats import kstest
from training_fixtures import Colours

from pathfed_client.training.augmentation import Augmentation
from pathfed_client.training.compute import Compute
from pathfed_client.training.joint_sum import UNIT_SHARE, release
from pathfed_client.training.local_round import RoundOutcome
from pathfed_client.training.ranks.group import ProcessRanks
from pathfed_client.training.ranks.sharded import ShardedEngine, passes
from pathfed_client.training.ranks.shards import even_run
from pathfed_common.objectives.dino import SelfDistillation
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.privacy.randomness import KeyedRandom

WAYS = [("sharded", 2), ("sharded", 4), ("replicated", 2), ("replicated", 3), ("replicated", 4)]
#: Where ranks share a patient's tiles, the patient's gradient is a sum over ranks, whose last digits depend on how many there are. Of a few
#: patients' clipped gradients (norm at most 1), divided by B = 4, and, with several steps, what such a difference moves at the next.
NEAR = 3e-6
#: Noise's coarse grid would hide most such digits, and show some as whole cells of it. With this little noise it is the sum's own lattice.
FINE = 1e-4


def difference(pair: tuple[RoundOutcome, RoundOutcome]) -> float:
    """Largest difference of two updates and their figures."""
    figures = [abs(getattr(pair[0].figures, name) - getattr(pair[1].figures, name)) for name in ("loss_sum", "patients")]
    return max(*figures, *differences(pair))


def differences(pair: tuple[RoundOutcome, RoundOutcome]) -> list[float]:
    """Largest difference of each tensor of two updates."""
    left, right = pair
    assert left.update.keys() == right.update.keys()
    return [float((left.update[name] - right.update[name]).abs().max()) for name in left.update]


@pytest.fixture
def same(groups, compare, mechanism) -> Callable[..., tuple[RoundOutcome, RoundOutcome]]:
    """A round on ranks and by a single process, which must be one release: bit for bit where patients have a rank each, else nearly."""

    def both(mode: str, ranks: int, *, group: dict[str, Any] | None = None, near: float = NEAR, **changes: Any):
        m = mechanism(loss_bound=20.0, noise_multiplier=FINE)
        pair = compare(groups(mode, ranks, **(group or {})), mechanism=m, **changes)
        if mode == "replicated":
            assert difference(pair) == 0.0
            return pair
        assert max(differences(pair)) < near
        # The loss is rounded to the lattice too, for each of five patients in each of three steps at most.
        loss_unit = m.clip_norm * UNIT_SHARE / m.figure_scale * m.loss_bound
        assert abs(pair[0].figures.loss_sum - pair[1].figures.loss_sum) < 15 * max(loss_unit, near)
        assert pair[0].figures.patients == pair[1].figures.patients
        return pair

    return both


def flat(outcome: RoundOutcome) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(outcome.update.items())])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("mode", "ranks"), WAYS)
def test_a_release_equals_the_single_processs_noise_included(same, mode, ranks, steps) -> None:
    """Patients have 5, 3, 4, 1 and 2 tiles: more than ranks, fewer, and not divisible; at most two a pass."""
    pair = same(mode, ranks, steps=steps, augmentation=Augmentation(hed_jitter=0.1))
    assert pair[0].notes == pair[1].notes
    assert all(tensor.dtype == torch.float32 for tensor in pair[0].update.values())


@pytest.mark.parametrize(("mode", "ranks"), [("sharded", 2), ("replicated", 2)])
def test_an_objective_that_compares_a_patients_tiles_is_shared_all_the_same(same, mode, ranks) -> None:
    """A patient of one tile leaves a rank without any."""
    pair = same(mode, ranks, group={"kind": SelfDistillation}, kind=SelfDistillation, steps=2, near=10 * NEAR)
    assert pair[0].notes.failures == []
    assert not any(name.startswith("teacher.") for name in pair[0].update), "a teacher is no part of an update"


@pytest.mark.parametrize(("mode", "ranks"), [("sharded", 2), ("replicated", 2)])
def test_an_encoder_that_is_frozen_but_for_adapters_is_shared_all_the_same(same, mode, ranks) -> None:
    pair = same(mode, ranks, group={"kind": Adapted}, kind=Adapted, steps=2)
    assert pair[0].notes.failures == []
    assert {name.split(".")[-2] for name in pair[0].update if name.startswith("encoder.")} == {"lora_a", "lora_b"}
    assert len(pair[0].update) == 8 + sum(name.startswith("head.") for name in build()().state_dict())


@pytest.mark.parametrize(("mode", "ranks"), [("sharded", 2), ("replicated", 2)])
def test_bfloat16_and_checkpointed_blocks_change_rounding_alone(same, mode, ranks) -> None:
    """The passes compute in bfloat16 (2^-9)."""
    same(mode, ranks, group={"compute": Compute(precision="bfloat16", activation_checkpointing=True)}, near=0.02)


@pytest.mark.parametrize(("mode", "ranks"), [("sharded", 2), ("replicated", 2)])
def test_the_same_round_again_is_the_same_release_bit_for_bit(groups, compare, mode, ranks) -> None:
    first, second = (compare(groups(mode, ranks))[0] for _ in range(2))
    assert difference((first, second)) == 0.0


@pytest.mark.parametrize(("mode", "ranks"), WAYS)
def test_an_empty_step_releases_the_noise_of_a_single_process_bit_for_bit(groups, compare, mode, ranks, cohort) -> None:
    assert difference(compare(groups(mode, ranks), cohort=cohort())) == 0.0


def noise_is_right(outcome: RoundOutcome, std: float) -> bool:
    """Std within 5 of its own standard errors, and normal."""
    numbers = flat(outcome).numpy() / std
    return abs(numbers.std() - 1) < 5 / math.sqrt(2 * len(numbers)) and kstest(numbers, "norm").pvalue > 1e-4


@pytest.mark.parametrize(("mode", "ranks"), [("sharded", 2), ("replicated", 2)])
def test_noise_has_the_stated_scale(groups, compare, mode, ranks, cohort) -> None:
    assert noise_is_right(compare(groups(mode, ranks), cohort=cohort())[0], std=4.0 / 4.0)


def test_planted_noise_of_each_rank_is_too_much(groups, compare, cohort) -> None:
    assert not noise_is_right(compare(groups("replicated", 2, "own noise"), cohort=cohort())[0], std=1.0)


def like_pieces(outcome: RoundOutcome, ranks: int) -> float:
    """Correlation of the first piece of a large parameter with the second."""
    numbers = outcome.update["encoder.blocks.0.mlp.fc1.weight"].flatten().chunk(ranks)
    return float(torch.corrcoef(torch.stack([numbers[0], numbers[1]]))[0, 1])


def test_pieces_have_noise_of_their_own(groups, compare, cohort) -> None:
    assert abs(like_pieces(compare(groups("sharded", 2), cohort=cohort())[0], 2)) < 0.2


def test_planted_equal_noise_of_pieces_correlates(groups, compare, cohort) -> None:
    """A difference of two pieces would be free of noise."""
    assert like_pieces(compare(groups("sharded", 2, "same noise"), cohort=cohort())[0], 2) > 0.99


# A patient's whole contribution


def contribution(groups, compare, cohort, mechanism, mode: str, ranks: int, *faults: str) -> float:
    """Norm of what one patient adds to the sum's gradient, in units of its bound C sqrt(1 - a^2)."""
    quiet = mechanism(clip_norm=0.01, noise_multiplier=1e-9)
    outcome, _ = compare(groups(mode, ranks, *faults), cohort=cohort(5), mechanism=quiet)
    return float(flat(outcome).double().norm()) * quiet.expected_patients / quiet.gradient_bound


@pytest.mark.parametrize(("mode", "ranks"), WAYS)
def test_removing_a_patient_moves_the_sum_by_no_more_than_the_bound(groups, compare, cohort, mechanism, mode, ranks) -> None:
    assert 0.999 < contribution(groups, compare, cohort, mechanism, mode, ranks) <= 1.0


def test_planted_norms_of_pieces_alone_exceed_the_bound(groups, compare, cohort, mechanism) -> None:
    assert contribution(groups, compare, cohort, mechanism, "sharded", 2, "local norm") > 1.02


def test_planted_counting_of_whole_parameters_by_every_rank_changes_the_norm(groups, compare, cohort, mechanism) -> None:
    assert contribution(groups, compare, cohort, mechanism, "sharded", 2, "counted often") < 0.99


def test_planted_equal_weights_of_ranks_change_the_gradient(groups, compare, mechanism) -> None:
    """5 tiles on 2 ranks are 3 and 2."""
    fine = mechanism(loss_bound=20.0, noise_multiplier=FINE)
    assert max(differences(compare(groups("sharded", 2, "equal weights"), mechanism=fine))) > 100 * NEAR


@pytest.mark.parametrize(("tiles", "ranks", "at_once"), [(1, 4, 2), (5, 2, 2), (5, 2, 8), (7, 3, 1), (16, 4, 4), (3, 4, 1)])
def test_ranks_take_every_tile_once_in_equally_many_passes(tiles, ranks, at_once) -> None:
    taken = [passes(tiles, rank, ranks, at_once) for rank in range(ranks)]
    assert len({len(own) for own in taken}) == 1
    real = [one for own in taken for one in own if one.weight]
    assert sorted(place for one in real for place in one.tiles) == list(range(tiles))
    assert all(len(one.tiles) <= at_once and one.weight == len(one.tiles) / tiles for one in real)
    assert all(one.tiles == (0,) for own in taken for one in own if not one.weight)


def test_noise_of_pieces_together_is_the_whole_parameters(mechanism) -> None:
    m, sums = mechanism(), torch.arange(1003, dtype=torch.int32) * 1000
    whole = release(sums.clone(), m, KeyedRandom(bytes(32), {}))
    parts = []
    for rank in range(4):
        start, stop = even_run(1003, rank, 4)
        parts.append(release(sums[start:stop].clone(), m, KeyedRandom(bytes(32), {}), start=start))
    assert torch.equal(torch.cat(parts), whole)


# What happens to one patient


class White(Colours):
    """The second patient asked for has one white tile, on which `Brittle` gives no finite loss."""

    def read(self, refs, /):
        tiles = np.minimum(super().read(refs), 200)
        if len(self.asked) == 2:
            tiles[1] = 255
        return tiles


@pytest.mark.parametrize(("mode", "ranks"), [("sharded", 2), ("replicated", 2)])
def test_a_loss_that_is_not_finite_on_one_rank_costs_that_patient_alone(same, mode, ranks) -> None:
    """The white tile is the second, so that rank 1 has it and rank 0 does not."""
    pair = same(mode, ranks, group={"kind": Brittle}, kind=Brittle, tiles=White)
    assert pair[0].notes.failures == ["loss or gradient is not finite"]
    assert pair[0].notes == pair[1].notes


class Unreadable(Colours):
    """Some tiles cannot be read; of the third patient none, and the fourth crashes its reader."""

    def read(self, refs, /):
        tiles = super().read(refs)
        if len(self.asked) == 4:
            raise OSError("/slides/Muellerova.tif")
        return tiles[: {1: 3, 3: 0}.get(len(self.asked), len(tiles))]


@pytest.mark.parametrize(("mode", "ranks"), [("sharded", 2), ("replicated", 2)])
def test_unreadable_tiles_are_left_out_as_by_a_single_process(same, mode, ranks) -> None:
    pair = same(mode, ranks, tiles=Unreadable)
    assert pair[0].notes.failures == pair[1].notes.failures == ["0 of 4 tiles were read", "OSError"]


@pytest.mark.parametrize(("mode", "ranks", "left"), [("sharded", 2, 0), ("replicated", 2, 3)])
def test_memory_that_is_wanting_for_tiles_on_one_rank_costs_patients_and_not_the_round(
    groups, compare, mechanism, mode, ranks, left
) -> None:
    """Shared patients are every rank's; of one's own, rank 1 has the second and the fourth."""
    outcome, _ = compare(groups(mode, ranks, "no memory for tiles", only=1), mechanism=mechanism(noise_multiplier=1e-9))
    assert outcome.figures.patients == pytest.approx(left, abs=1e-6)
    assert len(outcome.notes.failures) == 5 - left


def test_pixels_of_patients_do_not_stay_in_the_shared_memory(groups, compare) -> None:
    group = groups("sharded", 2)
    compare(group)
    assert not group.shared.tiles.any()


def test_an_objective_whose_tiles_have_no_losses_of_their_own_is_not_sharded(mechanism) -> None:
    class Mixed(MaskedAutoencoder):
        separable = False

    ranks = ProcessRanks(torch.device("cpu"))
    with pytest.raises(ValueError, match="in one pass"):
        ShardedEngine(build(Mixed)(), {}, mechanism(), ranks, Compute())
