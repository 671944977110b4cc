"""Names in Flower messages, agreed by both sides. Flower carries offers, statements and codes; what is large moves over the bulk plane.

offer   config record OFFER {ENVELOPE: bytes}
reply   config record REPLY {CODE: str, ENVELOPE: bytes}; with a statement, its update lies at the server already
"""

from typing import Final

MESSAGE_TYPE: Final = "train"
OFFER: Final = "pathfed.offer"
REPLY: Final = "pathfed.reply"
ENVELOPE: Final = "envelope"
CODE: Final = "code"
