"""The optional training loop, its schedule, checkpoints and exact resume."""

from robustft.training.loop import History, NonFiniteError, fit

__all__ = ["History", "NonFiniteError", "fit"]
