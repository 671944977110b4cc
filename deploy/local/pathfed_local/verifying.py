"""`pathfed verify`: reads a record and the keys a person trusts, and says what holds."""

from pathlib import Path
from typing import Any

from pathfed_common.errors import ErrorCode, HostError, ProvenanceError
from pathfed_common.provenance.record import MANIFEST
from pathfed_common.provenance.record_reader import TrustedKeys
from pathfed_common.provenance.verify import Verdict, read_trust


def find_record(folder: Path) -> Path:
    """The record in a folder: the folder itself, or `record/` in a demo's.

    Raises:
        ProvenanceError: PF605, there is none.
    """
    for place in (folder, folder / "record"):
        if (place / MANIFEST).is_file():
            return place
    raise ProvenanceError(ErrorCode.RECORD_INCOMPLETE, "no record is there", where=folder, remedy=f"name the folder that holds {MANIFEST}")


def trusted_keys(file: Path | None) -> TrustedKeys | None:
    """The keys of a trust file, or None without one.

    Raises:
        HostError: PF904, it cannot be read.
        ProvenanceError: PF604, it is not a trust file.
    """
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(ErrorCode.HOME_UNUSABLE, f"the trust file cannot be read: {error}", where=file) from None
    return read_trust(text, where=file)


def summary(verdict: Verdict) -> dict[str, Any]:
    """A verdict that found nothing wrong, for people and scripts."""
    return {
        "run": verdict.run,
        "plan": verdict.plan,
        "rounds": verdict.rounds,
        "identities_proven": verdict.identities_proven,
        "aggregation_proven": verdict.aggregation_proven,
        "delta": verdict.delta,
        "sites": {
            site.site: {"rounds": site.rounds, "epsilon_stated": site.epsilon_stated, "epsilon_recomputed": site.epsilon_recomputed}
            for site in verdict.sites
        },
        "notes": list(verdict.notes),
    }
