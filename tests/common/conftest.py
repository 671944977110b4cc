"""Fixtures shared with the tests of commands; see tests/support/command_fixtures.py."""

from command_fixtures import small_disk

__all__ = ["small_disk"]
