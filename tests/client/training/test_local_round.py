"""A site's round: what is drawn and read, what the update is, what is left in the model."""

import numpy as np
import pytest
import torch

from pathfed_client.training import local_round
from pathfed_client.training.local_round import load_state, run_round, try_base_state
from pathfed_client.training.private_step import Release, private_step
from pathfed_common.errors import ErrorCode, HostError, PrivacyError
from pathfed_common.privacy.mechanism import PatientMechanism


@pytest.fixture
def run(objective, base_state, cohort, tiles, mechanism, random):
    """run_round with defaults that a test changes by name."""

    def call(**changes):
        context = changes.pop("context", {"round": 1})
        values = {
            "objective": objective,
            "base_state": base_state,
            "cohort": cohort(5, 3, 4),
            "tiles": tiles,
            "mechanism": mechanism(),
            "tiles_per_patient": 4,
            "steps": 1,
            "local_learning_rate": 0.1,
            "random": random(**context),
        }
        return run_round(**{**values, **changes})

    return call


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientMechanism, "noise_std", property(lambda self: 1e-9))


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[Release]:
    """What each private step of a round gave away."""
    kept: list[Release] = []

    def step(*args, **options) -> Release:
        kept.append(private_step(*args, **options))
        return kept[-1]

    monkeypatch.setattr(local_round, "private_step", step)
    return kept


def equal(left, right) -> bool:
    return left.figures == right.figures and all(torch.equal(left.update[name], right.update[name]) for name in left.update)


def test_the_update_names_every_trained_tensor_in_fp32(run, base_state) -> None:
    update = run().update
    assert {name: tensor.shape for name, tensor in update.items()} == {name: tensor.shape for name, tensor in base_state.items()}
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in update.values())


def test_each_drawn_patient_gives_k_tiles_or_all_of_fewer(run, tiles) -> None:
    run()
    assert [len(set(refs)) for refs in tiles.asked] == [4, 3, 4]
    assert tiles.asked == tiles.expected, "what was announced is what is asked for"
    assert [{ref.slide // 2 for ref in refs} for refs in tiles.asked] == [{0}, {1}, {2}]


@pytest.mark.usefixtures("quiet")
def test_unreadable_tiles_are_left_out_of_the_mean(run, tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading two of a patient's tiles is as if two had been drawn: same gradient as k = 2, whose draw starts with the same two.
    original = tiles.read
    monkeypatch.setattr(tiles, "read", lambda refs: original(refs)[:2])
    outcome = run()
    assert outcome.figures.patients == pytest.approx(3)
    assert outcome.notes.failures == []
    assert equal(outcome, run(tiles_per_patient=2))


@pytest.mark.usefixtures("quiet")
def test_a_patient_without_readable_tiles_contributes_zero(run, tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tiles.read
    monkeypatch.setattr(tiles, "read", lambda refs: original(refs)[: 0 if refs[0].slide // 2 == 1 else None])
    outcome = run()
    assert outcome.figures.patients == pytest.approx(2)
    assert outcome.notes.failures == ["0 of 3 tiles were read"]
    assert outcome.notes.patients_drawn == 3


@pytest.mark.usefixtures("quiet")
def test_a_patient_without_tiles_or_with_too_many_contributes_zero(run, cohort, tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tiles.read
    monkeypatch.setattr(tiles, "read", lambda refs: np.concatenate([original(refs), original(refs)]))
    outcome = run(cohort=cohort(0, 3))
    assert outcome.figures.patients == 0
    assert outcome.notes.failures == ["the patient has no tile", "6 of 3 tiles were read"]


@pytest.mark.parametrize("error", [OSError, MemoryError, ValueError], ids=lambda error: error.__name__)
def test_a_round_releases_even_when_every_patient_fails(error, run, tiles, cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(refs):
        raise error("slide 17")

    monkeypatch.setattr(tiles, "read", broken)
    failed = run()
    assert failed.notes.failures == [error.__name__] * 3
    assert equal(failed, run(cohort=cohort()))


def test_wrongly_typed_tiles_contribute_zero(run, tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "read", lambda refs: np.zeros((len(refs), 16, 16), np.float32))
    assert run().notes.failures == ["ValueError"] * 3


def test_the_model_holds_the_base_state_and_no_gradient_afterwards(run, objective, base_state) -> None:
    objective.eval()
    run(steps=3)
    assert all(torch.equal(tensor, base_state[name]) for name, tensor in objective.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert not objective.training


def test_the_model_holds_the_base_state_after_an_interruption_too(
    run, objective, base_state, tiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(refs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiles, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(steps=2)
    assert all(torch.equal(tensor, base_state[name]) for name, tensor in objective.state_dict().items())


def test_several_steps_give_the_mean_of_the_released_gradients(run, released: list[Release]) -> None:
    outcome = run(steps=3)
    assert len(released) == 3
    for name, tensor in outcome.update.items():
        mean = torch.stack([release.gradients[name] for release in released]).mean(0)
        assert torch.allclose(tensor, mean, atol=2e-5, rtol=1e-4)
    assert outcome.figures.loss_sum == pytest.approx(sum(release.figures.loss_sum for release in released))
    assert outcome.figures.patients_std == pytest.approx(3**0.5 * released[0].figures.patients_std)
    assert outcome.notes.patients_drawn == 9


def test_steps_of_a_round_have_independent_noise(run, cohort, released: list[Release]) -> None:
    run(steps=2, cohort=cohort())
    left, right = (torch.cat([t.flatten() for t in release.gradients.values()]) for release in released)
    assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 0.05


@pytest.mark.usefixtures("quiet")
def test_the_update_points_downhill(run, objective, base_state, cohort, tiles, mechanism, random) -> None:
    losses = []
    state = dict(base_state)
    for index in range(8):
        outcome = run(base_state=state, mechanism=mechanism(clip_norm=10.0), context={"round": index})
        losses.append(outcome.figures.loss_sum)
        state = {name: tensor - 0.5 * outcome.update[name] for name, tensor in state.items()}
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("changes", [{"steps": 0}, {"tiles_per_patient": 0}, {"local_learning_rate": 0.0}])
def test_arguments_out_of_bounds_are_refused(changes, run) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        run(**changes)


def test_a_state_of_other_names_shapes_or_in_the_models_memory_is_refused(objective, base_state) -> None:
    with pytest.raises(ValueError, match="names differ"):
        load_state(objective, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="must have shape"):
        load_state(objective, {**base_state, "encoder.pos_embed": torch.zeros(1)})
    with pytest.raises(ValueError, match="objective's own"):
        load_state(objective, objective.state_dict())


def test_a_healthy_base_state_passes_the_trial(objective, base_state) -> None:
    objective.eval()
    try_base_state(objective=objective, base_state=base_state, tile_px=16, tiles_per_patient=4)
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert not objective.training


@pytest.mark.parametrize("k", [1, 4, 9])
def test_the_trial_runs_whole_microbatches_and_every_kind_of_tile(k: int) -> None:
    batches = local_round._synthetic_tiles(16, k)
    assert all(batch.shape == (k, 16, 16, 3) and batch.dtype == np.uint8 for batch in batches)
    assert len({tile.tobytes() for batch in batches for tile in batch}) == 6


def spoiled(base_state, how):
    state = dict(base_state)
    name = "encoder.patch_embed.proj.weight"
    if how == "nan":
        state[name] = torch.full_like(state[name], float("nan"))
    elif how == "overflow":
        state["head.predict.weight"] = torch.full_like(state["head.predict.weight"], 3e38)
    elif how == "shape":
        state[name] = torch.zeros(1)
    else:
        del state[name]
    return state


@pytest.mark.parametrize("how", ["nan", "overflow", "shape", "missing"])
def test_a_base_state_that_cannot_be_trained_is_refused_before_the_charge(how, objective, base_state) -> None:
    with pytest.raises(PrivacyError, match="synthetic tiles") as caught:
        try_base_state(objective=objective, base_state=spoiled(base_state, how), tile_px=16, tiles_per_patient=4)
    assert caught.value.code is ErrorCode.BASE_STATE_UNTRAINABLE
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_tiles_too_large_for_the_memory_are_refused_before_the_charge(objective, base_state, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args):
        raise MemoryError

    monkeypatch.setattr(objective, "loss", exhausted)
    with pytest.raises(HostError) as caught:
        try_base_state(objective=objective, base_state=base_state, tile_px=16, tiles_per_patient=4)
    assert (caught.value.code, caught.value.value) == (ErrorCode.MEMORY_TOO_SMALL, "MemoryError")
