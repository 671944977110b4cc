import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.home import SiteHome, SiteSettings, create_home, hold
from pathfed_common.errors import HostError, PathfedError
from pathfed_common.provenance.documents import SiteCard

SETTINGS = SiteSettings(name="site-a", slides=('/data/"slides"\\new\nline', "/archive"), patients="/data/patients.csv")
POLICY = SitePolicy(max_epsilon=3.5, delta=1e-6, reply_slots=False, threads=2)


def made(world, root: Path) -> SiteHome:
    return create_home(root, SETTINGS, POLICY, world.card.read_bytes())


def test_a_home_reads_back_what_it_was_made_with(world, tmp_path):
    home = SiteHome(made(world, tmp_path / "home").root)
    assert home.settings == SETTINGS
    assert home.policy == POLICY
    assert home.name == "site-a"
    assert home.server_card.evidence_key == world.server_key.public
    assert home.ca_file.read_text() == home.server_card.ca_pem


def test_one_folder_may_be_written_without_a_list(world, tmp_path):
    home = made(world, tmp_path / "home")
    settings = home.root / "site.toml"
    settings.write_text('name = "site-a"\nslides = "/data"\npatients = "/data/patients.csv"\n')
    assert SiteHome(home.root).slides == (Path("/data"),)


@pytest.mark.parametrize("slides", ["[]", "[1]", "true"])
def test_slides_are_one_folder_or_several(world, tmp_path, slides):
    home = made(world, tmp_path / "home")
    (home.root / "site.toml").write_text(f'name = "site-a"\nslides = {slides}\npatients = "/data/patients.csv"\n')
    with pytest.raises(HostError, match="PF905"):
        SiteHome(home.root).slides  # noqa: B018 - reading is what fails


def test_every_key_is_its_owners_alone(world, tmp_path):
    home = made(world, tmp_path / "home")
    for folder in (home.root, home.root / "keys", home.run_secrets, home.updates, home.logs):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    keys = [*(home.root / "keys").iterdir(), *home.run_secrets.iterdir()]
    assert len(keys) == 7
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_no_two_homes_share_a_secret(world, tmp_path):
    homes = [made(world, tmp_path / name) for name in "ab"]
    for place in ("keys/evidence.pem", "keys/flower", "keys/tls.pem", "keys/pseudonym.key", "keys/superexec.secret", "secrets/root.secret"):
        assert len({(home.root / place).read_bytes() for home in homes}) == 2


def test_the_card_is_signed_and_names_the_keys_and_nothing_secret(world, tmp_path):
    home = made(world, tmp_path / "home")
    card = SiteCard.from_bytes(home.card_file.read_bytes())
    assert card.site == "site-a"
    assert card.evidence_key == home.evidence_key.public
    flower = load_ssh_private_key(home.flower_key.read_bytes(), password=None)
    assert isinstance(flower, ec.EllipticCurvePrivateKey)
    assert card.flower_key.startswith("ecdsa-sha2-nistp384 ")
    for key in (home.root / "keys").iterdir():
        assert key.read_bytes() not in home.card_file.read_bytes()


def test_a_home_that_exists_is_left_as_it_is(world, tmp_path):
    home = made(world, tmp_path / "home")
    before = {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()}
    with pytest.raises(HostError, match="PF904"):
        made(world, home.root)
    assert {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("card", [b"", b"{}", b"changed"])
def test_a_card_that_does_not_verify_makes_no_home(world, tmp_path, card):
    data = world.card.read_bytes().replace(b"A", b"B", 1) if card == b"changed" else card
    with pytest.raises(PathfedError, match=r"PF60[12]"):
        create_home(tmp_path / "home", SETTINGS, POLICY, data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["evidence.pem", "pseudonym.key"])
def test_a_key_that_others_may_read_is_refused(world, tmp_path, name):
    home = made(world, tmp_path / "home")
    (home.root / "keys" / name).chmod(0o644)
    with pytest.raises(HostError, match="PF906"):
        {"evidence.pem": lambda: home.evidence_key, "pseudonym.key": lambda: home.pseudonym_key}[name]()


def test_a_folder_that_is_no_home_says_so(tmp_path):
    home = SiteHome(tmp_path)
    for read in (lambda: home.settings, lambda: home.policy, lambda: home.server_card):
        with pytest.raises(HostError, match=r"PF904.*init"):
            read()


def test_a_home_is_held_by_one_process_and_let_go_afterwards(world, tmp_path):
    home = made(world, tmp_path / "home")
    refused = pytest.raises(HostError, match=r"PF904.*another process runs this site")
    with hold(home, "site"), hold(home, "runner"), refused, hold(home, "site"):
        pass
    with hold(home, "site"):
        pass


def test_a_killed_process_lets_go_of_the_home_and_its_lock_is_waited_for(world, tmp_path):
    home = made(world, tmp_path / "home")
    code = "import sys; from pathlib import Path; from pathfed_client.home import SiteHome, hold\n"
    code += "with hold(SiteHome(Path(sys.argv[1])), 'site'):\n    print('held', flush=True)\n    sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, home.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(HostError, match="PF904"), hold(home, "site", patience_s=0.3):
            pass
        other.kill()
        with hold(home, "site", patience_s=60):
            pass
