"""Fixtures shared by training, numerics and statistics; see tests/support/training_fixtures.py."""

from training_fixtures import base_state, cohort, mechanism, objective, one_thread, random, tiles

__all__ = ["base_state", "cohort", "mechanism", "objective", "one_thread", "random", "tiles"]
