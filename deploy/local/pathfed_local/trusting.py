"""The keys that a verifier trusts, out of what a person names: a file of keys, a card, or a folder of these."""

from pathlib import Path

from pathfed_common.errors import ErrorCode, HostError, ProvenanceError
from pathfed_common.provenance import dsse
from pathfed_common.provenance.documents import SERVER_CARD_TYPE, SITE_CARD_TYPE, ServerCard, SiteCard
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.record_reader import TrustedKeys
from pathfed_common.provenance.verify import read_trust


def trusted_keys(given: Path | None) -> TrustedKeys | None:
    """The keys in a file or in every file of a folder, or None where nothing is given.

    A file holds ``{"server": key, "sites": {name: key}}``, or is a card of a site or the server, as people handed it over.

    Raises:
        HostError: PF904, it cannot be read.
        ProvenanceError: PF604, neither of these forms, no key at all, or two keys for one name; PF602, a card that its key did not sign.
    """
    if given is None:
        return None
    files = sorted(path for path in given.iterdir() if path.is_file()) if given.is_dir() else [given]
    server: VerifyKey | None = None
    sites: dict[str, VerifyKey] = {}
    for file in files:
        found = _keys(file)
        server = _one(server, found.server, "the server", file)
        for site, key in found.sites.items():
            sites[site] = _one(sites.get(site), key, site, file) or key
    if server is None and not sites:
        raise ProvenanceError(ErrorCode.IDENTITY_UNPROVEN, "no trusted key is there", where=given)
    return TrustedKeys(server=server, sites=sites)


def _keys(file: Path) -> TrustedKeys:
    try:
        data = file.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(ErrorCode.HOME_UNUSABLE, f"the trusted keys cannot be read: {error}", where=file) from None
    try:
        kind = dsse.parse(data, where=str(file)).payload_type
    except ProvenanceError:
        return read_trust(text, where=file)
    if kind == SERVER_CARD_TYPE:
        return TrustedKeys(server=ServerCard.from_bytes(data, where=str(file)).evidence_key)
    if kind == SITE_CARD_TYPE:
        card = SiteCard.from_bytes(data, where=str(file))
        return TrustedKeys(sites={card.site: card.evidence_key})
    raise ProvenanceError(ErrorCode.IDENTITY_UNPROVEN, "an envelope that is no card of a site or the server", where=file, value=kind[:80])


def _one(before: VerifyKey | None, found: VerifyKey | None, whose: str, file: Path) -> VerifyKey | None:
    if before is not None and found is not None and before != found:
        raise ProvenanceError(ErrorCode.IDENTITY_UNPROVEN, f"two keys are given for {whose}", where=file)
    return found or before
