"""The Flower app bundle: one pyproject.toml that names installed modules, and no code (docs/decisions/0004).

Flower wants an app bundle (FAB) for a run: a zip archive with a pyproject.toml and a list of contents. Both sides make the same bytes
from the text installed with pathfed, so a site knows the one digest it lets pass.
"""

import hashlib
import io
import zipfile
from importlib import resources

_EPOCH = (1980, 1, 1, 0, 0, 0)


def bundle_bytes() -> bytes:
    """The bundle's bytes: equal on every machine with this version of pathfed (stored, not compressed, at a fixed date)."""
    text = resources.files("pathfed_common").joinpath("bundle_pyproject.toml").read_bytes()
    contents = f"pyproject.toml,{hashlib.sha256(text).hexdigest()},{len(text) * 8}"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("pyproject.toml", text), (".info/CONTENT", contents.encode())):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
    return buffer.getvalue()


def bundle_hash() -> str:
    """The bundle's SHA-256 in bare hex, as Flower names it."""
    return hashlib.sha256(bundle_bytes()).hexdigest()
