"""Out-of-distribution scores s(x), every one higher for samples that look in-distribution (ID).

u (N, D)         unit image features; u_(k) the k-th nearest among those of ID training images
c = u w^T        (N, K) cosines with K classes;   z = s c (N, K) logits
c' (N, P, K)     cosines of the patches of an image;   n (N, M) with M negative texts

Each function has its formula; `robustft.detection.table()` prints the list of them.

Softmax at the scale of cosines is not softmax at the scale of the model: MCM_tau(c) = MSP(c / tau), and MCM of logits
that the model has scaled already is silently MSP. So what is no cosine is refused. For K = 1000 MCM lives near 0.0011,
where bfloat16 has two dozen values: everything here is float32 at least. `robustft.functional.concept_scores` computes
some of them without the matrix of cosines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from robustft.ops import arguments

if TYPE_CHECKING:
    from robustft.neighbors import NeighborIndex

_COSINE_TOLERANCE = 0.02  # half-precision unit vectors reach 1.01; scaled logits are an order of magnitude away
_ELEMENTS = 1 << 23  # of a block of similarities; torch.quantile takes no more than 2^24 at a time


@arguments.checked
def mcm(cosines: Tensor, temperature: float = 1.0) -> Tensor:
    """Maximum concept matching, max_k softmax(c / tau): cosines (..., K) to scores (...,), float32 at least.

    For K = 1000 and tau = 1 it lives near 0.0011, where bfloat16 has two dozen values; neither scores nor thresholds
    compare across K. Source: MCM (Ming et al. 2022, arXiv 2211.13445).
    """
    return msp(_cosines(cosines) / _positive(temperature))


@arguments.checked
def max_cosine(cosines: Tensor) -> Tensor:
    """The largest cosine, max_k c_k: cosines (..., K) to scores (...,), float32 at least."""
    return _cosines(cosines).amax(-1)


@arguments.checked
def msp(logits: Tensor) -> Tensor:
    """Maximum softmax probability, max_k softmax(z)_k: logits (..., K) to scores (...,), float32 at least.

    The logits are the model's own, scale included. Source: Hendrycks and Gimpel 2017 (arXiv 1610.02136).
    """
    return _logits(logits).softmax(-1).amax(-1)  # exp(max - logsumexp) would lose a digit of large logits


@arguments.checked
def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Negative free energy, T logsumexp(z / T): logits (..., K) to scores (...,), float32 at least.

    On cosines with T = 1 this is all but the mean cosine over all classes, a weak score; T = 0.01 follows the maximum.
    Source: Liu et al. 2020 (arXiv 2010.03759).
    """
    return _positive(temperature) * (_logits(logits) / temperature).logsumexp(-1)


@arguments.checked
def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Negative entropy of softmax(z / T) in nats: logits (..., K) to scores (...,), float32 at least."""
    p = (_logits(logits) / _positive(temperature)).softmax(-1)
    return -torch.special.entr(p).sum(-1)


@arguments.checked
def variance(cosines: Tensor, temperature: float = 1.0) -> Tensor:
    """Variance over the K classes (divided by K) of softmax(c / tau): cosines (..., K) to scores (...,); float64.

    It is about (MCM's distance from 1/K)^2, some 1e-10 for K = 1000: hence float64. Source: a baseline in MCM's code.
    """
    p = (_cosines(cosines).double() / _positive(temperature)).softmax(-1)
    return p.var(-1, unbiased=False)


@arguments.checked
def local_mcm(patch_cosines: Tensor, temperature: float = 1.0) -> Tensor:
    """L-MCM, max_{p,k} softmax(c'_p / tau)_k, the MCM of the best patch: cosines (..., P, K) to scores (...,).

    Float32 at least. Cosines of `clip.encode_patches` with the class embeddings. Source: GL-MCM (Miyai et al., arXiv
    2304.04521).
    """
    if patch_cosines.ndim < 2 or patch_cosines.shape[-2] == 0:
        raise ValueError(f"patch_cosines must have shape (..., P, K) with P >= 1, got {tuple(patch_cosines.shape)}")
    return msp(_cosines(patch_cosines, "patch_cosines") / _positive(temperature)).amax(-1)


@arguments.checked
def gl_mcm(cosines: Tensor, patch_cosines: Tensor, temperature: float = 1.0, local_weight: float = 1.0) -> Tensor:
    """GL-MCM, MCM + lambda L-MCM: cosines (..., K) and patch cosines (..., P, K) to scores (...,).

    lambda is 1 by default, as in the released code; its ImageNet script of 2025 has 0.5. Weight 0 is MCM. Source:
    Miyai et al., arXiv 2304.04521.
    """
    if cosines.shape != patch_cosines.shape[:-2] + patch_cosines.shape[-1:]:
        raise ValueError(
            f"cosines {tuple(cosines.shape)} and patch_cosines {tuple(patch_cosines.shape)} must be (..., K) and "
            "(..., P, K) of the same samples and classes"
        )
    _on_one_device(cosines=cosines, patch_cosines=patch_cosines)
    return mcm(cosines, temperature) + local_weight * local_mcm(patch_cosines, temperature)


@arguments.checked
def neg_label(
    cosines: Tensor,
    negative_cosines: Tensor,
    temperature: float = 0.01,
    groups: int | None = None,
    seed: int = 0,
) -> Tensor:
    """NegLabel: the softmax mass on the K classes against negative texts, averaged over groups g of these; float64.

    mean_g  sum_k e^{c_k / tau} / (sum_k e^{c_k / tau} + sum_{m in g} e^{n_m / tau})

    Args:
        cosines: (..., K) with the classes. negative_cosines: (..., M) with texts that no ID image shows
            (`select_negatives`).
        temperature: 0.01, CLIP's own scale, whatever the model's is now.
        groups: the negatives are permuted and cut into so many groups of equal size; what is left over, the last
            M mod groups of them, is dropped. None: groups of a hundred, as the released 10,000 in 100 (fewer than 200
            make one group). 1 puts all negatives into one softmax.
        seed: of the permutation, drawn on the CPU; the released one, also seed 0, is drawn on the GPU and differs.

    Returns (...,) in [0, 1], in float64: in float32 a lead of 0.17 in cosine is a 1 already, and such samples tie.
    Source: NegLabel (Jiang et al. 2024, arXiv 2403.20078), sum-softmax score and grouping strategy.
    Raises ValueError when there are no negatives, or more groups than negatives.
    """
    positive, negative = _cosines(cosines).double(), _cosines(negative_cosines, "negative_cosines").double()
    if positive.shape[:-1] != negative.shape[:-1]:
        raise ValueError(
            f"cosines {tuple(cosines.shape)} and negative_cosines {tuple(negative_cosines.shape)} must be (..., K) and "
            "(..., M) of the same samples"
        )
    _on_one_device(cosines=cosines, negative_cosines=negative_cosines)
    count = negative.shape[-1]
    groups = max(1, count // 100) if groups is None else groups
    if not 1 <= groups <= count:
        raise ValueError(f"groups must lie between 1 and the number of negatives, {count}, got {groups}")
    size = count - count % groups
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).to(negative.device)
    grouped = (negative / _positive(temperature))[..., order].unflatten(-1, (groups, -1))
    lead = (positive / temperature).logsumexp(-1, keepdim=True) - grouped.logsumexp(-1)
    return torch.sigmoid(lead).mean(-1)


@arguments.checked
def select_negatives(
    candidate_embeddings: Tensor, class_embeddings: Tensor, count: int, percentile: float = 0.95
) -> Tensor:
    """Indices (count,) of the candidate texts least like the classes, the least alike first: NegMining.

    A candidate's likeness is the `percentile` of its cosines with the K classes. Embeddings (C, D) and (K, D) of unit
    norm. The paper takes 15 % of WordNet's nouns, and of its adjectives. Memory: C floats and 32 MB. No gradient.
    Source: NegLabel (arXiv 2403.20078), algorithm 1, where distance is negative cosine and the percentile 5 %.
    """
    for name, value in (("candidate_embeddings", candidate_embeddings), ("class_embeddings", class_embeddings)):
        if value.ndim != 2 or 0 in value.shape or not value.is_floating_point() or value.is_meta:
            raise ValueError(
                f"{name} must be floating (rows, D), got {tuple(value.shape)} {value.dtype} on {value.device}"
            )
    if candidate_embeddings.shape[1] != class_embeddings.shape[1]:
        raise ValueError(
            f"candidate_embeddings have {candidate_embeddings.shape[1]} dimensions, class_embeddings "
            f"{class_embeddings.shape[1]}: use the same model"
        )
    _on_one_device(candidate_embeddings=candidate_embeddings, class_embeddings=class_embeddings)
    if not 1 <= count <= len(candidate_embeddings):
        raise ValueError(f"count must lie between 1 and the {len(candidate_embeddings)} candidates, got {count}")
    if not 0.0 <= percentile <= 1.0:
        raise ValueError(f"percentile must lie in [0, 1], got {percentile}")
    with torch.no_grad():
        wider = torch.promote_types(candidate_embeddings.dtype, class_embeddings.dtype)
        blocks = candidate_embeddings.to(wider).split(max(1, _ELEMENTS // len(class_embeddings)))
        name, classes = "products of candidate_embeddings and class_embeddings", class_embeddings.to(wider).T
        likeness = torch.cat([_cosines(block @ classes, name).quantile(percentile, dim=1) for block in blocks])
        return likeness.argsort(stable=True)[:count]


class ClassGaussians(NamedTuple):
    """K Gaussians of one covariance: `means` (K, D), and `whitening` W (D, D) with W^T W = Sigma^-1; float64.

    `shrinkage` is gamma in Sigma = (1 - gamma) S + gamma tr(S) / D I, S the mean of the K classes' scatter.
    """

    means: Tensor
    whitening: Tensor
    shrinkage: float


@arguments.checked
def fit_class_gaussians(features: Tensor, labels: Tensor, shrinkage: float | None = None) -> ClassGaussians:
    """The Gaussians of ID training features (N, D) with labels (N,), in float64 on the CPU; no gradient.

    S = 1/N sum_i (u_i - mu_{y_i})(u_i - mu_{y_i})^T. `shrinkage` None is Ledoit and Wolf's estimate of the gamma that
    brings Sigma nearest to the truth; the paper has none (0), which needs N well above D. Classes without samples have
    no Gaussian. Memory: N D float64. Source: Lee et al. 2018 (arXiv 1807.03888), section 2.1; Ledoit and Wolf 2004.
    ValueError where Sigma is singular, or features are not finite.
    """
    u, y = _features(features), arguments.array("labels", labels).detach().cpu()
    if y.shape != u.shape[:1] or y.is_floating_point() or y.is_complex():
        raise ValueError(f"labels must be ({len(u)},) integers, one a feature, got {tuple(y.shape)} {y.dtype}")
    _, index, counts = y.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), u.shape[1], dtype=u.dtype).index_add_(0, index, u) / counts[:, None]
    centred = u - means[index]
    if shrinkage is None:
        from sklearn.covariance import ledoit_wolf_shrinkage

        shrinkage = float(ledoit_wolf_shrinkage(centred.numpy(), assume_centered=True)) if centred.any() else 1.0
    if not 0.0 <= shrinkage <= 1.0:
        raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}")
    scatter = centred.T @ centred / len(u)
    identity = torch.eye(u.shape[1], dtype=u.dtype)
    covariance = (1.0 - shrinkage) * scatter + shrinkage * scatter.diagonal().mean() * identity
    factor, failure = torch.linalg.cholesky_ex(covariance)
    # Rounding can leave a singular matrix a pivot of a few ulps.
    if failure or factor.diagonal().min() ** 2 <= 1e-13 * covariance.diagonal().max():
        raise ValueError(
            f"the covariance of {len(u)} features of {len(counts)} classes in {u.shape[1]} dimensions is singular: "
            "give more than one sample a class, or a shrinkage above 0 (None estimates it)"
        )
    whitening = torch.linalg.solve_triangular(factor, identity, upper=False)
    # Contiguous, as a file gives it back: products of another memory layout differ in their last bits.
    return ClassGaussians(means, whitening.contiguous(), shrinkage)


@arguments.checked
def mahalanobis(features: Tensor, gaussians: ClassGaussians) -> Tensor:
    """-min_k (u - mu_k)^T Sigma^-1 (u - mu_k): features (N, D) to scores (N,), float64 on the CPU.

    Source: Lee et al. 2018 (arXiv 1807.03888), without its input perturbation and layer ensemble. MCM's released code
    has half of this. Memory: N (D + K) float64.
    """
    u = _features(features)
    if not isinstance(gaussians, ClassGaussians):
        raise TypeError(f"gaussians is {arguments.described(gaussians)}; expected what fit_class_gaussians gives")
    if u.shape[1] != gaussians.means.shape[1]:
        raise ValueError(
            f"features have {u.shape[1]} dimensions, the Gaussians {gaussians.means.shape[1]}: use the same model"
        )
    # About the middle of the means, where |a|^2 + |b|^2 - 2 a b cancels least.
    middle = gaussians.means.mean(0)
    whitened, means = ((x - middle) @ gaussians.whitening.T for x in (u, gaussians.means))
    return -torch.cdist(whitened, means, compute_mode="use_mm_for_euclid_dist").amin(1).square()


@arguments.checked
def knn_distance(features: Tensor, index: NeighborIndex, k: int) -> Tensor:
    """-|u - u_(k)|, the distance to the k-th nearest of the ID training features in `index`: (N, D) to (N,).

    Exact; float32, float64 for a float64 index. Features of unit norm, in both. Source: Sun et al. 2022 (arXiv
    2204.06507), where k = 1000 for ImageNet's 1.28 million training images and 50 for CIFAR-10's 50,000.
    """
    if not callable(getattr(index, "kth_distance", None)):
        raise TypeError(f"index is {arguments.described(index)}; expected a NeighborIndex of training features")
    try:
        return -index.kth_distance(features.detach(), k, squared=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"features or k: {error}") from error


def _on_one_device(**values: Tensor) -> None:
    devices = {str(value.device) for value in values.values()}
    if len(devices) > 1:
        raise ValueError(f"{' and '.join(values)} are on {' and '.join(sorted(devices))}; expected one device")


def _features(features: Tensor) -> Tensor:
    features = arguments.array("features", features)
    if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
        raise ValueError(f"features must be (N, D) floating point, got {tuple(features.shape)} {features.dtype}")
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        raise ValueError(f"features must be finite, but {bad} of {len(features)} rows hold NaN or infinity")
    return features.detach().double().cpu()


def _logits(logits: Tensor, name: str = "logits and cosines") -> Tensor:
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., K) with K >= 1, got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {logits.dtype}")
    return logits if logits.dtype == torch.float64 else logits.float()


def _cosines(cosines: Tensor, name: str = "cosines") -> Tensor:
    cosines = _logits(cosines, name)
    looked_at = cosines.numel() and arguments.has_numbers(cosines)
    largest = float(cosines.detach().abs().max()) if looked_at else 0.0
    if not largest <= 1.0 + _COSINE_TOLERANCE:
        raise ValueError(
            f"{name} must lie in [-1, 1], got |cos| up to {largest:.4g}; these look like scaled logits: "
            "pass cosines of unit features and unit class embeddings, before logit_scale"
        )
    return cosines


def _positive(temperature: float) -> float:
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    return temperature
