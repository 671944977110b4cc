"""Loaded by every Python process of a consortium under test (its folder is on PYTHONPATH): stops a process at a named instant.

The program is not changed and knows nothing of it. When a module of `POINTS` has been imported, the functions named there are wrapped; as
one of them is entered or left, the process looks whether somebody has armed that instant for it (`pathfed_instants`), says that it has
reached it, and stops itself with SIGSTOP. It goes on when it is sent SIGCONT, or never, when it is killed.
"""

import os
import sys

if os.environ.get("PATHFED_TEST_INSTANTS"):
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120 - before anything is imported
    import pathfed_instants

    pathfed_instants.install()
    sys.path.pop()
