r"""NCTI, the neural collapse transferability index: how close the features are to those of a fully trained network.

In a fully trained network the features of a class collapse onto their mean. NCTI (Wang et al., *How far pre-trained
models are from neural collapse on the target dataset informs their transferability*, ICCV 2023) measures with three
terms how close a source's features are to this state. The features are reduced to 64 principal components z. Linear
discriminant analysis (LDA) models them by one Gaussian per class with mean mu_c and a common covariance,

.. math::
    \Sigma = (1 - \lambda) S_W + \lambda \tfrac{\mathrm{tr} S_W}{d} I, \qquad
    \lambda = \max(e^{-(v_1 + \dots + v_{32})}, 10^{-10})

with S_W the covariance within the classes and v the variances of the components. The fewer and weaker the components,
the stronger the shrinkage. With the posteriors P of the model, and its K - 1 discriminant directions W (scaled so that
W' Sigma W = I), the terms are

.. math::
    \mathrm{seli} = \| Z W \|_*, \qquad
    \mathrm{ncc} = \tfrac1n \textstyle\sum_i P(y_i | z_i), \qquad
    \mathrm{vc} = \ln \textstyle\sum_c \| P_c \|_*

where ``||.||_*`` is the nuclear norm (the sum of the singular values), and P_c are the posteriors (n_c x K) of the
samples of class c. seli measures in how many directions the classes spread, and how far: a trained network converges to
the simplex-encoded-label interpolation (SELI), which has full rank. ncc measures how well the nearest class centre
classifies. vc measures the remaining variability within the classes. The terms have different units; `combine_ncti`
combines them into one score over several models.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from scipy.linalg import eigh

from medtl_ext._validation import InputError, warn
from medtl_ext.metrics.features import SampleMetric, feature_sums
from medtl_ext.metrics.label_prediction import min_max
from medtl_ext.metrics.parc import principal_components
from medtl_ext.metrics.sfda import Discriminant

N_COMPONENTS = 64
N_SHRINKAGE = 32
LEAST_SHRINKAGE = 1e-10

# Smallest share of the total variance within the classes. Without it, the covariance of collapsed classes is singular.
LEAST_VARIANCE = 1e-12


class NCTITerms(NamedTuple):
    """The three terms of NCTI for one model, float64 scalars (see `combine_ncti`).

    Attributes:
        seli: spread of the classes in units of the spread within them, >= 0; higher is better.
        ncc: mean posterior of the true class, in [0, 1]; higher is better.
        vc: logarithm of the variability within the classes; lower is better.
    """

    seli: torch.Tensor
    ncc: torch.Tensor
    vc: torch.Tensor


def compute_ncti(features: Any, target_labels: Any, *, ignore_index: int | None = None) -> NCTITerms:
    """The three terms of NCTI for one model.

    Args:
        features: N x D, or N x D x *spatial with each pixel a sample. The shrinkage depends on their scale.
        target_labels: N, or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        ignore_index: samples with this label are left out.

    Returns:
        `NCTITerms`, always finite. In three cases they say nothing about transfer, and there is a `UserWarning`: one
        class only (the terms are 0, 1, and half the log of the number of samples); constant features (posteriors are
        the class frequencies, and seli is 0); fewer samples than components and classes (any features separate the
        classes perfectly).

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [1.0, 2.0], [0.0, 2.0], [4.0, 0.0], [5.0, 1.0], [4.0, 0.0]])
        >>> terms = compute_ncti(features, torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> [round(term.item(), 3) for term in terms]
        [20.011, 1.0, 1.242]

    Reference: Wang et al., ICCV 2023. Components, shrinkage and the logarithm in vc are as in the authors' code. Here
    the components are exact (in the code a library approximates them for many samples). There may be fewer than 64.
    """
    return NCTI(ignore_index=ignore_index).of(features, target_labels)


def combine_ncti(terms: Mapping[str, NCTITerms]) -> dict[str, float]:
    """NCTI of several models: each term is scaled to [0, 1] over the models, then ``ncc + seli - vc``.

    Args:
        terms: name of the model -> its `NCTITerms`.

    Returns:
        Name -> score in [-1, 2], higher predicts better transfer. A term that is equal for all models counts 0.5.

    Raises:
        InputError: no model, not three terms, or NaN or Inf in a term.

    Example:
        >>> combine_ncti({"mri": NCTITerms(30.0, 0.9, 2.0), "x-ray": NCTITerms(20.0, 0.6, 3.0)})
        {'mri': 2.0, 'x-ray': -1.0}

    Reference: Wang et al., ICCV 2023. The code of Juodelyte et al. (arXiv 2412.20172) adds vc. That sign is an error:
    more variability means farther from collapse.
    """
    if not terms:
        raise InputError("terms is empty; expected name of the model -> NCTITerms, for at least one model.")
    for name, values in terms.items():
        if len(values) != len(NCTITerms._fields) or not all(map(math.isfinite, values)):
            raise InputError(f"terms of {name} are {values!r}; expected three finite numbers, seli, ncc and vc.")
    rows = [[float(value) for value in values] for values in terms.values()]
    scaled = pd.DataFrame(rows, list(terms), NCTITerms._fields).apply(min_max)
    return (scaled["ncc"] + scaled["seli"] - scaled["vc"]).to_dict()


class NCTI(SampleMetric):
    """`compute_ncti` over batches: ``compute()`` returns the `NCTITerms`, float64 scalars.

    Memory: the samples; limit them by `pixels`. Three terms are not a scalar, so this cannot be an evaluator's key
    metric: attach it as an additional metric.

    Args:
        options: layer, pixels, body, seed, ignore_index, output_transform, see `FeatureMetric`.

    >>> metric = NCTI()
    >>> metric.update(torch.tensor([[0.0, 1.0], [1.0, 2.0], [0.0, 2.0]]), torch.tensor([0, 0, 0]))
    >>> metric.update(torch.tensor([[4.0, 0.0], [5.0, 1.0], [4.0, 0.0]]), torch.tensor([1, 1, 1]))
    >>> [round(term.item(), 3) for term in metric.compute()]
    [20.011, 1.0, 1.242]
    """

    def _score(self, features: torch.Tensor, labels: torch.Tensor) -> NCTITerms:
        classes, target = labels.cpu().unique(return_inverse=True)
        scores, variance = principal_components(features, N_COMPONENTS)
        rows = torch.from_numpy(scores)
        n_samples, width = rows.shape
        prior = target.bincount().double() / n_samples
        what = None
        if len(classes) == 1:
            what = "target_labels holds one class only"
        elif width == 0:
            what = "features are constant"
        elif n_samples - len(classes) < width:
            found = f"{width} components and {len(classes)} classes"
            what = f"features holds {n_samples} samples, no more than their {found} together"
        if what:
            warn(f"{what}, so the terms of NCTI say nothing about transfer.")
        if len(classes) == 1 or width == 0:
            seli, posterior = rows.new_zeros(()), prior.expand(n_samples, -1)
        else:
            shrinkage = max(math.exp(-variance[:N_SHRINKAGE].sum()), LEAST_SHRINKAGE)
            sums = feature_sums(rows, target, ["gram"])
            model = Discriminant(**sums, shrinkage=shrinkage, least=LEAST_VARIANCE / width)
            posterior = model.scores(rows).softmax(1)
            seli = torch.linalg.matrix_norm(rows @ _directions(model, prior), "nuc")
        ncc = posterior.gather(1, target[:, None]).mean()
        per_class = [torch.linalg.matrix_norm(posterior[target == c], "nuc") for c in range(len(classes))]
        return NCTITerms(*(term.to(labels.device) for term in (seli, ncc, torch.stack(per_class).sum().log())))


def _directions(model: Discriminant, prior: torch.Tensor) -> torch.Tensor:
    """D x (K - 1) directions in which the classes differ most, of variance 1 within them."""
    between = (model.means.T * prior) @ model.means
    width, spread = len(between), between.trace()
    # Both covariances, between and within the classes, are shrunk alike, as in scikit-learn.
    between *= 1 - model.shrinkage
    between.diagonal().add_(model.shrinkage * spread / width)
    _, vectors = eigh(between.numpy(), model.covariance.numpy())
    return torch.from_numpy(vectors[:, -min(len(prior) - 1, width) :])
