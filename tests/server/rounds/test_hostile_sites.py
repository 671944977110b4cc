"""One site of three is late, silent, broken or dishonest: it gets its code, and the round goes on with the other two as if alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.server.rounds.consortium import KEYS, NAMES, RUN, Answer, Conduct, Consortium, Make, honest_update, make_plan, send
from torch import Tensor

from pathfed_common import digest
from pathfed_common.encoder import weights
from pathfed_common.ids import SiteName
from pathfed_server.rounds.ports import Reply
from pathfed_server.rounds.state import ParticipationState

A, B, C = NAMES
PLAN = make_plan(rounds=2, quorum=2)


def altered(change: Callable[[dict[str, Tensor]], object]) -> Conduct:
    """Sends tensors that are not the honest ones, and signs them truthfully."""

    def conduct(answer: Answer, folder: Path, at: float) -> list[Reply]:
        tensors = honest_update(PLAN, answer.offer)
        change(tensors)
        return [answer.signed_again(weights.dump(tensors, {})).reply(folder, at)]

    return conduct


def states(**changes: Any) -> Conduct:
    """Signs another statement over the honest bytes."""
    return lambda answer, folder, at: [replace(answer, statement=replace(answer.statement, **changes)).reply(folder, at)]


def states_privacy(**changes: Any) -> Conduct:
    return lambda answer, folder, at: states(privacy=replace(answer.statement.privacy, **changes))(answer, folder, at)


def states_figures(**changes: Any) -> Conduct:
    return lambda answer, folder, at: states(figures=replace(answer.statement.figures, **changes))(answer, folder, at)


def reply_with(**changes: Any) -> Conduct:
    def conduct(answer: Answer, folder: Path, at: float) -> list[Reply]:
        made = replace(answer.reply(folder, at), **changes)
        if made.update is None:
            (folder / f"{answer.offer.site}.part").unlink()
        return [made]

    return conduct


def sends_bytes(change: Callable[[bytes], bytes], *, sign: bool) -> Conduct:
    def conduct(answer: Answer, folder: Path, at: float) -> list[Reply]:
        data = change(answer.update)
        return [(answer.signed_again(data) if sign else replace(answer, update=data)).reply(folder, at)]

    return conduct


def signs_as(name: str) -> Conduct:
    return lambda answer, folder, at: [replace(answer, key=KEYS[SiteName(name)]).reply(folder, at)]


def late(answer: Answer, folder: Path, at: float) -> list[Reply]:
    return [answer.reply(folder, at + 61.0)]


def put(name: str, index: tuple[int, ...], value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].__setitem__(index, value)


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


OTHER = digest.of_bytes(b"other")

REFUSED: dict[str, tuple[Conduct, str]] = {
    "signs with a stranger's key": (signs_as("stranger"), "PF504"),
    "signs with another site's key": (signs_as(A), "PF504"),
    "names another site": (states(site=A), "PF504"),
    "names another run": (states(run="run-2"), "PF504"),
    "names another plan": (states(plan=OTHER), "PF504"),
    "names another round": (states(round_index=7), "PF509"),
    "names another base state": (states(base_state=OTHER), "PF509"),
    "envelope changed on the way": (reply_with(statement=b"{}"), "PF504"),
    "too late": (late, "PF561"),
    "states a lower rate": (states_privacy(sampling_rate=0.1), "PF517"),
    "states more noise": (states_privacy(noise_multiplier=2.0), "PF517"),
    "states another clip norm": (states_privacy(clip_norm=0.5), "PF517"),
    "states more steps": (states_privacy(steps=2), "PF517"),
    "states another delta": (states_privacy(delta=1e-9), "PF517"),
    "states a noiseless count": (states_figures(patients_std=0.0), "PF517"),
    "states a noiseless loss": (states_figures(loss_sum_std=1e-3), "PF517"),
    "states a loss that no patients have": (states_figures(loss_sum=1.7e308), "PF517"),
    "states a loss far below zero": (states_figures(loss_sum=-1.7e308), "PF517"),
    "states more patients than there are": (states_figures(patients=1e300), "PF517"),
    "states patients far below zero": (states_figures(patients=-1e300), "PF517"),
    "flips one bit of the update": (sends_bytes(flip, sign=False), "PF505"),
    "sends half the update": (sends_bytes(lambda data: data[: len(data) // 2], sign=False), "PF505"),
    "signs half the update": (sends_bytes(lambda data: data[: len(data) // 2], sign=True), "PF506"),
    "signs rubbish": (sends_bytes(lambda data: b"rubbish", sign=True), "PF506"),
    "signs a huge file": (sends_bytes(lambda data: data + bytes(100_000), sign=True), "PF506"),
    "claims a giant header": (sends_bytes(lambda data: b"\xff" * 8 + data[8:], sign=True), "PF506"),
    "leaves a tensor out": (altered(lambda tensors: tensors.pop("head.bias")), "PF506"),
    "adds a tensor": (altered(lambda tensors: tensors.update(extra=torch.zeros(1))), "PF506"),
    "sends another shape": (altered(lambda tensors: tensors.update({"head.bias": torch.zeros(5, 1)})), "PF506"),
    "sends another dtype": (altered(lambda tensors: tensors.update({"head.bias": torch.zeros(5, dtype=torch.bfloat16)})), "PF506"),
    "sends one NaN": (altered(put("encoder.norm", (3,), float("nan"))), "PF507"),
    "sends one infinity": (altered(put("encoder.blocks.0.w", (2, 3), float("inf"))), "PF507"),
    "sends minus infinity": (altered(put("encoder.blocks.0.w", (2, 3), -float("inf"))), "PF507"),
    "sends a huge number": (altered(put("head.bias", (0,), 1e30)), "PF508"),
    "sends ten times too much": (altered(lambda tensors: [tensor.mul_(10) for tensor in tensors.values()]), "PF508"),
    "gives its own code": (reply_with(code="PF301", statement=None, update=None), "PF301"),
    "gives a patient's name for a code": (reply_with(code="J. Doe", statement=None, update=None), "PF405"),
    "gives a code there is none of": (reply_with(code="PF999", statement=None, update=None), "PF405"),
    "sends no statement": (reply_with(statement=None), "PF405"),
    "sends no update": (reply_with(update=None), "PF405"),
}


INT8 = make_plan(rounds=1, quorum=2, wire="int8")


def altered_file(change: Callable[[dict[str, Tensor]], object]) -> Conduct:
    """Sends an int8 file in which something was changed, and signs it truthfully."""

    def conduct(answer: Answer, folder: Path, at: float) -> list[Reply]:
        tensors = weights.load(answer.update)
        change(tensors)
        return [answer.signed_again(weights.dump(tensors, {"kind": "pathfed-update"})).reply(folder, at)]

    return conduct


REFUSED_INT8: dict[str, tuple[Conduct, str]] = {
    "scales that are NaN": (altered_file(put("encoder.norm.scale", (0,), float("nan"))), "PF507"),
    "scales that are infinite": (altered_file(put("encoder.blocks.0.w.scale", (0,), float("inf"))), "PF507"),
    "infinite scales over zeros": (
        altered_file(lambda tensors: (tensors["head.bias.scale"].fill_(float("inf")), tensors["head.bias"].zero_())),
        "PF507",
    ),
    "a huge scale": (altered_file(put("head.bias.scale", (0,), 1e30)), "PF508"),
    "a huge scale over zeros": (
        altered_file(lambda tensors: (tensors["head.bias.scale"].fill_(1e30), tensors["head.bias"].zero_())),
        "PF550",
    ),
    "a number of -128": (altered_file(put("encoder.norm", (0,), -128)), "PF550"),
    "fewer scales than blocks": (altered_file(lambda tensors: tensors.update({"head.bias.scale": torch.zeros(0)})), "PF506"),
    "no scales": (altered_file(lambda tensors: tensors.pop("head.bias.scale")), "PF506"),
    "scales in float64": (altered_file(lambda tensors: tensors.update({"head.bias.scale": torch.zeros(1, dtype=torch.float64)})), "PF506"),
    "float32 numbers": (altered(lambda tensors: None), "PF506"),
}


@pytest.mark.parametrize("what", REFUSED_INT8)
def test_hostile_int8_updates_are_refused_with_their_code(consortium: Make, what: str) -> None:
    conduct, code = REFUSED_INT8[what]
    made = consortium(INT8)
    made.sites.conduct[B] = conduct
    made.drive()
    assert made.codes(1) == {A: None, B: code, C: None}
    assert quarantined_codes(made) == [code]


@pytest.fixture
def calm_end(consortium: Make) -> digest.Digest:
    """State after a run of the two honest sites alone."""
    made = consortium(PLAN, sites=[A, C])
    made.drive()
    return made.store.checkpoints(RUN)[-1].state


def quarantined_codes(made: Consortium) -> list[str]:
    rows = made.store.quarantined(RUN)
    for row in rows:
        path = made.home / row.path
        assert (digest.of_bytes(path.read_bytes()), path.stat().st_size) == (row.update, row.update_bytes)
    assert len(list((made.home / "quarantine").rglob("*.safetensors"))) == len({row.path for row in rows})
    return [row.code for row in rows if row.site == B]


@pytest.mark.parametrize("what", REFUSED)
def test_site_gets_its_code_and_the_round_goes_on_without_it(consortium: Make, calm_end: digest.Digest, what: str) -> None:
    conduct, code = REFUSED[what]
    made = consortium(PLAN)
    made.sites.conduct[B] = conduct
    made.drive()
    assert [made.codes(index) for index in (1, 2)] == [{A: None, B: code, C: None}] * 2
    assert made.store.participations(RUN, 1)[1].state is ParticipationState.REFUSED
    assert made.store.checkpoints(RUN)[-1].state == calm_end
    assert [row.site for row in made.store.statements(RUN)] == [A, C] * 2
    sent_an_update = (
        "its own code" not in what and "for a code" not in what and "there is none of" not in what and what != "sends no update"
    )
    assert set(quarantined_codes(made)) == ({code} if sent_an_update else set())


def test_silent_site_is_told_as_silent(consortium: Make, calm_end: digest.Digest) -> None:
    for conduct in (lambda *_: [], reply_with(code="PF515", statement=None, update=None)):
        made = consortium(PLAN)
        made.sites.conduct[B] = conduct
        made.drive()
        row = made.store.participations(RUN, 2)[1]
        assert (row.state, row.code) == (ParticipationState.SILENT, "PF515")
        assert made.store.checkpoints(RUN)[-1].state == calm_end


def test_replayed_update_of_an_earlier_round_counts_only_once(consortium: Make) -> None:
    first: list[Answer] = []

    def replay(answer: Answer, folder: Path, at: float) -> list[Reply]:
        first.append(answer)
        return send(first[0], folder, at)

    made = consortium(PLAN)
    made.sites.conduct[B] = replay
    made.drive()
    assert [made.codes(index)[B] for index in (1, 2)] == [None, "PF509"]
    assert quarantined_codes(made) == ["PF509"]


def test_update_of_another_site_sent_again_as_ones_own_is_refused(consortium: Make, calm_end: digest.Digest) -> None:
    heard: list[Answer] = []

    def overheard(answer: Answer, folder: Path, at: float) -> list[Reply]:
        heard.append(answer)
        return send(answer, folder, at)

    def copy(answer: Answer, folder: Path, at: float) -> list[Reply]:
        return [replace(heard[-1].reply(folder, at), site=B)]

    made = consortium(PLAN)
    made.sites.conduct = {A: overheard, B: copy}
    made.drive()
    assert made.codes(1) == {A: None, B: "PF504", C: None}
    assert made.store.checkpoints(RUN)[-1].state == calm_end


def test_another_reply_of_a_site_is_set_aside_and_the_first_counts(consortium: Make) -> None:
    calm = consortium(PLAN)
    calm.drive()

    def twice(answer: Answer, folder: Path, at: float) -> list[Reply]:
        one = answer.reply(folder, at)
        assert one.update is not None
        kept = one.update.rename(folder / "first.part")
        (other,) = altered(put("head.bias", (0,), 0.5))(answer, folder, at)
        return [replace(one, update=kept), other]

    made = consortium(PLAN)
    made.sites.conduct[B] = twice
    made.drive()
    assert made.codes(1) == dict.fromkeys(NAMES)
    assert quarantined_codes(made) == ["PF509", "PF509"]
    assert made.store.checkpoints(RUN)[-1].state == calm.store.checkpoints(RUN)[-1].state


def test_reply_of_a_site_that_was_not_asked_is_dropped(consortium: Make) -> None:
    calm = consortium(PLAN)
    calm.drive()

    def chatty(answer: Answer, folder: Path, at: float) -> list[Reply]:
        other = replace(answer.reply(folder, at), site=SiteName("stranger"))
        assert other.update is not None
        moved = other.update.rename(folder / "other.part")
        return [replace(other, update=moved), answer.reply(folder, at)]

    made = consortium(PLAN)
    made.sites.conduct[B] = chatty
    made.drive()
    assert made.codes(2) == dict.fromkeys(NAMES)
    assert made.store.checkpoints(RUN)[-1].state == calm.store.checkpoints(RUN)[-1].state


def test_one_site_of_two_that_sends_nan_does_not_poison_the_encoder(consortium: Make) -> None:
    made = consortium(make_plan(quorum=1), sites=[A, B])
    made.sites.conduct[B] = altered(lambda tensors: [tensor.fill_(float("nan")) for tensor in tensors.values()])
    made.drive()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in made.final_state().values())
    assert made.codes(2) == {A: None, B: "PF507"}


def test_whole_consortium_of_refused_sites_leaves_the_encoder_unchanged(consortium: Make) -> None:
    made = consortium(make_plan(quorum=1))
    made.sites.conduct = dict.fromkeys(NAMES, altered(put("head.bias", (0,), float("nan"))))
    with pytest.raises(Exception, match="PF503"):
        made.drive()
    assert [each.round_index for each in made.store.checkpoints(RUN)] == [0]
