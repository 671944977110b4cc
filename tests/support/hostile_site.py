"""A site that is enrolled and certified, takes part as its program does, and answers each round of a run with something else.

Installed into its runner by `hostile/sitecustomize.py`: the round is trained, charged and sealed as always; then, in place of the delivery,
the round's act is played over the real bulk plane, and its answer goes to the server in a real Flower message. Before most acts something
is tried on the bulk port alone. What the server answered there is noted, a JSON object a line, in `<folder>/answered.jsonl`.

Environment: PATHFED_TEST_HOSTILE, the folder; PATHFED_TEST_ACCOMPLICE, the home of a site that hands this one what it has sealed.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from after_import import after_import

if TYPE_CHECKING:
    from torch import Tensor

    from pathfed_client.gate.ports import Answer
    from pathfed_client.home import SiteHome
    from pathfed_client.io.site_store import SiteStore
    from pathfed_common.protocol.messages import RoundOffer
    from pathfed_common.provenance.statement import UpdateStatement
    from pathfed_common.shards import Manifest

FOLDER_VARIABLE = "PATHFED_TEST_HOSTILE"
ACCOMPLICE_VARIABLE = "PATHFED_TEST_ACCOMPLICE"
ANSWERED = "answered.jsonl"
#: How long the accomplice may take to seal its answer, seconds.
_ACCOMPLICE_S = 60.0
_PIECE = 2**20
_TINY = 10_000
#: Of a reply that is too heavy for a Flower message.
_HEAVY_BYTES = 200 * 2**20


def install() -> None:
    """Make the runner's answerer hostile as soon as its module has been imported."""
    after_import(_TURNED)


@dataclass
class Withheld:
    """The site's own bulk plane; what it is told to deliver stays here."""

    real: Any
    sealed: "tuple[Path, RoundOffer] | None" = None

    def fetch(self, offer: "RoundOffer") -> Path:
        found: Path = self.real.fetch(offer)
        return found

    def deliver(self, update: Path, manifest: "Manifest", offer: "RoundOffer") -> None:
        del manifest
        self.sealed = (update, offer)


@dataclass
class Hand:
    """What an act has in hand: the round's offer, the honest sealed update, and all that the site's program has."""

    home: "SiteHome"
    store: "SiteStore"
    bulk: Any
    update: Path
    offer: "RoundOffer"
    envelope: bytes

    @property
    def statement(self) -> "UpdateStatement":
        from pathfed_common.provenance.statement import UpdateStatement

        return UpdateStatement.from_envelope(self.envelope, self.home.evidence_key.public)

    def signed(self, **changes: Any) -> "Answer":
        """The honest statement with changes, under the site's own key."""
        from pathfed_client.gate.ports import Answer

        return Answer(code=None, statement=replace(self.statement, **changes).to_envelope(self.home.evidence_key))

    def sends(self, data: bytes) -> Any:
        """Deliver bytes as the round's update; their manifest."""
        from pathfed_common.part_file import manifest_of

        path = _folder() / "update"
        path.write_bytes(data)
        manifest = manifest_of(path)
        self.bulk.deliver(path, manifest, self.offer)
        return manifest

    def alters(self, change: "Callable[[dict[str, Tensor]], object]") -> "Answer":
        """Deliver other tensors than the honest ones, signed truthfully."""
        from pathfed_common.encoder import weights

        tensors = weights.load(self.update.read_bytes())
        change(tensors)
        manifest = self.sends(weights.dump(tensors, {"kind": "pathfed-update"}))
        return self.signed(update=manifest.file, update_bytes=manifest.size)

    def announce(self, **changes: Any) -> "tuple[Manifest, int]":
        """Announce the honest update, or a manifest with changes; it, and how many bytes the server has of it."""
        from pathfed_client.transport.bulk_client import Outbound
        from pathfed_common.part_file import manifest_of

        manifest = replace(manifest_of(self.update), **changes)
        with self.bulk._connected() as client:
            going = Outbound(path=self.update, manifest=manifest, run=self.offer.run, round_index=self.offer.round_index)
            return manifest, client.begin(going)

    def pours(self, pieces: Iterator[bytes], manifest: "Manifest") -> int:
        """Send pieces as one stream, whatever they are; how many bytes the server says it has."""
        from pathfed_common.protocol import control_pb2 as pb

        named = bytes.fromhex(manifest.file.removeprefix("sha256:"))
        given: dict[str, Any] = {"run": self.offer.run, "round_index": self.offer.round_index, "file": named, "offset": 0}

        def messages() -> Iterator[bytes]:
            yield pb.PutShardRequest(**given, piece=next(pieces)).SerializeToString()
            for piece in pieces:
                yield pb.PutShardRequest(piece=piece).SerializeToString()

        with self.bulk._connected() as client:
            here: int = client._calls.send("PutShard", messages(), pb.PutShardReply).here
            return here

    def whole(self) -> Iterator[bytes]:
        """The honest update in pieces of full size."""
        data = self.update.read_bytes()
        return (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))


Act = Callable[[Hand], "Answer"]
#: Something tried at the bulk port alone; what it returns is noted, or the code that it is answered with.
Trial = Callable[[Hand], object]


# ---- trials at the bulk port


def endless(hand: Hand) -> object:
    manifest, _ = hand.announce()
    last = hand.update.stat().st_size % _PIECE

    def pieces() -> Iterator[bytes]:
        yield from list(hand.whole())[: -1 if last else None]
        while True:
            yield bytes(_PIECE)

    return hand.pours(pieces(), manifest)


def ten_thousand_tiny_messages(hand: Hand) -> object:
    manifest, _ = hand.announce()
    return hand.pours((b"x" for _ in range(_TINY)), manifest)


def lying_shard(hand: Hand) -> object:
    from pathfed_common import digest

    manifest, _ = hand.announce(file=digest.of_bytes(b"a lie"), shards=(digest.of_bytes(b"a lie"),))
    return hand.pours(hand.whole(), manifest)


def truncated(hand: Hand) -> object:
    """Three pieces, and the stream ends; then the same from the front, where the server is not."""
    manifest, _ = hand.announce()
    hand.pours(iter(list(hand.whole())[:3]), manifest)
    return hand.pours(hand.whole(), manifest)


def larger_than_the_plan(hand: Hand) -> object:
    from pathfed_common import digest
    from pathfed_common.shards import SHARD_BYTES

    return hand.announce(size=40 * SHARD_BYTES, shards=(digest.of_bytes(b"a"),) * 40)[1]


def another_round_than_the_open_one(hand: Hand) -> object:
    later = replace(hand.offer, round_index=hand.offer.round_index + 1)
    return replace(hand, offer=later).announce()[1]


# ---- answers


def honest(hand: Hand) -> "Answer":
    hand.sends(hand.update.read_bytes())
    return hand.signed()


def _first(value: float) -> "Callable[[dict[str, Tensor]], object]":
    """Put a number into the first tensor."""

    def change(tensors: "dict[str, Tensor]") -> None:
        next(iter(tensors.values())).view(-1)[0] = value

    return change


def one_nan(hand: Hand) -> "Answer":
    return hand.alters(_first(float("nan")))


def one_infinity(hand: Hand) -> "Answer":
    return hand.alters(_first(-float("inf")))


def thousandfold(hand: Hand) -> "Answer":
    return hand.alters(lambda tensors: [tensor.mul_(1000.0) for tensor in tensors.values()])


def wrong_shapes(hand: Hand) -> "Answer":
    def change(tensors: "dict[str, Tensor]") -> None:
        name = next(name for name, tensor in tensors.items() if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1])
        tensors[name] = tensors[name].T.contiguous()

    return hand.alters(change)


def the_first_round_again(hand: Hand) -> "Answer":
    """Update and statement of round 1, as they were admitted then, byte for byte."""
    from pathfed_client.gate.ports import Answer

    before = hand.store.get_sealed(hand.offer.run, 1)
    assert before is not None
    hand.sends((hand.home.root / before.update_path).read_bytes())
    return Answer(code=None, statement=before.statement)


def signed_for_the_next_round(hand: Hand) -> "Answer":
    hand.sends(hand.update.read_bytes())
    return hand.signed(round_index=hand.offer.round_index + 1)


def an_accomplices_answer(hand: Hand) -> "Answer":
    """What another site has sealed for this very round, statement and bytes."""
    from pathfed_client.gate.ports import Answer
    from pathfed_client.home import SiteHome
    from pathfed_client.io.site_store import SiteStore

    home = SiteHome(Path(os.environ[ACCOMPLICE_VARIABLE]))
    until = time.monotonic() + _ACCOMPLICE_S
    with closing(SiteStore(home.database)) as store:
        while (sealed := store.get_sealed(hand.offer.run, hand.offer.round_index)) is None:
            assert time.monotonic() < until, "the accomplice sealed nothing"
            time.sleep(0.1)
    hand.sends((home.root / sealed.update_path).read_bytes())
    return Answer(code=None, statement=sealed.statement)


def half_of_what_it_signs(hand: Hand) -> "Answer":
    data = hand.update.read_bytes()
    hand.sends(data[: len(data) // 2])
    return hand.signed()


def an_update_that_never_ends(hand: Hand) -> "Answer":
    """A sound announcement, half of the bytes, and the statement of all of them."""
    manifest, _ = hand.announce()
    pieces = list(hand.whole())
    hand.pours(iter(pieces[: len(pieces) // 2]), manifest)
    return hand.signed()


def more_noise_than_the_plan(hand: Hand) -> "Answer":
    hand.sends(hand.update.read_bytes())
    privacy = hand.statement.privacy
    return hand.signed(privacy=replace(privacy, noise_multiplier=2 * privacy.noise_multiplier))


def a_strangers_signature(hand: Hand) -> "Answer":
    from pathfed_client.gate.ports import Answer
    from pathfed_common.provenance.keys import SigningKey

    hand.sends(hand.update.read_bytes())
    return Answer(code=None, statement=hand.statement.to_envelope(SigningKey.generate()))


def a_list_for_a_code(hand: Hand) -> "Answer":
    """A record of another type than any site of ours sends."""
    from pathfed_client.gate.ports import Answer

    made: Any = Answer(code="")
    object.__setattr__(made, "code", ["PF301", "PF302"])
    answer: Answer = made
    return answer


def an_unreadable_message(hand: Hand) -> "Answer":
    """A Flower message whose record is no record: its bytes have the digest that names them, and cannot be read."""
    from pathfed_client.gate.ports import Answer

    return Answer(code=UNREADABLE)


def a_heavy_message(hand: Hand) -> "Answer":
    from pathfed_client.gate.ports import Answer

    return Answer(code=HEAVY)


UNREADABLE, HEAVY = "unreadable", "heavy"


@dataclass(frozen=True)
class Turn:
    """What happens in one round.

    Attributes:
        act: how the round is answered.
        code: what the server says of it; None: the update is admitted.
        trial: what is tried at the bulk port before.
        answered: the code that it is answered with.
        sends_update: whether a whole update arrives, which is then in quarantine.
    """

    act: Act
    code: str | None
    trial: Trial | None = None
    answered: str | None = None
    sends_update: bool = True


#: Round 1 first. What is no fault of a site (PF464: its line may have been cut) breaks no row of refusals, and counts in none.
TURNS: tuple[Turn, ...] = (
    Turn(honest, None),
    Turn(one_nan, "PF507", endless, "PF463"),
    Turn(one_infinity, "PF507", ten_thousand_tiny_messages, "PF416"),
    Turn(thousandfold, "PF508", lying_shard, "PF463"),
    Turn(wrong_shapes, "PF506", truncated, "PF466"),
    Turn(the_first_round_again, "PF509", larger_than_the_plan, "PF462"),
    Turn(signed_for_the_next_round, "PF509", another_round_than_the_open_one, "PF461"),
    Turn(an_update_that_never_ends, "PF464", sends_update=False),
    Turn(an_accomplices_answer, "PF504"),
    Turn(a_strangers_signature, "PF504"),
    Turn(half_of_what_it_signs, "PF505"),
    Turn(more_noise_than_the_plan, "PF517"),
    Turn(a_list_for_a_code, "PF405", sends_update=False),
    Turn(an_unreadable_message, "PF405", sends_update=False),
    Turn(a_heavy_message, "PF405", sends_update=False),
)


def _folder() -> Path:
    return Path(os.environ[FOLDER_VARIABLE])


def _note(turn: Turn, hand: Hand) -> None:
    """Play a turn's trial and note what the server answers."""
    from pathfed_common.errors import PathfedError

    if turn.trial is None:
        return
    try:
        said: object = turn.trial(hand)
    except PathfedError as error:
        said = error.code.value
    noted = {"round": hand.offer.round_index, "trial": turn.trial.__name__, "answered": said}
    with (_folder() / ANSWERED).open("a", encoding="utf-8") as file:
        file.write(json.dumps(noted) + "\n")


def _turn_answerer(module: ModuleType) -> None:
    """`pathfed_client.answering`: what is sealed is not delivered, and the round's turn is played."""
    answerer: Any = module.SiteAnswerer
    make, answer = answerer.__init__, answerer.__call__

    def make_hostile(self: Any, home: Any, store: Any, bulk: Any, **options: Any) -> None:
        make(self, home, store, lambda outlet: Withheld(bulk(outlet)), **options)

    def answer_hostile(self: Any, envelope: bytes) -> Any:
        found = answer(self, envelope)
        if found.code is not None:
            return found
        update, offer = self._bulk.sealed
        hand = Hand(self._home, self._store, self._bulk.real, update, offer, found.statement)
        turn = TURNS[min(offer.round_index, len(TURNS)) - 1]
        _note(turn, hand)
        return turn.act(hand)

    answerer.__init__, answerer.__call__ = make_hostile, answer_hostile


def _turn_packing(module: ModuleType) -> None:
    """`pathfed_client.transport.flower_client`: some answers are packed as no site of ours does."""
    pack = module._content

    def content(answer: Any) -> Any:
        return {UNREADABLE: _unreadable, HEAVY: _heavy}.get(str(answer.code), lambda: pack(answer))()

    module._content = content  # type: ignore[attr-defined]


def _unreadable() -> Any:
    from flwr.app import ConfigRecord, RecordDict

    class Broken(ConfigRecord):
        def deflate(self) -> bytes:
            from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body

            return add_header_to_object_body(object_body=b"\xff" * 20, obj=self)

    Broken.__qualname__ = ConfigRecord.__qualname__
    return RecordDict({"pathfed.reply": Broken({"code": "", "envelope": b""})})


def _heavy() -> Any:
    import numpy
    from flwr.app import Array, ArrayRecord, RecordDict

    numbers = numpy.random.default_rng(0).integers(0, 256, _HEAVY_BYTES, dtype=numpy.uint8)
    return RecordDict({"pathfed.reply": ArrayRecord({"heavy": Array(numbers)})})


_TURNED: Mapping[str, Callable[[ModuleType], None]] = {
    "pathfed_client.answering": _turn_answerer,
    "pathfed_client.transport.flower_client": _turn_packing,
}
