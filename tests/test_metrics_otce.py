"""OTCE: compared with reference vectors and other solvers, for each solver, and on engines."""

from functools import partial

import numpy as np
import ot
import pytest
import torch
from drawing import torch_generator
from metric_cases import DEVICES, evaluate, negative_entropy, rotation, small_unet
from scipy.spatial.distance import cdist
from scipy.stats import entropy

from medtl_ext import InputError
from medtl_ext.metrics import OTCE, FeatureSamples, compute_otce, label_transport, probabilities_and_labels

SOLVERS = ["sorted", "emd", "sinkhorn"]
of_every_solver = pytest.mark.parametrize("solver", SOLVERS)


def draw(n=30, m=40, width=3):
    """Random source of three classes and target of four that differ a little."""
    generator = torch_generator()
    sides = []
    for size, n_classes in ((n, 3), (m, 4)):
        labels = torch.randint(n_classes, (size,), generator=generator)
        features = torch.randn(size, width, generator=generator, dtype=torch.float64) / 2 + labels[:, None] / n_classes
        sides += [features, labels]
    return sides


def draw_softmax(n=300, m=400):
    source, source_labels, target, target_labels = draw(n, m, width=2)
    return source.softmax(1), source_labels, target.softmax(1), target_labels


def by_definition(plan, source_labels, target_labels):
    """-H(Y_t | Y_s) from a plan and two lists of labels."""
    table = np.zeros((5, 5))
    np.add.at(table, np.ix_(source_labels, target_labels), np.asarray(plan))
    return -conditional_entropy(table)


def conditional_entropy(table):
    return entropy(table.ravel()) - entropy(table.sum(1))


def dual_plan(source, target, epsilon):
    """The entropic plan from its dual, by a quasi-Newton method of POT instead of Sinkhorn iterations."""
    cost = cdist(source, target, "sqeuclidean")
    weights = (np.full(n, 1 / n) for n in cost.shape)
    how = {"reg_type": "negentropy", "stopThr": 1e-12, "numItermax": 5000}
    return ot.smooth.smooth_ot_dual(*weights, cost, epsilon, **how)


def quantile_plan(source, target):
    return ot.emd_1d(source[:, 0].numpy(), target[:, 0].numpy())


def exact_plan(source, target):
    return ot.emd([], [], cdist(source, target, "sqeuclidean"))


SIZES = [(200, 260), (157, 157), (5, 1000), (1, 7)]


class TestReferenceVectors:
    @pytest.fixture
    def data(self, vectors):
        return vectors("otce_features")

    @pytest.mark.parametrize(
        ("options", "name", "near"),
        [
            ({"solver": "emd"}, "otce_emd", 1e-9),
            ({"epsilon": 0.01}, "otce_sinkhorn_eps0.01", 1e-5),
            ({"epsilon": 0.03}, "otce_sinkhorn_eps0.03", 1e-5),
            ({"epsilon": 0.1}, "otce_sinkhorn_converged", 1e-5),
            ({"epsilon": 1.0}, "otce_sinkhorn_eps1.0", 1e-5),
        ],
    )
    def test_score(self, data, options, name, near):
        value = compute_otce(data["xs"], data["ys"], data["xt"], data["yt"], **options)
        assert value.item() == pytest.approx(data[name], abs=near)
        assert value.item() >= data["minus_H_yt"]

    def test_much_entropy_is_the_lower_bound(self, data):
        with pytest.warns(UserWarning, match="hardly depends on the features"):
            value = compute_otce(data["xs"], data["ys"], data["xt"], data["yt"], epsilon=1e6)
        assert value.item() == pytest.approx(data["minus_H_yt"], abs=1e-6)


class TestAgainstOtherSolvers:
    """Compare with a plan by another algorithm, and the entropy by the definition."""

    @pytest.mark.filterwarnings("ignore:source_labels holds one class")
    @pytest.mark.parametrize(
        ("drawn", "plan_of", "options", "near"),
        [
            *((partial(draw, 20, 25), partial(dual_plan, epsilon=e), {"epsilon": e}, 2e-5) for e in (0.05, 0.3)),
            *((partial(draw, n, m, width=1), quantile_plan, {"solver": "sorted"}, 1e-12) for n, m in SIZES),
            # The softmax of two channels is one-dimensional.
            *(
                (partial(draw_softmax, 60, 75), exact_plan, {"solver": name}, 1e-9)
                for name in ("sorted", "auto", "emd")
            ),
        ],
    )
    def test_plans(self, drawn, plan_of, options, near):
        source, source_labels, target, target_labels = drawn()
        expected = by_definition(plan_of(source, target), source_labels, target_labels)
        value = compute_otce(source, source_labels + 1, target, target_labels, **options)
        assert value.item() == pytest.approx(expected, abs=near)

    @pytest.mark.parametrize("solver", ["sorted", "emd"])
    def test_samples_with_equal_features_share_in_equal_parts(self, solver):
        source, source_labels, target, target_labels = draw(200, 300, width=1)
        source, target = (source * 3).round(), (target * 3).round()
        points, sides = [], []
        for features, labels in ((source, source_labels), (target, target_labels)):
            places, index = np.unique(features, return_inverse=True)
            points.append(places)
            sides.append(np.zeros((len(places), 4)))
            np.add.at(sides[-1], (index.ravel(), labels), 1 / len(labels))
        plan = ot.emd_1d(*points, *(side.sum(1) for side in sides))
        shares = [side / side.sum(1, keepdims=True) for side in sides]
        table = shares[0].T @ plan @ shares[1]
        value = compute_otce(source, source_labels, target, target_labels, solver=solver)
        assert value.item() == pytest.approx(-conditional_entropy(table), abs=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_label_transport(self, dtype):
        _, source_labels, _, target_labels = draw(40, 23)
        plan = torch.rand(40, 23, dtype=dtype)
        expected = np.zeros((3, 4))
        np.add.at(expected, np.ix_(source_labels, target_labels), plan.numpy())
        table = label_transport(plan, source_labels, target_labels)
        assert table.dtype == torch.float64
        np.testing.assert_allclose(table, expected, atol=1e-9)


@of_every_solver
def test_one_source_class_tells_nothing(solver):
    source, source_labels, target, target_labels = draw(width=1)
    with pytest.warns(UserWarning, match="source_labels holds one class only, so OTCE is -H"):
        value = compute_otce(source, torch.ones_like(source_labels), target, target_labels, solver=solver)
    assert value.item() == pytest.approx(negative_entropy(target_labels), abs=1e-6)


@of_every_solver
def test_constant_features_tell_nothing(solver, recwarn):
    _, source_labels, _, target_labels = draw()
    value = compute_otce(torch.ones(30, 1), source_labels, torch.ones(40, 1), target_labels, solver=solver)
    assert value.item() == pytest.approx(negative_entropy(target_labels), abs=1e-9)
    assert (len(recwarn) == 1) == (solver == "sinkhorn")


class TestPlans:
    @pytest.mark.parametrize("scale", [1e8, 1.0, 1e-8])
    def test_exact_ones_do_not_change_with_scale_shift_and_rotation(self, scale):
        source, source_labels, target, target_labels = draw()
        expected = compute_otce(source, source_labels, target, target_labels, solver="emd").item()
        turn = rotation(3)
        moved = [(side @ turn + 3) * scale for side in (source, target)]
        value = compute_otce(moved[0], source_labels, moved[1], target_labels, solver="emd")
        assert value.item() == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("device", DEVICES)
    def test_sorted_ones_depend_on_ranks_alone(self, device):
        source, source_labels, target, target_labels = draw(width=1)
        source, target = (source * 2).round() / 2, (target * 2).round() / 2  # with ties
        expected = compute_otce(source, source_labels, target, target_labels).item()
        i, j = torch.randperm(30).repeat(2), torch.randperm(40).repeat(3)
        moved = source[i].exp().to(device), source_labels[i], target[j].exp().to(device), target_labels[j]
        value = compute_otce(*moved, n_samples=5)  # which takes all
        assert value.device.type == device
        assert value.item() == pytest.approx(expected, abs=1e-9)

    def test_little_entropy_is_the_exact_one(self):
        _, source_labels, shift, target_labels = draw(8, 8, width=2)
        angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
        source = torch.stack([angle.cos(), angle.sin()], 1)
        sides = source, source_labels, source.flip(0) + 0.02 * shift.tanh(), target_labels  # no other plan is near
        value = compute_otce(*sides, solver="sinkhorn", epsilon=5e-3)
        assert value.item() == pytest.approx(compute_otce(*sides, solver="emd").item(), abs=1e-6)

    @pytest.mark.parametrize(("scale", "solver"), [(1e8, "emd"), (1.0, "sinkhorn")])
    def test_auto_is_exact_where_the_cost_dwarfs_epsilon(self, scale, solver):
        source, source_labels, target, target_labels = draw(width=2)
        sides = source * scale, source_labels, target * scale, target_labels
        assert compute_otce(*sides) == compute_otce(*sides, solver=solver)

    def test_softmax_in_lower_precision_keeps_its_order(self):
        source, source_labels, target, target_labels = draw_softmax()
        expected = compute_otce(source, source_labels, target, target_labels).item()
        value = compute_otce(source.half(), source_labels, target.half(), target_labels, solver="sorted")
        assert value.item() == pytest.approx(expected, abs=0.02)
        # In single precision the second channel alone rounds all these to 1.
        logits = torch.tensor([20.0, 25.0, 30.0, 35.0])
        source = torch.stack([-logits, torch.zeros(4)], 1).softmax(1).float()
        assert (source[:, 1] == 1).all()
        assert compute_otce(source, [0, 0, 1, 1], source.flip(0), [1, 1, 0, 0]) == 0

    def test_sinkhorn_that_does_not_converge_warns(self, monkeypatch):
        monkeypatch.setattr("medtl_ext.metrics.otce.ITERATIONS", 3)
        for epsilon in (0.005, 0.1):  # in the log domain, and not
            with pytest.warns(UserWarning, match=f"did not converge at epsilon {epsilon}"):
                assert compute_otce(*draw(), solver="sinkhorn", epsilon=epsilon) <= 0


class TestDraws:
    def test_are_fair(self):
        sides = draw(400, 400, width=1)
        whole = compute_otce(*sides).item()
        values = [compute_otce(*sides, solver="emd", n_samples=200, repeats=repeats).item() for repeats in (1, 10)]
        assert values == pytest.approx([whole, whole], abs=0.1)
        assert values[0] != values[1]  # other samples in every draw
        assert values[0] != compute_otce(*sides, solver="emd", n_samples=200, repeats=1, seed=1).item()

    def test_only_of_the_larger_side(self):
        sides, options = draw(20, 200), {"solver": "emd", "repeats": 1}
        whole = compute_otce(*sides, **options)
        assert compute_otce(*sides, **options, n_samples=200, seed=1) == whole
        drawn = {compute_otce(*sides, **options, n_samples=50, seed=seed).item() for seed in range(5)}
        assert len(drawn) > 1

    def test_without_foreground(self):
        source, target = torch.linspace(0, 1, 60).view(30, 2), torch.linspace(0, 1, 40).view(20, 2)
        target_labels = (torch.arange(20) == 0).long()
        with pytest.warns(UserWarning, match=r"target_labels holds one class only in [1-9] of 10 draws"):
            compute_otce(source, torch.arange(30) % 2, target, target_labels, solver="emd", n_samples=10)


def sorted_otce(width):
    return compute_otce(*draw(width=width), solver="sorted")


def transported(plan):
    return label_transport(plan, [0, 1], [0, 1, 1])


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, y: (x * torch.nan, y), "source_features holds NaN or Inf"),
            (lambda x, y: (x, y[:-1]), "source_labels has shape .* does not fit source_features"),
            (lambda x, y: (x, y - 1), "source_labels holds the negative label -1"),
            (lambda x, y: (x, y * 0 + 9), "source_features holds 0 sample"),
            (lambda x, y: (x[:, :2], y), "target_features has 3 channels, source_features 2"),
        ],
    )
    def test_of_the_source(self, change, message):
        source, source_labels, target, target_labels = draw()
        for refused in (
            lambda side: compute_otce(*side, target, target_labels, ignore_index=9),
            lambda side: OTCE(side, ignore_index=9).update(target, target_labels),
        ):
            with pytest.raises(InputError, match=message):
                refused(change(source, source_labels))


PLAN = "not a transport plan"


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        *((partial(OTCE, source), "source is") for source in (torch.zeros(3, 2), (torch.zeros(3, 2),), None)),
        *((partial(sorted_otce, width), "'sorted' needs one-dimensional features") for width in (2, 3)),
        *((partial(transported, torch.full((2, 3), value)), PLAN) for value in (torch.nan, -1.0, torch.inf)),
        *((partial(transported, torch.ones(shape)), PLAN) for shape in ((2,), (0, 3))),
        (partial(transported, torch.ones(3, 2)), r"plan has shape \(3, 2\)"),
    ],
)
def test_what_makes_no_sense_is_refused(ask, message):
    with pytest.raises(InputError, match=message):
        ask()


def test_ignored_on_both_sides():
    source, source_labels, target, target_labels = draw()
    source_labels[3:9], target_labels[::4] = 255, 255
    value = compute_otce(source, source_labels, target, target_labels, ignore_index=255)
    keep, left = source_labels != 255, target_labels != 255
    assert value == compute_otce(source[keep], source_labels[keep], target[left], target_labels[left])


class TestEngine:
    @pytest.fixture
    def items(self):
        torch.manual_seed(0)  # float noise between batch sizes may swap two pixels' ranks
        labels = (torch.rand(6, 1, 32, 32) < 0.2).float()
        return [{"image": torch.randn(1, 32, 32) + label, "label": label} for label in labels]

    def test_from_softmax_to_softmax(self, items):
        network, drawn = small_unet(), FeatureSamples(output_transform=probabilities_and_labels)
        evaluate(items[:3], network, drawn=drawn)
        value = evaluate(items[3:], network, otce=OTCE(drawn.compute())).state.metrics["otce"]
        with torch.no_grad():
            probs = network(torch.stack([item["image"] for item in items])).softmax(1)
        labels = torch.stack([item["label"] for item in items])
        expected = compute_otce(probs[:3], labels[:3], probs[3:], labels[3:]).item()
        assert value == pytest.approx(expected, abs=1e-5)

    def test_on_a_layer(self, items):
        network, drawn = small_unet(), FeatureSamples(layer="upcat_1", pixels=20)
        evaluate(items[:3], network, drawn=drawn)
        metric = OTCE(drawn.compute(), layer="upcat_1", pixels=20)
        value = evaluate(items[3:], network, otce=metric).state.metrics["otce"]
        samples = metric.samples()
        assert samples.labels.bincount().tolist() == [20, 20]
        expected = compute_otce(*drawn.compute()[:2], samples.features, samples.labels).item()
        assert value == pytest.approx(expected, abs=1e-9)
