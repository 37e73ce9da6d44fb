"""The optional training loop: its optimiser, schedule, validation, reporters, checkpoints and exact resume."""

from robustft.training.adamw import AdamW, whole_tables
from robustft.training.compiling import CompiledTowers
from robustft.training.loop import History, fit
from robustft.training.reporting import reporter
from robustft.training.steps import NonFiniteError
from robustft.training.validation import Best

__all__ = ["AdamW", "Best", "CompiledTowers", "History", "NonFiniteError", "fit", "reporter", "whole_tables"]
