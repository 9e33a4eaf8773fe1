"""What the transferability metrics cost, as ratios taken in one run on one thread, and one large streaming pass.

    python benchmarks/metrics.py            # all
    python benchmarks/metrics.py ratios     # without the large pass, which takes minutes

Each ratio is against a plain implementation of the published algorithm (loops over pixels or samples, the full singular
value decomposition of the features, generalised eigenvectors) and, for LogME and the H-score, against the package
transformer-ranker where it is installed (``pip install --no-deps transformer-ranker``). Both sides give the same
number, which is checked first. Seconds are of the processor; repeats are interleaved and the quickest of each side
counts. Exits with 1 when a target is missed.
"""

from __future__ import annotations

import importlib
import importlib.util
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from scipy import linalg
from threadpoolctl import threadpool_limits

from medtl_ext.metrics import (
    GBC,
    SFDA,
    HScore,
    LogME,
    PatientScores,
    TransRate,
    compute_h_score,
    compute_h_score_map,
    compute_logme,
    compute_otce,
    compute_sfda,
    label_transport,
)


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def compare(
    what: str, plain: Callable[[], float], ours: Callable[[], float], target: float, *, repeats: int = 3
) -> bool:
    """Check that both sides agree, time them in turns, print the ratio, and say whether it reaches the target."""
    np.testing.assert_allclose(np.asarray(ours()), np.asarray(plain()), rtol=1e-3, atol=1e-6)
    pairs = [(seconds(plain), seconds(ours)) for _ in range(repeats)]
    slow, fast = (min(side) for side in zip(*pairs, strict=True))
    print(f"{what}: {1e3 * fast:.1f} ms, plain {slow:.2f} s: {slow / fast:.1f} times faster (target {target:g})")
    return slow / fast >= target


def plain_h_score_map(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The H-score of one pixel after the other, with a pseudo-inverse each."""
    result = np.zeros(labels.shape[1:])
    for x, y in np.ndindex(*result.shape):
        f, t = features[:, :, x, y], labels[:, x, y]
        g = np.stack([f[t == label].mean(0) for label in t])
        if len(np.unique(t)) > 1:
            inverse = np.linalg.pinv(np.cov(f, rowvar=False), rcond=1e-6, hermitian=True)
            result[x, y] = np.trace(inverse @ np.cov(g, rowvar=False))
    return result


def h_score_map() -> bool:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(20, 240, 240, generator=generator) < 0.3).long()
    features = torch.randn(20, 2, 240, 240, generator=generator) + labels[:, None]
    arrays = features.double().numpy(), labels.numpy()
    return compare(
        "H-score map, 20 x 240 x 240",
        lambda: plain_h_score_map(*arrays),
        lambda: compute_h_score_map(features, labels),
        100,
        repeats=1,
    )


def problem(n: int, width: int, n_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(n_classes, (n,), generator=generator)
    centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    features = torch.randn(n, width, generator=generator, dtype=torch.float64) @ mixing + 0.3 * centres[labels]
    return features, labels


def plain_logme(features: np.ndarray, labels: np.ndarray) -> float:
    """Evidence maximisation class by class from all singular vectors of the N x D matrix."""
    n, width = features.shape
    left, singular, _ = np.linalg.svd(features, full_matrices=True)
    eigenvalues, evidences = singular**2, []
    for label in np.unique(labels):
        target = (labels == label).astype(float)
        projected = (left.T @ target) ** 2
        rest, projected = projected[len(singular) :].sum(), projected[: len(singular)]
        alpha = beta = 1.0
        for _ in range(100):
            ratio = alpha / beta
            gamma = (eigenvalues / (eigenvalues + ratio)).sum()
            weight = (eigenvalues * projected / (eigenvalues + ratio) ** 2).sum()
            error = (projected / (1 + eigenvalues / ratio) ** 2).sum() + rest
            alpha, beta = gamma / weight, (n - gamma) / error
            if abs(alpha / beta - ratio) / ratio <= 1e-3:
                break
        evidence = width / 2 * np.log(alpha) + n / 2 * np.log(beta) - 0.5 * np.log(alpha + beta * eigenvalues).sum()
        evidences.append((evidence - beta / 2 * error - alpha / 2 * weight - n / 2 * np.log(2 * np.pi)) / n)
    return float(np.mean(evidences))


def logme() -> bool:
    features, labels = problem(5000, 512, 10)
    arrays = features.numpy(), labels.numpy()
    return compare(
        "LogME, N 5000, D 512, K 10, against the full SVD",
        lambda: plain_logme(*arrays),
        lambda: compute_logme(features, labels),
        5,
    )


def plain_sfda(features: np.ndarray, labels: np.ndarray) -> float:
    """Two shrunk discriminant analyses by generalised eigenvectors, classes and samples in loops."""
    classes = np.unique(labels)

    def fit(x: np.ndarray, shrinkage: float | None) -> tuple[np.ndarray, float]:
        means = np.stack([x[labels == c].mean(0) for c in classes])
        priors = np.array([(labels == c).mean() for c in classes])
        within = np.zeros((x.shape[1], x.shape[1]))
        for prior, c in zip(priors, classes, strict=True):
            within += prior * np.cov(x[labels == c], rowvar=False, bias=True)
        between = np.cov(x, rowvar=False, bias=True) - within
        if shrinkage is None:
            vector = within.sum(1)
            for _ in range(6):  # the public code's power iteration
                vector = within @ (vector / np.linalg.norm(vector))
            shrinkage = max(np.exp(-5 * np.linalg.norm(vector)), 1e-10)
        within = (1 - shrinkage) * within + shrinkage * np.eye(x.shape[1])
        _, vectors = linalg.eigh(between, within)
        projections = means @ vectors @ vectors.T
        scores = x @ projections.T - 0.5 * np.diag(means @ projections.T) + np.log(priors)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        return scores / scores.sum(1, keepdims=True), shrinkage

    posterior, shrinkage = fit(features, None)
    posterior = np.exp(posterior) / np.exp(posterior).sum(1, keepdims=True)
    means = [features[labels == c].mean(0) for c in classes]
    mixed = features.copy()
    for i, label in enumerate(labels):
        others = np.mean([mean for c, mean in zip(classes, means, strict=True) if c != label], axis=0)
        share = posterior[i, np.searchsorted(classes, label)]
        mixed[i] = share * features[i] + (1 - share) * others
    posterior, _ = fit(mixed, shrinkage)
    return float(posterior[np.arange(len(labels)), np.searchsorted(classes, labels)].mean())


def sfda() -> bool:
    """As wide as a ResNet-50's features, where eigenvectors are dear, and narrower, where products of matrices are."""

    def at(n: int, width: int, target: float) -> bool:
        features, labels = problem(n, width, 10)
        arrays = features.numpy(), labels.numpy()
        return compare(
            f"SFDA, N {n}, D {width}, K 10", lambda: plain_sfda(*arrays), lambda: compute_sfda(features, labels), target
        )

    return at(2500, 2048, 4) and at(5000, 512, 2)


def label_table() -> bool:
    generator = np.random.default_rng(0)
    plan = generator.random((4000, 4000))
    plan /= plan.sum()
    source, target = generator.integers(10, size=4000), generator.integers(10, size=4000)

    def plain() -> np.ndarray:
        table = np.zeros((10, 10))
        for row, label in zip(plan, source, strict=True):
            for other in range(10):
                table[label, other] += row[target == other].sum()
        return table

    tensors = torch.from_numpy(plan), torch.from_numpy(source), torch.from_numpy(target)
    return compare(
        "Labels of a 4000 x 4000 plan, against a loop over its rows", plain, lambda: label_transport(*tensors), 20
    )


def otce() -> bool:
    generator = torch.Generator().manual_seed(0)
    n = 1_150_000

    def side() -> tuple[torch.Tensor, torch.Tensor]:
        labels = (torch.rand(n, generator=generator) < 0.2).long()
        logits = torch.randn(n, 2, generator=generator)
        logits[:, 1] += 2 * labels
        return logits.softmax(1), labels

    source, target = side(), side()
    compute_otce(*(value[:1000] for value in (*source, *target)), solver="sorted")
    before = peak_memory()
    spent = min(seconds(lambda: compute_otce(*source, *target, solver="sorted")) for _ in range(3))
    grown = peak_memory() - before
    print(
        f"OTCE, exact, two channels, {n:,} pixels a side: {spent:.2f} s (target 2), "
        f"{grown:.0f} MB above the inputs (target 200)"
    )
    return spent <= 2 and grown <= 200


def transformer_ranker() -> bool:
    """The two metrics of the package on PyPI, loaded by themselves: as a whole it needs the transformers library."""
    found = importlib.util.find_spec("transformer_ranker")
    if found is None:
        print("transformer-ranker is not installed: no comparison with it")
        return True
    folder = Path(found.origin).parent
    for name, path in (("transformer_ranker", folder), ("transformer_ranker.estimators", folder / "estimators")):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    features, labels = problem(5000, 512, 10)
    theirs = importlib.import_module("transformer_ranker.estimators.logme").LogME()
    logme = compare(
        "LogME against transformer-ranker",
        lambda: theirs.fit(embeddings=features, labels=labels),
        lambda: compute_logme(features, labels),
        1,
    )
    other = importlib.import_module("transformer_ranker.estimators.hscore").HScore()
    h_score = compare(
        "Shrunk H-score against transformer-ranker",
        lambda: other.fit(embeddings=features, labels=labels),
        lambda: compute_h_score(features, labels, shrinkage="ledoit_wolf"),
        1,
    )
    return logme and h_score


def peak_memory() -> float:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def large_pass(*, n: int = 1_000_000, width: int = 512, n_classes: int = 10, patients: int = 20) -> bool:
    """A million samples, five metrics, one pass, and a thousand patient bootstraps of each; all threads, wall clock."""
    torch.set_num_threads(torch.get_num_interop_threads() or 2)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(n_classes, width, generator=generator) * 0.3
    scores = PatientScores(
        {"h_score": HScore(shrinkage="ledoit_wolf"), "logme": LogME(), "gbc": GBC(), "transrate": TransRate()}
    )
    discriminant = SFDA()
    batch, before = 10_000, peak_memory()
    start, made = time.perf_counter(), 0.0
    for index in range(0, n, batch):
        begun = time.perf_counter()  # making the samples is no part of it
        labels = torch.randint(n_classes, (batch,), generator=generator)
        features = torch.randn(batch, width, generator=generator) + centres[labels]
        made += time.perf_counter() - begun
        names = [f"patient {index * patients // n:02d}"] * batch
        scores.update(features, labels, names)
        discriminant.update(features, labels, names)
    values = {**scores.compute(), "sfda": discriminant.compute()}
    passed = time.perf_counter() - start - made
    counts = np.random.default_rng(0).multinomial(patients, np.full(patients, 1 / patients), size=1000)
    resamples = scores.resampled(counts, n_jobs=2)
    spent = time.perf_counter() - start - made
    print(
        f"{n:,} x {width}, {n_classes} classes, {patients} patients: one pass {passed:.0f} s, with 1,000 bootstraps "
        f"{spent:.0f} s (target 180), peak memory {peak_memory() - before:.0f} MB above the start"
    )
    print(f"  sfda: {values.pop('sfda'):.4f}")
    for name, value in values.items():
        # About the score, as `bootstrap_ranking` does: repeated patients raise scores that reward many dimensions.
        shifted = resamples[name] - resamples[name].mean() + value
        low, high = np.quantile(shifted.numpy(), [0.025, 0.975])
        print(f"  {name}: {value:.4f} ({low:.4f} to {high:.4f})")
    return spent <= 180


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    checks = [h_score_map, logme, sfda, label_table, otce, transformer_ranker]
    with threadpool_limits(1):  # numpy's and scipy's
        met = [check() for check in checks]
    if not arguments:
        met.append(large_pass())
    print("All targets met." if all(met) else "A target was missed.")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
