"""A real site: painted slides, a patient list, a server with keys, a plan that is signed and approved, and offers to answer."""

import csv
import datetime
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_fixtures import Done, run_main, small_disk

from pathfed_client import app, cli, deciding
from pathfed_client.computing import RoundComputer
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.home import SiteHome, SiteSettings
from pathfed_common import digest
from pathfed_common.encoder import weights
from pathfed_common.ids import RunName, SiteName
from pathfed_common.model import initial_state
from pathfed_common.plan import Plan, load_plan
from pathfed_common.protocol.messages import OFFER_TYPE, RoundOffer
from pathfed_common.provenance import dsse
from pathfed_common.provenance.documents import ServerCard, seal_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.synthetic import draw_anatomy, draw_stain, paint
from pathfed_local.generator import slide_bytes
from pathfed_server.transport.certificates import make_tls

__all__ = ["run_main", "small_disk"]

SURNAMES = ("Muellerova", "Oyelaran", "Katzenstein", "Drozdowski", "Yamashiro")
DECLARED = 4
SITE = SiteName("st-elsewhere")
RUN = RunName("run-1")
PLAN = """
name = "tiny"
[objective]
decoder_dim = 32
decoder_depth = 1
decoder_heads = 2
[cohort]
tile_px = 32
tiles_per_patient = 2
[privacy]
expected_patients = 2
noise_multiplier = 1.0
clip_norm = 1.0
delta = 1e-5
epsilon_limit = 50.0
[rounds]
count = 3
deadline_s = 60
quorum = 1
reply_slot_s = 5
[wire]
dtype = "bfloat16"
"""


@dataclass(frozen=True)
class World:
    """What lies outside a site's home: slides, list, server, plan."""

    root: Path
    server_key: SigningKey
    plan: Plan
    base_state: bytes = field(repr=False)

    @property
    def slides(self) -> Path:
        return self.root / "slides"

    @property
    def patients(self) -> Path:
        return self.root / "patients.csv"

    @property
    def card(self) -> Path:
        return self.root / "server-card.dsse"

    @property
    def signed_plan(self) -> Path:
        return self.root / "plan.dsse"

    def sign(self, name: str, plan: Plan) -> Path:
        """A plan signed by the server, as a file."""
        path = self.root / name
        path.write_bytes(seal_plan(plan, self.server_key))
        return path

    def init(self, root: Path, **policy: Any) -> SiteHome:
        """A fresh home."""
        settings = SiteSettings(name=SITE, slides=(str(self.slides),), patients=str(self.patients))
        return app.init(root, settings, SitePolicy(**{"max_epsilon": 100.0, "delta": 1e-6, **policy}), self.card)

    def offer(self, *, base_state: bytes | None = None, key: SigningKey | None = None, **changes: Any) -> bytes:
        """A signed offer: the plan's first round, unless told otherwise."""
        state = self.base_state if base_state is None else base_state
        values: dict[str, Any] = {
            "run": RUN,
            "site": SITE,
            "round_index": 1,
            "plan": self.plan.digest,
            "base_state": digest.of_bytes(state),
            "base_state_bytes": len(state),
            "offered_at": 1_000_000.0,
            "deadline": 1_000_060.0,
        }
        return dsse.seal(RoundOffer(**{**values, **changes}).to_bytes(), OFFER_TYPE, key or self.server_key)


def _state(plan: Plan, **changes: Any) -> bytes:
    return weights.dump({**initial_state(plan), **changes}, {"kind": "pathfed-state"})


@pytest.fixture(scope="session")
def dump_state() -> Callable[..., bytes]:
    """A plan's first base state, with tensors exchanged."""
    return _state


@pytest.fixture(scope="session")
def write_slides() -> Callable[..., None]:
    """Paint one slide for each name, and list them."""

    def write(root: Path, names: tuple[str, ...] = SURNAMES, side: int = 256) -> None:
        (root / "slides").mkdir(parents=True)
        rows = [("slide", "patient")]
        for number, name in enumerate(names):
            random = np.random.default_rng(number)
            pixels = paint(side, side, random, draw_stain(random, 0), draw_anatomy(random), glass=False)
            (root / "slides" / f"{name}_biopsy.tif").write_bytes(slide_bytes(pixels))
            rows.append((f"{name}_biopsy.tif", f"PATIENTID-{number:04d}-{name}"))
        with (root / "patients.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)

    return write


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, write_slides: Callable[..., None]) -> World:
    root = tmp_path_factory.mktemp("world")
    write_slides(root)
    plan = load_plan(PLAN, where="tiny")
    made = World(root, SigningKey.generate(), plan, _state(plan))
    tls = make_tls("test", ["127.0.0.1"], now=datetime.datetime.now(datetime.UTC))
    card = ServerCard(
        name="test",
        evidence_key=made.server_key.public,
        ca_pem=tls.ca_certificate.decode(),
        fleet_address="127.0.0.1:1",
        control_address="127.0.0.1:2",
        enrolment_address="127.0.0.1:3",
    )
    made.card.write_bytes(card.to_bytes(made.server_key))
    made.sign("plan.dsse", plan)
    return made


@pytest.fixture(scope="session")
def ready_home(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that scanned and approved the plan. Never used itself: it is copied."""
    home = world.init(tmp_path_factory.mktemp("ready") / "home")
    app.scan(home, world.plan.cohort, lambda done, total: None)
    deciding.approve(home, world.signed_plan, DECLARED, home.root / "approval.dsse")
    return home.root


@pytest.fixture
def copy_home(ready_home: Path, tmp_path: Path) -> Callable[..., SiteHome]:
    """A copy of the ready home with the same keys and secrets; `policy` changes its limits."""

    def copy(name: str = "home", **policy: Any) -> SiteHome:
        target = shutil.copytree(ready_home, tmp_path / name)
        if policy:
            text = (target / "policy.toml").read_text(encoding="utf-8")
            for key, value in policy.items():
                lines = [line for line in text.splitlines() if not line.startswith(f"{key} ")]
                text = "\n".join([*lines, f"{key} = {str(value).lower()}", ""])
            (target / "policy.toml").write_text(text, encoding="utf-8")
        return SiteHome(target)

    return copy


@pytest.fixture
def site_cli(run_main: Callable[..., Done]) -> Callable[..., Done]:
    """Run `pathfed-site`, its `main` and all, in this process."""
    return partial(run_main, cli.main, "pathfed-site")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a round computes is remembered. It depends on nothing but its context, and this is about what is written down."""
    prepared: set[str] = set()
    contexts: dict[str, Any] = {}
    outcomes: dict[str, Any] = {}
    prepare, context, run = RoundComputer.prepare, RoundComputer.context, RoundComputer.run

    def prepare_once(self: RoundComputer, plan: Any, state: Any) -> None:
        if plan.digest not in prepared:
            prepare(self, plan, state)
            contexts[plan.digest] = context(self, plan)
            prepared.add(plan.digest)

    def run_once(self: RoundComputer, **given: Any) -> Any:
        name = digest.of_value(given["context"])
        if name not in outcomes:
            prepare(self, given["plan"], given["base_state"])
            outcomes[name] = run(self, **given)
        return outcomes[name]

    monkeypatch.setattr(RoundComputer, "prepare", prepare_once)
    monkeypatch.setattr(RoundComputer, "context", lambda self, plan: contexts[plan.digest])
    monkeypatch.setattr(RoundComputer, "run", run_once)
