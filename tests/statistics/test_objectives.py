"""No objective mixes patients: one patient's loss knows nothing of another's tiles, and taking one away moves the sum by <= C."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from objectives import FORMS, SPEC, Source, dino_settings, joined, some_tiles, unlike_its_start
from torch import Tensor

from pathfed_client.training.compute import Compute
from pathfed_client.training.engines.choice import make_engine
from pathfed_client.training.engines.engine import PatientTiles, trainable
from pathfed_client.training.private_step import private_step
from pathfed_common.objectives.dino import SelfDistillation
from pathfed_common.objectives.mae import MaskedAutoencoder
from pathfed_common.objectives.objective import Draws, ObjectiveModule
from pathfed_common.objectives.spread import kde
from pathfed_common.objectives.teacher_targets import plain, sinkhorn
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

COUNTS = (3, 1, 4, 2)
#: Patients with equally many tiles share a pass of the book-keeping engine.
EQUAL_COUNTS = (2, 2, 2, 2)
SERIAL, BOOK_KEEPING = Compute(engine="serial"), Compute(engine="book_keeping", patients_at_once=4)
CLIP = 0.05
#: With so little noise that its grid is the sum's own lattice: two releases differ as their sums do.
MECHANISM = PatientMechanism(
    sampling_rate=1.0, noise_multiplier=1e-4, clip_norm=CLIP, expected_patients=1.0, figure_share=0.3, loss_bound=3.0
)

Patient = tuple[Tensor, Draws]


def patients_for(model: ObjectiveModule, seed: int = 0, counts: Sequence[int] = COUNTS) -> list[Patient]:
    dtype = next(model.parameters()).dtype
    return [
        (some_tiles(count, seed=10 * seed + number).to(dtype), model.draw(count, Source(seed, number)))
        for number, count in enumerate(counts)
    ]


def losses(model: ObjectiveModule, patients: Sequence[Patient]) -> Tensor:
    tiles = torch.cat([tiles for tiles, _ in patients])
    return model.patient_losses(tiles, joined([draws for _, draws in patients]), [len(tiles) for tiles, _ in patients])


def check_knows_no_other(model: ObjectiveModule) -> None:
    """A patient's loss and gradient stay as they are when the others' tiles are exchanged, and have no slope in them."""
    model.double()
    own, others = patients_for(model, 0), patients_for(model, 1)
    parameters = list(trainable(model).values())
    for place in range(len(COUNTS)):
        mixed = [own[place] if number == place else others[number] for number in range(len(COUNTS))]
        first, second = losses(model, own)[place], losses(model, mixed)[place]
        torch.testing.assert_close(first, second, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (first, second)]
        for left, right in zip(*gradients, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)
    tiles = [tiles.clone().requires_grad_() for tiles, _ in own]
    found = losses(model, [(made, draws) for made, (_, draws) in zip(tiles, own, strict=True)])
    for place in range(len(COUNTS)):
        slopes = torch.autograd.grad(found[place], tiles, retain_graph=True)
        assert [bool(slope.any()) for slope in slopes] == [number == place for number in range(len(COUNTS))]


def check_is_alone(model: ObjectiveModule) -> None:
    """A patient's loss among others is the loss of that patient alone."""
    model.double()
    patients = patients_for(model)
    for loss, (tiles, draws) in zip(losses(model, patients), patients, strict=True):
        torch.testing.assert_close(loss, model.loss(tiles, draws), rtol=1e-12, atol=0)


def check_removal_in_one_pass(model: ObjectiveModule) -> None:
    """Clipped gradients of patients taken in one pass, as the book-keeping engine forms them: removal moves the sum by <= C."""
    patients, parameters = patients_for(model), list(trainable(model).values())

    def joint(chosen: Sequence[Patient]) -> np.ndarray[Any, Any]:
        total = np.zeros(sum(parameter.numel() for parameter in parameters) + 2)
        for loss in losses(model, chosen):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            flat = torch.cat([gradient.flatten() for gradient in gradients]).double().numpy()
            figures = np.array([MECHANISM.loss_share(loss.item()), 1.0]) * MECHANISM.figure_scale
            total += np.concatenate([flat * MECHANISM.clip_factor(float(np.linalg.norm(flat))), figures])
        return total

    check_shifts(joint(patients), [joint(without) for without in all_but_one(patients)])


def check_removal_in_the_step(model: ObjectiveModule, compute: Compute = SERIAL, counts: Sequence[int] = COUNTS) -> None:
    """The private step as sites take it, with the same noise: removing any patient moves what is released by <= C."""
    patients, parameters = patients_for(model, counts=counts), trainable(model)
    engine = make_engine(model, parameters, compute, tiles_per_patient=max(counts), tile_px=SPEC.img_size)

    def released(chosen: Sequence[Patient]) -> np.ndarray[Any, Any]:
        loaders = [lambda tiles=tiles, draws=draws: PatientTiles(tiles, draws) for tiles, draws in chosen]
        release = private_step(model, parameters, loaders, MECHANISM, KeyedRandom(bytes(32), {"test": "removal"}), engine=engine)
        figures = release.figures
        shares = [figures.loss_sum / MECHANISM.loss_bound * MECHANISM.figure_scale, figures.patients * MECHANISM.figure_scale]
        return np.concatenate([*(gradient.flatten().double().numpy() for gradient in release.gradients.values()), shares])

    check_shifts(released(patients), [released(without) for without in all_but_one(patients)])


def all_but_one(patients: Sequence[Patient]) -> list[list[Patient]]:
    return [[*patients[:place], *patients[place + 1 :]] for place in range(len(patients))]


def check_shifts(whole: np.ndarray[Any, Any], without: Sequence[np.ndarray[Any, Any]]) -> None:
    shifts = [float(np.linalg.norm(whole - part)) for part in without]
    assert max(shifts) <= CLIP * (1 + 1e-3)
    assert min(shifts) > 0.5 * CLIP


CHECKS = (check_knows_no_other, check_is_alone, check_removal_in_one_pass, check_removal_in_the_step)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_no_objective_mixes_patients(form, check):
    check(unlike_its_start(FORMS[form]()))


class BatchWide(SelfDistillation):
    """Takes one of its statistics over all patients of a pass."""

    fault = ""

    def patient_losses(self, tiles_NCHW: Tensor, draws: Draws, counts: Sequence[int]) -> Tensor:
        out = self._outputs(tiles_NCHW, draws)
        if self.fault != "kde":
            self._centring = plain
            rows = {name: getattr(out, name) for name in ("teacher_class_NVK", "teacher_patch_NMK")}
            out = out._replace(**{name: self._over_all(logits) for name, logits in rows.items()})
        parts = zip(*(each.split(list(counts)) for each in out), strict=True)
        own = torch.stack([self._patient_loss(type(out)(*part)) for part in parts])
        return own + 0.3 * kde(out.features_NVD[:, 0]) if self.fault == "kde" else own

    def _over_all(self, logits: Tensor) -> Tensor:
        if self.fault == "centre":
            return logits - logits.mean((0, 1))
        # plain's softmax gives these back.
        temperature = self.settings.teacher_temperature
        return sinkhorn(logits.flatten(0, 1), temperature).view_as(logits).log() * temperature


class BatchCentre(BatchWide):
    fault = "centre"


class BatchSinkhorn(BatchWide):
    fault = "sinkhorn"


class BatchKde(BatchWide):
    fault = "kde"


class RunningCentre(SelfDistillation):
    """Remembers the mean of the patients it has seen."""

    seen: Tensor | float = 0.0

    def _patient_loss(self, out: Any) -> Tensor:
        self._centring = plain
        centre, self.seen = self.seen, self.seen * 0.5 + out.teacher_class_NVK.mean((0, 1)) * 0.5
        return super()._patient_loss(out._replace(teacher_class_NVK=out.teacher_class_NVK - centre))


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        *((fault, check) for fault in (BatchCentre, BatchSinkhorn, BatchKde) for check in CHECKS[:3]),
        # The serial engine shows one patient to the objective at a time: only what is remembered can couple them.
        (RunningCentre, check_removal_in_the_step),
    ],
)
def test_statistics_over_several_patients_are_caught(fault, check):
    model = unlike_its_start(fault(SPEC, dino_settings(teacher_temperature=0.02, ibot_weight=0.1)))
    with pytest.raises(AssertionError):
        check(model)


# The same in the engines: a pass over several patients, and what is remembered from one to the next.


class BatchCentredMae(MaskedAutoencoder):
    """Takes off pixels what all tiles of a pass have in common, as a batch-norm layer does, and more, so that little data shows it."""

    def tile_losses(self, tiles_NCHW: Tensor, draws: Draws) -> Tensor:
        return super().tile_losses(tiles_NCHW - tiles_NCHW.sum(0), draws)


class RunningCentreMae(MaskedAutoencoder):
    """Takes off what it remembers of the tiles it has seen, as a batch-norm layer in evaluation does."""

    seen: Tensor | float = 0.0

    def tile_losses(self, tiles_NCHW: Tensor, draws: Draws) -> Tensor:
        centre, self.seen = self.seen, self.seen * 0.5 + tiles_NCHW.sum(0)
        return super().tile_losses(tiles_NCHW - centre, draws)


def coupled_mae(kind: type[MaskedAutoencoder]) -> ObjectiveModule:
    return kind(SPEC, mask_ratio=0.5, decoder_dim=16, decoder_depth=1, decoder_heads=2, normalise_target=False)


def coupled_dino(kind: type[SelfDistillation]) -> ObjectiveModule:
    return kind(SPEC, dino_settings(teacher_temperature=0.02, ibot_weight=0.1, local_crops=0))


COUPLED: list[tuple[ObjectiveModule, ObjectiveModule, Compute]] = [
    *((coupled_dino(kind), coupled_dino(SelfDistillation), BOOK_KEEPING) for kind in (BatchCentre, BatchSinkhorn, BatchKde)),
    (coupled_dino(RunningCentre), coupled_dino(SelfDistillation), SERIAL),
    (coupled_mae(BatchCentredMae), coupled_mae(MaskedAutoencoder), BOOK_KEEPING),
    (coupled_mae(RunningCentreMae), coupled_mae(MaskedAutoencoder), SERIAL),
]


@pytest.mark.parametrize(("fault", "sound", "compute"), COUPLED, ids=lambda value: getattr(value, "engine", type(value).__name__))
def test_patients_coupled_in_an_engine_are_caught_and_those_of_a_sound_objective_pass(fault, sound, compute: Compute) -> None:
    check_removal_in_the_step(unlike_its_start(sound), compute, EQUAL_COUNTS)
    with pytest.raises(AssertionError):
        check_removal_in_the_step(unlike_its_start(fault), compute, EQUAL_COUNTS)
