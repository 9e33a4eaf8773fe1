"""What every metric inherits: sums that grow and merge, the spool, engines, several processes."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from ignite.engine import Engine
from ignite.metrics import Metric
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
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
from medtl_ext.metrics._spool import PredictionSpool


class ClassSums(TransferMetric):
    """The smallest metric: what was predicted for each class."""

    def update(self, source_probs, target_labels):
        sums = torch.zeros(int(target_labels.max()) + 1, source_probs.shape[1], dtype=source_probs.dtype)
        self._add(sums=sums.index_add_(0, target_labels, source_probs), count=torch.tensor(len(source_probs)))

    def _evaluate(self, sums):
        return sums["sums"] / sums["count"]


def batch(n=6, *, grid=(), n_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 2, *grid, generator=generator) * 2
    return logits.softmax(1), torch.randint(n_classes, (n, *grid), generator=generator)


class TestSums:
    def test_is_what_monai_expects_of_a_metric(self):
        assert isinstance(LEEP(), Metric)
        assert LEEP.higher_is_better
        assert LEEP.inputs == ("source_probs", "target_labels")

    def test_float64_sums_grow_with_new_classes(self):
        metric = ClassSums()
        metric.update(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        metric.update(torch.tensor([[0.25, 0.75]]), torch.tensor([2]))
        metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
        expected = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64) / 3
        assert torch.equal(metric.compute(), expected)

    def test_compute_changes_nothing(self):
        metric = LEEP()
        metric.update(*batch(seed=1))
        assert metric.compute() == metric.compute()
        metric.update(*batch(seed=2))
        both = [torch.cat(parts) for parts in zip(batch(seed=1), batch(seed=2), strict=True)]
        assert metric.compute().item() == pytest.approx(compute_leep(*both).item(), abs=1e-12)

    def test_reset_forgets(self):
        for metric in (LEEP(), NCE()):
            source = batch(seed=1)[0] if isinstance(metric, LEEP) else batch(seed=1)[0].argmax(1)
            metric.update(source, batch(seed=1)[1])
            metric.reset()
            with pytest.raises(InputError, match="has seen no sample; call update"):
                metric.compute()

    def test_what_was_handed_in_may_change_afterwards(self):
        probs, labels = batch()
        metric = LEEP()
        metric.update(probs, labels)
        expected = compute_leep(probs, labels).item()
        probs.fill_(0.5)
        labels.zero_()
        assert metric.compute().item() == pytest.approx(expected, abs=1e-12)

    def test_sums_are_the_metrics_own(self):
        first = torch.ones(2, dtype=torch.float64)
        metric = ClassSums()
        metric._add(sums=first, count=torch.tensor(1))
        metric._add(sums=torch.ones(3, 1).squeeze(1), count=torch.tensor(1))
        metric._add(sums=first, count=torch.tensor(2))
        assert torch.equal(first, torch.ones(2))
        assert torch.equal(metric.compute(), torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64) / 4)
        twin = ClassSums()
        twin._add(sums=first, count=torch.tensor(1))
        twin._add(sums=first, count=torch.tensor(1))
        assert torch.equal(first, torch.ones(2))

    def test_merge_refuses_another_class(self):
        with pytest.raises(InputError, match="other is LEEPMap; expected LEEP"):
            LEEP().merge(LEEPMap())

    def test_merge_refuses_another_grid(self):
        first, second = LEEPMap(stride=4), LEEPMap(stride=4)
        first.update(*batch(grid=(7, 8)))
        second.update(*batch(grid=(8, 8)))
        with pytest.raises(InputError, match="one grid"):
            first.merge(second)
        assert torch.equal(first.compute(), compute_leep_map(*batch(grid=(7, 8)), stride=4))

    def test_merge_with_itself_and_into_an_empty_one(self):
        metric, empty = LEEP(), LEEP()
        metric.update(*batch())
        empty.merge(metric)
        metric.merge(metric)
        assert metric.compute().item() == pytest.approx(empty.compute().item(), abs=1e-12)
        assert len(metric._spool) == 2

    def test_travels_between_processes(self):
        metric = LEEPMap()
        metric.update(*batch(grid=(4, 5)))
        for twin in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)):
            assert torch.equal(twin.compute(), metric.compute())
            twin.update(*batch(grid=(4, 5), seed=3))
        assert torch.equal(metric.compute(), compute_leep_map(*batch(grid=(4, 5))))


class TestSpool:
    @pytest.mark.parametrize("memory_limit", [2**20, 10], ids=["in memory", "on disk"])
    def test_gives_back_what_it_was_given(self, memory_limit):
        spool = PredictionSpool(memory_limit)
        given = [
            (torch.rand(3, 2, 4), torch.arange(3, dtype=torch.int16)),
            (torch.rand(2, 2, 5).half().transpose(1, 2), torch.tensor(7)),
            (torch.rand(4).bfloat16(), torch.rand(2, 2, dtype=torch.float64)),
        ]
        for tensors in given:
            spool.append(*tensors)
        for _ in range(2):
            for expected, found in zip(given, spool, strict=True):
                for one, other in zip(expected, found, strict=True):
                    assert one.dtype == other.dtype
                    assert torch.equal(one, other)

    def test_moves_to_disk(self, monkeypatch):
        monkeypatch.setattr("medtl_ext.metrics.leep.PredictionSpool", lambda: PredictionSpool(1000))
        metric = LEEPMap()
        parts = [batch(grid=(8, 8), seed=seed) for seed in range(5)]
        for part in parts:
            metric.update(*part)
        assert metric._spool._file._rolled
        expected = compute_leep_map(*map(torch.cat, zip(*parts, strict=True)))
        torch.testing.assert_close(metric.compute(), expected, atol=1e-12, rtol=0)


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
    """In one batch; a network's float32 output differs in the last bits between batch sizes, hence the 1e-6 below."""
    with torch.no_grad():
        probs = network(torch.stack([case["image"].as_tensor() for case in cases])).softmax(1)
    return probs, torch.stack([case["label"].as_tensor() for case in cases])


class TestEngines:
    @pytest.mark.parametrize("decollate", [True, False])
    def test_monai_evaluator(self, network, cases, expected, decollate):
        image_maps = LEEPImageMaps()
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(Dataset(cases), batch_size=3),
            network=network,
            key_val_metric={"leep": LEEP()},
            additional_metrics={"leep_map": LEEPMap(stride=4), "nce": NCE()},
            decollate=decollate,
        )
        image_maps.attach(evaluator, "image_maps")
        for _ in range(2):  # a second epoch starts afresh
            evaluator.run()
        metrics = evaluator.state.metrics
        assert isinstance(metrics["leep"], float)
        assert metrics["leep"] == evaluator.state.best_metric
        assert metrics["leep"] == pytest.approx(compute_leep(*expected).item(), abs=1e-6)
        assert metrics["nce"] == pytest.approx(compute_nce(expected[0].argmax(1), expected[1]).item(), abs=1e-6)
        torch.testing.assert_close(metrics["leep_map"], compute_leep_map(*expected, stride=4), atol=1e-6, rtol=0)
        torch.testing.assert_close(metrics["image_maps"], compute_leep_image_maps(*expected), atol=1e-6, rtol=0)

    def test_bundle_config_by_class_name_alone(self, tmp_path, network, cases, expected):
        config = {
            "evaluator": {
                "_target_": "SupervisedEvaluator",
                "device": "$torch.device('cpu')",
                "val_data_loader": "$monai.data.DataLoader(monai.data.Dataset(@cases), batch_size=2)",
                "network": "$@net",
                "key_val_metric": {"leep": {"_target_": "medtl_ext.metrics.LEEP"}},
                "additional_metrics": {"leep_map": {"_target_": "medtl_ext.metrics.LEEPMap", "smoothing": 5}},
            }
        }
        (tmp_path / "evaluate.json").write_text(json.dumps(config))
        parser = ConfigParser(globals={"torch": "torch", "monai": "monai"})
        parser.read_config(tmp_path / "evaluate.json")
        parser["cases"], parser["net"] = cases, network
        evaluator = parser.get_parsed_content("evaluator")
        evaluator.run()
        assert evaluator.state.metrics["leep"] == pytest.approx(compute_leep(*expected).item(), abs=1e-6)
        leep_map = compute_leep_map(*expected, smoothing=5)
        torch.testing.assert_close(evaluator.state.metrics["leep_map"], leep_map, atol=1e-6, rtol=0)

    def test_probabilities_are_not_put_through_a_softmax_again(self, network, cases, expected):
        def evaluator(metric):
            return SupervisedEvaluator(
                device=torch.device("cpu"),
                val_data_loader=DataLoader(Dataset(cases), batch_size=3),
                network=network,
                postprocessing=Activationsd(keys="pred", softmax=True),
                key_val_metric={"leep": metric},
            )

        with pytest.raises(InputError, match="expected the network's raw logits"):
            evaluator(LEEP()).run()
        informed = evaluator(LEEP(output_transform=from_engine(["pred", "label"])))
        informed.run()
        assert informed.state.metrics["leep"] == pytest.approx(compute_leep(*expected).item(), abs=1e-6)

    @pytest.mark.parametrize("pred", [torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0, 2]]])])
    def test_classes_instead_of_logits(self, pred):
        engine = Engine(lambda engine, data: [{"pred": pred, "label": torch.zeros(1, 1, 2)}])
        LEEP().attach(engine, "leep")
        with pytest.raises(InputError, match="expected the network's raw logits"):
            engine.run([0])

    def test_sigmoid_head_and_half_precision(self):
        logits, labels = torch.randn(4, 1, 5, 6), torch.randint(2, (4, 1, 5, 6))
        engine = Engine(lambda engine, data: {"pred": logits.half(), "label": labels})
        LEEP().attach(engine, "leep")
        expected = compute_leep(logits.half().float().sigmoid(), labels)
        assert engine.run([0]).metrics["leep"] == pytest.approx(expected.item(), abs=1e-9)

    def test_classification(self):
        logits = torch.randn(12, 3)
        labels = torch.arange(12) % 4
        output = [{"pred": row, "label": label} for row, label in zip(logits, labels.tolist(), strict=True)]
        engine = Engine(lambda engine, data: output)
        LEEP().attach(engine, "leep")
        NCE().attach(engine, "nce")
        metrics = engine.run([0]).metrics
        assert metrics["leep"] == pytest.approx(compute_leep(logits.softmax(1), labels).item(), abs=1e-9)
        assert metrics["nce"] == pytest.approx(compute_nce(logits.argmax(1), labels).item(), abs=1e-9)

    def test_images_of_several_sizes_in_one_batch(self):
        output = [
            {"pred": torch.randn(2, *grid), "label": torch.arange(grid[1]).expand(1, *grid) % 2}
            for grid in [(3, 4), (5, 2)]
        ]
        engine = Engine(lambda engine, data: output)
        LEEPImageMaps().attach(engine, "maps")
        maps = engine.run([0]).metrics["maps"]
        assert [tuple(one_map.shape) for one_map in maps] == [(3, 4), (5, 2)]

    def test_output_transform_to_a_mapping(self):
        probs, labels = batch()
        engine = Engine(lambda engine, data: (labels, probs))
        transform = lambda output: {"target_labels": output[0], "source_probs": output[1]}  # noqa: E731
        LEEP(output_transform=transform).attach(engine, "leep")
        assert engine.run([0]).metrics["leep"] == pytest.approx(compute_leep(probs, labels).item(), abs=1e-12)

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ([{"pred": torch.zeros(2, 3, 3), "image": 0}], "no 'label', only image, pred"),
            ({"label": torch.zeros(1, 1), "pred": None}, "no 'pred'"),
            (torch.zeros(3), "is Tensor; expected MONAI's dictionaries"),
        ],
    )
    def test_output_without_what_is_needed(self, output, message):
        engine = Engine(lambda engine, data: output)
        LEEP().attach(engine, "leep")
        with pytest.raises(InputError, match=message):
            engine.run([0])


def in_one_of_two_processes(rank, rendezvous, results):
    """Each process feeds its share; the results of both are compared in the test."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    probs, labels = batch(8, grid=(6, 7), n_classes=4)
    labels[:3] = labels[:3].clamp(max=1)
    found = {}
    for name, share in {"split": [slice(0, 3), slice(3, 8)], "one idle": [slice(0, 8), slice(0, 0)]}.items():
        for metric in (
            LEEP(),
            LEEPMap(),
            LEEPMap(stride=4, smoothing=3.0),
            LEEPMap(estimator="global"),
            LEEPImageMaps(),
        ):
            for k in range(share[rank].start, share[rank].stop):
                metric.update(probs[k : k + 1], labels[k : k + 1])
            first, again = metric.compute(), metric.compute()
            assert again == [] if isinstance(first, list) else torch.equal(first, again)
            found.setdefault(name, []).append(first)
        nce = NCE()
        if share[rank].start < share[rank].stop:
            nce.update(probs[share[rank]].argmax(1), labels[share[rank]])
        found[name].append(nce.compute())
    nobody = LEEP()
    with pytest.raises(InputError, match="has seen no sample"):
        nobody.compute()
    torch.save(found, f"{results}.{rank}")
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes_equal_one(tmp_path):
    # Forked, because importing everything again in two new processes takes most of a minute on a small machine.
    arguments = str(tmp_path / "rendezvous"), str(tmp_path / "found")
    torch.multiprocessing.start_processes(in_one_of_two_processes, arguments, nprocs=2, start_method="fork")
    probs, labels = batch(8, grid=(6, 7), n_classes=4)
    labels[:3] = labels[:3].clamp(max=1)
    maps = compute_leep_image_maps(probs, labels)
    common = [
        compute_leep(probs, labels),
        compute_leep_map(probs, labels),
        compute_leep_map(probs, labels, stride=4, smoothing=3.0),
        compute_leep_map(probs, labels, estimator="global"),
    ]
    own = {"split": [maps[:3], maps[3:]], "one idle": [maps, []]}
    for rank in range(2):
        found = torch.load(tmp_path / f"found.{rank}")
        for name, values in found.items():
            expected = [*common, own[name][rank], compute_nce(probs.argmax(1), labels)]
            for value, reference in zip(values, expected, strict=True):
                if isinstance(value, list):
                    assert value == reference == []
                else:
                    torch.testing.assert_close(value, reference, atol=1e-12, rtol=0)
