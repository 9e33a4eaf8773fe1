"""Each feature metric compared with a second computation: a library, the definition, or numerical integration."""

import math
from functools import partial
from itertools import permutations, product

import numpy as np
import pytest
import torch
from metric_cases import draw, streamed, tensors
from scipy.integrate import quad
from scipy.stats import multivariate_normal, norm, spearmanr
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import BayesianRidge
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier, NeighborhoodComponentsAnalysis

from medtl_ext import metrics
from medtl_ext.metrics import FeatureSamples, compute_parc


def by_singular_values(x, y, eps=1e-4):
    """TransRate from the singular values of the N x D matrices, without any D x D matrix."""

    def rate(rows):
        return 0.5 * np.log1p(np.linalg.svd(rows, compute_uv=False) ** 2 / (len(rows) * eps)).sum()

    x = x - x.mean(0)
    return rate(x) - np.mean([rate(x[y == label]) for label in np.unique(y)])


def log_density(features, target, alpha, beta):
    """Density of all N targets at once: the weights are integrated out by adding covariances."""
    covariance = np.eye(len(target)) / beta + features @ features.T / alpha
    return multivariate_normal(np.zeros(len(target)), covariance).logpdf(target)


def dense(x, y):
    """LogME from scikit-learn's alpha and beta and the density of N samples, without any eigenvalue of F'F."""
    evidences = []
    for label in np.unique(y):
        target = (y == label).astype(float)
        flat = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0}
        model = BayesianRidge(fit_intercept=False, tol=1e-10, max_iter=5000, **flat).fit(x, target)
        evidences.append(log_density(x, target, model.lambda_, model.alpha_) / len(y))
    return np.mean(evidences)


def overlap(first, second):
    """The integral over the real line of the square root of two normal densities' product."""
    (m, s), (n, t) = first, second
    near, wide = (m + n) / 2, abs(m - n) + 20 * max(s, t)
    return quad(lambda x: np.sqrt(norm.pdf(x, m, s) * norm.pdf(x, n, t)), near - wide, near + wide, points=[m, n])[0]


def integrated(x, y, covariance):
    """GBC by the definition: minus the Bhattacharyya coefficients, integrated numerically."""
    gaussians = []
    for label in np.unique(y):
        deviations = x[y == label].std(0)
        if covariance == "spherical":
            deviations[:] = np.sqrt((deviations**2).mean())
        gaussians.append(list(zip(x[y == label].mean(0), deviations, strict=True)))
    return -sum(math.prod(map(overlap, a, b)) for a, b in permutations(gaussians, 2))


def mixtures(x, y, seed):
    """NLEEP with scikit-learn's mixtures: the mean over ten starting points, which depend on the samples' order."""
    samples = FeatureSamples(seed=seed)
    samples.update(x, y)
    x, y, *_ = samples.compute()
    # Components as exact, and as rounded, as they can be: their last bit may decide where a mixture ends.
    x = (x - x.mean(0)).numpy()
    solver = "covariance_eigh" if len(x) >= x.shape[1] else "full"
    scores = PCA(0.8, svd_solver=solver).fit_transform(x / np.abs(x).max())
    scores /= np.sqrt(scores.var(0).mean())
    n_gaussians, values = min(5 * len(y.unique()), len(x) // 2), []
    for start in range(10 * seed, 10 * seed + 10):
        mixture = GaussianMixture(n_gaussians, covariance_type="diag", reg_covar=1e-5, random_state=start).fit(scores)
        responsibilities = mixture.predict_proba(scores)
        joint = np.eye(3)[y].T @ responsibilities
        mass = joint.sum(0)
        values.append(np.log(((joint / np.where(mass > 0, mass, 1))[y] * responsibilities).sum(1)).mean())
    assert len(set(values)) > 1
    return np.mean(values)


def discriminants(x, y):
    """NCTI's terms from scikit-learn's discriminant analysis, and singular values matrix by matrix."""
    pca = PCA(min(64, *x.shape), svd_solver="full")
    scores = pca.fit_transform(x)
    shrinkage = math.exp(-pca.explained_variance_[:32].sum())
    if shrinkage > 1e-10:
        analysis = LinearDiscriminantAnalysis(solver="eigen", shrinkage=shrinkage)
    else:
        analysis = LinearDiscriminantAnalysis(solver="svd")
    projected = analysis.fit_transform(scores, y)
    posterior = analysis.predict_proba(scores)
    column = {label: k for k, label in enumerate(analysis.classes_)}
    seli = np.linalg.svd(projected - projected.mean(0), compute_uv=False).sum()
    ncc = np.mean([row[column[label]] for row, label in zip(posterior, y, strict=True)])
    nuclear = sum(np.linalg.svd(posterior[y == label], compute_uv=False).sum() for label in column)
    return seli, ncc, math.log(nuclear)


def power_iteration(matrix):
    vector = matrix.sum(1)
    for _ in range(6):
        vector = matrix @ vector / np.linalg.norm(vector)
    return np.linalg.norm(vector)


def shrunk_discriminants(x, y, largest=power_iteration):
    """SFDA with scikit-learn's two shrunk discriminants, mixing one sample after the other."""
    means = np.stack([x[y == label].mean(0) for label in range(y.max() + 1)])
    within = (x - means[y]).T @ (x - means[y]) / len(y)
    shrinkage = max(np.exp(-5 * largest(within)), 1e-10)

    def posteriors(rows):
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(rows, y).predict_proba(rows)

    weights = np.exp(posteriors(x))
    mixed = x.copy()
    for i, label in enumerate(y):
        share = weights[i, label] / weights[i].sum()
        mixed[i] = share * x[i] + (1 - share) * np.delete(means, label, axis=0).mean(0)
    return posteriors(mixed)[np.arange(len(y)), y].mean()


def over_pairs(x, y, n_components=None):
    """PARC by the definition: every pair's two distances, and scipy's rank correlation."""
    if n_components is not None:
        x = PCA(min(n_components, len(x) - 1), svd_solver="full").fit_transform(x)
    first, second = np.triu_indices(len(y), 1)
    distance = 1 - np.corrcoef((x - x.mean(0)) / x.std(0))[first, second]
    # Equal distances differ in the last bits, which scipy would rank.
    return 100 * spearmanr(np.round(distance, 12), y[first] != y[second]).statistic


def neighbours(x, y, leave_one_out=False):
    """LP with scikit-learn's map and neighbours; leave-one-out sample by sample."""
    analysis = NeighborhoodComponentsAnalysis(min(50, x.shape[1]), random_state=42)
    mapped = analysis.fit_transform(x - x.mean(0), y)
    if not leave_one_out:
        return KNeighborsClassifier(5).fit(mapped, y).predict_proba(mapped)[np.arange(len(y)), y].mean()
    shares = []
    for k in range(len(y)):
        distance = np.linalg.norm(mapped - mapped[k], axis=1)
        others = [i for i in np.argsort(distance) if i != k][:5]
        shares.append(np.mean([bool(y[i] == y[k]) for i in others]))
    return np.mean(shares)


def scaled(x, y, factor=1.0):
    return factor * x, y


def uneven(x, y, factor=1.0):
    """Classes of different sizes: in the second half, every second sample is moved to the first class."""
    place = torch.arange(len(y))
    return factor * x, y * ~((place >= len(y) // 2) & (place % 2 == 0))


def lone(x, y):
    """A class of one sample."""
    return x, y.index_fill(0, torch.tensor([0]), 2)


def of_other_spread(x, y):
    return x * (torch.rand(3, 3, dtype=torch.float64) + 0.5)[y], y


def rounded(x, y):
    """Features with few distinct rows."""
    return x.round(), y


def far(x, y):
    return x + 1e6, y


# name of the metric, what is drawn, how that is changed, the metric's options, how near the two are
TRANSRATE = [
    ("transrate", {"n": n, "width": width}, partial(uneven, factor=factor), {"eps": eps}, {"rel": 1e-9, "abs": 1e-9})
    for n, width in [(60, 1), (60, 5), (60, 25), (20, 90)]
    for factor, eps in [(1.0, 1e-4), (1.0, 1.0), (1e8, 1e-4), (1e-8, 1e-4)]
]
LOGME = [
    ("logme", {"n": n, "width": width, "signal": signal}, scaled, {}, {"abs": 1e-7})
    for n, widths, signals in [(60, [6], [1, 0.3]), (60, [1, 2, 3, 60], [1]), (30, [100], [1, 0.5])]
    for width, signal in product(widths, signals)
]
GBC = [
    ("gbc", {"width": 3}, of_other_spread, {"covariance": name}, {"abs": 1e-7}) for name in ("spherical", "diagonal")
]
NLEEP = [
    (
        "nleep",
        {"n": n, "width": width, "n_classes": classes},
        partial(scaled, factor=factor),
        {"seed": 3},
        {"abs": 1e-9},
    )
    for n, width, classes in [(60, 9, 2), (45, 60, 3)]
    for factor in (1.0, 2.0**27, 2.0**-27)
]
NCTI = [  # small features are shrunk much, large ones not at all
    ("ncti", {"n": n, "width": width, "n_classes": classes}, partial(uneven, factor=factor), {}, {"rel": 1e-6})
    for (n, width), classes, factor in product([(90, 9), (200, 100)], [2, 3, 6], [0.05, 0.3, 1.0, 10.0])
]
SFDA = [
    ("sfda", {"n_classes": classes}, partial(scaled, factor=factor), {}, {"abs": 1e-8})
    for classes, factor in product([2, 3, 5], [0.05, 0.5, 1.0, 10.0])
]
PARC = [
    *(("parc", {"width": 9, "n_classes": n}, scaled, {"n_components": None}, {"abs": 1e-8}) for n in (2, 3, 7)),
    ("parc", {"width": 2}, scaled, {"n_components": None}, {"abs": 1e-8}),  # there are two distances only
    ("parc", {"width": 3}, rounded, {"n_components": None}, {"abs": 1e-5}),  # rounding may tie a pair more
    *(
        ("parc", {"n": n, "width": width}, far, {"n_components": asked}, {"abs": 1e-6})
        for n, width, asked in [(70, 9, 5), (20, 50, 5), (20, 50, 32)]
    ),
]
LP = [  # NCA's fifty steps amplify the rounding of another order of the samples: a neighbour may change places
    ("label_prediction", {"n": n, "width": width, "n_classes": classes}, scaled, options, {"abs": 0.02})
    for n, width, classes, options in [
        *((60, 6, 3, {}), (40, 70, 2, {}), (50, 12, 20, {})),
        *((n, 6, 2, {"leave_one_out": True}) for n in (60, 4)),
    ]
]
LONE = [
    (name, {"n_classes": 2}, lone, {}, {"abs": near})
    for name, near in [("transrate", 1e-9), ("logme", 1e-6), ("sfda", 1e-8)]
]
REFERENCES = {"transrate": by_singular_values, "logme": dense, "gbc": integrated, "nleep": mixtures}
REFERENCES |= {"ncti": discriminants, "sfda": shrunk_discriminants, "parc": over_pairs, "label_prediction": neighbours}
BY_SUMS = {"transrate": metrics.TransRate, "logme": metrics.LogME, "sfda": metrics.SFDA}
"""Metrics whose class computes the value in another way than the function."""


@pytest.mark.filterwarnings("ignore:Only one sample available")
@pytest.mark.parametrize(
    ("name", "drawn", "change", "options", "near"), TRANSRATE + LOGME + GBC + NLEEP + NCTI + SFDA + PARC + LP + LONE
)
def test_function_and_class_agree_with_the_second_computation(name, drawn, change, options, near):
    features, labels = change(*draw(**drawn))
    expected = np.ravel(REFERENCES[name](features.numpy(), labels.numpy(), **options)).tolist()
    found = [getattr(metrics, f"compute_{name}")(features, labels, **options)]
    if name in BY_SUMS:
        found.append(streamed(BY_SUMS[name](**options), features, labels, 7))
    for value in found:
        assert [term.item() for term in tensors(value)] == pytest.approx(expected, **near)


def test_sfda_of_probabilities():
    """The row sums of their covariance are 0, so a power iteration cannot start from them."""
    features, labels = draw()
    probs = features.softmax(1)
    expected = shrunk_discriminants(probs.numpy(), labels.numpy(), lambda within: np.linalg.eigvalsh(within)[-1])
    for value in (metrics.compute_sfda(probs, labels), streamed(metrics.SFDA(), probs, labels, 20)):
        assert value.item() == pytest.approx(expected, abs=1e-8)


def test_sfda_of_several_blocks_of_samples():
    features, labels = draw(n=5000)
    expected = shrunk_discriminants(features.numpy(), labels.numpy())
    for value in (
        metrics.compute_sfda(features, labels),
        streamed(metrics.SFDA(), features, labels, 300 * [1] + [4700]),
    ):
        assert value.item() == pytest.approx(expected, abs=1e-8)


def test_parc_of_three_classes(vectors):
    """With three classes the reference's one-hot distances of equal labels are 0 or 2e-16, as rounding has it, and it
    ranks them: so it lies beside the value of the definition, which is what we have.
    """
    data = vectors("cls_smallD")
    value = compute_parc(data["features"], data["labels"], n_components=None).item()
    assert value == pytest.approx(over_pairs(data["features"], data["labels"]), abs=1e-6)
    assert value == pytest.approx(data["parc_nopca"], rel=0.02)


@pytest.mark.parametrize("name", ["cls_basic", "cls_binary"])
def test_parc_of_32_components(vectors, name):
    data = vectors(name)
    approximate = PCA(32, svd_solver="randomized", iterated_power=1, random_state=1919)
    value = compute_parc(approximate.fit_transform(data["features"]), data["labels"], n_components=None)
    assert value.item() == pytest.approx(data["parc_32"], abs=1e-6)
    value = compute_parc(data["features"], data["labels"]).item()
    assert value == pytest.approx(over_pairs(data["features"], data["labels"], 32), abs=1e-6)
    assert value == pytest.approx(data["parc_32"], rel=0.1)
