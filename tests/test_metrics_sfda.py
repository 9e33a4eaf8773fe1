"""SFDA: against reference vectors, against scikit-learn's discriminant analysis, and against what must hold."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from drawing import torch_generator
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from medtl_ext import InputError
from medtl_ext.metrics import SFDA, compute_sfda, sfda


def draw(grid=(), *, n=60, width=5, n_classes=3, spread=1.0, seed=None):
    """Random features that depend on the labels."""
    generator = torch_generator() if seed is None else torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n, *grid), generator=generator)
    labels.view(-1)[: 2 * n_classes] = torch.arange(2 * n_classes) % n_classes
    centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64)
    features = torch.randn(n, *grid, width, generator=generator, dtype=torch.float64) + centres[labels]
    return spread * features.movedim(-1, 1), labels


def power_iteration(matrix):
    vector = matrix.sum(1)
    for _ in range(6):
        vector = matrix @ vector / np.linalg.norm(vector)
    return np.linalg.norm(vector)


def by_scikit_learn(features, labels, largest=power_iteration):
    """The score with scikit-learn's two shrunk discriminants, mixing one sample after the other."""
    x, y = np.asarray(features, dtype=float), np.unique(labels, return_inverse=True)[1]
    means = np.stack([x[y == label].mean(0) for label in range(y.max() + 1)])
    within = (x - means[y]).T @ (x - means[y]) / len(y)
    shrinkage = max(np.exp(-5 * largest(within)), 1e-10)

    def posteriors(rows):
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(rows, y)
        return model.predict_proba(rows)

    weights = np.exp(posteriors(x))
    mixed = x.copy()
    for i, label in enumerate(y):
        share = weights[i, label] / weights[i].sum()
        mixed[i] = share * x[i] + (1 - share) * np.delete(means, label, axis=0).mean(0)
    return posteriors(mixed)[np.arange(len(y)), y].mean()


def streamed(metric, features, labels, sizes):
    for part, part_labels in zip(features.split(sizes), labels.split(sizes), strict=True):
        metric.update(part, part_labels)
    return metric.compute()


@pytest.mark.parametrize("name", ["cls_basic", "cls_smallD", "cls_binary"])
def test_reference_vectors(vectors, name):
    data = vectors(name)
    assert compute_sfda(data["features"], data["labels"]).item() == pytest.approx(data["sfda"], abs=1e-10)


class TestDiscriminantsOfScikitLearn:
    @pytest.mark.parametrize("spread", [0.05, 0.5, 1.0, 10.0])
    @pytest.mark.parametrize("n_classes", [2, 3, 5])
    def test_function_and_class(self, n_classes, spread):
        features, labels = draw(n_classes=n_classes, spread=spread)
        expected = by_scikit_learn(features, labels)
        assert compute_sfda(features, labels).item() == pytest.approx(expected, abs=1e-8)
        assert streamed(SFDA(), features, labels, 20).item() == pytest.approx(expected, abs=1e-8)

    def test_pixels(self):
        features, labels = draw((3, 2), n=10)
        expected = by_scikit_learn(features.movedim(1, -1).reshape(-1, 5), labels.flatten())
        assert compute_sfda(features, labels).item() == pytest.approx(expected, abs=1e-8)

    def test_probabilities_whose_covariance_has_no_row_sums(self):
        features, labels = draw()
        probs = features.softmax(1)
        expected = by_scikit_learn(probs, labels, lambda within: np.linalg.eigvalsh(within)[-1])
        assert compute_sfda(probs, labels).item() == pytest.approx(expected, abs=1e-8)
        assert streamed(SFDA(), probs, labels, 20).item() == pytest.approx(expected, abs=1e-8)

    def test_several_blocks(self, monkeypatch):
        features, labels = draw()
        expected = compute_sfda(features, labels).item()
        monkeypatch.setattr(sfda, "BLOCK", 7)
        assert compute_sfda(features, labels).item() == pytest.approx(expected, abs=1e-12)
        assert streamed(SFDA(), features, labels, 20).item() == pytest.approx(expected, abs=1e-12)


class TestInvariants:
    def test_bounds(self):
        for spread in (1e-8, 1e-3, 1.0, 1e8):
            features, labels = draw(spread=spread)
            assert 0 <= compute_sfda(features, labels) <= 1
        assert compute_sfda(features + 1e12 * labels[:, None], labels).item() == pytest.approx(1)

    def test_shift_and_order_of_features(self):
        features, labels = draw()
        expected = compute_sfda(features, labels).item()
        for moved in (features + 1e3, features.flip(1), -features):
            assert compute_sfda(moved, labels).item() == pytest.approx(expected, abs=1e-9)
            assert streamed(SFDA(), moved, labels, 20).item() == pytest.approx(expected, abs=1e-9)

    def test_any_linear_map_of_large_features(self):
        # Lambda is then 1e-10, so that next to nothing depends on the axes.
        features, labels = draw(spread=100)
        turned = features @ (torch.eye(5) + torch.rand(5, 5, dtype=torch.float64))
        assert compute_sfda(turned, labels).item() == pytest.approx(compute_sfda(features, labels).item(), abs=1e-6)

    def test_names_of_classes_order_and_number_of_samples(self):
        features, labels = draw()
        expected = compute_sfda(features, labels).item()
        order = torch.randperm(60)
        assert compute_sfda(features[order], labels[order]).item() == pytest.approx(expected, abs=1e-9)
        renamed = torch.tensor([8, 0, 3])[labels]
        assert compute_sfda(features, renamed).item() == pytest.approx(expected, abs=1e-9)
        assert streamed(SFDA(), features, renamed, 20).item() == pytest.approx(expected, abs=1e-9)
        assert compute_sfda(features.repeat(2, 1), labels.repeat(2)).item() == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_any_split_in_any_order(self, dtype):
        features, labels = draw((2, 2))
        features = features.to(dtype)
        labels[:10] %= 2  # the first batches have seen fewer classes
        expected = compute_sfda(features, labels).item()
        for sizes in ([1] * 60, [13, 47]):
            assert streamed(SFDA(), features, labels, sizes).item() == pytest.approx(expected, abs=1e-9)
        parts = [SFDA() for _ in range(4)]
        for metric, x, y in zip(parts, features.split(25), labels.split(25), strict=False):
            metric.update(x, y)
        total = SFDA()
        for k in torch.randperm(4).tolist():  # the fourth has seen nothing
            total.merge(pickle.loads(pickle.dumps(parts[k])))
        assert total.compute().item() == pytest.approx(expected, abs=1e-9)
        total.merge(total)
        assert total.compute().item() == pytest.approx(expected, abs=1e-9)

    def test_ignored_samples_might_as_well_not_be_there(self):
        features, labels = draw()
        labels[::4] = 255
        expected = compute_sfda(features[labels < 255], labels[labels < 255]).item()
        assert compute_sfda(features, labels, ignore_index=255).item() == pytest.approx(expected, abs=1e-9)
        assert streamed(SFDA(ignore_index=255), features, labels, 20).item() == pytest.approx(expected, abs=1e-9)


class TestPatients:
    def fed(self, **options):
        features, _ = draw((4,), n=12)
        labels = (torch.arange(12)[:, None] // 3 + torch.arange(4)) % 3  # five of each class or more for each patient
        metric, names = SFDA(**options), ["bob", "ann", "cid"] * 4
        for part in (slice(0, 5), slice(5, 12)):
            metric.update(features[part], labels[part], names[part])
        return metric, features, labels, names

    def test_resampled(self):
        metric, features, labels, _ = self.fed()
        assert metric.patients == ("ann", "bob", "cid")
        assert metric.resampled([1, 1, 1]).item() == pytest.approx(compute_sfda(features, labels).item(), abs=1e-9)
        alone = metric.resampled(np.eye(3, dtype=int))
        assert metric.resampled([2, 0, 5]).item() == pytest.approx((2 * alone[0] + 5 * alone[2]).item() / 7, abs=1e-12)

    def test_a_patients_own_share(self):
        metric, features, labels, names = self.fed()
        own = torch.tensor([name == "cid" for name in names])
        # How the others are divided into patients and batches makes no difference.
        whole, without = SFDA(), SFDA()
        whole.update(features, labels, ["all"] * 12)
        for kept, name in ((own, "cid"), (~own, "rest")):
            without.update(features[kept], labels[kept], [name] * int(kept.sum()))
        assert without.resampled([1, 0]).item() == pytest.approx(metric.resampled([0, 0, 1]).item(), abs=1e-12)
        assert without.resampled([1, 1]).item() == pytest.approx(whole.compute().item(), abs=1e-12)

    def test_nothing_is_kept_from_before_an_update(self):
        metric, features, labels, _ = self.fed()
        before = metric.resampled([1, 0, 0])
        metric.update(features[:1] + 9, labels[:1], ["dan"])
        assert metric.patients == ("ann", "bob", "cid", "dan")
        assert metric.resampled([1, 0, 0, 0]) != before
        other = SFDA()
        other.update(features[:1] - 9, labels[:1], ["eve"])
        metric.merge(other)
        assert metric.patients == ("ann", "bob", "cid", "dan", "eve")
        metric.reset()
        with pytest.raises(InputError, match="has seen no sample"):
            metric.resampled([1])

    @pytest.mark.parametrize("counts", [[1, 1], [1, -1, 1], [0, 0, 0], [0.5, 1, 1]], ids=str)
    def test_bad_counts(self, counts):
        metric, *_ = self.fed()
        with pytest.raises(InputError, match="counts"):
            metric.resampled(counts)

    def test_samples(self):
        metric, features, _, names = self.fed()
        samples = metric.samples()
        assert len(samples.labels) == 48
        order = samples.features[:, 0].argsort()
        rows = features.movedim(1, -1).reshape(-1, 5)
        assert torch.equal(samples.features[order], rows[rows[:, 0].argsort()])
        owners = np.repeat(names, 4)[rows[:, 0].argsort()]
        assert [samples.names[k] for k in samples.groups[order]] == owners.tolist()

    def test_drawn_pixels(self):
        metric, *_ = self.fed(pixels=3)
        samples = metric.samples()
        assert len(samples.labels) == 27
        expected = compute_sfda(samples.features, samples.labels).item()
        assert metric.compute().item() == pytest.approx(expected, abs=1e-12)
        assert metric.resampled([1, 1, 1]).item() == pytest.approx(expected, abs=1e-12)
        other, *_ = self.fed(pixels=3)
        total = SFDA(pixels="auto")  # as a worker's that has not seen a grid yet
        total.merge(metric)
        total.merge(other)
        assert len(total.samples().labels) == 27
        assert 0 < total.compute() < 1


def _share(rank, file, folder):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    features, labels = draw(n=40, seed=3)
    features, labels, names = features[rank::2], labels[rank::2], ["ann", "bob"] * 10
    everything, drawn, lonely = SFDA(), SFDA(pixels=4), SFDA()
    for metric in (everything, drawn):
        metric.update(features, labels % (2 + rank), names)
    if rank == 0:  # the other process has no data
        lonely.update(features, labels, names)
    values = [metric.compute() for metric in (everything, drawn, lonely)]
    if rank == 0:  # the other process has nothing new
        everything.update(features, labels, ["cid"] * 20)
    values.append(everything.compute())
    torch.save((values, everything.patients), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_see_the_whole(tmp_path):
    torch.multiprocessing.spawn(_share, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    features, labels = draw(n=40, seed=3)
    lonely = compute_sfda(features[::2], labels[::2])
    more = features[::2], labels[::2].clone()
    labels[::2] %= 2
    drawn = SFDA(pixels=4)
    for rank in range(2):
        drawn.update(features[rank::2], labels[rank::2], ["ann", "bob"] * 10)
    expected = [
        compute_sfda(features, labels),
        drawn.compute(),
        lonely,
        compute_sfda(torch.cat([features, more[0]]), torch.cat([labels, more[1]])),
    ]
    for rank in range(2):
        values, patients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(torch.stack(values), torch.stack(expected), atol=1e-9, rtol=0)
        assert patients == ("ann", "bob", "cid")


class TestDegenerate:
    def test_one_class(self):
        features, labels = draw()
        metric = SFDA()
        metric.update(features, labels * 0 + 4)
        for compute in (metric.compute, lambda: compute_sfda(features, labels * 0)):
            with pytest.warns(UserWarning, match="one class only"):
                assert compute().item() == pytest.approx(1, abs=1e-12)

    @pytest.mark.parametrize("constant", [0.0, 0.1, 1e8])
    def test_constant_features(self, constant):
        features, labels = draw()
        features = torch.full_like(features, constant)
        expected = (labels.bincount() / 60).square().sum().item()
        assert compute_sfda(features, labels).item() == pytest.approx(expected, abs=1e-6)
        assert streamed(SFDA(), features, labels, [1] * 60).item() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("scale", [1.0, 1e8, 1e-8])
    def test_classes_that_are_points(self, scale):
        labels = torch.arange(60) % 3
        features = scale * (1 + torch.eye(3)[labels])
        assert compute_sfda(features, labels).item() == pytest.approx(1, abs=1e-9)
        assert streamed(SFDA(), features, labels, 20).item() == pytest.approx(1, abs=1e-9)

    @pytest.mark.parametrize("scale", [1.0, 1e8, 1e-8])
    @pytest.mark.parametrize("twice", [False, True])
    def test_more_dimensions_than_samples(self, scale, twice):
        features, labels = draw(n=30, width=200, spread=scale)
        if twice:
            features = torch.cat([features, features], 1)
        score = compute_sfda(features, labels)
        assert 0 <= score <= 1
        assert streamed(SFDA(), features, labels, 10).item() == pytest.approx(score.item(), abs=1e-9)

    @pytest.mark.filterwarnings("ignore:Only one sample available")
    def test_class_of_one_sample(self):
        features, labels = draw()
        labels[labels == 2] = 1
        labels[0] = 2
        assert compute_sfda(features, labels).item() == pytest.approx(by_scikit_learn(features, labels), abs=1e-8)


class TestInputs:
    def test_another_width(self):
        metric = SFDA()
        metric.update(*draw())
        before = metric.compute()
        with pytest.raises(InputError, match="6 channels here, 5 before"):
            metric.update(*draw(width=6))
        assert metric.compute() == before

    def test_one_sample_and_none(self):
        metric = SFDA()
        with pytest.raises(InputError, match="has seen no sample"):
            metric.compute()
        metric.update([[1.0]], [0])
        for compute in (metric.compute, lambda: compute_sfda([[1.0]], [0])):
            with pytest.raises(InputError, match="expected at least 2"):
                compute()
        metric.reset()
        with pytest.raises(InputError, match="has seen no sample"):
            metric.compute()
