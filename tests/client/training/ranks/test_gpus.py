"""The same on GPUs, where there are some: NCCL instead of gloo, and the allocator's own limit."""

import pytest
import torch
from faulty_ranks import COMMAND, SIDE, Scaled, build
from training_fixtures import Colours

from pathfed_client.io.rank_group import GroupSpec, RankGroup
from pathfed_client.io.shared_numbers import Layout
from pathfed_client.training.compute import Compute
from pathfed_client.training.device import gpus, limit_memory, resolve, resolve_all
from pathfed_client.training.local_round import run_round
from pathfed_common.privacy.randomness import KeyedRandom

#: Products are summed in other orders, and noise may differ in a last bit; the noise itself is 1.
CLOSE = 1e-4

one_gpu = pytest.mark.skipif(gpus() < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(gpus() < 2, reason="needs two GPUs")


@one_gpu
def test_a_round_on_a_gpu_is_that_on_the_cpu_but_for_rounding(cohort, mechanism) -> None:
    updates = []
    for device in ("cpu", "cuda"):
        objective = build()().to(resolve(device))
        state = {name: tensor.cpu().clone() for name, tensor in objective.state_dict().items()}
        outcome = run_round(
            objective=objective,
            base_state=state,
            cohort=cohort(5, 3, 4),
            tiles=Colours(),
            mechanism=mechanism(),
            tiles_per_patient=4,
            steps=2,
            local_learning_rate=0.1,
            random=KeyedRandom(bytes(32), {}),
        )
        updates.append({name: tensor.cpu() for name, tensor in outcome.update.items()})
    assert max(float((updates[0][name] - updates[1][name]).abs().max()) for name in updates[0]) < CLOSE


@one_gpu
def test_a_limit_of_memory_makes_torch_say_that_it_is_too_little() -> None:
    device = resolve("cuda")
    limit_memory(device, 10**8)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(10**9, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@two_gpus
@pytest.mark.parametrize("mode", ["sharded", "replicated"])
def test_two_gpus_release_what_one_process_does(compare, mode) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in build(Scaled)().state_dict().items()}
    spec = GroupSpec(
        devices=resolve_all("cuda", 2),
        mode=mode,
        build=build(Scaled),
        layout=Layout(shapes, shapes, (3, 8, SIDE, SIDE, 3)),
        compute=Compute(),
        tiles_at_once=2,
    )
    with RankGroup(spec, command=COMMAND) as group:
        on_gpus, single = compare(group, steps=2)
    assert max(float((on_gpus.update[name] - single.update[name]).abs().max()) for name in single.update) < CLOSE
