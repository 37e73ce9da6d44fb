"""The mathematics of robust fine-tuning, as functions of features.

Shapes: N samples, D dimensions. Features are used as they are (nothing is normalised here); `logit_scale` is the
multiplied-out scale exp(log-scale), a float or a one-element tensor. Arguments are float64, float32, bfloat16 or
float16, of any strides; losses come back as float32 (float64 for float64 features), because a bfloat16 loss is too
coarse to average. Features of different dtypes are promoted to the wider one.

The compiled operators compute an N x N or N x K matrix a tile at a time. What they keep of it for the backward is
bounded by their `memory`, and is nothing at `memory=0`; the eager reference stores several such matrices. See
`robustft.backend`. Products of float32 features follow `torch.set_float32_matmul_precision`: "highest" is IEEE float32;
on processors that multiply bfloat16 (AMX, AVX512_BF16) "medium" rounds factors to it, and with a matrix unit (AMX)
"high" splits each into two (cosines of 512 dimensions within 2e-6); on a GPU "high" is TF32 three times and "medium"
TF32. Elsewhere all three are IEEE.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robustft.ops import arguments, classification, contrastive, neighbors, orthogonality, risks, scores, sigmoid
from robustft.ops.precision import at_least_float32
from robustft.ops.registry import reduced


class ContrastiveTerms(NamedTuple):
    """Un-weighted terms of `contrastive_distillation_loss` and of its sigmoid form: add them with your own weights."""

    contrastive: Tensor
    distillation: Tensor


class ClassificationTerms(NamedTuple):
    """Un-weighted terms of `classification_loss`."""

    cross_entropy: Tensor
    misalignment: Tensor


class DualRiskTerms(NamedTuple):
    """Un-weighted terms of `dual_risk`."""

    empirical: Tensor
    worst_case: Tensor


class ConceptScores(NamedTuple):
    """Scores of `concept_scores`, each (N,), higher where a sample looks in-distribution; and the predicted class."""

    max_cosine: Tensor
    mcm: Tensor
    msp: Tensor
    energy: Tensor
    entropy: Tensor
    prediction: Tensor


class GroupRisk(NamedTuple):
    """Mean risk of each group (G,), the largest of them (0-d), and the groups' sizes (G,)."""

    mean: Tensor
    worst: Tensor
    counts: Tensor


class GroupDRO(NamedTuple):
    """The objective (0-d), the groups' weights for the next batch (G,), mean risk (G,) and sizes (G,)."""

    loss: Tensor
    weights: Tensor
    mean: Tensor
    counts: Tensor


class Neighbors(NamedTuple):
    """Distances (Q, k), ascending, and the indices (Q, k) int64 of the points at them."""

    distances: Tensor
    indices: Tensor


def _contrastive_arguments(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor | None,
    label_smoothing: float,
    weight: Tensor | None,
    reduction: str,
    memory: str | int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The features, the scale and the labels, after the checks of all arguments."""
    x, t, s = arguments.feature_pair(image_features, text_features, logit_scale)
    n = x.shape[0]  # len() of a tensor takes three times as long
    labels = arguments.sample_labels(labels, n, x.device)
    arguments.check_smoothing(label_smoothing)
    arguments.check_reduction(reduction)
    arguments.check_weight(weight, n, x.device)
    arguments.memory_budget(memory, x.device)
    return x, t, s, labels


_Pair = tuple[Tensor, Tensor, Tensor | float]
"""Image features, text features and their logit scale, as they were given."""


def _distillation_arguments(
    student: _Pair, teacher: _Pair, labels: Tensor | None, weight: Tensor | None, reduction: str, memory: str | int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor | None]:
    """Both pairs of features and their scales, in one dtype, and the labels, after the checks of all arguments."""
    x, t, s, labels = _contrastive_arguments(*student, labels, 0.0, weight, reduction, memory)
    xt, tt, st = arguments.feature_pair(*teacher, "teacher_")
    if xt.shape[0] != x.shape[0]:
        raise ValueError(f"teacher_image_features has {len(xt)} rows; expected {len(x)}, as image_features")
    if xt.device != x.device:
        raise ValueError(f"teacher_image_features is on {xt.device}; expected {x.device}, as image_features")
    # Everything in the widest dtype: narrowing a float32 teacher to the student's bfloat16 would lose what it knows.
    if xt.dtype != x.dtype:
        wider = torch.promote_types(x.dtype, xt.dtype)
        x, t, xt, tt = x.to(wider), t.to(wider), xt.to(wider), tt.to(wider)
    return (x, t, s, _constant(xt), _constant(tt), _constant(st)), labels


def _constant(number: Tensor) -> Tensor:
    return number.detach() if number.requires_grad else number


@arguments.own_precision
def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    memory: str | int = "auto",
) -> Tensor:
    """Symmetric image-text cross-entropy: the mean of both directions of CLIP's loss.

    Args:
        image_features, text_features: (N, D), row i of each belonging together.
        logit_scale: multiplies the similarities; a float or a one-element tensor.
        labels: (N,) integers. A sample's target then spreads evenly over the samples of its label instead of lying
            on its own pair alone. With captions made from class names this keeps same-class captions from being
            treated as negatives.
        label_smoothing: in [0, 1): targets become `(1 - label_smoothing) target + label_smoothing / N`.
        weight: (N,) per-sample weights, multiplied onto the per-sample losses before the reduction.
        reduction: "mean" (sum over samples / N, weighted or not), "sum" or "none" (N,).
        group: a process group over which the batch is spread. Features, labels and weights are then the local part
            and must be equally many on every rank; "mean" is the mean over all samples and the same on every rank,
            "sum" likewise, "none" the local losses. Gradients are those of that global value with respect to the
            local features, so summing parameter gradients over ranks (not averaging: multiply the loss by the
            world size under DistributedDataParallel) gives exactly the single-process gradient. Ranks first compare
            dtypes, shapes and options, in the backward that all are in it: where they disagree, or one has an error
            in its arguments, all raise the same error. A rank that calls nothing more over the group, yet lives, is
            waited for until the group's time-out. On a GPU the comparison waits for the device.
        memory: bytes that may be kept from the forward to the backward, or "auto", 512 MiB, on a GPU 4 GiB. If N^2
            exponentials (4 bytes each, 8 for float64, on a GPU 2 for bfloat16) fit, they are kept, and forward and
            backward take 6 N^2 D flops. If not, as with 0, the similarities are computed again: 8 N^2 D flops, and
            nothing grows with N^2.

    Gradients reach both features, `logit_scale` and `weight`.
    Memory: what `memory` allows, the features' gradients, O(N), and a tile of 512 KB a thread; half-precision features
    once more in float32.
    Source: Radford et al. 2021 (CLIP), figure 3; per-label targets as in UniCL (Yang et al. 2022), equation 3.
    Raises: ValueError or TypeError naming the argument.
    """
    given = image_features, text_features, logit_scale, labels, label_smoothing, weight, reduction, memory
    if group is not None:
        from robustft.ops import ranks, sharded

        ranks.check_group(group)
        x, t, s, labels = ranks.checked(group, lambda: _contrastive_arguments(*given))
        return sharded.sharded_contrastive_loss(x, t, s, labels, label_smoothing, weight, reduction, group, memory)
    x, t, s, labels = _contrastive_arguments(*given)
    return contrastive.contrastive_loss(x, t, s, labels, label_smoothing, memory, weight, reduction)


@arguments.own_precision
def contrastive_distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    memory: str | int = "auto",
) -> ContrastiveTerms:
    """`contrastive_loss` together with the cross-entropy against a teacher's own similarities, in one pass.

    The distillation term of a sample is `-sum_j P_ij log softmax(z)_ij` with P the teacher's softmax over texts, plus
    the same over images: a sum of both directions, where the contrastive term is their mean. It is a cross-entropy,
    not a divergence: its minimum is the teacher's entropy, its gradient the divergence's.

    Args:
        image_features, text_features, logit_scale, labels, weight, reduction, group, memory: as in
            `contrastive_loss`; with `memory` for 2 N^2 exponentials 8 N^2 D flops, else 12.
        teacher_image_features, teacher_text_features: (N, D'), D' of the teacher's own.
        teacher_logit_scale: the teacher's scale.

    Gradients reach the student's features, `logit_scale` and `weight`; nothing of the teacher gets one.
    Memory: as `contrastive_loss`, for two matrices.
    Source: CaRot, Oh et al. 2024 (arXiv 2311.01723), self-distillation term as in the released objective.
    Raises: ValueError or TypeError naming the argument.
    """
    student, teacher = (
        (image_features, text_features, logit_scale),
        (teacher_image_features, teacher_text_features, teacher_logit_scale),
    )
    if group is not None:
        from robustft.ops import ranks, sharded

        ranks.check_group(group)
        matrices, labels = ranks.checked(
            group, lambda: _distillation_arguments(student, teacher, labels, weight, reduction, memory)
        )
        return ContrastiveTerms(
            *sharded.sharded_contrastive_distillation_loss(*matrices, labels, weight, reduction, group, memory)
        )
    matrices, labels = _distillation_arguments(student, teacher, labels, weight, reduction, memory)
    terms = contrastive.contrastive_distillation_loss(
        *matrices, labels=labels, memory=memory, weight=weight, reduction=reduction
    )
    return ContrastiveTerms(*terms)


def _sigmoid_arguments(
    pair: _Pair,
    logit_bias: Tensor | float,
    labels: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    memory: str | int,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]:
    """Features, scale and bias, and the labels, after the checks of all arguments."""
    x, t, s, labels = _contrastive_arguments(*pair, labels, 0.0, weight, reduction, memory)
    return (x, t, s, arguments.bias_tensor(logit_bias, x.device)), labels


def _sigmoid_distillation_arguments(
    student: _Pair,
    logit_bias: Tensor | float,
    teacher: _Pair,
    teacher_logit_bias: Tensor | float,
    labels: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    memory: str | int,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor | None]:
    """Features, scale and bias of the student and of the teacher, in one dtype, and the labels, after all checks."""
    (x, t, s, xt, tt, st), labels = _distillation_arguments(student, teacher, labels, weight, reduction, memory)
    b = arguments.bias_tensor(logit_bias, x.device)
    bt = arguments.bias_tensor(teacher_logit_bias, x.device, "teacher_logit_bias")
    return (x, t, s, b, xt, tt, st, _constant(bt)), labels


@arguments.own_precision
def sigmoid_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    memory: str | int = "auto",
) -> Tensor:
    """SigLIP's loss: of every image with every text, whether they belong together, by the sigmoid of their logit.

        loss_i = sum_j softplus(-y_ij (logit_scale x_i . t_j + logit_bias)),    y = 1 for pairs, else -1

    Args:
        image_features, text_features: (N, D), row i of each belonging together.
        logit_scale, logit_bias: of the similarities; floats or one-element tensors. SigLIP begins at 10 and -10.
        labels: (N,) integers. Images and texts of one label then all belong together.
        weight: (N,) of the images' losses, multiplied onto them before the reduction.
        reduction: "mean" (sum over images / N, weighted or not), "sum" or "none" (N,), an image's loss being its sum
            over all texts.
        group: a process group over which the batch is spread, as in `contrastive_loss`: every image meets the texts of
            all ranks, and "mean" and "sum" are those of all images.
        memory: bytes that may be kept from the forward to the backward, or "auto", 512 MiB, on a GPU 4 GiB. If the
            features' gradients (8 N D bytes, 16 for float64) fit, "mean" and "sum" compute them in the forward, while
            they have the similarities: 6 N^2 D flops in all, and nothing grows with N^2. For "none" they are not known
            there: if N^2 similarities (4 bytes each, 8 for float64) fit, these are kept, 6 N^2 D flops again. If
            nothing fits, as with 0, the similarities are computed again: 8 N^2 D flops, and nothing grows with N^2.

    Gradients reach both features, `logit_scale`, `logit_bias` and `weight`.
    Memory: what `memory` allows, the features' gradients, O(N), and a tile of 512 KB a thread; half-precision features
    once more in float32.
    Source: SigLIP, Zhai et al. 2023 (arXiv 2303.15343), equation 1 and algorithm 1.
    Raises: ValueError or TypeError naming the argument.
    """
    pair = image_features, text_features, logit_scale
    given = pair, logit_bias, labels, weight, reduction, memory
    if group is not None:
        from robustft.ops import ranks, sharded

        ranks.check_group(group)
        matrices, labels = ranks.checked(group, lambda: _sigmoid_arguments(*given))
        return sharded.sharded_sigmoid_contrastive_loss(*matrices, labels, weight, reduction, group, memory)
    matrices, labels = _sigmoid_arguments(*given)
    return sigmoid.contrastive_loss(*matrices, labels, weight, reduction, memory)


@arguments.own_precision
def sigmoid_contrastive_distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    teacher_logit_bias: Tensor | float,
    *,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    memory: str | int = "auto",
) -> ContrastiveTerms:
    """`sigmoid_contrastive_loss` together with the cross-entropy against a teacher's own probabilities, in one pass.

    The distillation term of image i is `-sum_j [P_ij log sigmoid(z_ij) + (1 - P_ij) log sigmoid(-z_ij)]` with P the
    sigmoid of the teacher's logits. It is a cross-entropy, not a divergence: its minimum is the teacher's entropy, its
    gradient the divergence's.

    Args:
        image_features, text_features, logit_scale, logit_bias, labels, weight, reduction, group, memory: as in
            `sigmoid_contrastive_loss`; with `memory` for 2 N^2 similarities 8 N^2 D flops, else 12.
        teacher_image_features, teacher_text_features: (N, D'), D' of the teacher's own.
        teacher_logit_scale, teacher_logit_bias: the teacher's.

    Gradients reach the student's features, `logit_scale`, `logit_bias` and `weight`; nothing of the teacher gets one.
    Memory: as `sigmoid_contrastive_loss` with "none", for two matrices.
    Source: the self-distillation of CaRot, Oh et al. 2024 (arXiv 2311.01723), with SigLIP's probabilities of pairs.
    Raises: ValueError or TypeError naming the argument.
    """
    student, teacher = (
        (image_features, text_features, logit_scale),
        (teacher_image_features, teacher_text_features, teacher_logit_scale),
    )
    given = student, logit_bias, teacher, teacher_logit_bias, labels, weight, reduction, memory
    if group is not None:
        from robustft.ops import ranks, sharded

        ranks.check_group(group)
        matrices, labels = ranks.checked(group, lambda: _sigmoid_distillation_arguments(*given))
        return ContrastiveTerms(
            *sharded.sharded_sigmoid_contrastive_distillation_loss(*matrices, labels, weight, reduction, group, memory)
        )
    matrices, labels = _sigmoid_distillation_arguments(*given)
    terms = sigmoid.contrastive_distillation_loss(*matrices, labels, memory)
    return ContrastiveTerms(*(reduced(term, weight, reduction) for term in terms))


@arguments.own_precision
def classification_loss(
    features: Tensor,
    class_embeddings: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    bias: Tensor | None = None,
    variant: str = "neg_log_ratio",
    top1: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    memory: str | int = "auto",
) -> ClassificationTerms:
    """Cross-entropy of class logits `z = s x w^T + b`, and the confidence misalignment penalty, in one pass.

    The penalty looks at H, the classes whose logit is strictly above the true one (ties are not misranked; classes of
    equal embeddings and biases, as duplicate names give, tie exactly, and to rounding in the eager reference), with
    R = p_true / sum_H p, and is 0 where H is empty:
    "neg_log_ratio" -log R = logsumexp_H z - z_true, "neg_ratio" 1 - R, "softplus" log(1 + 1/R), "ratio" R.
    H itself carries no gradient. "ratio" is the released code's form, for replication only: minimising it *lowers*
    the true logit, and with weight 1 two classes are stable at p_true = 0.38. "neg_log_ratio" has the sign that the
    paper intends, and is the default.

    Args:
        features: (N, D). class_embeddings: (K, D), any norms. labels: (N,) integers in [0, K).
        logit_scale: multiplied out. bias: (K,), added after the scale.
        variant: of the penalty. top1: H is the highest class only.
        label_smoothing: of the cross-entropy, over K. weight, reduction: as in `contrastive_loss`, on both terms.
        memory: bytes that may be kept from the forward to the backward, or "auto", 512 MiB, on a GPU 4 GiB. If N K
            exponentials (4 bytes each, 8 for float64, on a GPU 2 for bfloat16) fit, they are kept, else the logits are
            multiplied again: 6 or 8 N K D flops.

    Gradients reach features, class_embeddings, logit_scale, bias and weight. A NaN among a sample's logits makes both
    its terms NaN.
    Memory: the gradients and what `memory` allows; forward up to 4 MB a thread (64 K numbers where that is more);
    backward 8 MB (256 K numbers where that is more) and, for few classes, up to eight times their gradient. On a GPU,
    where labels outside [0, K) are not looked for but make their losses NaN: O(N), up to 256 MB (2048 rows of K
    exponentials where that is more), and in the backward float32 sums of the embeddings' gradient, 16 MB or K D.
    Source: CMP, arXiv 2501.17595; the default is the negative logarithm of its ratio (appendix B).
    Raises: ValueError or TypeError naming the argument.
    """
    x, w, s = arguments.class_inputs(features, class_embeddings, logit_scale)
    n, k = x.shape[0], w.shape[0]
    y = arguments.class_labels(labels, n, x.device)
    if bias is not None and (bias.shape != (k,) or bias.device != x.device or bias.dtype not in arguments.FLOATS):
        raise ValueError(
            f"bias is {tuple(bias.shape)} {bias.dtype} on {bias.device}; expected floating ({k},) on {x.device}"
        )
    arguments.check_variant(variant)
    arguments.check_smoothing(label_smoothing)
    arguments.check_reduction(reduction)
    arguments.check_weight(weight, n, x.device)
    how = variant, top1, label_smoothing, memory, weight, reduction
    return ClassificationTerms(*classification.classification_loss(x, w, s, bias, y, *how))


@arguments.own_precision
def misalignment_penalty(
    logits: Tensor,
    labels: Tensor,
    *,
    variant: str = "neg_log_ratio",
    top1: bool = False,
    average: str = "batch",
    reduction: str = "mean",
) -> Tensor:
    """The confidence misalignment penalty of `classification_loss` on logits that exist already.

    Args:
        logits: (N, K). labels: (N,) integers in [0, K). variant, top1: as in `classification_loss`.
        average: what "mean" divides by: "batch", all samples (as released), or "errors", those with a misranked
            class (0 when there is none).
        reduction: "mean", "sum" or "none".

    Gradient reaches logits, exactly 0 in rows without a misranked class. A NaN in a row makes its penalty NaN; so does,
    on a GPU, where labels are not looked at, one outside [0, K).
    Memory: the gradient (N, K) and O(N); the eager reference holds a few N x K temporaries.
    Source: CMP, arXiv 2501.17595.
    Raises: ValueError or TypeError naming the argument.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits is {type(logits).__name__}; expected a tensor (N, K)")
    if logits.dim() != 2 or logits.dtype not in arguments.FLOATS or logits.numel() == 0:
        raise ValueError(f"logits is {tuple(logits.shape)} {logits.dtype}; expected floating (N, K), not empty")
    labels = arguments.class_labels(labels, logits.shape[0], logits.device)
    arguments.check_variant(variant)
    arguments.check_reduction(reduction)
    if average not in ("batch", "errors"):
        raise ValueError(f"average is {average!r}; expected 'batch' or 'errors'")
    penalty, errors = risks.misalignment_penalty(logits, labels, variant, top1)
    if reduction == "mean" and average == "errors":
        return penalty.sum() / errors.clamp(min=1)
    return reduced(penalty, None, reduction)


@arguments.own_precision
def dual_risk(
    features: Tensor,
    class_embeddings: Tensor,
    core_embeddings: Tensor,
    labels: Tensor,
    core_labels: Tensor,
    logit_scale: Tensor | float,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    memory: str | int = "auto",
) -> DualRiskTerms:
    """Empirical risk under default prompts and worst-case risk under concept descriptions: dual risk minimisation.

        empirical_i  = -log softmax(s x w^T)_{i, y_i}
        worst_case_i = -sum_k q_ik log softmax(s x v^T)_ik

    Args:
        features: (N, D). class_embeddings w, core_embeddings v: (K, D) of the two kinds of prompts.
        labels: (N,) integers in [0, K).
        core_labels: (N, K) soft labels q, rows need not sum to one, or (N,) confidences of the true class, which
            weigh it alone.
        logit_scale, weight, reduction: as in `contrastive_loss`. memory: as in `classification_loss`, for N x 2K.

    Gradients reach features, both embeddings, logit_scale and weight, not core_labels.
    Memory: as `classification_loss`, for 2K classes; where the compiled body does not run, both embeddings once more.
    Source: DRM, Li et al. 2024 (arXiv 2411.19757), equations of the two risks.
    Raises: ValueError or TypeError naming the argument.
    """
    x, w, s = arguments.class_inputs(features, class_embeddings, logit_scale)
    n, k, v = x.shape[0], w.shape[0], core_embeddings
    if not (arguments.alike(w, v) and v.shape == w.shape):
        _, v, _ = arguments.class_inputs(features, core_embeddings, s, "core_embeddings")
        v = v.to(x.dtype)
    if v.shape[0] != k:
        raise ValueError(f"core_embeddings has {len(v)} rows; expected {k}, as class_embeddings")
    y = arguments.class_labels(labels, n, x.device)
    if (
        core_labels.shape not in ((n,), (n, k))
        or core_labels.dtype not in arguments.FLOATS
        or core_labels.device != x.device
    ):
        raise ValueError(
            f"core_labels is {tuple(core_labels.shape)} {core_labels.dtype} on {core_labels.device}; expected floating "
            f"({n}, {k}) or ({n},) on {x.device}"
        )
    arguments.check_reduction(reduction)
    arguments.check_weight(weight, n, x.device)
    inputs = x, w, v, s, y, _constant(core_labels)
    return DualRiskTerms(*classification.dual_risk(*inputs, memory, weight, reduction))


@arguments.own_precision
def concept_scores(
    features: Tensor,
    class_embeddings: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: Tensor | float | None = None,
) -> ConceptScores:
    """Out-of-distribution scores of features against classes or concepts, all from one sweep over their cosines.

    With cos = x w^T, p = softmax(s cos) and s = `logit_scale`:

        max_cosine = max_k cos_k                    mcm = max_k softmax(cos / temperature)_k
        energy     = (1/s) logsumexp_k(s cos_k)     msp = max_k p_k
        entropy    = sum_k p_k log p_k              prediction = argmax_k cos_k, the lowest of equal ones

    Entropy is the *negative* entropy, so that all five are higher for samples that look in-distribution. They are
    `robustft.detection`'s `max_cosine(cos)`, `mcm(cos, temperature)`, `msp(s cos)`, `energy(cos, 1/s)` and
    `entropy(s cos)`; `energy(s cos)` is s times the energy here and ranks samples alike.

    Args:
        features: (N, D). class_embeddings: (K, D). Rows of unit norm, within 1e-3 (1e-2 in half precision); on the CPU
            this is checked.
        temperature: of `mcm`.
        logit_scale: s, the model's multiplied-out scale; positive. None: 1 / temperature, which makes msp equal mcm.

    No gradients: scores are for detection, and nothing is kept for a backward. Results are float32 (float64 for
    float64 features), `prediction` int64. A NaN among a sample's cosines makes its scores NaN and its prediction any.
    Memory: O(N), up to 2 MB a thread (32 K numbers where that is more), half-precision features 8192 rows at a time in
    float32. On a GPU O(N).
    Source: MCM, Ming et al. 2022 (arXiv 2211.13445); energy, Liu et al. 2020; MSP, Hendrycks and Gimpel 2017.
    Raises: ValueError or TypeError naming the argument.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    x, w, s = arguments.class_inputs(
        features, class_embeddings, 1 / temperature if logit_scale is None else logit_scale
    )
    if isinstance(logit_scale, (int, float)) and logit_scale == 0:
        raise ValueError("logit_scale is 0; expected a positive number, 1/s is the energy's temperature")
    found, norms = scores.concept_scores(x, w, temperature, s)
    if norms:
        arguments.check_unit_norm("features", features.dtype, *norms[:2])  # as rounded: not promoted
        arguments.check_unit_norm("class_embeddings", class_embeddings.dtype, *norms[2:])
    return ConceptScores._make(found)


@arguments.own_precision
def cvar(losses: Tensor, alpha: float) -> Tensor:
    """Conditional value at risk: the mean of the worst fraction `alpha` of the losses, 0-d.

    With alpha N not whole, the next loss counts with the remainder: CVaR is continuous in alpha, alpha = 1 is the
    mean, alpha <= 1/N the maximum. Among equal losses the earlier come first. A NaN counts as the worst loss; losses
    that do not count may be infinite.

    Args:
        losses: (N,) per-sample losses. alpha: in (0, 1].

    Gradient reaches the losses that count. Time and memory: O(N).
    Source: Rockafellar and Uryasev 2000; as a training objective, Levy et al. 2020 (arXiv 2010.05893), section 2.
    """
    arguments.loss_vector(losses)
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a fraction in (0, 1]")
    return risks.cvar(losses, alpha)


@arguments.own_precision
def orthogonality_penalty(projection: Tensor, *, squared: bool = False) -> Tensor:
    """`||W^T W - I||_F` of a projection W (P, D) applied as `h @ W`: how far its columns are from orthonormal.

    Args:
        projection: (P, D), for example a ViT's `visual.proj`. With P < D it cannot reach zero.
        squared: the squared norm. Default False, as in CaRot's released objective; the paper writes the square.

    Gradient reaches `projection`, and can be differentiated again; at an exactly orthonormal W the unsquared norm gets
    a zero gradient, not NaN. Time: 3 P D^2 flops with the gradient, on a GPU 4, where autograd of the formula takes 6.
    Memory: D^2, and W once more. Half precision is computed in float32, and the result is float32 (float64 for
    float64). On the CPU float32 is IEEE at any matmul precision: W^T W - I cancels.
    Source: CaRot, Oh et al. 2024 (arXiv 2311.01723), orthogonality constraint.
    """
    if projection.dim() != 2 or projection.dtype not in arguments.FLOATS:
        raise ValueError(
            f"projection is {tuple(projection.shape)} {projection.dtype}; expected a floating (P, D) matrix"
        )
    return orthogonality.orthogonality_penalty(projection, squared)


@arguments.own_precision
def cross_penalty(visual_projection: Tensor, text_projection: Tensor) -> Tensor:
    """`||Wv Wt^T||_F` of the visual and the text projection, (P, D) and (Q, D), 0-d: CaRot's cross term.

    Gradients reach both, zero where the product is zero. Memory: P Q. Half precision is computed in float32.
    Source: CaRot, Oh et al. 2024 (arXiv 2311.01723), the released objective (`cross_fnorm`).
    Raises: ValueError naming the argument.
    """
    for name, w in (("visual_projection", visual_projection), ("text_projection", text_projection)):
        if w.dim() != 2 or w.dtype not in arguments.FLOATS or w.shape[1] != visual_projection.shape[1]:
            raise ValueError(
                f"{name} is {tuple(w.shape)} {w.dtype}; expected a floating matrix with the columns of the visual one"
            )
    wider = torch.promote_types(visual_projection.dtype, text_projection.dtype)
    product = at_least_float32(visual_projection.to(wider)) @ at_least_float32(text_projection.to(wider)).T
    return torch.linalg.vector_norm(product)


@arguments.own_precision
def group_risk(losses: Tensor, groups: Tensor, num_groups: int) -> GroupRisk:
    """Mean loss of each group, and the worst group's.

    Args:
        losses: (N,) per-sample losses.
        groups: (N,) integers in [0, num_groups), for example domains.
        num_groups: how many groups there are. An empty group has risk 0 and is never the worst.

    Gradients reach `losses`, through `mean` and through `worst` (the first of equal maxima).
    Source: Sagawa et al. 2020 (arXiv 1911.08731), the group risks of section 2.
    """
    arguments.loss_vector(losses)
    groups = arguments.group_indices(groups, losses, num_groups)
    return GroupRisk(*risks.group_risk(losses, groups, num_groups))


@arguments.own_precision
def group_dro_weights(weights: Tensor, group_means: Tensor, step_size: float, counts: Tensor | None = None) -> Tensor:
    """Group DRO's weights after one exponentiated-gradient step: `q_g exp(step_size * risk_g)`, normalised.

    Computed as a softmax of `log q + step_size * risk`, so large risks cannot overflow. A weight of 0 stays 0.

    Args:
        weights: (G,) q, float32 or float64, not negative; a scale of their own drops out. Start from `1 / G` each.
        group_means: (G,) risk of each group, as `group_risk(...).mean`.
        step_size: eta, not negative; Sagawa et al. use 0.01.
        counts: (G,) sizes of the groups. Groups of size 0 count as of risk 0, whatever `group_means` holds there: what
            they weigh relative to each other stays. Needed only if the means of absent groups are not 0 already.

    No gradient. A NaN risk makes every weight NaN: skip the update of a step whose losses are not finite.
    Source: Sagawa et al. 2020 (arXiv 1911.08731), algorithm 1.
    Raises: ValueError or TypeError naming the argument.
    """
    arguments.group_weights(weights, step_size)
    if not isinstance(group_means, Tensor):
        raise TypeError(f"group_means is {type(group_means).__name__}; expected a tensor {tuple(weights.shape)}")
    for name, vector in (("group_means", group_means), ("counts", counts)):
        if vector is not None and (vector.shape != weights.shape or vector.device != weights.device):
            raise ValueError(
                f"{name} is {tuple(vector.shape)} on {vector.device}; expected {tuple(weights.shape)} on "
                f"{weights.device}, as weights"
            )
    risk = group_means if counts is None else torch.where(counts > 0, group_means, 0.0)
    return _reweighted(weights, risk, step_size)


@arguments.own_precision
def group_dro(losses: Tensor, groups: Tensor, weights: Tensor, step_size: float) -> GroupDRO:
    """Group DRO's objective: updates the groups' weights, then weighs the groups' mean losses by them.

        mean_g = the mean loss of group g, 0 if it is absent from the batch
        q'     = group_dro_weights(q, mean, step_size)
        loss   = sum_g q'_g mean_g

    Keep the returned weights for the next batch:

        weights = torch.full((num_groups,), 1 / num_groups)
        for ...:
            loss, weights, *_ = group_dro(losses, groups, weights, 0.01)

    Args:
        losses: (N,) per-sample losses.
        groups: (N,) integers in [0, G).
        weights: (G,) q before this batch, float32 or float64, on the losses' device.
        step_size: eta of the update, not negative; 0 keeps the weights as they are, normalised.

    Gradient reaches `losses`, with the updated weights held constant; `mean` carries one too.
    Memory: O(N + G). Deterministic on the CPU; nothing waits for a GPU.
    Source: Sagawa et al. 2020 (arXiv 1911.08731), algorithm 1; absent groups as in the authors' code.
    Raises: ValueError or TypeError naming the argument.
    """
    arguments.loss_vector(losses)
    arguments.group_weights(weights, step_size)
    if weights.device != losses.device:
        raise ValueError(f"weights is on {weights.device}; expected {losses.device}, as losses")
    groups = arguments.group_indices(groups, losses, len(weights))
    mean, _, counts = risks.group_risk(losses, groups, len(weights))
    updated = _reweighted(weights, mean, step_size)
    return GroupDRO(torch.dot(updated.to(mean.dtype), mean), updated, mean, counts)


def _reweighted(weights: Tensor, risk: Tensor, step_size: float) -> Tensor:
    # Plain torch operations: for G numbers a kernel would cost as much in its call as it saved.
    with torch.no_grad():
        return torch.softmax(torch.add(weights.log(), risk.to(weights.dtype), alpha=step_size), 0)


@arguments.own_precision
def kth_neighbor_distance(
    queries: Tensor,
    points: Tensor,
    k: int,
    *,
    squared: bool = True,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Euclidean distance of each query to its k-th nearest point, exactly: (Q,), float32 (float64 for float64).

    Args:
        queries: (Q, D), Q may be 0. points: (N, D).
        k: in [1, N]; k = 1 is the nearest, a point equal to the query included.
        squared: the squared distance. Default True, as VRF's released code scores with it.
        group: a process group over which the points are spread: this rank has some of the N rows, maybe none, and those
            of all in the order of ranks are the points, to the bit. Queries, Q of each, are the rank's own, and so are
            the results; where all ranks bring the same queries, each rank's points are searched once. Every rank makes
            the same calls; where their arguments do not go together, all raise the same error.

    The relative error is that of rounding the result, near-duplicates and data far from the origin included: what a
    filter of fast products cannot rule out is measured by direct differences in float64. To search the same points
    again use `robustft.NeighborIndex`, which prepares them once.
    No gradient: inputs that require one are detached. Half precision is widened to float32.
    Memory: 4 N bytes, up to 80 MB a thread, and 2 N D bytes on processors with AMX or AVX512_BF16, or with AVX2 where Q
    is at least 128 and D at least 32; no Q x N matrix. Time: 2 Q N D flops.
    On a GPU 4 N + 2 N D bytes and up to 256 MB, or 4 N where that is more; float64 there is not filtered, so slower.
    Of a group, N is a rank's own part, and beside it are the queries of one other rank and about 100 MB of what the
    ranks found.
    Source: VRF, Zhu et al. 2024 (arXiv 2411.06966), the distance to the zero-shot-failure set.
    Raises: ValueError or TypeError naming the argument, for NaN and infinity too (under torch.compile NaN results).
    """
    if group is not None:
        return _sharded_neighbors("kth_neighbor_distance", queries, points, k, squared, group).distances[:, -1].clone()
    q, x = _neighbor_inputs(queries, points)
    k = arguments.check_neighbors(k, len(x))
    return neighbors.kth_distance(q, x, neighbors.prepare(x, len(q) >= neighbors.FILTERED), k, squared)


@arguments.own_precision
def nearest_neighbors(
    queries: Tensor,
    points: Tensor,
    k: int,
    *,
    squared: bool = True,
    group: torch.distributed.ProcessGroup | None = None,
) -> Neighbors:
    """The k nearest points of each query, exactly: distances (Q, k), ascending, and indices (Q, k).

    Points at equal distances (as returned) come in the order of their indices. Of a group, indices count the points of
    rank 0 first, then those of rank 1, and so on. Arguments, precision, memory (plus the results) and errors as
    `kth_neighbor_distance`, which is faster where only the k-th is needed and there is no group. No gradient.
    """
    if group is not None:
        return _sharded_neighbors("nearest_neighbors", queries, points, k, squared, group)
    q, x = _neighbor_inputs(queries, points)
    k = arguments.check_neighbors(k, len(x))
    return Neighbors(*neighbors.nearest(q, x, neighbors.prepare(x, len(q) >= neighbors.FILTERED), k, squared))


def _neighbor_inputs(queries: Tensor, points: Tensor, may_be_empty: bool = False) -> tuple[Tensor, Tensor]:
    x = arguments.neighbor_points(points, may_be_empty=may_be_empty)
    q = arguments.neighbor_queries(queries, x)
    wider = torch.promote_types(q.dtype, x.dtype)
    return q.to(wider), x.to(wider)


def _sharded_neighbors(
    function: str, queries: Tensor, points: Tensor, k: int, squared: bool, group: torch.distributed.ProcessGroup
) -> Neighbors:
    from robustft.ops import ranks, sharded_neighbors

    ranks.check_group(group)

    def prepared() -> tuple[Tensor, Tensor, neighbors.PackedPoints | None]:
        q, x = _neighbor_inputs(queries, points, may_be_empty=True)
        neighbors.check_finite("queries", q)
        return q, x, neighbors.prepare(x) if len(x) else None

    return Neighbors(*sharded_neighbors.nearest(function, *ranks.checked(group, prepared), k, squared, group))
