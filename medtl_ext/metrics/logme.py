r"""LogME: the evidence of the labels under a linear model of the features, with the weights integrated out.

Let y be the 0/1 target of one class, w ~ N(0, 1/alpha) the weights, and N(0, 1/beta) the noise. The evidence p(y | F)
has a closed form. With the eigenvalues s_i > 0 of F'F and the coordinates x_i of y along the left singular vectors of
F, alpha and beta are found by iterating

.. math::
    \gamma = \sum_i \frac{s_i}{s_i + t}, \quad
    \alpha = \frac{\gamma}{\sum_i s_i x_i^2 / (s_i + t)^2}, \quad
    \beta = \frac{N - \gamma}{\sum_i x_i^2 t^2 / (s_i + t)^2 + |y|^2 - \sum_i x_i^2}, \quad t = \alpha / \beta

until t converges. The logarithm of the evidence is then

.. math::
    \tfrac N2 \ln \beta - \tfrac12 \sum_i \ln(1 + s_i / t) - \tfrac N2 (1 + \ln 2 \pi)

One eigendecomposition serves all classes, and F'F and F'y are sums over the samples.
"""

import math
from typing import Any

import torch
from scipy.linalg import eigh_tridiagonal, lapack

from medtl_ext._validation import warn
from medtl_ext.metrics.features import MomentMetric, feature_sums, gram

# The iteration stops when ln t changes by less. The error after Newton's last step is about its square.
TOLERANCE = 1e-3
MAX_ITERATIONS = 100

# Bounds of Newton's step, which is unreliable where the fixed point iteration hardly slows down.
LEAST_SLOPE, LONGEST_STEP = 0.02, 3.0

# Smallest squared error of a 0/1 target. Without it, the evidence has no upper bound if a target is a linear function
# of the features. It does not apply if the features have at least as many dimensions as there are samples.
LEAST_ERROR = 1e-5

EPSILON = torch.finfo(torch.float64).eps


def compute_logme(features: Any, target_labels: Any, *, ignore_index: int | None = None) -> torch.Tensor:
    """Logarithm of the maximum evidence of the labels given the features, per sample and averaged over classes.

    Args:
        features: N x D, or N x D x *spatial, in which every pixel is a sample. Do not centre them: subtracting the mean
            changes the value. The scale does not matter.
        target_labels: N, or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        ignore_index: samples with this label are left out.

    Returns:
        The score, a float64 scalar without bounds: a log density in nats per sample, mostly between -1.5 and 1. Higher
        predicts better transfer. Classes without samples do not count. For one class only there is a `UserWarning`: the
        value says nothing about transfer.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [2.0, 1.0], [-1.0, 0.0], [-2.0, 1.0]])
        >>> compute_logme(features, torch.tensor([0, 0, 1, 1]))
        tensor(-1.0196, dtype=torch.float64)

    Reference: You et al., *LogME: practical assessment of pre-trained models for transfer learning*, ICML 2021,
    algorithm 1. Features are scaled to mean square 1, and the iteration starts from alpha = beta = 1. It is accelerated
    by Newton's method and runs until it converges. For D > N the evidence has the factor ``alpha ** (D - N)``. It
    cancels in the formula above; a public version leaves it out (issue 23 of the authors' repository). The authors'
    code adds 1e-5 to the squared error and to the squared norm of the weights, which depends on the features' scale.
    Here, a squared error below 1e-5 counts as 1e-5, and only if the evidence has no upper bound: a perfect fit of rank
    below N.
    """
    return LogME(ignore_index=ignore_index).of(features, target_labels)


class LogME(MomentMetric):
    """`compute_logme` over batches: ``compute()`` returns a float64 scalar without bounds, higher is better.

    Memory: D x D and C x D numbers. See `FeatureMetric` for the options, and how to attach it to an engine.

    >>> metric = LogME()
    >>> metric.update(torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([0, 0]))
    >>> metric.update(torch.tensor([[-1.0, 0.0], [-2.0, 1.0]]), torch.tensor([1, 1]))
    >>> metric.compute()
    tensor(-1.0196, dtype=torch.float64)
    """

    needs = ("gram",)

    def _score(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if len(features) >= features.shape[1]:
            return self._evaluate(feature_sums(features, labels, self.needs))
        _, labels = labels.unique(return_inverse=True)
        targets = torch.nn.functional.one_hot(labels).T.double()
        return _logme(*_spectrum(gram(features.T), targets), labels.bincount().double(), features.shape[1])

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        present = sums["count"] > 0
        eigenvalues, squares = _spectrum(sums["gram"], sums["total"][present])
        return _logme(eigenvalues, squares / eigenvalues, sums["count"][present], len(sums["gram"]))


def _spectrum(matrix: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of a symmetric matrix (D), and squared coordinates of K vectors along its eigenvectors (K x D).

    The matrix is made tridiagonal, and the vectors are rotated with it. This saves rotating D eigenvectors back, which
    is half of the work of `torch.linalg.eigh`.
    """
    if len(matrix) == 1:
        return matrix[0], vectors.square()
    symmetric, turned = matrix.cpu().numpy(), vectors.T.cpu().numpy().copy(order="F")
    size = int(lapack.dsytrd_lwork(len(matrix), lower=1)[0])
    reflectors, diagonal, beside, scales, _ = lapack.dsytrd(symmetric, lower=1, lwork=size)
    turned[1:] = lapack.dormqr("L", "T", reflectors[1:, :-1], scales, turned[1:], 64 * len(matrix))[0]
    eigenvalues, directions = eigh_tridiagonal(diagonal, beside)
    squares = (turned.T @ directions) ** 2
    return torch.from_numpy(eigenvalues).to(matrix.device), torch.from_numpy(squares).to(matrix.device)


def _logme(eigenvalues: torch.Tensor, squares: torch.Tensor, count: torch.Tensor, width: int) -> torch.Tensor:
    n = count.sum()
    if len(count) == 1:
        warn("target_labels holds one class only, so LogME says nothing about transfer.")
    mean_square = eigenvalues.clamp(min=0).sum() / (n * width)
    kept = eigenvalues > max(float(n), width) * EPSILON * eigenvalues[-1].clamp(min=0)
    evidence = _Evidence(eigenvalues[kept] / mean_square, squares[:, kept], count)
    return (evidence.maximum() / n).mean()


class _Evidence:
    """Log evidence of K targets as a function of u = ln t, with the best beta for that t.

    Args:
        eigenvalues: R, the positive ones, ascending.
        squares: K x R squared coordinates of the targets.
        count: K, the targets' squared norms; their sum is the number of samples.
    """

    def __init__(self, eigenvalues: torch.Tensor, squares: torch.Tensor, count: torch.Tensor) -> None:
        self.eigenvalues, self.squares, self.n = eigenvalues, squares, count.sum()
        full = len(eigenvalues) >= self.n  # any target is then a linear function of the features
        self.outside = torch.zeros_like(count) if full else (count - squares.sum(1)).clamp(min=0)
        self.least_error = torch.finfo(count.dtype).tiny if full else LEAST_ERROR

    def maximum(self) -> torch.Tensor:
        """The maximum that the fixed point iteration reaches from t = 1, found by Newton's method."""
        u = torch.zeros_like(self.outside)
        if len(self.eigenvalues):
            # Bounds for a maximum at infinity (no correlation with the features) or at zero (no noise).
            highest, lowest = (self.eigenvalues[-1] / EPSILON).log(), (self.eigenvalues[0] * EPSILON).log()
            for _ in range(MAX_ITERATIONS):
                step = self._step(u)
                previous, u = u, (u + step).clamp(lowest, highest)
                if bool(((u - previous).abs() <= TOLERANCE).all()):
                    break
        ratio = u.exp()[:, None]
        error, norm = self._error_and_norm(ratio)
        beta = self.n / (error + ratio.squeeze(1) * norm)
        return (self.n * (beta.log() - 1 - math.log(2 * math.pi)) - torch.log1p(self.eigenvalues / ratio).sum(1)) / 2

    def _error_and_norm(self, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of the model, and squared norm of its weights."""
        error = (self.squares * (ratio / (self.eigenvalues + ratio)).square()).sum(1) + self.outside
        norm = (self.squares * self.eigenvalues / (self.eigenvalues + ratio).square()).sum(1)
        return error.clamp(min=self.least_error), norm

    def _step(self, u: torch.Tensor) -> torch.Tensor:
        ratio = u.exp()[:, None]
        used, unused = self.eigenvalues / (self.eigenvalues + ratio), ratio / (self.eigenvalues + ratio)
        error, norm = self._error_and_norm(ratio)
        norm = norm.clamp(min=torch.finfo(norm.dtype).tiny)
        gamma, rest = used.sum(1), unused.sum(1) + (self.n - len(self.eigenvalues)).clamp(min=0)
        # The step of the fixed point iteration, and its derivative.
        far = (gamma * error / (rest * norm)).log() - u
        error_slope = 2 * (self.squares * used * unused.square()).sum(1) / error
        norm_slope = 2 * (self.squares * used.square() * unused / self.eigenvalues).sum(1) / norm
        slope = norm_slope - 1 - (used * unused).sum(1) * (1 / gamma + 1 / rest)
        slope = slope + torch.where(error > self.least_error, error_slope, 0)
        longest = far.abs().clamp(min=LONGEST_STEP)
        return (far / (-slope).clamp(min=LEAST_SLOPE)).clamp(-longest, longest)
