"""Ranks that fail: all end, nobody hangs, and the same round asked for again is the same release."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faulty_ranks
import pytest
import torch
from faulty_ranks import COMMAND, Hungry, Plant, build
from training_fixtures import SIDE, Colours, cohort, mechanism

from pathfed_client.io.rank_group import GroupSpec, OutOfStepError, RankGroup
from pathfed_client.io.rank_round import run_round_on_ranks, try_base_state_on_ranks
from pathfed_client.io.shared_numbers import Layout, attach, create
from pathfed_client.training.compute import Compute
from pathfed_common.errors import ErrorCode, HostError, PrivacyError
from pathfed_common.objectives.mae import MaskedAutoencoder

__all__ = ["cohort", "mechanism"]


def start(mode="sharded", *, kind=MaskedAutoencoder, timeout_s=60.0, command=COMMAND, tiles_at_once=8) -> RankGroup:
    shapes = {name: tuple(tensor.shape) for name, tensor in build(kind)().state_dict().items()}
    spec = GroupSpec(
        devices=[torch.device("cpu")] * 2,
        mode=mode,
        build=build(kind),
        layout=Layout(shapes, shapes, (2, 8, SIDE, SIDE, 3)),
        compute=Compute(),
        tiles_at_once=tiles_at_once,
    )
    return RankGroup(spec, timeout_s=timeout_s, command=command)


@pytest.fixture
def run(cohort, mechanism):
    def call(group: RankGroup) -> dict[str, torch.Tensor]:
        outcome = run_round_on_ranks(
            group,
            base_state=build()().state_dict(),
            cohort=cohort(5, 3, 4),
            tiles=Colours(),
            mechanism=mechanism(),
            tiles_per_patient=4,
            steps=1,
            local_learning_rate=0.1,
            secret=bytes(32),
            context={"round": 1},
        )
        return outcome.update

    return call


@pytest.fixture(scope="module")
def undisturbed() -> list[dict[str, torch.Tensor]]:
    """The first release of these tests; all later ones must be the same."""
    return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (("killed",), "ended by itself"),
        (("raises",), "RuntimeError"),
        (("hangs",), "took too long"),
        (("raises", "hides"), None),
    ],
)
def test_a_rank_that_fails_ends_all_with_a_code_and_the_round_can_be_had_again(run, undisturbed, faults, said, caplog) -> None:
    """In the middle of the second patient's backward pass, on one rank of two; the last one says that all is well."""
    with start() as group:
        release = run(group)
        undisturbed.append(release)
        assert all(torch.equal(release[name], undisturbed[0][name]) for name in release), "by new ranks after a failure: the same release"
        pids = group.pids
        group.ask_all(Plant(faults, 1))  # type: ignore[arg-type]
        # Time for a patient here; the real one is far longer.
        for member in group._members:
            member.process._timeout_s = 4.0
        began = time.monotonic()
        with pytest.raises(OutOfStepError) as caught:
            run(group)
        assert time.monotonic() - began < 30
        assert caught.value.code is ErrorCode.RANK_ENDED
        assert said in (None, caught.value.value)
        assert not group.is_open
        assert not any(alive(pid) for pid in pids)
        assert "Muellerova" not in caplog.text
        with pytest.raises(OutOfStepError):
            run(group)


def test_ranks_end_with_the_process_that_started_them(tmp_path) -> None:
    """Killed with -9 while a rank hangs in a collective operation."""
    script = tmp_path / "site.py"
    script.write_text(
        "import sys\nsys.path[:0] = sys.argv[1:]\n"
        "import test_rank_group as here\nfrom faulty_ranks import Plant\n"
        "group = here.start()\n"
        "group.ask_all(Plant(('hangs',), 1))\n"
        "print(*group.pids, flush=True)\n"
        "while True:\n    here.try_base_state_on_ranks(group, here.build()().state_dict())\n",
        encoding="utf-8",
    )
    folders = [str(Path(__file__).parent), str(Path(faulty_ranks.__file__).parent)]
    with subprocess.Popen([sys.executable, str(script), *folders], stdout=subprocess.PIPE, text=True) as site:
        assert site.stdout is not None
        pids = [int(word) for word in site.stdout.readline().split()]
        time.sleep(1.0)
        were_alive = [alive(pid) for pid in pids]
        os.kill(site.pid, signal.SIGKILL)
    assert were_alive == [True, True]
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_a_base_state_that_cannot_be_trained_is_refused_and_the_ranks_stay() -> None:
    with start() as group:
        state = build()().state_dict()
        huge = {name: torch.full_like(tensor, 1e30) for name, tensor in state.items()}
        nan = {**state, "encoder.norm.bias": torch.full_like(state["encoder.norm.bias"], torch.nan)}
        for broken in (huge, nan):
            with pytest.raises(PrivacyError) as caught:
                try_base_state_on_ranks(group, broken)
            assert caught.value.code is ErrorCode.BASE_STATE_UNTRAINABLE
        try_base_state_on_ranks(group, state)
        assert group.is_open


def test_memory_that_runs_out_on_synthetic_tiles_is_told_as_such() -> None:
    """8 tiles are 4 a rank, two too many."""
    with start(kind=Hungry) as group:
        with pytest.raises(OutOfStepError) as caught:
            try_base_state_on_ranks(group, build(Hungry)().state_dict())
        assert caught.value.out_of_memory


def test_neither_command_line_nor_environment_holds_a_secret() -> None:
    with start("replicated") as group:
        for pid in group.pids:
            seen = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
            assert bytes(32).hex().encode() not in seen
            listening = _listening(pid)
            assert listening, "ranks listen for each other"
            assert all(address == "0100007F" for address in listening), "on 127.0.0.1 alone"


def _listening(pid: int) -> list[str]:
    """Addresses (hexadecimal, as the kernel writes them) on which a process listens."""
    sockets = {str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def test_a_rank_that_does_not_start_is_an_error_before_any_charge(tmp_path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)\n", encoding="utf-8")
    with pytest.raises(HostError) as caught:
        start(command=(sys.executable, str(broken)))
    assert caught.value.code is ErrorCode.PROCESS_ENDED


def test_shared_memory_holds_what_it_was_laid_out_for() -> None:
    layout = Layout({"a": (2, 3), "b": (), "c": (0, 4)}, {"a": (2, 3)}, (2, 1, 4, 4, 3))
    memory = create(layout)
    one, other = attach(memory, layout), attach(memory, layout)
    one.state["a"].fill_(1)
    one.update["a"].fill_(2)
    one.tiles[1] = 7
    os.close(memory)
    assert other.state["a"].tolist() == [[1.0] * 3] * 2
    assert other.update["a"].tolist() == [2.0] * 6
    assert [int(tile.sum()) for tile in other.tiles] == [0, 7 * 48]
    assert (other.state["b"].shape, other.state["c"].shape) == (torch.Size([]), torch.Size([0, 4]))


def test_a_secret_is_not_in_what_a_task_says_of_itself(mechanism) -> None:
    from pathfed_client.training.augmentation import NO_AUGMENTATION
    from pathfed_client.training.ranks.tasks import Begin, Patient

    begin = Begin(
        mechanism=mechanism(),
        augmentation=NO_AUGMENTATION,
        steps=1,
        local_learning_rate=0.1,
        context={"cohort": "named"},
        secret=b"hidden" * 8,
    )
    assert "hidden" not in repr(begin)
    assert "named" not in repr(begin)
    assert "who" not in repr(Patient(slot=0, tiles=1, pseudonym="who"))
