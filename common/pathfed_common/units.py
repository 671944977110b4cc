"""Units as types, so that a length or time cannot be mistaken for another."""

from typing import NewType

#: Micrometres per pixel (um/px).
Mpp = NewType("Mpp", float)
#: A length or coordinate in pixels of a slide's level 0, the finest level.
Level0Px = NewType("Level0Px", int)
#: Seconds since 1970-01-01T00:00:00Z.
UtcSeconds = NewType("UtcSeconds", float)

#: What machines' clocks differ by at worst, seconds.
CLOCK_SKEW_S = 300.0
