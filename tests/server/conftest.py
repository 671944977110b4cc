"""`pathfed-server` in this process, homes, and sites' cards and approvals as files."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from command_fixtures import Done, run_main, small_disk
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from database_fixtures import backend, empty_url, migrated_postgres, migrated_sqlite, postgres, store, url

from pathfed_common.digest import Digest
from pathfed_common.ids import SiteName
from pathfed_common.provenance.documents import Approval, SiteCard
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.units import UtcSeconds
from pathfed_server import app, cli
from pathfed_server.home import ServerHome

__all__ = ["backend", "empty_url", "migrated_postgres", "migrated_sqlite", "postgres", "run_main", "small_disk", "store", "url"]


@pytest.fixture
def server_cli(run_main: Callable[..., Done]) -> Callable[..., Done]:
    """Run `pathfed-server`, its `main` and all, in this process."""
    return partial(run_main, cli.main, "pathfed-server")


@pytest.fixture
def server_home(tmp_path: Path) -> ServerHome:
    """A fresh server."""
    return app.init(tmp_path / "server", consortium="test", host="127.0.0.1", listen="127.0.0.1", database="")


@dataclass(frozen=True)
class Member:
    """A site as the server meets it: by the files it hands over."""

    name: SiteName
    key: SigningKey
    card: Path

    def approve(self, plan: Digest, *, key: SigningKey | None = None, site: str | None = None) -> Path:
        """A signed approval, as a file."""
        given = Approval(
            site=SiteName(site or self.name), plan=plan, declared_patients=8, reply_slots=True, approved_at=UtcSeconds(1_700_000_000.0)
        )
        path = self.card.with_name(f"approval-{self.name}.dsse")
        path.write_bytes(given.to_bytes(key or self.key))
        return path


@pytest.fixture
def member(tmp_path: Path) -> Callable[[str], Member]:
    """Make a site's keys and card."""

    def make(name: str) -> Member:
        key, node = SigningKey.generate(), ec.generate_private_key(ec.SECP384R1())
        text = node.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
        card = tmp_path / f"{name}.card"
        card.write_bytes(SiteCard(site=SiteName(name), evidence_key=key.public, flower_key=text).to_bytes(key))
        return Member(SiteName(name), key, card)

    return make


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    """A plan two small sites can take part in."""
    path = tmp_path / "plan.toml"
    path.write_text(
        """
name = "small"
[objective]
decoder_dim = 32
decoder_depth = 1
decoder_heads = 2
[cohort]
tile_px = 32
[privacy]
expected_patients = 4
noise_multiplier = 1.0
clip_norm = 1.0
epsilon_limit = 8.0
[rounds]
count = 3
quorum = 2
"""
    )
    return path
