"""Fixtures shared with the tests of commands; see tests/support/command_fixtures.py."""

from command_fixtures import run_main

__all__ = ["run_main"]
