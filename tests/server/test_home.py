import stat
from typing import Any

import pytest
from cryptography import x509

from pathfed_common.errors import HostError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.documents import ServerCard
from pathfed_server.home import ServerHome, ServerSettings, create_home

PORTS: dict[str, Any] = {"fleet_port": 4433, "control_port": 4434, "enrolment_port": 4435}


def made(root, **changes) -> ServerHome:
    options = {"consortium": "test", "host": "server.example", "listen": "0.0.0.0", "database": "", **PORTS, **changes}
    return create_home(root, **options)


def test_a_home_reads_back_what_it_was_made_with(tmp_path):
    home = ServerHome(made(tmp_path / "home").root)
    assert home.settings == ServerSettings(consortium="test", host="server.example", listen="0.0.0.0", database="", **PORTS)
    assert home.database_url == f"sqlite:///{home.root}/pathfed.db"
    assert made(tmp_path / "other", database="postgresql://u@h/d").database_url == "postgresql://u@h/d"


def test_the_card_names_address_key_and_ca_and_is_signed(tmp_path):
    home = made(tmp_path / "home")
    card = ServerCard.from_bytes(home.card_file.read_bytes())
    assert (card.name, card.fleet_address) == ("test", "server.example:4433")
    assert (card.control_address, card.enrolment_address) == ("server.example:4434", "server.example:4435")
    assert card.evidence_key == home.evidence_key.public
    assert card.ca_pem == home.ca_file.read_text()


def test_the_certificate_is_for_the_host_and_loopback_and_signed_by_the_ca(tmp_path):
    home = made(tmp_path / "home")
    certificate = x509.load_pem_x509_certificate(home.tls_certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(home.ca_file.read_bytes()))


def test_every_key_is_its_owners_alone(tmp_path):
    home = made(tmp_path / "home")
    keys = list((home.root / "keys").iterdir())
    assert sorted(path.name for path in keys) == ["ca.key", "evidence.pem", "superexec.secret", "tls.key"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700
    assert not any(key.read_bytes() in home.card_file.read_bytes() for key in keys)


def test_free_ports_are_chosen_where_none_are_given_each_another(tmp_path):
    settings = made(tmp_path / "home", **dict.fromkeys(PORTS)).settings
    ports = {settings.fleet_port, settings.control_port, settings.enrolment_port}
    assert len(ports) == 3
    assert all(1024 <= port <= 65535 for port in ports)
    assert made(tmp_path / "other", fleet_port=None).settings.control_port == 4434


@pytest.mark.parametrize("changes", [{"consortium": "Not A Name"}, {"consortium": ""}, {"fleet_port": 70000}, {"control_port": 4433}])
def test_settings_out_of_bounds_make_no_home(tmp_path, changes):
    with pytest.raises(HostError, match="PF905"):
        made(tmp_path / "home", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_exists_is_left_as_it_is(tmp_path):
    home = made(tmp_path / "home")
    before = home.tls_key.read_bytes()
    with pytest.raises(HostError, match="PF904"):
        made(home.root)
    assert home.tls_key.read_bytes() == before


def test_parts_that_are_missing_are_told(tmp_path):
    home = ServerHome(tmp_path)
    with pytest.raises(HostError, match="PF904"):
        home.settings  # noqa: B018 - the access is the test
    with pytest.raises(HostError, match="PF904"):
        home.site_card(SiteName("site-a"))
    with pytest.raises(HostError, match="PF906"):
        home.evidence_key  # noqa: B018 - the access is the test
