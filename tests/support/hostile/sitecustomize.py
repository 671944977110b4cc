"""Loaded by every Python process of one site under test (its folder is on PYTHONPATH): makes its runner hostile.

The program is not changed: keys, certificate, SuperNode, relay and messages are the real ones. See `hostile_site`.
"""

import os
import sys

if os.environ.get("PATHFED_TEST_HOSTILE"):
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120 - before anything is imported
    import hostile_site

    hostile_site.install()
