"""The base class of all metrics: growing sums, merging, stored predictions, and engines."""

import tempfile

import pytest
import torch
from ignite.engine import Engine
from metric_cases import evaluate, streamed
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.handlers import from_engine
from monai.networks.nets import BasicUNet
from monai.transforms import Activationsd

from medtl_ext import InputError
from medtl_ext.metrics import (
    LEEP,
    NCE,
    LEEPImageMaps,
    LEEPMap,
    TransferMetric,
    compute_leep,
    compute_leep_image_maps,
    compute_leep_map,
    compute_nce,
)


class Given(TransferMetric):
    """A metric that adds up its input."""

    def update(self, value):
        self._add(value=value)

    def _evaluate(self, sums):
        return sums["value"]


def test_sums_are_the_metrics_own_in_float64_and_grow():
    first = torch.ones(2, dtype=torch.float64)
    metric, twin = Given(), Given()
    for value in (first, first, torch.ones(3)):
        metric.update(value)
    twin.update(first)
    twin.merge(metric)
    assert torch.equal(first, torch.ones(2))
    assert (metric.compute().tolist(), metric.compute().dtype) == ([3, 3, 1], torch.float64)
    assert twin.compute().tolist() == [4, 4, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_many_predictions_move_to_disk(monkeypatch, dtype):
    files, spooled = [], tempfile.SpooledTemporaryFile
    monkeypatch.setattr(
        tempfile, "SpooledTemporaryFile", lambda **how: files.append(spooled(max_size=999)) or files[-1]
    )
    probs = torch.randn(10, 2, 8, 8).softmax(1).to(dtype)
    labels = torch.randint(3, (10, 8, 8))
    leep_map = streamed(LEEPMap(), probs, labels, [3, 1, 6])
    torch.testing.assert_close(leep_map, compute_leep_map(probs, labels), atol=1e-12, rtol=0)
    assert any(file._rolled for file in files)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=3, features=(4, 4, 8, 8, 8, 4), norm="batch").eval()


@pytest.fixture(scope="module")
def cases():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": MetaTensor(torch.randn(1, 16, 24, generator=generator)),
            "label": MetaTensor(torch.randint(3, (1, 16, 24), generator=generator).float()),
        }
        for _ in range(7)
    ]


@pytest.fixture(scope="module")
def expected(network, cases):
    """From one batch. The network's float32 output depends on the batch size in its last bits, hence the 1e-6 below."""
    with torch.no_grad():
        probs = network(torch.stack([case["image"].as_tensor() for case in cases])).softmax(1)
    return probs, torch.stack([case["label"].as_tensor() for case in cases])


def attached(output, **metrics):
    """The values of metrics attached to an engine with this output."""
    engine = Engine(lambda engine, data: output)
    for name, metric in metrics.items():
        metric.attach(engine, name)
    return engine.run([0]).metrics


class TestEvaluator:
    @pytest.mark.parametrize("decollate", [True, False])
    def test_monai_evaluator(self, network, cases, expected, decollate):
        config = {"_target_": "medtl_ext.metrics.LEEPMap", "stride": 4}
        parsed = ConfigParser({"leep_map": config}).get_parsed_content("leep_map")
        maps = {"leep_map": parsed, "image_maps": LEEPImageMaps()}
        how = {"decollate": decollate}
        evaluator = evaluate(cases, network, batch_size=3, how=how, leep=LEEP(), nce=NCE(), **maps)
        evaluator.run()  # a second epoch starts afresh
        metrics = evaluator.state.metrics
        assert isinstance(metrics["leep"], float)
        assert metrics["leep"] == evaluator.state.best_metric
        assert metrics["leep"] == pytest.approx(compute_leep(*expected).item(), abs=1e-6)
        assert metrics["nce"] == pytest.approx(compute_nce(expected[0].argmax(1), expected[1]).item(), abs=1e-6)
        torch.testing.assert_close(metrics["leep_map"], compute_leep_map(*expected, stride=4), atol=1e-6, rtol=0)
        torch.testing.assert_close(metrics["image_maps"], compute_leep_image_maps(*expected), atol=1e-6, rtol=0)

    def test_probabilities_are_not_put_through_a_softmax_again(self, network, cases, expected):
        how = {"postprocessing": Activationsd(keys="pred", softmax=True)}
        with pytest.raises(InputError, match="expected the network's raw logits"):
            evaluate(cases, network, how=how, leep=LEEP())
        informed = evaluate(cases, network, how=how, leep=LEEP(output_transform=from_engine(["pred", "label"])))
        assert informed.state.metrics["leep"] == pytest.approx(compute_leep(*expected).item(), abs=1e-6)


class TestOutput:
    @pytest.mark.parametrize("decollate", [True, False])
    @pytest.mark.parametrize(("shape", "n_classes"), [((4, 1, 5, 6), 2), ((12, 3), 4)], ids=["a sigmoid", "images"])
    def test_heads_of_any_kind_in_half_precision(self, shape, n_classes, decollate):
        binary = shape[1] == 1
        logits, labels = torch.randn(shape).half(), torch.randint(n_classes, shape if binary else shape[:1])
        output = {"pred": logits, "label": labels}
        if decollate:
            rows = zip(logits, labels if binary else labels.tolist(), strict=True)
            output = [{"pred": row, "label": label} for row, label in rows]
        metrics = attached(output, leep=LEEP(), nce=NCE())
        probs = logits.float().sigmoid() if binary else logits.float().softmax(1)
        assert metrics["leep"] == pytest.approx(compute_leep(probs, labels).item(), abs=1e-9)
        classes = probs > 0.5 if binary else probs.argmax(1)
        assert metrics["nce"] == pytest.approx(compute_nce(classes, labels).item(), abs=1e-9)

    def test_images_of_several_sizes_in_one_batch(self):
        images = [(torch.randn(2, *grid), torch.arange(grid[1]).expand(1, *grid) % 2) for grid in [(3, 4), (5, 2)]]
        output = [{"pred": logits, "label": labels} for logits, labels in images]
        maps = attached(output, maps=LEEPImageMaps())["maps"]
        assert [tuple(one_map.shape) for one_map in maps] == [(3, 4), (5, 2)]

    def test_output_transform_to_a_mapping(self):
        probs, labels = torch.randn(6, 2).softmax(1), torch.arange(6) % 3
        leep = LEEP(output_transform=lambda output: {"target_labels": output[0], "source_probs": output[1]})
        assert attached((labels, probs), leep=leep)["leep"] == pytest.approx(compute_leep(probs, labels).item())

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ([{"pred": torch.zeros(2, 3, 3), "image": 0}], "no 'label', only image, pred"),
            ({"label": torch.zeros(1, 1), "pred": None}, "no 'pred'"),
            (torch.zeros(3), "is Tensor; expected MONAI's dictionaries"),
            ([{"pred": torch.tensor([[[0.0, 1.0]]]), "label": torch.zeros(1, 1, 2)}], "the network's raw logits"),
            ([{"pred": torch.tensor([[[0, 2]]]), "label": torch.zeros(1, 1, 2)}], "the network's raw logits"),
        ],
        ids=["no label", "no pred", "a tensor", "a mask", "classes"],
    )
    def test_without_what_is_needed(self, output, message):
        with pytest.raises(InputError, match=message):
            attached(output, leep=LEEP())
