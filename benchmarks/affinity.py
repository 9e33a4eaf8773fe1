"""What task affinity costs, as ratios taken in one run on one thread.

    python benchmarks/affinity.py

- `pairwise_ssim` of 20 x 20 label volumes of 128 x 128 x 64, against a loop over the pairs with the same formula, and
  against a loop with scikit-image's SSIM in windows of 7 voxels;
- `pairwise_wasserstein` of 20 x 20 images of 128 x 160 x 128, against a loop over the pairs that resizes both images,
  finds their components and compares their scores (scikit-image, scikit-learn, SciPy), and how much of its time goes
  into resizing.

The loops with libraries would take minutes: a few pairs are timed, and the figure for all 400 is extrapolated from
them. Both sides give the same numbers, which is checked on those pairs first. Seconds are of the processor, and the
quickest repeat of each side counts. Exits with 1 when a target is missed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy reads it

import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.stats import wasserstein_distance
from skimage.metrics import structural_similarity
from skimage.transform import resize
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from medtl_ext.affinity import images, pairwise_ssim, pairwise_wasserstein

N = 20  # volumes a side
SSIM_SPEED_UP = 50.0  # times the plain loop, at least
WINDOWED_SPEED_UP = 500.0  # times scikit-image's windows, at least
WASSERSTEIN_SPEED_UP = 20.0  # times components anew for each pair, at least
RESIZE_SHARE = 0.5  # of the time of pairwise_wasserstein, at most


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def quickest(function: Callable[[], object], repeats: int) -> float:
    return min(seconds(function) for _ in range(repeats))


def verdict(what: str, ours: float, other: str, theirs: float, target: float) -> bool:
    print(
        f"{what}: {1e3 * ours:.0f} ms, {other} {theirs:.1f} s: {theirs / ours:.0f} times faster (target {target:.0f})"
    )
    return theirs / ours >= target


def plain_ssim(a: np.ndarray, b: np.ndarray, k1: float = 0.3, k2: float = 0.3) -> float:
    a, b = a.ravel(), b.ravel()
    mean_a, mean_b = a.mean(), b.mean()
    covariance = ((a - mean_a) @ (b - mean_b)) / (a.size - 1)
    return ((2 * mean_a * mean_b + k1**2) * (2 * covariance + k2**2)) / (
        (mean_a**2 + mean_b**2 + k1**2) * (a.var() + b.var() + k2**2)
    )


def plain_ssim_loop(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([[plain_ssim(x, y) for y in b] for x in a])


def random_labels(rng: np.random.Generator) -> np.ndarray:
    """Blobs, some 5 % of the volume."""
    noise = gaussian_filter(rng.standard_normal((128, 128, 64), dtype=np.float32), 4)
    return (noise > np.quantile(noise[::4, ::4, ::4], 0.95)).astype(np.uint8)


def ssim() -> bool:
    rng = np.random.default_rng(0)
    a, b = ([random_labels(rng) for _ in range(N)] for _ in range(2))
    floats = [[volume.astype(np.float64) for volume in volumes] for volumes in (a, b)]
    np.testing.assert_allclose(pairwise_ssim(a, b), plain_ssim_loop(*floats), rtol=0, atol=1e-10)
    ours = quickest(lambda: pairwise_ssim(a, b), 9)
    plain = quickest(lambda: plain_ssim_loop(*floats), 2)

    def windowed(pairs: int) -> list[float]:
        return [structural_similarity(a[i], b[i], win_size=7, data_range=1, K1=0.01, K2=0.03) for i in range(pairs)]

    same = pairwise_ssim(a[:1], b[:1], k1=0.01, k2=0.03, window=7).item()
    np.testing.assert_allclose(same, windowed(1)[0], rtol=0, atol=1e-8)
    windows = quickest(lambda: windowed(3), 2) * N**2 / 3
    what = f"SSIM, {N} x {N} volumes of 128 x 128 x 64"
    return all(
        [
            verdict(what, ours, "plain loop", plain, SSIM_SPEED_UP),
            verdict(what, ours, "scikit-image's windows (3 pairs, extrapolated)", windows, WINDOWED_SPEED_UP),
        ]
    )


def random_image(rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in an ellipsoid, zero around it."""
    shape = (128, 160, 128)
    noise = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 2)
    axes = np.ogrid[tuple(slice(-1.15, 1.15, 1j * side) for side in shape)]
    inside = sum(axis**2 for axis in axes) < 1
    return np.where(inside, rng.uniform(200, 800) * (1 + 4 * noise), 0).astype(np.float32)


def plain_wasserstein(a: np.ndarray, b: np.ndarray, size: int = 128) -> float:
    scores = []
    for image in (a, b):
        inside = image != 0
        standard = np.zeros(image.shape)
        standard[inside] = (image[inside] - image[inside].mean(dtype=np.float64)) / image[inside].std(dtype=np.float64)
        rows = resize(standard, (size,) * 3, order=1).reshape(-1, size)
        scores.append(PCA(0.75).fit_transform(rows).ravel())  # scikit-learn fixes the signs in the same way
    return wasserstein_distance(*scores)


def wasserstein() -> bool:
    rng = np.random.default_rng(0)
    a, b = ([random_image(rng) for _ in range(N)] for _ in range(2))
    pairs = 4
    values = pairwise_wasserstein(a, b).numpy()
    expected = [plain_wasserstein(a[i], b[i]) for i in range(pairs)]
    np.testing.assert_allclose(values.diagonal()[:pairs], expected, rtol=1e-3)

    plain = quickest(lambda: [plain_wasserstein(a[i], b[i]) for i in range(pairs)], 2) * N**2 / pairs
    resized, spent = images._resized, 0.0

    def timed(*arguments: object) -> np.ndarray:
        nonlocal spent
        start = time.process_time()
        result = resized(*arguments)
        spent += time.process_time() - start
        return result

    images._resized = timed
    ours = seconds(lambda: pairwise_wasserstein(a, b))
    images._resized = resized
    met = verdict(
        f"Wasserstein, {N} x {N} volumes of 128 x 160 x 128",
        ours,
        f"components for each pair ({pairs} pairs, extrapolated)",
        plain,
        WASSERSTEIN_SPEED_UP,
    )
    print(f"  of which {spent / ours:.0%} for resizing (target {RESIZE_SHARE:.0%})")
    return met and spent / ours <= RESIZE_SHARE


def main() -> int:
    with threadpool_limits(1):
        met = [ssim(), wasserstein()]
    print("All targets met." if all(met) else "A target was missed.")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
