"""Weight maps, resumable checkpoints and scores per patient, on real engines."""

from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import refused
from drawing import numpy_generator
from ignite.engine import Events
from metric_cases import evaluate
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import IgniteMetricHandler, LrScheduleHandler, from_engine
from monai.inferers import SliceInferer
from monai.metrics import DiceMetric, MeanIoU
from monai.transforms import AsDiscreted, LoadImaged, RandShiftIntensityd
from torch import nn

from medtl_ext import InputError
from medtl_ext.data import SliceDataset
from medtl_ext.engines import MixedPrecisionInferer, WeightedTrainer, has_bfloat16
from medtl_ext.handlers import EpochSeed, ResumableCheckpoint, SubjectTable, TrainingLength, WeightMap
from medtl_ext.losses import RiskWeightedLoss, frequency_map, risk_map
from medtl_ext.metrics import LEEP, LEEPImageMaps, LEEPMap, compute_leep_map
from medtl_ext.transfer import Predictions


@pytest.fixture
def slices(tmp_path):
    """Three patients of 12 x 10 x 4 voxels, 2 x 2 x 4 mm, with a bright square; written as NIfTI, read as slices."""
    rng = np.random.default_rng(0)
    affine = np.diag([2.0, 2.0, 4.0, 1.0])
    affine[:3, 3] = [-30, -20, 10]
    data = []
    for subject in "abc":
        label = np.zeros((12, 10, 4), np.uint8)
        x, y = rng.integers(1, 6, 2)
        label[x : x + 4, y : y + 3] = 1
        image = (label + 0.3 * rng.standard_normal(label.shape)).astype(np.float32)
        entry = {"subject": subject}
        for key, array in {"image": image, "label": label}.items():
            entry[key] = str(tmp_path / f"{subject}_{key}.nii.gz")
            nib.save(nib.Nifti1Image(array, affine), entry[key])
        data.append(entry)
    return SliceDataset(data, LoadImaged(["image", "label"], ensure_channel_first=True), progress=False), affine


def small_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def leep_pass(dataset, network, leep_map):
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(dataset.plain(), batch_size=5),
        network=network,
        key_val_metric={"leep": LEEP()},
        additional_metrics={"leep_map": leep_map},
    )


def trainer_of(dataset, network, loss, handlers=(), epochs=1, optimizer=None, kind=WeightedTrainer):
    return kind(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(dataset, batch_size=4, shuffle=True),
        network=network,
        optimizer=optimizer or torch.optim.Adam(network.parameters(), lr=0.01),
        loss_function=loss,
        train_handlers=list(handlers),
    )


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


def kept_in(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def cross_entropy():
    return RiskWeightedLoss(nn.CrossEntropyLoss(reduction="none"))


def test_the_shared_map_is_computed_at_the_start_and_lies_on_the_patients_grid(slices, tmp_path):
    dataset, affine = slices
    source, loss = small_network().eval(), cross_entropy()
    given = {"evaluator": leep_pass(dataset, source, LEEPMap()), "to_weight": risk_map, "output_dir": tmp_path}
    handler = WeightMap(dataset=dataset, loss=loss, **given)
    before = [parameter.clone() for parameter in source.parameters()]
    trainer_of(dataset, small_network(1), loss, [handler], epochs=3).run()

    with torch.no_grad():
        probs = source(torch.stack([item["image"] for item in dataset.plain()])).softmax(1)
    leep = compute_leep_map(probs, torch.stack([item["label"] for item in dataset.plain()]))
    torch.testing.assert_close(loss.weight, risk_map(leep).to(loss.weight), atol=1e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, source.parameters(), strict=True))
    assert given["evaluator"].network is source  # also after the pass with the trained network

    written = nib.load(tmp_path / "leep_before.nii.gz")
    np.testing.assert_allclose(written.affine, affine)
    assert written.shape == (12, 10, 4)
    np.testing.assert_allclose(written.get_fdata()[..., 2], leep.numpy(), atol=1e-5)
    after = nib.load(tmp_path / "leep_after.nii.gz").get_fdata()
    assert not np.allclose(after, written.get_fdata())


def test_maps_per_volume_are_written(slices, tmp_path):
    volumes = SliceDataset(slices[0].data, slices[0].transform, slices="volume", progress=False)
    maps = [torch.full((12, 10, 4), float(number)) for number in range(3)]
    loss = RiskWeightedLoss(nn.CrossEntropyLoss(reduction="none"))
    handler = WeightMap(dataset=volumes, loss=loss, to_weight=lambda _: maps, output_dir=tmp_path)
    handler.before(None)
    assert [nib.load(tmp_path / f"weight_{name}.nii.gz").get_fdata().mean() for name in "abc"] == [0, 1, 2]


def test_a_map_per_image_follows_its_image_and_reaches_the_loss(slices, tmp_path):
    dataset, affine = slices
    seen = []

    class Recording(RiskWeightedLoss):
        def forward(self, input, target, weight=None):
            seen.append((target, weight))
            return super().forward(input, target, weight)

    loss = Recording(nn.CrossEntropyLoss(reduction="none"))
    evaluator = leep_pass(dataset, small_network().eval(), LEEPImageMaps())
    given = {"evaluator": evaluator, "to_weight": risk_map, "output_dir": tmp_path}
    handler = WeightMap(dataset=dataset, loss=loss, **given)
    trainer_of(dataset, small_network(1), loss, [handler]).run()
    assert seen
    assert all(weight is not None and weight.shape == target.shape for target, weight in seen)
    maps = torch.stack([item["weight"] for item in dataset.plain()])
    assert 1.0 <= float(maps.min()) < float(maps.max()) <= 10.0

    written = nib.load(tmp_path / "weight_a.nii.gz")
    first = dataset.plain()[0]
    np.testing.assert_allclose(written.affine, affine)
    np.testing.assert_allclose(written.get_fdata()[..., first["slice"]], first["weight"][0].numpy(), atol=1e-5)


def test_a_control_never_sees_the_source(slices):
    dataset, _ = slices
    loss = cross_entropy()
    trainer_of(dataset, small_network(), loss, [WeightMap(dataset=dataset, loss=loss, to_weight=frequency_map)]).run()
    labels = torch.stack([item["label"][0] for item in dataset.plain()])
    torch.testing.assert_close(loss.weight, 10 ** (labels > 0).float().mean(0), atol=1e-4, rtol=1e-4)


def test_the_weighted_trainer_is_the_stock_one_without_weights(slices):
    dataset, _ = slices
    results = []
    for kind in (SupervisedTrainer, WeightedTrainer):
        network = small_network()
        trainer_of(dataset, network, cross_entropy(), epochs=2, kind=kind).run()
        results.append(network[0].weight.detach())
    assert torch.equal(*results)


@pytest.mark.skipif(not has_bfloat16(), reason="this processor does not compute in bfloat16")
def test_mixed_precision_rounds_the_forward_pass_and_nothing_else():
    network, image = small_network(), torch.rand(4, 1, 12, 10)
    exact, rounded = network(image), MixedPrecisionInferer()(image, network)
    rounded.square().mean().backward()
    assert {rounded.dtype, network[0].weight.dtype, network[0].weight.grad.dtype} == {torch.float32}
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("convolution", [nn.Conv3d, nn.ConvTranspose3d])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_thin_maps_stay_in_float32(convolution, memory_format, monkeypatch):
    """In bfloat16 the gradient of such a kernel's weights reads uninitialised memory."""
    monkeypatch.setattr("medtl_ext.engines.has_bfloat16", lambda: True)
    seen = []
    for slices in (1, 2, 3):
        network = nn.Sequential(convolution(12, 12, 3, padding=1), nn.Identity()).to(memory_format=memory_format)
        network[1].register_forward_hook(lambda *parts: seen.append(parts[2].dtype))
        image = torch.rand(2, 12, slices, 6, 6)
        unwritten = [torch.full((2**power,), torch.nan) for power in range(8, 20) for _ in range(4)]
        del unwritten
        MixedPrecisionInferer()(image, network).square().mean().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())
    assert seen == [torch.float32, torch.float32, torch.bfloat16]


class Scripted:
    """Replaces an evaluator: its score in every epoch is given."""

    def __init__(self, scores):
        self.scores = dict(enumerate(scores, 1))
        self.state = SimpleNamespace(epoch=0, metrics={}, key_metric_name="dice")

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.validate)

    def validate(self, engine):
        self.state.epoch = engine.state.epoch
        self.state.metrics = {"dice": self.scores[self.state.epoch]}


def train_with_scores(dataset, folder, scores, epochs):
    network = small_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    evaluator = Scripted(scores)
    kept = {"network": network, "optimizer": optimizer}
    checkpoint = ResumableCheckpoint(save_dir=folder, evaluator=evaluator, save_dict=kept)
    trainer = trainer_of(dataset, network, cross_entropy(), [evaluator, checkpoint], epochs, optimizer)
    trainer.run()
    return trainer, checkpoint, network


def test_a_resumed_run_continues_and_never_replaces_a_better_model(slices, tmp_path):
    dataset, _ = slices
    train_with_scores(dataset, tmp_path, [0.3, 0.9], epochs=2)
    best = kept_in(tmp_path)
    trainer, checkpoint, _ = train_with_scores(dataset, tmp_path, [0, 0, 0.5, 0.6], epochs=4)
    assert trainer.state.epoch == 4
    assert (checkpoint.best, checkpoint.best_epoch) == (0.9, 2)
    assert same_weights(kept_in(tmp_path), best)
    _, checkpoint, network = train_with_scores(dataset, tmp_path, [0, 0, 0, 0, 0.95], epochs=5)
    assert checkpoint.best_epoch == 5
    assert same_weights(kept_in(tmp_path), network.state_dict())


def test_a_training_that_breaks_down_ends_and_keeps_what_was_good(slices, tmp_path, monkeypatch):
    _, _, network = train_with_scores(slices[0], tmp_path, [0.3], epochs=1)
    monkeypatch.setitem(globals(), "cross_entropy", lambda: lambda logits, label: logits.sum() * float("nan"))
    assert "broke down in epoch 2" in refused(lambda: train_with_scores(slices[0], tmp_path, [0, 0.9], epochs=2))
    assert same_weights(kept_in(tmp_path), network.state_dict())
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("written", [0, 1])
def test_killed_while_it_writes_either_file_a_run_loses_nothing(slices, tmp_path, monkeypatch, written):
    _, _, first = train_with_scores(slices[0], tmp_path, [0.3], epochs=1)
    real_save, saved = torch.save, []

    def killed(content, path):
        real_save(content, path)
        saved.append(path)
        if len(saved) > written:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train_with_scores(slices[0], tmp_path, [0, 0.9], epochs=2)
    monkeypatch.undo()
    assert same_weights(kept_in(tmp_path), first.state_dict())
    _, checkpoint, best = train_with_scores(slices[0], tmp_path, [0, 0.9], epochs=2)
    assert (checkpoint.best, checkpoint.best_epoch) == (0.9, 2)
    assert same_weights(kept_in(tmp_path), best.state_dict())
    assert sorted(path.name for path in tmp_path.glob("*.pt*")) == ["last.pt", "model.pt"]


def test_a_finished_run_does_not_train_again(slices, tmp_path):
    dataset, _ = slices
    _, _, first = train_with_scores(dataset, tmp_path, [0.1, 0.2], epochs=2)
    _, _, second = train_with_scores(dataset, tmp_path, [0.1, 0.2], epochs=2)
    assert same_weights(first.state_dict(), second.state_dict())


@pytest.mark.parametrize(("scores", "best"), [([0.1, float("nan")], 1), ([float("nan"), 0.1], 2)])
def test_a_score_that_is_nan_is_worse_than_any(slices, tmp_path, scores, best):
    _, checkpoint, _ = train_with_scores(slices[0], tmp_path, scores, epochs=2)
    assert checkpoint.best_epoch == best


def test_a_damaged_checkpoint_says_what_to_do(slices, tmp_path):
    train_with_scores(slices[0], tmp_path, [0.1], epochs=1)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"last.pt is damaged; delete it to start the training again\."):
        train_with_scores(slices[0], tmp_path, [0.1, 0.2], epochs=2)


def test_a_checkpoint_of_another_network_says_so(slices, tmp_path):
    torch.save({"network": {}, "optimizer": {}, "epoch": 1, "best": 0.0, "best_epoch": 1}, tmp_path / "last.pt")
    network = small_network()
    checkpoint = ResumableCheckpoint(save_dir=tmp_path, save_dict={"network": network})
    with pytest.raises(InputError, match="is of another run"):
        trainer_of(slices[0], network, cross_entropy(), [checkpoint]).run()


def test_the_subject_table_scores_every_patient_and_class(slices):
    dataset, _ = slices
    load = LoadImaged(["image", "label"], ensure_channel_first=True)
    volumes = [load(dict(entry)) for entry in dataset.data]
    volumes[2]["label"] = volumes[2]["label"] * 0
    volumes[2]["image"] = volumes[2]["image"] * 0 - 1
    bright = nn.Conv2d(1, 3, 1)  # is class 1, and class 2 is nowhere
    bright.weight.data, bright.bias.data = torch.tensor([0.0, 1, 0]).reshape(3, 1, 1, 1), torch.tensor([0.5, 0, -9])
    pair = from_engine(["pred", "label"])
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(volumes, batch_size=1),
        network=bright,
        inferer=SliceInferer(spatial_dim=2, roi_size=(12, 10), sw_batch_size=4),
        postprocessing=AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=3),
        key_val_metric={"dice": IgniteMetricHandler(DiceMetric(False, ignore_empty=False), output_transform=pair)},
        additional_metrics={"iou": IgniteMetricHandler(MeanIoU(False, ignore_empty=False), output_transform=pair)},
        val_handlers=[SubjectTable(class_names=["ED", "ET"])],
    )
    evaluator.run()
    table = evaluator.state.subject_table
    more = ["hd95_mm", "assd_mm", "lesion_recall", "lesion_precision", "volume_ml", "truth_ml"]
    assert list(table.columns) == ["subject", "class", "dice", "iou", *more, "empty"]
    for volume, patient in zip(volumes, ("p1", "p2", "p1"), strict=True):
        volume["patient"] = patient
    evaluator.run()
    scans = evaluator.state.subject_table
    assert scans.pop("patient").tolist() == ["p1", "p1", "p2", "p2", "p1", "p1"]
    pd.testing.assert_frame_equal(scans, table)
    assert list(zip(table["subject"], table["class"], strict=True)) == list(product("abc", ["ED", "ET"]))
    assert table["empty"].tolist() == [False, True, False, True, True, True]
    predicted, real = volumes[0]["image"][0] > 0.5, volumes[0]["label"][0] > 0
    expected = 2 * (predicted & real).sum() / (predicted.sum() + real.sum())
    assert table.dice[0] == pytest.approx(float(expected))
    assert 0 < table.iou[0] < table.dice[0] < 1
    assert table.dice[4] == table.iou[4] == table.dice[1] == 1.0


@pytest.mark.parametrize("decollate", [False, True])
def test_scans_of_a_patient_are_kept_as_one_and_a_subject_without_a_patient_as_itself(decollate):
    items = [{"label": torch.zeros(1, 4, 4), "subject": subject} for subject in ("b1", "a2", "a1", "a1")]
    for place, item in enumerate(items):
        item |= {"image": torch.full((2, 4, 4), float(place)), "slice": 5 - place}

    def seen(data):
        how = {"batch_size": 3, "how": {"decollate": decollate}}
        return evaluate(data, nn.Identity(), **how, predictions=Predictions()).state.metrics["predictions"]

    alone = seen(items)
    assert (alone.names, alone.groups.tolist()) == (("a1", "a2", "b1"), [0, 0, 1, 2])
    scans = seen([item | {"patient": item["subject"][0]} for item in items])
    assert (scans.names, scans.groups.tolist()) == (("a", "b"), [0, 0, 0, 1])
    assert torch.equal(scans.features, alone.features)  # in the order of subject and slice


class TestEpochSeed:
    @staticmethod
    def batches(*, epochs: int, resume_after: int = 0, seed: int = 7) -> dict[int, list[torch.Tensor]]:
        """The images of a training by epoch; the initial random state differs in each call."""
        shift = RandShiftIntensityd("image", offsets=5.0, prob=1.0).set_random_state(numpy_generator().integers(1000))
        data = [{"image": torch.full((1, 4, 4), float(n)), "label": torch.zeros(1, 4, 4)} for n in range(6)]
        dataset, seen = Dataset(data, shift), {}
        trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=epochs,
            epoch_length=2,  # of three batches: an epoch ends in the middle of the loader
            train_data_loader=DataLoader(dataset, batch_size=2, shuffle=True),
            network=(network := nn.Conv2d(1, 1, 1)),
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            loss_function=nn.MSELoss(),
            train_handlers=[EpochSeed(dataset=dataset, seed=seed)],
        )

        @trainer.on(Events.STARTED)
        def resume(engine):
            engine.state.epoch = resume_after
            engine.state.iteration = resume_after * engine.state.epoch_length

        @trainer.on(Events.ITERATION_COMPLETED)
        def note(engine):
            images = torch.stack([item["image"].as_tensor() for item in engine.state.output])
            seen.setdefault(engine.state.epoch, []).append(images)

        trainer.run()
        return seen

    def test_a_resumed_run_sees_what_it_would_have_seen(self):
        whole, resumed = self.batches(epochs=4), self.batches(epochs=4, resume_after=2)
        assert sorted(resumed) == [3, 4]
        for epoch, images in resumed.items():
            assert len(images) == 2
            assert all(torch.equal(a, b) for a, b in zip(whole[epoch], images, strict=True))

    def test_every_epoch_and_every_seed_is_another(self):
        whole, other = self.batches(epochs=2), self.batches(epochs=2, seed=8)
        values = [torch.cat(images).flatten() for images in (whole[1], whole[2], other[1])]
        assert not any(torch.equal(values[a], values[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


class TestTrainingLength:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock in seconds; the first step of a process takes 50 s more."""
        clock = SimpleNamespace(now=0.0)
        monkeypatch.setattr("medtl_ext.handlers.perf_counter", lambda: clock.now)
        return clock

    @staticmethod
    def train(dataset, folder, clock, *, epochs=1, stop_after=None, **options):
        """Train with three steps of 2 seconds an epoch; the learning rates of the epochs, and the handler."""
        network = small_network()
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=epochs)
        evaluator = Scripted([])
        evaluator.run = lambda epoch: evaluator.state.metrics.update(dice=epoch / 100)
        length = TrainingLength(evaluator=evaluator, lr_scheduler=schedule, save_dir=folder, **options)
        states = {"network": network, "optimizer": optimizer, "lr_scheduler": schedule, "length": length}
        handlers = [length, LrScheduleHandler(schedule, print_lr=False)]
        handlers += [ResumableCheckpoint(save_dir=folder, save_dict=states)]
        trainer = trainer_of(dataset, network, cross_entropy(), handlers, epochs, optimizer)
        assert trainer.state.epoch_length == 3
        rates = []

        @trainer.on(Events.ITERATION_STARTED)
        def work(engine):
            clock.now += 2 + 50 * (engine.state.iteration == 1)

        @trainer.on(Events.EPOCH_STARTED)
        def note(engine):
            rates.append(round(optimizer.param_groups[0]["lr"], 9))
            if engine.state.epoch - 1 == stop_after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) if stop_after else nullcontext():
            trainer.run()
        return rates, length

    def test_minutes_are_as_many_epochs_with_the_schedule_of_so_many(self, slices, tmp_path, clock, caplog):
        settings = {"epochs": 1, "minutes": 0.75}
        caplog.set_level("INFO")
        rates, length = self.train(slices[0], tmp_path / "a", clock, minutes=0.75, settings=settings)
        assert settings == {"epochs": 7, "minutes": None}  # 45 seconds, 6 an epoch
        assert "21 training steps, about 0.7 minutes (2.00 s each)" in caplog.text
        assert rates == self.train(slices[0], tmp_path / "b", clock, epochs=7)[0]
        assert length.state["minutes"] == pytest.approx(0.7)
        assert "validation dice still gained 0.040 in the last two fifths of the training" in caplog.text

    def test_a_resumed_run_is_as_long_as_was_decided(self, slices, tmp_path, clock):
        whole, _ = self.train(slices[0], tmp_path / "whole", clock, minutes=1)
        first, _ = self.train(slices[0], tmp_path / "two", clock, minutes=1, stop_after=4)
        settings = {}
        rest, length = self.train(slices[0], tmp_path / "two", clock, minutes=9, settings=settings)
        assert first[:4] + rest == whole
        assert (settings["epochs"], length.state["minutes"]) == (10, pytest.approx(1))
        curves = [pd.read_csv(tmp_path / name / "curve.csv") for name in ("whole", "two")]
        pd.testing.assert_frame_equal(*curves)
        assert curves[0].to_dict("list") == {
            "epoch": [2, 4, 6, 8, 10],
            "steps": [6, 12, 18, 24, 30],
            "minutes": [0.2, 0.4, 0.6, 0.8, 1],
            "dice": [0.02, 0.04, 0.06, 0.08, 0.1],
        }

    @pytest.mark.parametrize(("epochs", "each", "due"), [(3, None, [1, 2, 3]), (9, 4, [4, 8, 9]), (4, 1, [1, 2, 3, 4])])
    def test_it_validates_at_intervals_and_at_the_end(self, slices, tmp_path, clock, epochs, each, due):
        _, length = self.train(slices[0], tmp_path, clock, epochs=epochs, interval=each)
        assert [row["epoch"] for row in length.state["curve"]] == due
