"""A new key in place of one of the site's three, with its continuity: the evidence key in use says that the next one is this site's.

| key | says that the new one follows | in the log |
| --- | --- | --- |
| tls | the connection, made with the present certificate | no |
| flower | the new site card, signed again by the evidence key as a change of card | no |
| evidence | the leaf `key-rotated`, signed by both keys | yes: cosignatures are counted by it |

The new key is made beside the one in use and takes its place only when the server has taken it. The same command again finishes what was
cut short: it sends the same card and the same leaf, which the server takes once.
"""

from pathfed_client.control import renewal
from pathfed_client.control.certificates import finish
from pathfed_client.egress.outlet import Outlet
from pathfed_client.home import SiteHome, site_card
from pathfed_client.io.site_keys import KeyKind
from pathfed_client.io.site_store import SiteStore
from pathfed_client.transport.control_client import ControlClient
from pathfed_common import files
from pathfed_common.errors import ErrorCode, ProvenanceError, TransportError
from pathfed_common.provenance.documents import seal_card_change
from pathfed_common.provenance.log_leaves import KeyRotated, read_leaf, rotate_key
from pathfed_common.units import UtcSeconds


def connect(home: SiteHome, outlet: Outlet) -> ControlClient:
    """A client of the control plane for this home.

    Raises:
        TransportError: PF430, the home is not enrolled.
        HostError: PF904, PF906: files.
    """
    card = home.server_card
    if not home.enrolled:
        raise TransportError(ErrorCode.NOT_ENROLLED, "this home has no certificate: it knows its server by a card alone", where=home.root)
    finish(home)
    return ControlClient(
        card.control_address,
        ca=home.ca_file.read_bytes(),
        certificate=home.certificate_file.read_bytes(),
        key=home.keys.tls_key(),
        outlet=outlet,
    )


def rotate(home: SiteHome, store: SiteStore, outlet: Outlet, kind: KeyKind, now: float) -> None:
    """Rotate one key. No process of this site may use it meanwhile, but for the TLS key.

    Raises:
        PathfedError: the server's code, such as PF418, PF401, PF403; PF430, the home is not enrolled.
        TransportError: PF439, the site's words on plans must reach the server first.
        HostError: PF901, PF904, PF906, PF913: files.
    """
    with connect(home, outlet) as client:
        match kind:
            case KeyKind.TLS:
                renewal.renew(home, client)
            case KeyKind.FLOWER:
                _rotate_flower(home, client)
            case KeyKind.EVIDENCE:
                _rotate_evidence(home, store, client, now)


def _rotate_flower(home: SiteHome, client: ControlClient) -> None:
    home.keys.stage(KeyKind.FLOWER)
    card = site_card(home.keys, home.name, staged=KeyKind.FLOWER)
    client.rotate_key(card, continuity=seal_card_change(card, home.keys.evidence_key()))
    files.write_atomic(home.card_file, card)
    home.keys.promote(KeyKind.FLOWER)


def _rotate_evidence(home: SiteHome, store: SiteStore, client: ControlClient, now: float) -> None:
    if store.words(waiting=True):
        raise TransportError(
            ErrorCode.ROTATION_WAITS,
            "words of this site on plans have not reached the server: it would not take them after the rotation",
            where=home.root,
            value=f"{len(store.words(waiting=True))} waiting",
            remedy="let `pathfed-site start` run until `pathfed-site status` shows none, then stop it and rotate",
        )
    home.keys.stage(KeyKind.EVIDENCE)
    leaf = _rotation(home, now)
    # Known before it can be in the log: a rotation in this site's name that it does not know is an alarm.
    store.add_own_leaf(leaf.to_bytes(), None)
    card = site_card(home.keys, home.name, staged=KeyKind.EVIDENCE)
    client.rotate_key(card, rotation=leaf.to_bytes())
    store.add_own_leaf(leaf.to_bytes(), now)
    home.add_former_key(leaf.old_key)
    files.write_atomic(home.card_file, card)
    home.keys.promote(KeyKind.EVIDENCE)


def _rotation(home: SiteHome, now: float) -> KeyRotated:
    """The leaf that hands over to the staged key; made once, for it states a time."""
    path = home.root / "rotation.leaf"
    old, new = home.keys.evidence_key(), home.keys.evidence_key(staged=True)
    if path.exists():
        try:
            made = read_leaf(path.read_bytes(), where=str(path))
        except ProvenanceError:
            made = None
        if isinstance(made, KeyRotated) and (made.old_key, made.new_key) == (old.public, new.public):
            return made
    leaf = rotate_key(home.name, old, new, UtcSeconds(now))
    files.write_atomic(path, leaf.to_bytes())
    return leaf
