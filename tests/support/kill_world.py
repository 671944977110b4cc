"""A consortium that is set up once and put back to where it began, again and again, so that runs of it can be compared."""

import json
import os
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pathfed_instants
import psutil

from pathfed_client.home import SiteHome
from pathfed_common.digest import Digest
from pathfed_common.ids import RunName
from pathfed_common.provenance.documents import ServerCard, SiteCard
from pathfed_local.consortium import Consortium, Hospital
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.state import ParticipationState, RoundState, RunState

RUN = RunName("matrix")
HOOK = Path(__file__).parent / "instants"
_OPTIONS = ("--no-reply-slots", "--max-epsilon", "900", "--delta", "1e-5")
OPEN = (RunState.PLANNED, RunState.RUNNING)
_PLAN = """
name = "matrix"
[objective]
decoder_dim = 32
decoder_depth = 1
decoder_heads = 2
[cohort]
tile_px = 96
tiles_per_patient = 2
tissue_share = 0.2
[privacy]
expected_patients = 2
noise_multiplier = 20.0
clip_norm = 1.0
figure_share = 0.5
loss_bound = 1.5
delta = 1e-5
epsilon_limit = 900.0
[rounds]
count = {rounds}
deadline_s = 900
quorum = 3
reply_slot_s = 1
[server_optimiser]
name = "sgd"
learning_rate = 0.001
"""
_TICK_S = 0.3
_APPROVED_WITHIN_S = 300.0
#: kind -> words of its command, and whose process it is: the server's or a site's.
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "server": (("pathfed-server", "start"), "server"),
    "superlink": (("pathfed_server.transport.superlink",), "server"),
    "superexec": (("flower-superexec",), "server"),
    "round loop": (("flwr-serverapp",), "server"),
    "control plane": (("pathfed_server.control",), "server"),
    "fleet door": (("pathfed_server.transport.path_filter",), "server"),
    "site": (("pathfed-site", "start"), "site"),
    "supernode": (("pathfed_client.transport.supernode",), "site"),
    "runner": (("pathfed_client.app",), "site"),
    "agent": (("pathfed_client.control.agent",), "site"),
    "relay": (("pathfed_client.relaying",), "site"),
    "rank": (("pathfed_client.io.rank_process",), "site"),
    "tile reader": (("pathfed_client.io.tile_workers",), "site"),
}
#: Kinds of which an owner has as many as it has work for.
_SEVERAL = ("rank", "tile reader", "round loop")


def matrix_plan(rounds: int) -> str:
    """A plan of so many rounds, in TOML: each needs every site, has time for what is killed to come back, and costs next to nothing.

    Its noise is large, so that epsilon stays small, and its learning rate so small that fifty rounds of it leave the encoder finite.
    """
    return _PLAN.format(rounds=rounds)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended: all that must not depend on what was killed on the way."""

    state: RunState
    checkpoints: tuple[Any, ...]
    committed: tuple[int, ...]
    admitted: tuple[tuple[str, ...], ...]
    statements: tuple[tuple[int, str], ...]
    charged: Mapping[str, tuple[int, ...]]


@dataclass
class World:
    """The consortium, and a copy of its folder as it stood still before the run.

    Attributes:
        out: its folder; every run happens there, since homes know their places.
        hospitals: its hospitals. The last one computes with two ranks.
        plan_text: the plan, in TOML.
        digest: the plan's.
        within: by site, the words that its start has before it when the run happens; see `Consortium.start_site`.
    """

    out: Path
    hospitals: Sequence[Hospital]
    plan_text: str
    digest: Digest = field(default=Digest(""))
    told: list[str] = field(default_factory=list)
    within: dict[str, Sequence[str]] = field(default_factory=dict)

    @property
    def _rest(self) -> Path:
        return self.out.with_name(self.out.name + "-at-rest")

    @property
    def instants(self) -> Path:
        """Where instants are armed."""
        return self.out.with_name(self.out.name + "-instants")

    @property
    def last_site(self) -> str:
        """The site that computes with two ranks."""
        return self.hospitals[-1].name

    def set_up(self) -> None:
        """Make it, by the commands people use, up to the sites' approvals; then stop it and copy it."""
        made = Consortium(self.out, self.hospitals)

        def start() -> None:
            _replace_in(made.site(self.last_site) / "policy.toml", 'device = "auto"', 'device = "cpu"', "devices = 1", "devices = 2")
            made.start_sites()

        try:
            self.digest = bring_together(made, self.plan_text, start=start)
        finally:
            made.stop()
        write_trust(made)
        shutil.copytree(self.out, self._rest, symlinks=True)

    @contextmanager
    def again(self, *, restarts: int = 200, run: RunName = RUN) -> Iterator[Consortium]:
        """The consortium as it was before the run, started, and the run with it. Every process has ended afterwards."""
        shutil.rmtree(self.out)
        shutil.copytree(self._rest, self.out, symlinks=True)
        shutil.rmtree(self.instants, ignore_errors=True)
        for name in ("armed", "reached"):
            (self.instants / name).mkdir(parents=True)
        before = {name: os.environ.get(name) for name in ("PYTHONPATH", pathfed_instants.FOLDER_VARIABLE)}
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HOOK), before["PYTHONPATH"])))
        os.environ[pathfed_instants.FOLDER_VARIABLE] = str(self.instants)
        made = Consortium(self.out, self.hospitals, restarts=restarts)
        self.told.clear()
        try:
            made.start_server()
            for one in self.hospitals:
                made.start_site(one.name, self.within.get(one.name, ()))
            made.server_command("run", "start", self.digest, "--name", run)
            yield made
        finally:
            made.stop()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def ended(self, made: Consortium, run: RunName = RUN) -> Ended:
        """How the run ended. Each site's ledger and the record, replayed, have been verified."""
        names = [one.name for one in self.hospitals]
        with SqlStore(ServerHome(made.server).database_url) as store:
            rounds = store.rounds(run)
            found = Ended(
                state=store.run(run).state,
                checkpoints=tuple(store.checkpoints(run)),
                committed=tuple(row.round_index for row in rounds if row.state is RoundState.COMMITTED),
                admitted=tuple(
                    tuple(each.site for each in store.participations(run, row.round_index) if each.state is ParticipationState.ADMITTED)
                    for row in rounds
                ),
                statements=tuple((row.round_index, row.site) for row in store.statements(run)),
                charged={name: self._charged(made, name) for name in names},
            )
        if found.state is RunState.FINISHED:
            release = self.out / "release"
            made.server_command("release", "create", run, "--out", release, "--wait", "180")
            updates = ServerHome(made.server).record(run) / "updates"
            made.finish(made.begin("pathfed", "verify", release, "--trust", self.out / "trust.json", "--replay", updates))
        return found

    def _charged(self, made: Consortium, site: str) -> tuple[int, ...]:
        made.site_command(site, "ledger", "verify")
        return tuple(sorted(entry["round"] for entry in made.site_command(site, "ledger", "show")["entries"]))


def bring_together(
    made: Consortium, plan_text: str, *, init: Sequence[str] = (), settings: Sequence[str] = (), start: Callable[[], None] | None = None
) -> Digest:
    """Make a consortium whose sites have approved a plan, by the commands people use. The caller stops it.

    Args:
        made: a new one.
        plan_text: the plan, in TOML.
        init: words of `pathfed-server init`.
        settings: what stands in the server's settings and what shall stand there, in turn; updates are retained in any case.
        start: starts the sites; None: all, as they are.
    """
    made.server_command("init", *init)
    _replace_in(made.server / "server.toml", "retain_updates = false", "retain_updates = true", *settings)
    made.start_server()
    made.enrol({one.name: ["--slides", one.slides, "--patients", one.patients, *_OPTIONS] for one in made.hospitals})
    plan, signed = made.out / "plan.toml", made.out / "plan.dsse"
    plan.write_text(plan_text, encoding="utf-8")
    digest = Digest(made.server_command("plan", "publish", plan, "--out", signed)["plan"])
    for one in made.hospitals:
        made.site_command(one.name, "scan", signed)
        made.site_command(one.name, "approve", signed, "--patients-at-least", "6")
    (start or made.start_sites)()
    with SqlStore(ServerHome(made.server).database_url) as store:
        until = time.monotonic() + _APPROVED_WITHIN_S
        while len(store.approvals(digest)) < len(made.hospitals):
            assert time.monotonic() < until, "the approvals did not come"
            time.sleep(_TICK_S)
    return digest


def write_trust(made: Consortium) -> Path:
    """What a verifier trusts, as a file: the keys of the server and of every site, read from their homes."""
    server = ServerCard.from_bytes((made.server / "server-card.dsse").read_bytes())
    cards = [SiteCard.from_bytes(SiteHome(made.site(one.name)).card_file.read_bytes()) for one in made.hospitals]
    trust = {"server": server.evidence_key.to_text(), "sites": {card.site: card.evidence_key.to_text() for card in cards}}
    file = made.out / "trust.json"
    file.write_text(json.dumps(trust), encoding="utf-8")
    return file


def _replace_in(file: Path, *pairs: str) -> None:
    text = file.read_text(encoding="utf-8")
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in text, (old, text)
        text = text.replace(old, new)
    tomllib.loads(text)
    file.write_text(text, encoding="utf-8")


def processes(made: Consortium, owner: str) -> list[psutil.Process]:
    """The living processes of `server` or of a site, its own first."""
    found = []
    try:
        pid = made.pids()[owner]
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except (KeyError, psutil.Error):
        return []
    for process in tree:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def find(made: Consortium, kind: str, owner: str) -> list[psutil.Process]:
    """The living processes of a kind."""
    words, _ = KINDS[kind]
    found = []
    for process in processes(made, owner):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if all(any(word in part for part in command) for word in words):
            found.append(process)
    return found


def doubles(made: Consortium) -> list[tuple[str, str, int]]:
    """Kinds of which an owner has more processes than one, where it should have one at most."""
    found = []
    for kind, (_, side) in KINDS.items():
        for owner in ("server",) if side == "server" else [one.name for one in made.hospitals]:
            number = len(find(made, kind, owner))
            if kind not in _SEVERAL and number > 1:
                found.append((kind, owner, number))
    return found
