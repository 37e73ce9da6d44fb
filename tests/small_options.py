"""Options with which prompt learners fit the tests' tiny models."""

from robustft.methods import CoCoOp, CoOp, KgCoOp, LoCoOp, MaPLe, ProDA

PROMPTED = {
    CoOp: {"context": 3},
    KgCoOp: {"context": 3},
    LoCoOp: {"context": 3, "top_k": 2},
    CoCoOp: {"context": 3},
    ProDA: {"context": 3, "prompts": 4, "prompt_batch": 2},
    MaPLe: {"context": 3},
}
