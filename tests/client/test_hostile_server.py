"""What a dishonest server may ask of a site, and what it gets: a list to read.

Each line is an attack, the code that the site answers with, and what the privacy ledger shows afterwards. `NOTHING SPENT`: refused before
anything was charged, and nothing but the code leaves. `THE SPEND`: the server asked for something that an approved plan allows and that is
new; it is charged, stated, and never free.

The site is a real one: slides, keys, database, ledger, encoder and noise. The server has its own, valid evidence key.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import tifffile
import torch
from answering_site import OFFERED_AT, Site, bytes_of, opened
from breaking_state import breaking_state

from pathfed_client import app, deciding
from pathfed_client.gate.ports import Answer
from pathfed_client.home import SiteHome
from pathfed_client.training.augmentation import NO_AUGMENTATION
from pathfed_client.training.engines.engine import NotContributed
from pathfed_client.training.engines.serial import patient_gradient
from pathfed_client.training.local_round import load_state, patient_tiles
from pathfed_common import digest
from pathfed_common.encoder import weights
from pathfed_common.model import build_model
from pathfed_common.objectives.mae import normalise
from pathfed_common.plan import Plan
from pathfed_common.privacy.randomness import KeyedRandom
from pathfed_common.protocol.messages import OFFER_TYPE, RoundOffer
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey


@pytest.fixture
def site(copy_home: Callable[..., SiteHome]) -> Iterator[Site]:
    with opened(copy_home()) as made:
        yield made


class Ask(NamedTuple):
    """What a server sends: an envelope, and the bytes it calls the base state."""

    envelope: bytes
    base_state: bytes


@dataclass(frozen=True)
class Server:
    """A server that may sign what it likes."""

    world: Any
    site: Site
    dump: Callable[..., bytes]

    def offer(self, state: bytes | None = None, **changes: Any) -> Ask:
        """A well-formed offer, for the first round unless told otherwise."""
        given = self.world.base_state if state is None else state
        return Ask(self.world.offer(base_state=given, **changes), given)

    def plan(self, **changes: Any) -> Plan:
        """The approved plan with other figures: signed by the server, approved by nobody."""
        parts = {name: getattr(self.world.plan, name) for name in ("privacy", "rounds", "cohort", "server_optimiser")}
        name = changes.pop("name", self.world.plan.name)
        made = {
            each: part.model_copy(update={key: value for key, value in changes.items() if key in type(part).model_fields})
            for each, part in parts.items()
        }
        return self.world.plan.model_copy(update=made | {"name": name})

    def other_plan(self, **changes: Any) -> Ask:
        """An offer under another plan than the approved one."""
        return self.offer(plan=self.plan(**changes).digest)

    def raw(self, **changes: Any) -> Ask:
        """Signed JSON that is an offer but for these keys; a key with Ellipsis is left out."""
        whole = json.loads(dsse.parse(self.world.offer()).payload) | changes
        data = json.dumps({key: value for key, value in whole.items() if value is not ...}, sort_keys=True, separators=(",", ":"))
        return self.signed(data.encode())

    def signed(self, payload: bytes, kind: str = OFFER_TYPE) -> Ask:
        """Anything at all under the server's own signature."""
        return Ask(dsse.seal(payload, kind, self.world.server_key), self.world.base_state)

    def state(self, **changes: Any) -> Ask:
        """A base state with tensors exchanged, truthfully named in the offer."""
        return self.offer(self.dump(self.world.plan, **changes))

    def tensors(self) -> dict[str, torch.Tensor]:
        return weights.load(self.world.base_state)

    def everywhere(self, value: float) -> bytes:
        """A base state of one number."""
        return weights.dump({key: torch.full_like(tensor, value) for key, tensor in self.tensors().items()}, {})

    def broken(self, value: float) -> Ask:
        """One number of the base state is this one."""
        name, tensor = min(self.tensors().items())
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return self.state(**{name: changed})


FIRST = OFFERED_AT
#: NOTHING SPENT. what the server does -> (the site's code, how it does it)
NOTHING_SPENT: dict[str, tuple[str, Callable[[Server], Ask]]] = {
    # Another mechanism than the hospital approved. A plan is its digest: whatever differs in it is another plan.
    "lower sigma": ("PF407", lambda s: s.other_plan(noise_multiplier=0.1)),
    "other clipping": ("PF407", lambda s: s.other_plan(clip_norm=100.0)),
    "a larger share of figures": ("PF407", lambda s: s.other_plan(figure_share=0.9)),
    "a higher sampling rate": ("PF407", lambda s: s.other_plan(expected_patients=4)),
    "a larger delta": ("PF407", lambda s: s.other_plan(delta=1e-3)),
    "a higher limit of epsilon": ("PF407", lambda s: s.other_plan(epsilon_limit=900.0)),
    "more steps a round": ("PF407", lambda s: s.other_plan(steps=50)),
    "more rounds in the plan": ("PF407", lambda s: s.other_plan(count=1000)),
    "shorter reply slots": ("PF407", lambda s: s.other_plan(reply_slot_s=0.5)),
    "more tiles of each patient": ("PF407", lambda s: s.other_plan(tiles_per_patient=64)),
    "another plan of the same name": ("PF407", lambda s: s.other_plan(learning_rate=0.5)),
    "a plan that nobody has heard of": ("PF407", lambda s: s.other_plan(name="unapproved")),
    # More rounds than approved, and rounds at other times.
    "a round beyond the plan's last": ("PF409", lambda s: s.offer(round_index=s.world.plan.rounds.count + 1)),
    "a round of the far future": ("PF409", lambda s: s.offer(round_index=10**15)),
    "round zero": ("PF405", lambda s: s.raw(round_index=0)),
    "a round before the first": ("PF405", lambda s: s.raw(round_index=-1)),
    "half a round": ("PF405", lambda s: s.raw(round_index=1.5)),
    "a deadline in the past": ("PF409", lambda s: s.offer(offered_at=FIRST - 100, deadline=FIRST - 40)),
    "a deadline before its own offer": ("PF409", lambda s: s.offer(deadline=FIRST - 1)),
    "a later deadline than the plan's": ("PF409", lambda s: s.offer(deadline=FIRST + 62)),
    "a deadline of the year 9000": ("PF409", lambda s: s.offer(deadline=221_845_392_000.0)),
    "a deadline beyond all years": ("PF405", lambda s: s.raw(deadline=1e300)),
    "an offer from the future": ("PF409", lambda s: s.offer(offered_at=FIRST + 400, deadline=FIRST + 450)),
    "an offer of the year 9000": ("PF409", lambda s: s.offer(offered_at=221_845_392_000.0, deadline=221_845_392_060.0)),
    "a time that is a text": ("PF405", lambda s: s.raw(deadline="tomorrow")),
    "a time of NaN": ("PF405", lambda s: s.raw(offered_at=float("nan"))),
    "an infinite deadline": ("PF405", lambda s: s.raw(deadline=float("inf"))),
    # Base states that would leak, break, or waste the budget.
    "a base state with NaN": ("PF306", lambda s: s.broken(float("nan"))),
    "a base state with an infinity": ("PF306", lambda s: s.broken(float("-inf"))),
    "a base state that overflows": (
        "PF306",
        lambda s: s.offer(s.everywhere(1e30)),
    ),
    "a base state of another shape": ("PF408", lambda s: s.state(**{min(s.tensors()): torch.zeros(3)})),
    "a base state with a tensor more": ("PF408", lambda s: s.state(more=torch.zeros(3))),
    "a base state with a tensor less": ("PF408", lambda s: s.offer(weights.dump(dict(sorted(s.tensors().items())[1:]), {}))),
    "a base state of half precision": (
        "PF408",
        lambda s: s.offer(weights.dump({key: value.bfloat16() for key, value in s.tensors().items()}, {})),
    ),
    "a base state that is no file of tensors": ("PF408", lambda s: s.offer(b"\x08\0\0\0\0\0\0\0not json")),
    "a base state whose header has no end": ("PF408", lambda s: s.offer(b"\xff" * 8 + s.world.base_state[8:])),
    "a base state of one byte": ("PF408", lambda s: s.offer(b"x")),
    # The bytes are not those that the offer names.
    "other bytes than offered": ("PF408", lambda s: s.offer()._replace(base_state=s.world.base_state[:-1] + b"\x01")),
    "fewer bytes than offered": ("PF408", lambda s: s.offer()._replace(base_state=s.world.base_state[:-1])),
    "more bytes than offered": ("PF408", lambda s: s.offer()._replace(base_state=s.world.base_state + b"\0")),
    "no bytes": ("PF408", lambda s: s.offer()._replace(base_state=b"")),
    "a lie about their number": ("PF408", lambda s: s.offer(base_state_bytes=1)),
    "a number of bytes beyond any disk": ("PF408", lambda s: s.offer(base_state_bytes=10**18)),
    "a number of bytes that is none": ("PF405", lambda s: s.raw(base_state_bytes=0)),
    # Offers that are not this server's, not for this site, or none.
    "another key's signature": ("PF406", lambda s: s.offer(key=SigningKey.generate())),
    "the site's own signature": ("PF406", lambda s: s.offer(key=s.site.home.evidence_key)),
    "another site's offer": ("PF406", lambda s: s.offer(site="other-site")),
    "no envelope": ("PF406", lambda s: s.offer()._replace(envelope=b"{}")),
    "nothing": ("PF406", lambda s: s.offer()._replace(envelope=b"")),
    "an envelope changed on the way": ("PF406", lambda s: s.offer()._replace(envelope=s.offer().envelope.replace(b"a", b"b", 1))),
    "a plan signed as an offer": ("PF405", lambda s: s.signed(s.world.plan.canonical_bytes())),
    "an offer signed as a plan": (
        "PF406",
        lambda s: s.signed(dsse.parse(s.world.offer()).payload, "application/vnd.pathfed.plan.v1+json"),
    ),
    "a run whose name is a path": ("PF405", lambda s: s.offer(run="../../etc/passwd")),
    "a run whose name has a line break": ("PF405", lambda s: s.offer(run="run\n1")),
    "a run without a name": ("PF405", lambda s: s.offer(run="")),
    "a key more": ("PF405", lambda s: s.raw(noise_multiplier=0.0)),
    "a key less": ("PF405", lambda s: s.raw(deadline=...)),
    "another version of the protocol": ("PF405", lambda s: s.raw(version=2)),
    "brackets without end": ("PF405", lambda s: s.signed(b"[" * 100_000)),
    "a number without end": ("PF405", lambda s: s.signed(b'{"round_index":' + b"9" * 100_000 + b"}")),
}


def test_every_attack_is_refused_with_its_code_and_nothing_is_spent(world, site, dump_state) -> None:
    server = Server(world, site, dump_state)
    found = {what: site.answer(*attack(server)) for what, (_, attack) in NOTHING_SPENT.items()}
    assert {what: answer.code for what, answer in found.items()} == {what: code for what, (code, _) in NOTHING_SPENT.items()}
    assert all(answer == Answer(code=answer.code) for answer in found.values()), "a refusal is a code and nothing else"
    assert site.charges() == 0
    of_states = [code for code, _ in NOTHING_SPENT.values() if code in ("PF306", "PF408")]
    assert site.answer.bulk.fetched <= len(of_states), "what the gate refuses is not even asked for"
    assert site.released() == []
    assert site.clock.slept == [], "no time is given away, and the site is not held"
    assert site.answer(*server.offer()).code is None, "none of it is in the way of the honest offer"
    assert site.charges() == 1


def test_after_an_answer_no_offer_of_that_round_gets_anything_new(world, site, dump_state) -> None:
    """The same round again, to average the noise away: with another seed, from another state, at another time, under another deadline."""
    server = Server(world, site, dump_state)
    first, second = server.offer(), server.offer(round_index=2)
    answers = site.answer(*first), site.answer(*second)
    assert [answer.code for answer in answers] == [None, None]
    # The second round began from the first one's state, an older encoder than is due. A site cannot know that, and the guarantee does not
    # need it: what is asked anew is another release, and the spend stands in what the site signs.
    assert site.charges() == 2
    assert site.statement(answers[1]).base_state == site.statement(answers[0]).base_state == digest.of_bytes(world.base_state)
    assert bytes_of(answers[0]) != bytes_of(answers[1])
    assert site.statement(answers[1]).epsilon_plan > site.statement(answers[0]).epsilon_plan
    name, tensor = min(server.tensors().items())
    other = server.dump(world.plan, **{name: tensor + 1e-6})

    same = {
        "the first round, the very offer": first,
        "the first round, offered later": server.offer(offered_at=FIRST + 1, deadline=FIRST + 61),
        "the first round, another deadline": server.offer(deadline=FIRST + 30),
    }
    assert {what: site.answer(*ask) for what, ask in same.items()} == dict.fromkeys(same, answers[0]), "the bytes of then"
    refused = {
        "the first round on another state": server.offer(other),
        "the second round on another state": server.offer(other, round_index=2),
        "the first round on an older encoder": server.offer(server.dump(world.plan, **{name: tensor - 0.5})),
        "the first round, more noise said to be enough": server.other_plan(noise_multiplier=9.0),
    }
    codes = {what: site.answer(*ask).code for what, ask in refused.items()}
    assert set(codes.values()) == {"PF409", "PF407"}
    assert codes.pop("the first round, more noise said to be enough") == "PF407"
    assert set(codes.values()) == {"PF409"}
    assert site.charges() == 2
    assert len(site.released()) == 4, "two updates, and the opening of each one's commitment"


def test_more_rounds_than_approved_are_charged_until_the_plans_own_limit_and_then_refused(world, site, dump_state) -> None:
    """The approved plan begun anew under other run names: each of its rounds is charged, and the plan's limit counts them all."""
    server = Server(world, site, dump_state)
    one_round = app.plan_epsilon(server.plan(count=1), 4, world.plan.privacy.delta)
    plan = server.plan(name="two-rounds", epsilon_limit=one_round * 1.9)
    deciding.approve(site.home, world.sign("limited.dsse", plan), 4, site.home.root / "other.dsse")
    codes = [site.answer(*server.offer(plan=plan.digest, run=f"run-{number}")).code for number in range(5)]
    allowed = codes.count(None)
    assert codes == [None] * allowed + ["PF302"] * (5 - allowed)
    assert 1 <= allowed < 5
    assert site.charges() == allowed
    entries = app.open_ledger(site.home, site.store).verify()
    assert max(entry.epsilon_plan for entry in entries) <= plan.privacy.epsilon_limit


def test_a_base_state_that_breaks_on_tissue_alone_gets_noise_like_any_other(world, site, dump_state) -> None:
    """It passes every public tile, and no tissue of this site gives a finite number: an answer that depended on it would be an oracle."""
    plan, px = world.plan, world.plan.cohort.tile_px
    slides = [tifffile.imread(path) for path in sorted(world.slides.iterdir())]
    tiles = torch.stack([torch.from_numpy(pixels[y : y + px, x : x + px]) for pixels in slides for y in (64, 128) for x in (64, 128)])
    state = breaking_state(plan, normalise(tiles))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    model = build_model(plan)
    load_state(model, state)
    given = patient_tiles(model, tiles.numpy(), NO_AUGMENTATION, KeyedRandom(bytes(32), {"test": "masks"}))
    with pytest.raises(NotContributed, match="not finite"):
        patient_gradient(model, dict(model.named_parameters()), given)

    answer = site.answer(*Server(world, site, dump_state).offer(weights.dump(state, {})))
    update = torch.cat([tensor.float().flatten() for tensor in weights.load(bytes_of(answer)).values()])
    assert bool(torch.isfinite(update).all())
    assert float(update.std()) == pytest.approx(1.0 / 2.0, rel=0.01), "sigma * C / B, as without it"
    assert site.charges() == 1


def test_the_list_leaves_no_field_of_an_offer_out() -> None:
    """Who adds a field to offers adds its lies here."""
    lies = " ".join(NOTHING_SPENT)
    words = {
        "run": "run",
        "site": "another site",
        "round_index": "round",
        "plan": "plan",
        "base_state": "base state",
        "base_state_bytes": "number of bytes",
        "offered_at": "an offer from the future",
        "deadline": "deadline",
    }
    assert set(words) == set(RoundOffer.__dataclass_fields__)
    assert [name for name, word in words.items() if word not in lies] == []
