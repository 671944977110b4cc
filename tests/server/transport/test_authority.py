"""The certificate authority's states, and what a crash between two of its files leaves."""

import datetime
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from control_peer import csr_of, new_key
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding

from pathfed_common import files
from pathfed_common.errors import HostError, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.protocol.invitation import ca_pin
from pathfed_server.transport.authority import Authority, AuthorityFiles, request_key
from pathfed_server.transport.certificates import make_tls, read_key

NOW = datetime.datetime(2026, 11, 30, tzinfo=datetime.UTC)
HOSTS = ["server.example", "127.0.0.1"]
NORTH = SiteName("north")


@pytest.fixture
def where(tmp_path: Path) -> AuthorityFiles:
    tls = make_tls("test", HOSTS, now=NOW)
    made = AuthorityFiles(
        bundle=tmp_path / "ca.pem", key=tmp_path / "ca.key", server_certificate=tmp_path / "tls.pem", server_key=tmp_path / "tls.key"
    )
    made.bundle.write_bytes(tls.ca_certificate)
    files.write_atomic(made.key, tls.ca_key, secret=True)
    made.server_certificate.write_bytes(tls.certificate + tls.ca_certificate)
    files.write_atomic(made.server_key, tls.key, secret=True)
    return made


def read(where: AuthorityFiles) -> Authority:
    return Authority("test", where)


def fits(where: AuthorityFiles) -> bool:
    """Whether the server's key is that of its certificate."""
    leaf = x509.load_pem_x509_certificates(where.server_certificate.read_bytes())[0]
    return leaf.public_key() == read_key(where.server_key.read_bytes()).public_key()


def test_a_certificate_is_for_the_requests_key_and_as_long_as_asked(where):
    key = new_key()
    issued = read(where).issue(csr_of(key), NORTH, now=NOW, days=7)
    found = x509.load_pem_x509_certificate(issued.pem)
    assert found.public_key() == key.public_key()
    assert issued.expires_at == (NOW + datetime.timedelta(days=7)).timestamp()
    assert issued.serial == f"{found.serial_number:x}"
    found.verify_directly_issued_by(x509.load_pem_x509_certificate(where.bundle.read_bytes()))
    assert read(where).issue(csr_of(key), NORTH, now=NOW, days=7).serial != issued.serial


def test_at_rest_one_authority_does_everything(where):
    found = read(where)
    assert (found.rotating, found.pin, found.server_pin) == (False, ca_pin(where.bundle.read_bytes()), found.pin)
    with pytest.raises(TransportError, match="PF420"):
        found.finish(HOSTS, now=NOW)


def test_rotating_the_new_one_issues_and_the_old_one_is_trusted_without_its_key(where):
    old, old_key = read(where), where.key.read_bytes()
    old.rotate(HOSTS, now=NOW)
    found = read(where)
    assert (found.rotating, found.server_pin) == (True, old.pin)
    assert found.pin != old.pin
    assert {ca_pin(each.public_bytes(Encoding.PEM)) for each in found.trusted} == {old.pin, found.pin}
    assert where.key.read_bytes() != old_key
    assert not any(old_key in path.read_bytes() for path in where.key.parent.iterdir())
    for action in (found.rotate, found.renew_server):
        with pytest.raises(TransportError, match="PF420"):
            action(HOSTS, now=NOW)


def test_finished_the_old_one_is_gone(where):
    read(where).rotate(HOSTS, now=NOW)
    new = read(where).pin
    read(where).finish(HOSTS, now=NOW)
    found = read(where)
    assert (found.rotating, found.pin, found.server_pin) == (False, new, new)
    assert fits(where)


def test_two_authorities_of_one_consortium_and_day_have_different_names(where):
    read(where).rotate(HOSTS, now=NOW)
    assert len({each.subject for each in read(where).trusted}) == 2


def test_keys_stay_their_owners_alone_through_every_change(where):
    for change in ("renew_server", "rotate", "finish"):
        getattr(read(where), change)(HOSTS, now=NOW)
        assert {stat.S_IMODE(path.stat().st_mode) for path in (where.key, where.server_key)} == {0o600}


@pytest.mark.parametrize("change", ["renew_server", "rotate", "finish"])
@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_change_that_is_cut_off_is_put_right_by_doing_it_again(where, monkeypatch, change, written):
    """Killed before any of its files is written: the authority is readable, locks nobody out, and the same command ends the change."""
    if change == "finish":
        read(where).rotate(HOSTS, now=NOW)
    trusted_before = set(read(where).trusted)
    count = 0

    def cut(path: Path, data: bytes, *, secret: bool = False) -> None:
        nonlocal count
        if count == written:
            raise KeyboardInterrupt
        count += 1
        real(path, data, secret=secret)

    real = files.write_atomic
    monkeypatch.setattr(files, "write_atomic", cut)
    try:
        getattr(read(where), change)(HOSTS, now=NOW)
    except KeyboardInterrupt:
        monkeypatch.undo()
        found = read(where)
        assert found.issuing in found.trusted
        if change == "rotate":
            assert trusted_before <= set(found.trusted)
        getattr(found, change)(HOSTS, now=NOW)
    assert fits(where)
    assert read(where).rotating is (change == "rotate")
    leaf = x509.load_pem_x509_certificates(where.server_certificate.read_bytes())[0]
    assert any(_issued(leaf, each) for each in read(where).trusted)


def _issued(leaf: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(authority)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("part", ["bundle", "key"])
def test_parts_that_are_missing_or_broken_are_told(where, part):
    path: Path = getattr(where, part)
    path.unlink()
    with pytest.raises(HostError, match=r"PF90[46]"):
        read(where)
    files.write_atomic(path, b"broken", secret=True)
    with pytest.raises((HostError, TransportError), match=r"PF906|PF420"):
        read(where)


def test_a_request_with_a_key_of_another_kind_is_refused():
    ed = ed25519.Ed25519PrivateKey.generate()
    builder = x509.CertificateSigningRequestBuilder(x509.Name([]))
    data = builder.sign(ed, None).public_bytes(Encoding.DER)
    sound = csr_of(new_key())
    version = sound.index(b"\x02\x01\x00")
    other_version = sound[:version] + b"\x02\x01\x20" + sound[version + 3 :]
    for bad in (data, b"", b"x", sound[:-1], sound + b"x", other_version):
        with pytest.raises(TransportError, match="PF414"):
            request_key(bad)


def test_a_server_certificate_of_nobody_here_is_told(where, tmp_path):
    other = make_tls("test", HOSTS, now=NOW)
    (tmp_path / "other.pem").write_bytes(other.certificate)
    with pytest.raises(TransportError, match="PF420"):
        read(replace(where, server_certificate=tmp_path / "other.pem")).server_pin  # noqa: B018 - the access is the test
