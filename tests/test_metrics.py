"""Requirements on all transferability metrics, tested for each row of the table in `metric_cases.py`."""

import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from metric_cases import CASES, OF_FEATURES, draw, evaluate, rotation, streamed, tensors
from monai.data import MetaTensor
from threadpoolctl import threadpool_limits
from torch import nn

from medtl_ext import InputError, metrics
from medtl_ext.testing import metric_checks

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
of_features = pytest.mark.parametrize("case", OF_FEATURES, ids=lambda case: case.name)


def same(value, expected, tolerance=1e-9):
    for found, wanted in zip(tensors(value), tensors(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


def both(case, values, labels, **options):
    """The value of the function, and of the class after several batches."""
    metric = case.make(**options)
    return case.compute(values, labels, **options), streamed(metric, values, labels, 7)


def within_bounds(case, value, labels):
    low, high = case.bounds(labels) if callable(case.bounds) else case.bounds
    for part in tensors(value):
        assert part.isfinite().all()
        assert low - 1e-9 <= part.min()
        assert part.max() <= high + 1e-9


def equals(value, expected, labels, tolerance=1e-6):
    """Compare every entry of the value with the table, where None means any finite number."""
    wanted = expected(labels) if callable(expected) else expected
    for k, part in enumerate(tensors(value)):
        assert part.isfinite().all()
        if wanted is not None:
            torch.testing.assert_close(
                part, torch.full_like(part, wanted[k] if isinstance(wanted, list) else wanted), atol=tolerance, rtol=0
            )


VECTORS = [
    pytest.param(case, *row[::2], name, id=f"{case.name}-{row[0]}-{name}")
    for case in CASES
    for row in case.vectors
    for name in row[1]
]


@pytest.mark.parametrize(("case", "keys", "near", "name"), VECTORS)
def test_reference_vectors(vectors, case, keys, near, name):
    data = vectors(name)
    values = data[{"features": "features", "probabilities": "source_probs", "classes": "source_argmax"}[case.kind]]
    value = case.compute(**{case.make().inputs[0]: values}, target_labels=data["labels"])
    found = [term.item() for term in tensors(value)]
    assert found == pytest.approx([float(data[key]) for key in ([keys] if isinstance(keys, str) else keys)], **near)


CONFORMANCE = [
    pytest.param(check, id=f"{case.name}-{what}")
    for case in CASES
    for what, check in metric_checks(type(case.make()), make=case.make, grid=case.grid, per_sample=case.per_sample)
]


@pytest.mark.parametrize("check", CONFORMANCE)
def test_conforms(check):
    check()


def test_the_table_has_every_metric():
    bases = {"FeatureMetric", "MomentMetric", "SampleMetric", "TransferMetric"}
    others = {"FeatureSamples", "FeatureUpdate", "PatientScores"}  # collect what is computed from, or need a network
    public = [getattr(metrics, name) for name in metrics.__all__]
    classes = {one.__name__ for one in public if isinstance(one, type) and issubclass(one, metrics.TransferMetric)}
    assert classes == bases | others | {type(case.make()).__name__ for case in CASES}


class TestStreaming:
    @every_case
    def test_parts_that_have_not_seen_all_classes_merge_to_the_one_shot_value(self, case):
        values, labels = case.draw()
        values = values.float() if case.kind != "classes" else values
        labels[: len(labels) // 6] %= 2
        expected = case.compute(values, labels)
        assert all(part.dtype == torch.float64 for part in tensors(expected))
        parts = [case.make() for _ in range(4)]  # the fourth has seen nothing
        for metric, *batch in zip(parts, values.split(len(labels) // 3), labels.split(len(labels) // 3), strict=False):
            metric.update(*batch)
        total = case.make()
        for k in range(4) if case.per_sample else torch.randperm(4).tolist():
            total.merge(pickle.loads(pickle.dumps(parts[k])))
        same(total.compute(), expected)

    @pytest.mark.parametrize("case", [of for of in CASES if not of.name.startswith("ccfv")], ids=lambda case: case.name)
    def test_merged_with_itself_counts_twice(self, case):
        values, labels = case.draw()
        metric, twice = case.make(), case.make()
        for part in (metric, twice, twice):
            part.update(values, labels)
        metric.merge(metric)
        same(metric.compute(), twice.compute())

    @every_case
    def test_ignored_samples_might_as_well_not_be_there(self, case):
        values, labels = case.draw()
        labels[::4] = 255
        kept = labels.flatten(1)[:, 0] < 255 if case.grid else labels < 255
        expected = case.compute(values[kept], labels[kept])
        for value in both(case, values, labels, ignore_index=255):
            same(value[kept] if case.per_sample else value, expected)
            assert not case.per_sample or value[~kept].isnan().all()
        with pytest.raises(InputError, match=r"no valid sample|at least|holds 0"):
            case.compute(values, torch.zeros_like(labels), ignore_index=0)
        metric = case.make(ignore_index=0)
        metric.update(values, torch.zeros_like(labels))
        with pytest.raises(InputError, match=r"no valid sample|has seen no sample"):
            metric.compute()


def renamed(labels):
    return torch.tensor([300, 0, 4])[labels]


CHANGES = {
    "order": lambda x, y: (x.flip(0), y.flip(0)),
    "names": lambda x, y: (x, renamed(y)),
    "twice": lambda x, y: (torch.cat([x, x]), torch.cat([y, y])),
    "channels": lambda x, y: (x[:, torch.randperm(x.shape[1])], y),
    "shift": lambda x, y: (x + 100, y),
    "large shift": lambda x, y: (x + 1e5, y),
    "reflection": lambda x, y: (-x.flip(1), y),
    "rotation": lambda x, y: (on_channels(x, rotation(5)), y),
    "rotation and shift": lambda x, y: (on_channels(x, rotation(5)) + 10, y),
    "affine": lambda x, y: (on_channels(x, rotation(5) * (torch.rand(5) + 0.5)) + 10, y),
    "each feature": lambda x, y: (x * (torch.rand(5) + 0.1) + torch.randn(5), y),
    "scale": lambda x, y: [(x * 1e8, y), (x * 1e-8, y)],
    "scale up": lambda x, y: (x * 1e8, y),
    "extreme scale": lambda x, y: [(x * 1e150, y), (x * 1e-150, y)],
    "constant feature": lambda x, y: (torch.cat([x, torch.full_like(x[:, :2], 0.3)], 1), y),
    "features of zeros": lambda x, y: [(torch.cat([x, x.new_zeros(len(x), n)], 1), y) for n in (2, 200)],
    "features twice": lambda x, y: (torch.cat([x, x], 1), y),
}


def on_channels(features, matrix):
    return (features.movedim(1, -1) @ matrix).movedim(-1, 1)


class TestInvariants:
    @pytest.mark.parametrize(
        ("case", "change"),
        [pytest.param(case, change, id=f"{case.name}-{change}") for case in CASES for change in case.invariant],
    )
    def test_change_of_the_inputs(self, case, change):
        values, labels = case.draw()
        expected = case.compute(values, labels)
        if case.per_sample and change in ("order", "twice"):
            expected, _ = CHANGES[change](expected, labels)
        changed = CHANGES[change](values, labels)
        for inputs in changed if isinstance(changed, list) else [changed]:
            for value in both(case, *inputs):
                same(value, expected, case.invariant[change])

    @pytest.mark.parametrize("case", [case for case in CASES if not case.grid], ids=lambda case: case.name)
    def test_pixels_are_samples_but_for_those_that_are_ignored(self, case):
        values, labels = case.draw()
        labels[::7] = 255
        expected = case.compute(values[labels < 255], labels[labels < 255])
        pixels = values.view(-1, 3, 4, *values.shape[1:])
        pixels = pixels if case.kind == "classes" else pixels.movedim(3, 1)
        for value in both(case, pixels, labels.view(-1, 1, 3, 4), ignore_index=255):
            same(value, expected)


class TestInputsOfEveryKind:
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    @every_case
    def test_gpu(self, case):
        """The conformance suite tests the class; this tests the function."""
        values, labels = case.draw()
        value = case.compute(values.cuda(), labels)
        assert all(part.is_cuda for part in tensors(value))
        near = 0.02 if case.name.startswith(("label", "lp")) else 1e-6
        same([part.cpu() for part in tensors(value)], case.compute(values, labels), near)

    @every_case
    def test_layout_and_metadata(self, case):
        values, labels = case.draw()
        expected = case.compute(values, labels)
        for kind in (values.transpose(0, -1).contiguous().transpose(0, -1), MetaTensor(values)):
            value = case.compute(kind, labels.unsqueeze(1).half())
            assert {type(part) for part in tensors(value)} == {torch.Tensor}
            same(value, expected)

    @every_case
    def test_may_change_afterwards(self, case):
        values, labels = case.draw()
        labels[0] = 3
        before = values.clone(), labels.clone()
        metric = case.make(ignore_index=3)
        metric.update(values, labels)
        expected = case.compute(values, labels, ignore_index=3)
        assert torch.equal(values, before[0])
        assert torch.equal(labels, before[1])
        values.zero_()
        labels.zero_()
        same(metric.compute(), expected)

    @of_features
    def test_half_precision_does_not_overflow(self, case):
        values, labels = case.draw()
        half = (values.clamp(-4, 4) * 15000).half()  # the squares are far beyond 65504
        for value, wanted in zip(both(case, half, labels), both(case, half.double(), labels), strict=True):
            same(value, wanted)


def with_one(value):
    return lambda x, y: (x.index_fill(0, torch.tensor([1]), value), y)


BAD = {
    "no labels": (lambda x, y: (x, y[:0]), "target_labels (is empty|lists)"),
    "one label less": (lambda x, y: (x, y[:-1]), "target_labels (has shape|lists)"),
    "one-hot labels": (lambda x, y: (x, torch.stack([y, y], 1)), "target_labels has shape"),
    "a negative label": (lambda x, y: (x, y - 1), "target_labels holds the negative label -1"),
    "a label between two": (lambda x, y: (x, y + 0.5), "target_labels holds non-integer"),
    "a label that is NaN": (lambda x, y: (x, y * torch.nan), "target_labels holds non-integer"),
    "labels of an image": (lambda x, y: (x, y + 100_000), "target_labels holds the label 10000"),
    "nothing": (lambda x, y: (x[:0], y[:0]), "is empty|holds 0 case"),
}
BAD_NUMBERS = {
    "NaN": (with_one(torch.nan), "{} holds NaN or Inf"),
    "Inf": (with_one(torch.inf), "{} holds NaN or Inf"),
    "complex": (lambda x, y: (x + 0j, y), "{} is complex"),
    "a word": (lambda x, y: ("numbers", y), "{} is str|target_labels lists"),
    "no channels": (lambda x, y: (x.flatten(), y), "{} has shape|target_labels lists"),
}
BAD_PROBABILITIES = {
    "logits": (lambda x, y: (x.log(), y), r"source_probs ranges from -.* softmax"),
    "above one": (lambda x, y: (x * 1.5, y), "source_probs (ranges|sums)"),
    "halves": (lambda x, y: (x * 0.5, y), "source_probs sums to between 0.5 and 0.5"),
}
BAD_OF = {"features": BAD | BAD_NUMBERS, "probabilities": BAD | BAD_NUMBERS | BAD_PROBABILITIES, "classes": BAD}
BAD_MAPS = {"no pixels": (lambda x, y: (x.flatten(2)[..., 0], y.flatten(1)[:, 0]), "a map needs")}


def bad_of(case):
    a_map = case.name.startswith(("h_score_map", "leep_map"))
    return BAD_OF[case.kind] | (BAD_MAPS if a_map else {})


NAN = torch.nan
NUMBERS = {
    "transrate": {"eps": (0, -1e-4, NAN, torch.inf)},
    "parc": {"n_components": (0, -1, 2.0, "all")},
    "nleep": {"seed": (-1, 1.5, None, 2**32)},
    "ccfv": {"eps": (-1.0, NAN)},
    "otce": {"epsilon": (0.0, NAN), "n_samples": (0,), "repeats": (2.5,)},
    "leep_map{}": {"stride": (0, 1.5), "smoothing": (-1.0, NAN)},
}
OPTIONS = [
    *((name, {key: bad}, f"{key} is ") for name, keys in NUMBERS.items() for key in keys for bad in keys[key]),
    ("h_score", {"shrinkage": "ledoitwolf"}, "did you mean 'ledoit_wolf'"),
    ("gbc", {"covariance": "diag"}, "did you mean 'diagonal'"),
    ("otce", {"solver": "sinkhorm"}, "did you mean 'sinkhorn'"),
    ("leep_map{}", {"estimator": "locl"}, "did you mean 'local'"),
    ("leep_map{}", {"smoothing": 1.0, "estimator": "global"}, "smoothing .* leave it 0"),
]


class TestBadInput:
    """Function and class raise an error that names the argument, and the class stays as it was."""

    @pytest.mark.parametrize(
        ("case", "what"), [pytest.param(of, what, id=f"{of.name}-{what}") for of in CASES for what in bad_of(of)]
    )
    def test_named(self, case, what):
        values, labels = case.draw()
        metric = case.make()
        metric.update(values, labels)
        before = metric.compute()
        change, message = bad_of(case)[what]
        changed, message = change(values, labels), message.format(metric.inputs[0])
        with pytest.raises(InputError, match=message):
            case.compute(*changed)
        with pytest.raises(ValueError, match=message):
            metric.update(*changed)
        same(metric.compute(), before, 0)

    @every_case
    def test_one_sample(self, case):
        values, labels = case.draw(n=1)
        metric = case.make()
        metric.update(values, labels * 0)
        for compute in (metric.compute, lambda: case.compute(values, labels * 0)):
            if case.minimum > 1:
                with pytest.raises(InputError, match=r"expected at least 2|two or more"):
                    compute()
            else:
                with pytest.warns(UserWarning, match="one class only"):
                    equals(compute(), case.one_class, labels * 0)

    @pytest.mark.parametrize(
        ("case", "options", "message"),
        [pytest.param(of, *row, id=f"{name}-{row[0]}") for name, *row in OPTIONS for of in CASES if of.name == name],
    )
    def test_options(self, case, options, message):
        with pytest.raises(InputError, match=message):
            case.compute(*case.draw(), **options)
        with pytest.raises(InputError, match=message):
            case.make(**options)


class TestDegenerateInput:
    @every_case
    def test_one_class(self, case):
        values, labels = case.draw()
        for one in (torch.zeros_like(labels), torch.full_like(labels, 4)):
            metric = case.make()
            metric.update(values, one)
            for compute in (metric.compute, lambda one=one: case.compute(values, one)):
                with pytest.warns(UserWarning, match="one class only"):
                    equals(compute(), case.one_class, one)

    @of_features
    @pytest.mark.parametrize("constant", [0.0, 0.1, 1e8])
    def test_constant_features(self, case, constant):
        values, labels = case.draw()
        values = torch.full_like(values, constant)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = both(case, values, labels)
        for value in found:
            within_bounds(case, value, labels)
            if case.constant is not None:
                equals(value, case.constant, labels)
        assert sum(case.constant_warns in str(warning.message) for warning in caught) >= 2 * bool(case.constant_warns)

    @every_case
    def test_class_of_one_sample(self, case):
        values, labels = case.draw()
        labels %= 2
        labels.view(-1)[-1] = 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for value in both(case, values, labels):
                within_bounds(case, value, labels)

    @of_features
    @pytest.mark.filterwarnings("error", "ignore::UserWarning")
    @pytest.mark.parametrize(
        "change",
        [
            lambda x, y: torch.cat([x[:, :2], torch.full_like(x[:, 2:3], 4.0), x[:, 3:]], 1),
            lambda x, y: torch.eye(3, 5, dtype=torch.float64)[y].movedim(-1, 1) * 100,
            lambda x, y: x[torch.arange(len(x)) % 4],
            lambda x, y: x * 1e8,
            lambda x, y: (x * 1e-8).float(),
            lambda x, y: (x * 1e8).float(),
        ],
        ids=["a constant feature", "told perfectly", "few distinct samples", "huge", "tiny, single", "huge, single"],
    )
    def test_features(self, case, change):
        values, labels = case.draw()
        for value in both(case, change(values, labels), labels):
            within_bounds(case, value, labels)

    @of_features
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_more_dimensions_than_samples(self, case):
        values, labels = case.draw(n=24 if not case.grid else 6, width=200)
        within_bounds(case, case.compute(values, labels), labels)

    @pytest.mark.parametrize("case", [of for of in CASES if of.kind == "probabilities"], ids=lambda case: case.name)
    def test_softmax_that_underflows(self, case):
        probs, labels = case.draw()
        probs = (probs.log().float() * 400).softmax(1)
        assert (probs == 0).any()
        for value in both(case, probs, labels):
            within_bounds(case, value, labels)


class TestEvaluator:
    def test_reads_a_layer_of_the_network(self):
        """All feature metrics in one run give the values of the pixels that `FeatureSamples` draws."""
        images, masks = draw((32, 32), n=9, width=1)
        items = [
            {"image": image.float(), "label": mask[None].float(), "subject": f"p{k % 2}"}
            for k, (image, mask) in enumerate(zip(images, masks, strict=True))
        ]
        cases = {case.name: case for case in OF_FEATURES if not case.name.startswith(("h_score_map", "otce", "ccfv"))}
        samples = metrics.FeatureSamples(pixels=20)
        attached = {name: case.make(pixels=20) for name, case in cases.items()}
        evaluate(items, batch_size=3, samples=samples, **attached)
        features, labels, *_ = samples.compute()
        assert labels.bincount().tolist() == [40, 40, 40]
        for name, case in cases.items():
            same(attached[name].compute(), case.compute(features, labels))


def seen_by_all(case, rows):
    """The value in a process that has seen these rows only."""
    values, labels = case.draw(generator=torch.Generator().manual_seed(1))
    labels[: len(labels) // 3] %= 2
    metric = case.make()
    for row in rows:
        metric.update(values[row : row + 1], labels[row : row + 1])
    first, again = metric.compute(), metric.compute()
    assert str(first) == str(again)
    return again


def samples_of_patients(rows, **options):
    features, labels = draw((2,), generator=torch.Generator().manual_seed(2))
    metric = metrics.FeatureSamples(**options)
    metric.update(features[rows], labels[rows], [f"p{row % 5}" for row in rows]) if rows else None
    *samples, names = metric.compute()
    assert names == tuple(f"p{k}" for k in range(5))
    return samples


def scores_of_patients(rows):
    features, labels = draw(generator=torch.Generator().manual_seed(3))
    scores = metrics.PatientScores({"gbc": metrics.GBC(), "transrate": metrics.TransRate()})
    scores.update(features[rows], labels[rows], [f"p{row % 5}" for row in rows]) if rows else None
    assert scores.patients == tuple(f"p{k}" for k in range(5))
    return scores.compute(), scores.resampled([2, 1, 0, 1, 3])


def news_of_one_process(rows):
    features, labels = draw(generator=torch.Generator().manual_seed(4))
    metric, drawn = metrics.SFDA(), metrics.SFDA(pixels=4)
    for sfda in (metric, drawn) if rows else ():
        sfda.update(features[rows], labels[rows], [f"p{row % 2}" for row in rows])
    before = metric.compute()
    if 0 in rows:
        metric.update(features[:20], labels[:20] % 2, ["new"] * 20)
    after = metric.compute()
    return before, after, drawn.compute()


def map_far_from_zero(rows):
    features, labels = draw((5, 4), n=60, width=2, n_classes=4, generator=torch.Generator().manual_seed(5))
    labels[:20] %= 2
    metric = metrics.HScoreMap()
    metric.update(1e4 + features[rows], labels[rows]) if rows else None
    return metric.compute(), metric.multi_label()


def feature_updates(rows):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Conv1d(3, 3, 3), nn.Flatten(), nn.Linear(15, 2))
    images, labels = torch.randn(60, 1, 9), torch.arange(60) % 2
    metric = metrics.FeatureUpdate(network)
    for part in torch.tensor(rows, dtype=torch.int64).split(10) if rows else ():
        metric.update(images[part], labels[part])
    return metric.compute()


def nobody(rows):
    with pytest.raises(InputError, match="has seen no sample"):
        metrics.LEEP().compute()
    return torch.zeros(1)


SCENES = {
    **{case.name: (partial(seen_by_all, case), case.n) for case in CASES},
    "samples": (samples_of_patients, 60),
    "drawn samples": (partial(samples_of_patients, pixels=3), 60),
    "patients": (scores_of_patients, 60),
    "SFDA, news of one process": (news_of_one_process, 60),
    "H-score map far from zero": (map_far_from_zero, 60),
    "feature update": (feature_updates, 60),
    "nobody": (nobody, 60),
}


def rows_of(rank, how, n):
    """The last of three processes never has data."""
    rows = list(range(n))
    return {"split": [rows[: n // 3], rows[n // 3 :], []], "one idle": [rows, [], []]}[how][rank]


def in_one_process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    with threadpool_limits(1), warnings.catch_warnings():
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        every = [(name, how, *SCENES[name]) for name in SCENES for how in ("split", "one idle")]
        found = {(name, how): scene(rows_of(rank, how, n)) for name, how, scene, n in every}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def three_processes(tmp_path_factory):
    """The values of each scene in three processes, which are started once for all scenes."""
    folder = tmp_path_factory.mktemp("processes")
    # Forked, because importing everything again in new processes takes most of a minute on a small machine.
    torch.multiprocessing.start_processes(in_one_process, (str(folder),), nprocs=3, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(3)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["split", "one idle"])
@pytest.mark.parametrize("name", SCENES)
def test_processes_see_the_whole(three_processes, name, how):
    scene, n = SCENES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = scene(list(range(n)))
    for rank, found in enumerate(three_processes):
        expected = whole
        if name == "leep_image_maps":  # each process has the maps of its own images
            expected = whole[rows_of(rank, how, n)] if rows_of(rank, how, n) else []
        torch.testing.assert_close(found[name, how], expected, rtol=1e-9, atol=1e-9)
