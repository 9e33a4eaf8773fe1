"""Slices: which ones are chosen, what an item contains, and when the random transforms run."""

from __future__ import annotations

import logging
import multiprocessing
import runpy
from collections import Counter
from itertools import pairwise

import nibabel
import numpy as np
import pytest
import torch
from bundle_runs import REPOSITORY
from ignite.engine import Engine
from monai.data import DataLoader, MetaTensor
from monai.transforms import (
    Compose,
    Lambdad,
    LoadImaged,
    Orientationd,
    RandAffined,
    RandFlipd,
    RandomizableTransform,
    RandShiftIntensityd,
    ScaleIntensityd,
)
from monai.utils import set_determinism
from torch.utils.data import ConcatDataset

from medtl_ext import InputError
from medtl_ext.data import SeededCacheDataset, SliceDataset, check_collection, load_collection
from medtl_ext.handlers import EpochSeed
from medtl_ext.transforms import NormalizeBodyd, SelectLabelsd

KEYS = ["image", "label"]
LOAD = (LoadImaged(KEYS, ensure_channel_first=True), Orientationd(KEYS, axcodes="RAS", labels=None))


@pytest.fixture
def data(tmp_path):
    """Three patients of 8 x 6 x 10 with 5, 1 and 3 foreground slices; a voxel's value encodes its position."""
    entries = []
    for number, foreground in enumerate((5, 1, 3)):
        grid = np.arange(8 * 6 * 10, dtype=np.float32).reshape(8, 6, 10) + 1000 * number
        label = np.zeros_like(grid, dtype=np.uint8)
        label[2, 3, 4 : 4 + foreground] = 1
        files = {key: str(tmp_path / f"{number}-{key}.nii.gz") for key in KEYS}
        nibabel.save(nibabel.Nifti1Image(grid, np.eye(4)), files["image"])
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), files["label"])
        entries.append(files | {"subject": f"p{number}"})
    return entries


@pytest.fixture
def deterministic():
    set_determinism(0)
    yield
    set_determinism(None)


def places(dataset):
    return [(item["subject"], item["slice"]) for item in items(dataset)]


def items(dataset):
    return [dataset[position] for position in range(len(dataset))]


def build(data, transform=LOAD, **options):
    return SliceDataset(data, transform, progress=False, **options)


class TestChoice:
    def test_foreground(self, data):
        expected = [("p0", z) for z in range(4, 9)] + [("p1", 4)] + [("p2", z) for z in range(4, 7)]
        assert places(build(data)) == expected

    def test_all(self, data):
        assert places(build(data, slices="all")) == [(f"p{p}", z) for p in range(3) for z in range(10)]

    def test_slices_are_cut_along_the_last_axis(self, data):
        item = build(data)[1]
        grid = np.arange(8 * 6 * 10, dtype=np.float32).reshape(8, 6, 10)
        assert item["image"].shape == (1, 8, 6)
        np.testing.assert_array_equal(item["image"][0], grid[:, :, 5])

    @pytest.mark.parametrize(("n", "per_patient"), [(3, (1, 1, 1)), (5, (2, 1, 2)), (7, (3, 1, 3)), (99, (5, 1, 3))])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_draw_is_spread_over_patients(self, data, n, per_patient, seed):
        counts = Counter(subject for subject, _ in places(build(data, max_slices=n, seed=seed)))
        assert tuple(counts[f"p{p}"] for p in range(3)) == per_patient

    def test_draw_is_seeded_and_nested(self, data):
        def draw(n, seed):
            return places(build(data, slices="all", max_slices=n, seed=seed))

        assert draw(7, 0) == draw(7, 0) == sorted(draw(7, 0))
        alone = [tuple(places(build(data[:1], slices="all", max_slices=3, seed=seed))) for seed in range(4)]
        assert len(set(alone)) > 1, "the slices of one patient are drawn too"
        assert set(draw(2, 0)) < set(draw(7, 0)) < set(draw(12, 0))
        assert len({draw(1, seed)[0][0] for seed in range(10)}) == 3, "no patient is always first"

    def test_workers_do_not_matter(self, data):
        one, four = (build(data, max_slices=4, num_workers=n) for n in (1, 4))
        assert places(one) == places(four)

    def test_a_volume_without_foreground_is_left_out(self, data):
        for entry in data:
            entry["label"] = entry["image"]
        keep_low = Lambdad("label", lambda label: label * (label < 10))  # voxel values of patients 1 and 2 are larger
        assert {subject for subject, _ in places(build(data, [*LOAD, keep_low]))} == {"p0"}

    def test_no_foreground_anywhere(self, data):
        with pytest.raises(InputError, match="none of the 3 volumes has foreground"):
            build(data, [*LOAD, SelectLabelsd("label", [[7]])])

    @pytest.mark.parametrize(
        ("options", "said"), [({"slices": "forground"}, "did you mean 'foreground'"), ({"max_slices": 0}, "at least 1")]
    )
    def test_bad_options(self, data, options, said):
        with pytest.raises(InputError, match=said):
            build(data, **options)

    def test_volume_that_was_not_loaded(self, data):
        with pytest.raises(InputError, match=r"subject 'p\d': image and label must be arrays .* found none"):
            build(data, [RandFlipd(KEYS), *LOAD])


class TestHealthySlices:
    """The patients have 5, 9 and 7 slices without foreground. The healthy p3 has ten, one of them only air."""

    @pytest.fixture
    def data(self, data, tmp_path):
        grid = np.arange(8 * 6 * 10, dtype=np.float32).reshape(8, 6, 10)
        grid[:, :, 0] = 0  # air
        files = {key: str(tmp_path / f"3-{key}.nii.gz") for key in KEYS}
        for key, array in zip(KEYS, (grid, np.zeros_like(grid)), strict=True):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), files[key])
        return [*data, files | {"subject": "p3"}]

    def kinds(self, dataset):
        """The numbers of slices with and without foreground."""
        counts = Counter(bool(item["label"].any()) for item in items(dataset))
        return counts[True], counts[False]

    @pytest.mark.parametrize(
        ("n", "share", "expected"),
        [
            (None, 0.0, (9, 0)),
            (None, 0.25, (9, 3)),
            (None, 0.5, (9, 9)),
            (None, 0.9, (9, 30)),  # there are no more
            (5, 0.2, (4, 1)),
            (10, 0.2, (8, 2)),
            (50, 0.25, (9, 3)),  # few slices with foreground do not give more healthy ones
            (1, 0.9, (1, 0)),  # at least one slice to learn from
        ],
    )
    @pytest.mark.parametrize("seed", [0, 1])
    def test_the_share_is_that_of_the_drawn_slices(self, data, n, share, expected, seed):
        assert self.kinds(build(data, max_slices=n, background_share=share, seed=seed)) == expected

    def test_too_few_healthy_slices_leave_room_for_others(self, data):
        label = Lambdad("label", lambda label: label.clamp(min=0) + (torch.arange(10) > 1))
        assert self.kinds(build(data[:1], [*LOAD, label], max_slices=8, background_share=0.5)) == (6, 2)

    @pytest.mark.parametrize("seed", range(3))
    def test_a_larger_draw_contains_the_smaller_one(self, data, seed):
        draws = [set(places(build(data, max_slices=n, background_share=0.4, seed=seed))) for n in range(1, 17)]
        assert all(len(draw) == min(n, 15) for n, draw in enumerate(draws, 1))
        assert all(small <= large for small, large in pairwise(draws))
        assert draws[-1] == set(places(build(data, background_share=0.4, seed=seed)))

    @pytest.mark.parametrize("seed", range(3))
    def test_spread_over_patients_of_whom_one_is_healthy(self, data, seed):
        drawn = places(build(data, max_slices=4, background_share=0.5, seed=seed))
        assert [subject for subject, _ in drawn] == ["p0", "p1", "p2", "p3"]

    def test_empty_air_is_no_healthy_slice(self, data):
        drawn = {place for subject, place in places(build(data, background_share=0.9)) if subject == "p3"}
        assert drawn == set(range(1, 10))

    def test_healthy_patients_alone(self, data):
        with pytest.raises(InputError, match="none of the 1 volumes has foreground"):
            build(data[3:], background_share=0.5)

    @pytest.mark.parametrize("share", [0, 0.5])
    def test_small_draw_spares_volumes(self, data, share):
        loaded = []
        transform = [*LOAD, Lambdad("subject", lambda subject: loaded.append(subject) or subject)]
        build(data * 20, transform, max_slices=2, background_share=share, num_workers=1)
        assert 2 <= len(loaded) < 20

    def test_volumes_stay_whole(self, data):
        dataset = build(data, slices="volume", background_share=0.25)
        assert places(dataset) == [(f"p{p}", 0) for p in range(4)]

    @pytest.mark.parametrize("share", [-0.1, 1, float("nan")])
    def test_no_share(self, data, share):
        with pytest.raises(InputError, match="expected a share of the slices"):
            build(data, background_share=share)

    def test_the_log_counts(self, data, caplog):
        caplog.set_level(logging.INFO, "medtl_ext")
        build([entry | {"patient": "Ann"} for entry in data[:2]] + data[2:], max_slices=10, background_share=0.2)
        assert "training on 10 slices of 3 patients, 2 without foreground" in caplog.text
        build(data, slices="all")
        assert "training on 40 slices of 4 patients, 31 without foreground" in caplog.text


class Tag(RandomizableTransform):
    """Adds a fresh random number to the image in place, which must not reach the stored slices."""

    def __call__(self, data):
        data["image"] += float(self.R.uniform(1, 2))
        return data


class TestItems:
    def test_are_plain_tensors(self, data):
        transform = [*LOAD, ScaleIntensityd("image"), RandAffined(KEYS, prob=1, rotate_range=0.3)]
        dataset = build(data, transform)
        for item in (dataset[0], dataset.plain()[0]):
            assert set(item) == {"image", "label", "subject", "slice"}
            assert type(item["image"]) is type(item["label"]) is torch.Tensor
            assert item["image"].is_contiguous()
            assert not isinstance(item["image"], MetaTensor)

    def test_only_chosen_slices_stay_in_memory(self, data):
        arrays = [array for stack in build(data, max_slices=3)._stacks for array in stack.arrays.values()]
        stored = {array.untyped_storage().data_ptr(): array.untyped_storage().nbytes() for array in arrays}
        assert sum(stored.values()) == 3 * 8 * 6 * 2 * 4  # three slices, two float32 keys

    def test_random_part_runs_on_access_and_leaves_the_store_alone(self, data):
        calls = []
        count = Lambdad("image", lambda image: calls.append(image.shape) or image)
        dataset = build(data, Compose([*LOAD, count, Tag()]))
        assert calls == [(1, 8, 6, 10)] * 3
        plain = dataset.plain()
        before = plain[0]["image"]
        first, second = dataset[0]["image"], dataset[0]["image"]
        assert not torch.equal(first, second)
        assert torch.equal(plain[0]["image"], before)
        assert len(calls) == 3

    def test_plain_shares_memory_but_gives_copies(self, data):
        dataset = build(data, [*LOAD, RandFlipd(KEYS, prob=1, spatial_axis=0)])
        plain = dataset.plain()
        assert len(plain) == len(dataset)
        assert places(plain) == places(dataset)
        assert torch.equal(plain[0]["image"].flip(1), dataset[0]["image"])
        assert plain._stacks is dataset._stacks
        plain[0]["image"].zero_()
        assert plain[0]["image"].any()

    def test_other_arrays_on_the_grid_are_cut_too(self):
        volume = torch.zeros(1, 4, 4, 3)
        dataset = build([{"image": volume, "body": volume > 5, "affine": np.eye(4)}], [], slices="all")
        assert dataset[0]["body"].dtype == torch.bool
        assert dataset[0]["body"].shape == (1, 4, 4)
        assert "affine" not in dataset[0]

    def test_the_patient_is_named_where_the_datalist_does(self, data):
        data[0]["patient"] = "Ann"
        found = {item["subject"]: item.get("patient") for item in items(build(data, [*LOAD, Tag()]))}
        assert found == {"p0": "Ann", "p1": None, "p2": None}

    @pytest.mark.parametrize("slices", ["foreground", "volume"])
    def test_volumes_of_different_sizes_share_a_frame(self, slices):
        affine = torch.tensor([[0, 2, 0, 10], [-3, 0, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]]).double()
        whole = slices == "volume"
        entries = []
        for name, size in (("small", (4, 5, 2)), ("large", (7, 5, 3))):
            voxels = torch.arange(1.0, 1 + np.prod(size)).reshape(1, *size)
            one = {"image": MetaTensor(voxels, affine=affine), "label": voxels > 7, "body": 2 * voxels}
            entries.append(one | {"subject": name})
        dataset = build(entries, [], slices=slices)
        frame = (7, 5, 3)[: 2 + whole]
        assert {item["image"].shape[1:] for item in items(dataset)} == {frame}
        assert dataset.geometry["small"][1] == (7, 5, 3 if whole else 2)
        for item in items(dataset):
            entry, (here, _) = entries[item["subject"] == "large"], dataset.geometry[item["subject"]]
            for key in ("image", "label", "body"):  # all voxels are still there, and zeros around them
                given = entry[key][0] if whole else entry[key][0, ..., item["slice"]]
                assert item[key].sum() == given.sum()
            for place in item["image"][0].nonzero():  # and none has moved
                voxel = [*place.tolist(), 1] if whole else [*place.tolist(), item["slice"], 1]
                millimetres = torch.as_tensor(here) @ torch.tensor(voxel).double()
                before = (torch.linalg.inv(affine) @ millimetres).round().long()[:3].tolist()
                for key in ("image", "label", "body"):
                    assert item[key][0][tuple(place)] == entry[key][0][tuple(before)]
        dataset.set_map("weight", [torch.ones(frame)] * len(dataset))
        assert dataset[0]["weight"].shape == (1, *frame)

    def test_image_and_label_on_different_grids(self):
        entries = [{"image": torch.ones(1, n, 4, 3), "label": torch.ones(1, n, 4, 3)} for n in (4, 6)]
        entries[1]["label"] = torch.ones(1, 5, 4, 3)
        with pytest.raises(InputError, match=r"on one grid .*'label': \(1, 5, 4, 3\)"):
            build(entries, [])

    @pytest.mark.usefixtures("deterministic")
    def test_workers_have_their_own_seeds(self, data):
        dataset = build([data[0]] * 2, [*LOAD, Tag()])
        context = multiprocessing.get_context("fork")
        loader = DataLoader(dataset, batch_size=5, num_workers=2, multiprocessing_context=context)
        first, second = (batch["image"] for batch in loader)  # the same five slices, one batch from each worker
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("kind", ["slices", "images", "both"])
    def test_batches_do_not_depend_on_the_number_of_workers(self, data, kind):
        """Nor on what was loaded before them; every epoch and every item is changed in another way."""
        shift = RandShiftIntensityd("image", offsets=5.0, prob=1.0)
        cached = SeededCacheDataset([{"image": torch.zeros(1, 8, 6)}] * 8, Compose([shift]), progress=False)
        sliced = build([data[0]] * 2, [*LOAD, shift])
        dataset = {"slices": sliced, "images": cached, "both": ConcatDataset([sliced, cached])}[kind]

        def images(workers, **more):
            seen = []
            trainer = Engine(lambda _, batch: seen.append(torch.as_tensor(batch["image"])))
            EpochSeed(dataset=dataset, seed=3).attach(trainer)
            how = {"batch_size": 1 if kind == "both" else 3, "shuffle": True, "num_workers": workers}
            trainer.run(DataLoader(dataset, **how, **more), max_epochs=2)
            return torch.cat(seen)

        alone = images(0)
        assert len(alone) == 2 * len(dataset)
        assert torch.equal(images(1), alone)
        assert torch.equal(images(2), alone)
        persistent = images(2, persistent_workers=True)  # in another order
        epochs = [[of.sum((1, 2, 3)).sort().values for of in seen.split(len(dataset))] for seen in (alone, persistent)]
        assert all(map(torch.equal, *epochs))
        first, second = epochs[0]
        assert not torch.isclose(first, second).any(), "every epoch is another"
        if kind == "images":
            assert len(first.unique()) == len(dataset), "so is every item"


class TestMaps:
    def maps(self, dataset):
        return [item["image"][0].numpy() * 2 for item in dataset.plain()]

    def test_follow_the_image_through_the_random_transforms(self, data):
        flip = RandFlipd([*KEYS, "weight"], prob=0.5, spatial_axis=0, allow_missing_keys=True)
        dataset = build(data, [*LOAD, flip])
        flip.set_random_state(0)
        assert "weight" not in dataset[0]
        dataset.set_map("weight", self.maps(dataset))
        flipped = 0
        for item, plain in zip(items(dataset), items(dataset.plain()), strict=True):
            assert torch.equal(item["weight"], 2 * item["image"])
            flipped += not torch.equal(item["image"], plain["image"])
        assert 0 < flipped < len(dataset)

    def test_accept_a_channel_axis_and_replace(self, data):
        dataset = build(data)
        dataset.set_map("weight", self.maps(dataset))
        dataset.set_map("weight", [torch.ones(1, 8, 6)] * len(dataset))
        assert dataset[3]["weight"].shape == (1, 8, 6)
        assert dataset[3]["weight"].unique().tolist() == [1]

    @pytest.mark.parametrize(
        ("key", "n", "shape", "message"),
        [
            ("image", 9, (8, 6), "'image' is already used"),
            ("weight", 8, (8, 6), "8 maps for 9 slices"),
            ("weight", 9, (6, 8), r"map 0 has shape \(6, 8\); its slice needs \(1, 8, 6\)"),
            ("weight", 9, (2, 8, 6), r"its slice needs \(1, 8, 6\)"),
        ],
    )
    def test_bad_maps(self, data, key, n, shape, message):
        with pytest.raises(InputError, match=message):
            build(data).set_map(key, [np.ones(shape)] * n)


class TestWholeVolumes:
    def test_volumes_with_foreground_stay_whole(self, data):
        without_p1 = Lambdad("label", lambda label: label * (label.sum() > 1))
        dataset = build(data, [*LOAD, without_p1], slices="volume")
        assert places(dataset) == [("p0", 0), ("p2", 0)]
        assert len(build(data, slices="volume", max_slices=2)) == 2
        assert dataset[0]["image"].shape == dataset[0]["label"].shape == (1, 8, 6, 10)

    def test_a_map_has_the_shape_of_the_volume(self, data):
        dataset = build(data, slices="volume")
        dataset.set_map("weight", [np.full((8, 6, 10), number) for number in range(3)])
        assert dataset[2]["weight"].shape == (1, 8, 6, 10)
        assert float(dataset[2]["weight"].mean()) == 2
        with pytest.raises(InputError, match="its slice needs"):
            dataset.set_map("weight", [np.ones((8, 6))] * 3)


def test_real_patients_from_files_to_slices(shared_data, tmp_path, monkeypatch):
    """The example script, the check and the slices on two patients with multiple sclerosis (Lesjak et al. 2017)."""
    script, task = str(REPOSITORY / "docs/examples/open_ms_collection.py"), "MS-FLAIR-WMH"
    options = ["--out", str(tmp_path / "open_ms.json"), "--train", "patient19", "--test", "patient07"]
    monkeypatch.setattr("sys.argv", [script, str(shared_data / "open_ms"), *options])
    runpy.run_path(script, run_name="__main__")
    collection = load_collection(tmp_path / "open_ms.json")
    assert [str(task) for task in collection.tasks()] == [f"MS-{m}-WMH" for m in ("T1", "T1CE", "T2", "FLAIR")]
    assert check_collection(collection, [task], progress=False).issues == []
    transform = [*LOAD, SelectLabelsd("label", collection.label_values(task)), NormalizeBodyd("image")]
    dataset = build(collection.datalist(task, "train"), transform, max_slices=5)
    assert len(dataset) == 5
    for item in dataset:
        body = item["image"] != 0
        assert item["image"].shape == (1, 182, 218)
        assert item["label"].unique().tolist() == [0, 1]
        assert body[item["label"] > 0].float().mean() > 0.99
        assert item["image"][item["label"] > 0].mean() > 0.5, "lesions are bright on FLAIR"
