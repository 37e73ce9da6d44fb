"""Differentiable operators over the compiled kernels, one family a file: their Python halves.

csrc/ops.cpp declares all of them. The kernels know tensors and numbers; what of these makes a loss, and what a loss
needs of them for its gradient, is N-vector algebra and stands here, once for every device.
"""

from robustft.ops.native import classification, contrastive, neighbors, orthogonality, risks, scores

KERNELS = (
    "similarity_statistics",
    "similarity_gradient",
    "class_statistics",
    "class_gradient",
    "class_scores",
    "vector_exp",
    "group_sums",
    "misalignment_penalty",
    "cvar",
    "orthogonality_penalty",
    "neighbor_pack",
    "kth_neighbor_distance",
    "nearest_neighbors",
)
"""The operators with an implementation a device."""

COMPOSED = {"classification_loss": "class_statistics", "dual_risk": "class_statistics"}
"""Operators that are composed, on devices without an implementation of their own, and the kernel that they need."""


def register() -> None:
    """Gives the declared operators their Python halves. Called once, by `robustft.ops.dispatch`."""
    contrastive.register()
    classification.register()
    risks.register()
    orthogonality.register()
    neighbors.register()
    scores.register()
