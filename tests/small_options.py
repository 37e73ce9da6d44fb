"""Options with which methods fit the tests' tiny models, whose captions are of fourteen letters."""

from robustft.methods import CoCoOp, CoOp, KgCoOp, LoCoOp, MaPLe, ProDA

PROMPTED = {
    CoOp: {"context": 3},
    KgCoOp: {"context": 3},
    LoCoOp: {"context": 3, "top_k": 2},
    CoCoOp: {"context": 3},
    ProDA: {"context": 3, "prompts": 4, "prompt_batch": 2},
    MaPLe: {"context": 3},
}
ANCHORED = {
    "CARFT": {"contexts": ("a {}", "the {}", "red {}")},
    "LipsumFT": {"texts": 5, "length": 4},
    "StarFT": {"spurious": ("{} at sea", "{} in snow")},
}
