"""How a site computes a round is decided before the charge; on several devices the release is that of one, and a lost rank costs no second
charge. The devices are processes on the CPU."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import faulty_ranks
import pytest
import torch
from answering_site import OFFERED_AT, bytes_of, opened

from pathfed_client import computing
from pathfed_client.computing import RoundComputer
from pathfed_client.gate.ports import Answer
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.home import SiteHome
from pathfed_client.io.rank_group import RankGroup
from pathfed_client.io.rank_round import run_round_on_ranks
from pathfed_client.training.engines import book_keeping
from pathfed_client.training.engines.choice import make_engine
from pathfed_client.training.local_round import RoundOutcome, run_round
from pathfed_common.encoder import weights
from pathfed_common.errors import ErrorCode, HostError, PrivacyError
from pathfed_common.model import build_model
from pathfed_common.privacy.gaussian import grid
from pathfed_common.privacy.randomness import KeyedRandom


class Watched:
    """The rounds that ranks compute; the first of them is computed on one device as well, with the same secret and context."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan
        self.outcomes: list[RoundOutcome] = []
        self.single: RoundOutcome | None = None
        self.contexts: list[dict[str, object]] = []
        self.then: Callable[[RankGroup], None] = lambda group: None

    def run(self, group: RankGroup, **given: Any) -> RoundOutcome:
        outcome = run_round_on_ranks(group, **given)
        self.outcomes.append(outcome)
        self.contexts.append(given["context"])
        if self.single is None:
            random = KeyedRandom(given.pop("secret"), given.pop("context"))
            self.single = run_round(objective=build_model(self.plan), random=random, **given)
        self.then(group)
        return outcome


@pytest.mark.parametrize("mode", ["sharded", "replicated"])
def test_two_devices_answer_as_one_does_and_a_lost_rank_costs_no_second_charge(world, copy_home, monkeypatch, mode) -> None:
    watched = Watched(world.plan)
    monkeypatch.setattr(computing, "run_round_on_ranks", watched.run)

    def lose(group: RankGroup) -> None:
        """The release is thrown away, as if it had never been computed, and a rank is killed before it is computed again."""
        os.kill(group.pids[1], signal.SIGKILL)
        watched.then = lambda group: None
        group.ask_all(None)  # type: ignore[arg-type]

    watched.then = lose
    with opened(copy_home(device='"cpu"', devices=2, sharding=f'"{mode}"')) as site:
        assert site.answer(world.offer(), world.base_state) == Answer(code="PF911")
        assert (site.clock.time - OFFERED_AT) % 5.0 == pytest.approx(0.0), "at a time slot"
        assert site.charges() == 1
        assert site.released() == []
        answer = site.answer(world.offer(), world.base_state)
        assert site.charges() == 1
    first, second = watched.outcomes
    sent = weights.load(bytes_of(answer))
    assert all(torch.equal(first.update[name], second.update[name]) for name in first.update), "the same release, bit for bit"
    assert all(torch.equal(sent[name], second.update[name].bfloat16()) for name in sent)
    assert watched.contexts[0] == watched.contexts[1]
    assert {"device": "cpu", "ranks": 2, "mode": mode}.items() <= watched.contexts[0].items()
    single = watched.single
    assert single is not None
    # Sums that differ in their last bits are rounded to one public grid: a number that lies between two of its values may fall either way.
    apart = torch.cat([(first.update[name] - single.update[name]).abs().flatten() for name in first.update])
    assert float(apart.max()) < 3e-6 + grid(0.5)
    assert int((apart > 3e-6).sum()) <= 1 + apart.numel() // 10_000
    assert float(torch.cat([tensor.flatten() for tensor in single.update.values()]).std()) == pytest.approx(0.5, rel=0.01)


@pytest.fixture
def policy() -> Callable[..., SitePolicy]:
    return lambda **given: SitePolicy.model_validate({"max_epsilon": 8.0, "delta": 1e-6, "device": "cpu", **given})


@pytest.fixture
def prepared(world, policy, monkeypatch) -> Iterator[Callable[..., RoundComputer]]:
    """A computer that has prepared the plan, its k set to 8, with an objective of the tests'."""
    made: list[RoundComputer] = []
    cohort = world.plan.cohort.model_copy(update={"tiles_per_patient": 8, "tile_px": 16})
    plan = world.plan.model_copy(update={"cohort": cohort})

    def prepare(build: Any, **given: Any) -> RoundComputer:
        monkeypatch.setattr(computing, "build_model", build)
        monkeypatch.setattr(computing, "RankGroup", partial(RankGroup, command=faulty_ranks.COMMAND))
        shapes = {name: tuple(tensor.shape) for name, tensor in build(plan).state_dict().items()}
        monkeypatch.setattr(computing, "state_shapes", lambda plan: shapes)
        monkeypatch.setattr(computing, "update_shapes", lambda plan: shapes)
        made.append(RoundComputer(policy(**given)))
        made[-1].prepare(plan, build(plan).state_dict())
        return made[-1]

    prepare.plan = plan  # type: ignore[attr-defined]
    yield prepare
    for computer in made:
        computer.close()


@pytest.mark.parametrize(("devices", "found"), [(1, 2), (2, 2)])
def test_memory_that_is_wanting_for_all_tiles_at_once_is_found_out_before_the_charge(prepared, devices, found) -> None:
    """8 tiles, of which 2 at once fit. Two ranks begin with 4."""
    computer = prepared(faulty_ranks.hungry, devices=devices, sharding="sharded")
    assert computer.context(prepared.plan)["tiles_at_once"] == found


@pytest.mark.parametrize("given", [{}, {"device_memory_gb": 1e-6}])
def test_one_tile_that_does_not_fit_is_refused_with_a_code(prepared, given) -> None:
    with pytest.raises(HostError) as caught:
        prepared(faulty_ranks.small if given else faulty_ranks.insatiable, **given)
    assert caught.value.code is ErrorCode.MEMORY_TOO_SMALL


def test_a_limit_of_memory_chooses_how_many_tiles_the_cpu_takes_at_once(prepared) -> None:
    free = prepared(faulty_ranks.small).context(prepared.plan)["tiles_at_once"]
    tight = prepared(faulty_ranks.small, device_memory_gb=2e-4).context(prepared.plan)["tiles_at_once"]
    assert free == 8
    assert 1 <= tight < 8


def test_an_engine_is_kept_from_round_to_round_and_made_anew_for_another_plan(prepared, monkeypatch) -> None:
    """What an engine compiled would otherwise be compiled again in every round."""
    made: list[object] = []

    def make(*given: Any, **named: Any) -> object:
        made.append(given)
        return make_engine(*given, **named)

    monkeypatch.setattr(computing, "make_engine", make)
    computer, plan = prepared(faulty_ranks.small), prepared.plan
    state = faulty_ranks.small(plan).state_dict()
    computer.prepare(plan, state)
    assert len(made) == 1
    other = plan.model_copy(update={"rounds": plan.rounds.model_copy(update={"steps": plan.rounds.steps + 1})})
    computer.prepare(other, state)
    assert len(made) == 2


def few_tiles(plan: Any, **compute: str) -> Any:
    """The plan with so few tiles a patient that book-keeping is the cheaper engine."""
    cohort = plan.cohort.model_copy(update={"tiles_per_patient": 2, "tile_px": 96})
    return plan.model_copy(update={"cohort": cohort, "compute": plan.compute.model_copy(update=compute)})


def carried_far(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights after a round of much noise, N(0, 1) on each: the gradient of a tile of one colour then hangs on its last digits."""
    generator = torch.Generator().manual_seed(0)
    return {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def test_weights_that_noise_has_carried_far_do_not_end_a_run_that_leaves_the_engine_open(world, policy) -> None:
    plan, computer = few_tiles(world.plan), RoundComputer(policy())
    first = build_model(plan).state_dict()
    computer.prepare(plan, first)
    assert computer.context(plan)["engine"] == "book_keeping"
    computer.prepare(plan, carried_far(first))
    computer.prepare(plan, first)
    assert computer.context(plan)["engine"] == "book_keeping"


def test_an_engine_that_does_not_agree_is_replaced_where_the_plan_leaves_it_open_and_refused_where_it_names_it(
    world, policy, monkeypatch
) -> None:
    monkeypatch.setattr(book_keeping, "_agree", lambda *_: False)
    plan, computer = few_tiles(world.plan), RoundComputer(policy())
    computer.prepare(plan, build_model(plan).state_dict())
    assert computer.context(plan)["engine"] == "serial"
    named = few_tiles(world.plan, engine="book_keeping")
    with pytest.raises(PrivacyError) as caught:
        computer.prepare(named, build_model(named).state_dict())
    assert caught.value.code is ErrorCode.ENGINE_UNFIT


def test_a_model_that_fits_no_device_is_sharded_and_another_is_not(world, policy) -> None:
    """22 MB of weights: three copies in half of the memory."""
    modes = {}
    for memory in (None, 0.2, 0.1):
        given = {} if memory is None else {"device_memory_gb": memory}
        modes[memory] = RoundComputer(policy(devices=2, **given)).context(world.plan)["mode"]
    assert modes == {None: "replicated", 0.2: "replicated", 0.1: "sharded"}


def test_a_device_that_is_missing_is_refused_before_the_charge(world, copy_home) -> None:
    with opened(copy_home(device='"cuda:7"')) as site:
        assert site.answer(world.offer(), world.base_state) == Answer(code="PF910")
        assert site.charges() == 0


def test_the_command_that_approves_names_a_missing_device(world, copy_home, site_cli) -> None:
    home: SiteHome = copy_home(device='"cuda"', devices=2)
    done = site_cli("start", "--home", home.root)
    assert "PF910" in done.err
