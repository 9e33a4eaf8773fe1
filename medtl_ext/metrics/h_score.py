r"""H-score: how well features separate the classes, as one number and at every pixel of a grid.

With f the features and g the mean feature of each sample's class (Bao et al., *An information-theoretic approach to
transferability in task transfer learning*, ICIP 2019):

.. math::
    H = \mathrm{tr}\left(\mathrm{cov}(f)^{+}\, \mathrm{cov}(g)\right)

Covariances need sums only: the sum of x and the number of samples by class, and the sum of x x' over all samples. For K
classes, cov(g) has rank K - 1 at most. So H is a sum of K quadratic forms and needs one factorisation of cov(f).
"""

from collections.abc import Callable
from typing import Any

import torch

from medtl_ext._validation import InputError, require_choice, warn
from medtl_ext.metrics.base import all_reduce_sums
from medtl_ext.metrics.features import FeatureMetric, MomentMetric, checked_samples, require_samples

SHRINKAGES = ("ledoit_wolf",)

# Directions with a smaller share of the largest variance hold rounding noise of float32 features. A pseudo-inverse
# would amplify it. For example, the covariance of a softmax of two channels has rank one, and the rest is noise.
CUTOFF = 1e-6

EPSILON = torch.finfo(torch.float64).eps

Pixels = slice | torch.Tensor


def compute_h_score(
    features: Any, target_labels: Any, *, shrinkage: str | None = None, ignore_index: int | None = None
) -> torch.Tensor:
    """H-score ``tr(cov(f)^+ cov(g))`` of features f, with g the mean feature of each sample's class.

    Args:
        features: N x D, or N x D x *spatial, in which every pixel is a sample; at least two samples.
        target_labels: N, or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        shrinkage: None is the plain score. "ledoit_wolf" replaces cov(f) by ``(1 - a) cov(f) + a (tr cov(f) / D) I``
            and cov(g) by ``(1 - a) cov(g)``, where a in [0, 1] is Ledoit and Wolf's shrinkage. Use it unless N is many
            times D.
        ignore_index: samples with this label are left out.

    Returns:
        The score, a float64 scalar in [0, min(K - 1, rank)] for K classes; higher predicts better transfer. 0 with a
        `UserWarning` for one class only, or if all features are constant. With N <= D the plain score is K - 1 for any
        features, also with a `UserWarning`.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [3.0, 1.0], [3.0, -1.0], [0.5, 0.0]])
        >>> compute_h_score(features, torch.tensor([0, 0, 1, 1, 0]))
        tensor(0.9830, dtype=torch.float64)

    Reference: Bao et al., ICIP 2019; the shrinkage is Ibrahim et al., *Newer is not always better*, ECML PKDD 2022,
    with Ledoit and Wolf, J. Multivariate Anal. 88 (2004). The pseudo-inverse drops directions with less than 1e-6 of
    the largest variance. Public code inverts the rounding noise there and leaves the bounds. As in public code, cov(g)
    and cov(f) divide by N - 1; only the shrunk cov(f) divides by N.
    """
    return HScore(shrinkage=shrinkage, ignore_index=ignore_index).of(features, target_labels)


def compute_h_score_map(features: Any, target_labels: Any, *, ignore_index: int | None = None) -> torch.Tensor:
    """H-score at every pixel coordinate, over N images on one grid (2D or 3D).

    The score of the paper is the mean over all pixels. Most pixels have the same label in all images, and score 0. So
    this mean also depends on the size of the target's structures; the mean over the other pixels does not::

        h_map = compute_h_score_map(features, target_labels)
        h_map.mean()                                                          # over all pixels, as in the paper
        h_map[target_labels.amin(0) != target_labels.amax(0)].mean()          # over pixels of more than one label

    Args:
        features: N x D x *spatial with small D, such as logits or probabilities: a pixel needs D x D numbers.
        target_labels: N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        ignore_index: pixels with this label are left out.

    Returns:
        The map, *spatial, float64, values in [0, K - 1] for a pixel's K labels; higher is easier to transfer to. It is
        0 where only one label occurs or the features are constant, and NaN where no pixel is valid. `UserWarning` if no
        pixel has more than one label, and for N <= D, where H is K - 1 for any features.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> features = torch.tensor([[[[0.0, 1.0]]], [[[1.0, 0.0]]], [[[4.0, 2.0]]]])  # 3 images of 1 channel, 1 x 2
        >>> compute_h_score_map(features, torch.tensor([[[0, 1]], [[0, 1]], [[1, 1]]]))
        tensor([[0.9423, 0.0000]], dtype=torch.float64)

    Reference: Li et al., *Finding the most transferable tasks for brain image segmentation*, BIBM 2022, eq. 3. Its
    tables have values from -3.2 to 40.7 for two classes, outside the range of eqs. 2 and 3: see `CUTOFF`.
    """
    features, labels = checked_samples(features, target_labels, ignore_index)
    _require_images(features)
    grid, n_images, width = labels.shape[1:], *features.shape[:2]
    features, labels = features.flatten(2), labels.flatten(1)
    highest = labels.amax(0)

    def sums_of(pixels: Pixels) -> dict[str, torch.Tensor]:
        return _pixel_sums(features[:, :, pixels].double(), labels[:, pixels])

    several = ((highest - labels) * (labels >= 0)).amax(0) > 0
    return _map(sums_of, highest >= 0, several, n_images=n_images, width=width, n_numbers=n_images * width).view(grid)


class HScore(MomentMetric):
    """`compute_h_score` over batches: ``compute()`` returns a float64 scalar in [0, K - 1], higher is better.

    Memory: D x D and C x D numbers. The sums use raw features. If their mean is s standard deviations away from zero,
    the value loses ``2 log10(s)`` of 16 digits (``4 log10(s)`` with shrinkage): subtract a constant if s is in the
    thousands. The scale does not matter.

    Args:
        shrinkage: as in `compute_h_score`.
        options: see `FeatureMetric`.

    >>> metric = HScore()
    >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([0, 0]))
    >>> metric.update(torch.tensor([[3.0, 1.0], [3.0, -1.0], [0.5, 0.0]]), torch.tensor([1, 1, 0]))
    >>> metric.compute()
    tensor(0.9830, dtype=torch.float64)
    """

    def __init__(self, *, shrinkage: str | None = None, **options: Any) -> None:
        if shrinkage is not None:
            require_choice("shrinkage", shrinkage, SHRINKAGES)
        self.shrinkage = shrinkage
        self.needs = ("gram",) if shrinkage is None else ("gram", "norms")
        super().__init__(**options)

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        present = sums["count"] > 0
        count, total, gram = sums["count"][present], sums["total"][present], sums["gram"]
        n, width = count.sum(), len(gram)
        require_samples(n)
        mean = total.sum(0) / n
        scatter = torch.addr(gram, mean, mean, alpha=-float(n))
        offsets = (total / count[:, None] - mean) * (count / (n - 1)).sqrt()[:, None]
        if len(count) == 1:
            warn("target_labels holds one class only, so the H-score is 0 and says nothing about transfer.")
            return n.new_zeros(())
        if scatter.trace() <= 1e-14 * gram.trace():
            warn("features are constant, so the H-score is 0 and says nothing about transfer.")
            return n.new_zeros(())
        if self.shrinkage is None:
            if n <= width:
                what = f"features holds {int(n)} samples of {width} dimensions"
                warn(f"{what}: the H-score is K - 1 for any features; set shrinkage='ledoit_wolf', or add samples.")
            value = _quadratic_forms(scatter[None] / (n - 1), offsets[None], CUTOFF)
        else:
            alpha = _ledoit_wolf(sums, scatter / n, mean, n)
            shrunk = (1 - alpha) * scatter / n
            shrunk.diagonal().add_(alpha * scatter.trace() / (n * width))
            value = (1 - alpha) * _quadratic_forms(shrunk[None], offsets[None], width * EPSILON)
        return value.squeeze(0).clamp(0, len(count) - 1)


class HScoreMap(FeatureMetric):
    """`compute_h_score_map` over batches of images on one grid: ``compute()`` returns the float64 map.

    Higher is better. Values are in [0, K - 1]; 0 where only one label occurs, NaN where no pixel is valid::

        h_map = metric.compute()
        h_map.nanmean()                        # over all pixels, as in the paper
        h_map[metric.multi_label()].mean()     # over pixels of more than one label

    Memory: D x D + C x D numbers per pixel, for D channels of the features.

    Args:
        body: leave out background pixels where the image is exactly zero. The paper does not do this.
        options: layer (the last one for the logits), ignore_index, output_transform, see `FeatureMetric`.

    >>> metric = HScoreMap()
    >>> metric.update(torch.tensor([[[[0.0, 1.0]]], [[[1.0, 0.0]]]]), torch.tensor([[[0, 1]], [[0, 1]]]))
    >>> metric.update(torch.tensor([[[[4.0, 2.0]]]]), torch.tensor([[[1, 1]]]))
    >>> metric.compute()
    tensor([[0.9423, 0.0000]], dtype=torch.float64)
    >>> metric.multi_label()
    tensor([[ True, False]])
    """

    def __init__(self, *, body: bool = False, **options: Any) -> None:
        super().__init__(pixels=None, body=body, **options)

    def multi_label(self) -> torch.Tensor:
        """*spatial, True where more than one label was seen. Under torch.distributed, call it on all processes."""
        return (self._totals()["count"] > 0).sum(0) > 1

    def compute(self) -> torch.Tensor:
        """Return the map over everything seen by all processes. Further updates are possible afterwards."""
        sums = self._totals()
        own = {"scatter": _scatter_about(_mean(sums["count"], sums["total"]), **self._sums)} if self._sums else {}
        return self._evaluate(sums | all_reduce_sums(own))

    def _take(self, features: torch.Tensor, labels: torch.Tensor, groups: Any) -> None:
        _require_images(features)
        sums = _pixel_sums(features.flatten(2).double(), labels.flatten(1))
        self._add(**{name: value.unflatten(-1, labels.shape[1:]) for name, value in sums.items()})

    def _add(self, **sums: torch.Tensor) -> None:
        # Scatter about each pixel's own mean: raw sums of a saturated softmax would hold rounding errors only.
        if self._sums and sums:
            held = self._sums
            if held["total"].shape[1:] != sums["total"].shape[1:]:
                super()._add(count=sums["count"], total=sums["total"])  # raises an error that names the shapes
            sums = {name: value.to(held["total"].device) for name, value in sums.items()}
            n = held["count"].sum(0) + sums["count"].sum(0)
            mean = (held["total"].sum(0) + sums["total"].sum(0)) / n.clamp(min=1)
            sums["scatter"] = _scatter_about(mean, **sums)
            held["scatter"] = _scatter_about(mean, **held)
        super()._add(**sums)

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        grid = sums["count"].shape[1:]
        flat = {name: value.flatten(-len(grid)) for name, value in sums.items()}
        n, width, n_classes = flat["count"].sum(0), len(flat["scatter"]), len(flat["count"])

        def sums_of(pixels: Pixels) -> dict[str, torch.Tensor]:
            return {name: value[..., pixels] for name, value in flat.items()}

        several, n_numbers = (flat["count"] > 0).sum(0) > 1, (n_classes + width) * width
        return _map(sums_of, n > 0, several, n_images=int(n.amax()), width=width, n_numbers=n_numbers).view(grid)


def _ledoit_wolf(
    sums: dict[str, torch.Tensor], covariance: torch.Tensor, mean: torch.Tensor, n: torch.Tensor
) -> torch.Tensor:
    """Ledoit and Wolf's shrinkage intensity for a covariance that divides by n."""
    width = len(covariance)
    square = mean @ mean
    # sum_i ||x_i - mean||^4, expanded into sums of raw features.
    fourth = sums["quartic"].squeeze(0) - 4 * mean @ sums["cubic"] + 2 * square * sums["gram"].trace()
    fourth = fourth + 4 * mean @ sums["gram"] @ mean - 3 * n * square**2
    norm = covariance.square().sum()
    distance = (norm - covariance.trace() ** 2 / width).clamp(min=0) / width
    noise = (fourth / n - norm).clamp(min=0) / (n * width)
    return torch.where(distance > 0, torch.minimum(noise, distance) / distance, 0)


def _quadratic_forms(matrices: torch.Tensor, vectors: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Sum over k of ``v_k' A^+ v_k`` for B x D x D positive semi-definite matrices A and B x K x D vectors.

    Eigenvalues up to ``cutoff`` times the largest count as zero. If there are none, a Cholesky factor gives the same
    number in a tenth of the time of eigenvectors. There are none if the lowered matrix also has a Cholesky factor.
    """
    if matrices.shape[-1] == 2:
        return _forms_by_eigenvectors(matrices, vectors, cutoff)
    bound = torch.linalg.matrix_norm(matrices)  # Frobenius norm: an upper bound of the largest eigenvalue
    lowered = matrices.clone()
    lowered.diagonal(dim1=1, dim2=2).sub_(cutoff * bound[:, None])
    solid = (torch.linalg.cholesky_ex(lowered).info == 0) & (bound > 0)
    values = matrices.new_empty(len(matrices))
    if bool(solid.any()):
        factors = torch.linalg.cholesky(matrices[solid])
        values[solid] = torch.linalg.solve_triangular(factors, vectors[solid].mT, upper=False).square().sum((1, 2))
    if not bool(solid.all()):
        values[~solid] = _forms_by_eigenvectors(matrices[~solid], vectors[~solid], cutoff)
    return values


def _forms_by_eigenvectors(matrices: torch.Tensor, vectors: torch.Tensor, cutoff: float) -> torch.Tensor:
    variances, directions = _eigenvectors_2x2(matrices) if matrices.shape[-1] == 2 else torch.linalg.eigh(matrices)
    squares = (vectors @ directions).square().sum(1)
    kept = variances > cutoff * variances.amax(1, keepdim=True)
    return torch.where(kept, squares / torch.where(kept, variances, 1), 0).sum(1)


def _eigenvectors_2x2(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.linalg.eigh` of B x 2 x 2, in any order, by one rotation each: fast for maps of many thousand pixels."""
    a, b, c = matrices[:, 0, 0], matrices[:, 0, 1], matrices[:, 1, 1]
    angle = torch.atan2(2 * b, a - c) / 2
    cos, sin = angle.cos(), angle.sin()
    mixed, cos2, sin2 = 2 * b * cos * sin, cos.square(), sin.square()
    variances = torch.stack([a * cos2 + mixed + c * sin2, a * sin2 - mixed + c * cos2], 1)
    return variances, torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 2)


def _require_images(features: torch.Tensor) -> None:
    if features.ndim < 3:
        raise InputError(f"features has shape {tuple(features.shape)}; a map needs N x D x *spatial.")


def _map(
    sums_of: Callable[[Pixels], dict[str, torch.Tensor]],
    seen: torch.Tensor,
    several: torch.Tensor,
    *,
    n_images: int,
    width: int,
    n_numbers: int,
) -> torch.Tensor:
    """The scores of all pixels. ``sums_of`` gives the sums of some pixels, ``n_numbers`` per pixel."""
    if not bool(seen.any()):
        raise InputError("target_labels holds no valid sample: every label equals ignore_index; change ignore_index.")
    if not bool(several.any()):
        warn("target_labels holds one class only at every pixel, so the map is 0 and says nothing about transfer.")
    elif n_images <= width:
        warn(f"{n_images} images of {width} channels give every pixel the H-score K - 1; use more images.")
    h_map = torch.where(seen, 0.0, torch.nan).double()
    # Blocks of pixels that fit into the processor's cache; a slice, where possible, avoids a copy.
    size = max(64, (2**24 if seen.is_cuda else 2**18) // n_numbers)
    for start in range(0, len(several), size):
        block = several[start : start + size]
        if bool(block.any()):
            pixels = slice(start, start + size) if bool(block.all()) else start + block.nonzero().squeeze(1)
            h_map[pixels] = _pixel_scores(**sums_of(pixels))
    return h_map


def _pixel_sums(features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Count (C x P), total (C x D x P) and scatter about the mean (D x D x P) of P pixels over N images.

    Features are N x D x P in float64; labels N x P, `IGNORED` where a pixel is left out.
    """
    _, width, n_pixels = features.shape
    n_classes = max(int(labels.max()), 0) + 1
    valid = features.new_ones(()).expand(labels.shape)
    masked = bool(labels.min() < 0)
    if masked:
        valid, labels = (labels >= 0).double(), labels.clamp(min=0)
        features = features * valid[:, None]
    count = features.new_zeros(n_classes, n_pixels).scatter_add_(0, labels, valid)
    total = features.new_zeros(n_classes, width, n_pixels)
    total.scatter_add_(0, labels[:, None].expand(features.shape), features)
    centred = features - _mean(count, total)
    if masked:
        centred *= valid[:, None]
    scatter = features.new_empty(width, width, n_pixels)
    for d in range(width):
        scatter[d, : d + 1] = scatter[: d + 1, d] = (centred[:, d : d + 1] * centred[:, : d + 1]).sum(0)
    return {"count": count, "total": total, "scatter": scatter}


def _mean(count: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return total.sum(0) / count.sum(0).clamp(min=1)


def _scatter_about(mean: torch.Tensor, count: torch.Tensor, total: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
    """The scatter about ``mean`` (D x *spatial) instead of the samples' own mean."""
    shift = _mean(count, total) - mean.to(total.device)
    return scatter + count.sum(0) * shift[:, None] * shift


def _pixel_scores(count: torch.Tensor, total: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
    """H-score of P pixels with more than one label each, from their sums."""
    n = count.sum(0)
    mean = total.sum(0) / n
    offsets = (total / count.clamp(min=1)[:, None] - mean) * (count / (n - 1)).sqrt()[:, None]
    covariances = (scatter / (n - 1)).permute(2, 0, 1)
    values = _quadratic_forms(covariances, offsets.permute(2, 0, 1), CUTOFF)
    # For constant features only the rounding error of their mean is left.
    varied = covariances.diagonal(dim1=1, dim2=2).sum(1) > (16 * EPSILON) ** 2 * mean.square().sum(0)
    return torch.where(varied, values, 0).clamp(min=0).minimum((count > 0).sum(0) - 1.0)
