"""Which patients share a pass: decided so that one patient's leaving changes almost no other patient's company.

A pass over several patients is rounded to the lattice of the sum once for all of them (`training.joint_sum`). If passes were filled in the
order of drawing, one patient less would move everybody behind to another place, and the rounding of every later pass would change: the sum
would move by more than that patient's vector. Here groups are the leaves of a binary trie over keys that each depend on one patient alone:
a node with at most `most` patients is a group, a larger one is split by the next bit of the keys.

Guarantee: take one patient away, and at most one node that had `most` + 1 patients becomes a group where it was split before; every group
outside that node stays as it was. So at most `most` + 1 groups before, and one after, differ.
"""

from collections.abc import Sequence

#: Bits of a key.
KEY_BITS = 64


def groups(keys: Sequence[int], most: int) -> list[list[int]]:
    """Places of the keys in groups of at most `most`, ordered by key.

    Args:
        keys: a number in [0, 2^64) for each patient, uniform, and a function of that patient alone.
        most: patients in one group at most.

    Raises:
        ValueError: `most` is below 1, or a key is out of bounds.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    if any(not 0 <= key < 2**KEY_BITS for key in keys):
        raise ValueError(f"keys must be within 0 and 2^{KEY_BITS}")
    found: list[list[int]] = []
    _split(sorted(range(len(keys)), key=lambda place: keys[place]), keys, most, KEY_BITS, found)
    return found


def _split(places: list[int], keys: Sequence[int], most: int, bits: int, found: list[list[int]]) -> None:
    """Put the groups of one node into `found`; `bits` of the keys are still to be looked at."""
    if not places:
        return
    if len(places) <= most:
        found.append(places)
        return
    if bits == 0:
        # Equal keys, which 64 uniform bits do not give in practice: each patient alone is the one division that needs no other.
        found.extend([place] for place in places)
        return
    bit = 1 << (bits - 1)
    for side in (0, bit):
        _split([place for place in places if keys[place] & bit == side], keys, most, bits - 1, found)
