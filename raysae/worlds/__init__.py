"""Worlds: what the unlearning score is measured on. See `raysae.worlds.world`."""

from raysae.worlds.world import Question, World, load_world

__all__ = ["Question", "World", "load_world"]
