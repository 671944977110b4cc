"""What a refusal's code means for the site and the operator.

| code | counts towards a suspension | may be released |
| --- | --- | --- |
| PF504, PF405 signature or statement; PF505 digest; PF506 shapes; PF507 finiteness; PF517 privacy | yes | never |
| PF509 another round or base state; PF550 int8 numbers | yes | never |
| PF508 norm | yes | yes |
| PF561 late | no: lines are slow through no fault of a site's | yes, for its round and base state |
| any other: the site's own refusal, a revocation, silence | no | no update is there |
"""

from pathfed_common.errors import ErrorCode

#: Refusals for reasons of the site's own.
FAULTS = frozenset(
    {
        ErrorCode.MESSAGE_MALFORMED,
        ErrorCode.UPDATE_SIGNATURE,
        ErrorCode.UPDATE_DIGEST,
        ErrorCode.UPDATE_SHAPE,
        ErrorCode.UPDATE_NOT_FINITE,
        ErrorCode.UPDATE_NORM,
        ErrorCode.UPDATE_STALE,
        ErrorCode.UPDATE_PRIVACY,
        ErrorCode.UPDATE_QUANTISED,
    }
)
#: Refusals that an operator may overrule while the round is open. All that they do not stand for is checked again.
RELEASABLE = frozenset({ErrorCode.UPDATE_NORM, ErrorCode.UPDATE_LATE})
