"""Names in Flower messages, agreed by both sides. Flower carries offers, statements and codes; for now bulk bytes ride beside them.

offer   config record OFFER {ENVELOPE: bytes}               array record BULK {BYTES: base state}
reply   config record REPLY {CODE: str, ENVELOPE: bytes}    array record BULK {BYTES: update}, absent with a code
"""

from typing import Final

MESSAGE_TYPE: Final = "train"
OFFER: Final = "pathfed.offer"
REPLY: Final = "pathfed.reply"
BULK: Final = "pathfed.bulk"
ENVELOPE: Final = "envelope"
CODE: Final = "code"
BYTES: Final = "bytes"
#: Serialisation name of a bulk array: the array's data is the file's bytes as they are.
BULK_STYPE: Final = "pathfed.file"
