"""Label values to classes, resampling to a coarser grid, and intensities inside the body."""

import warnings

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, LoadImaged, Orientationd, Spacingd
from scipy import ndimage
from sklearn.metrics import f1_score

from medtl_ext import InputError
from medtl_ext.transforms import AreaSpacingd, NormalizeBodyd, PickChannelsd, SelectLabelsd, body_mask


class TestPickChannels:
    def test_channels_are_put_in_order_and_a_missing_one_is_the_mean_of_all(self):
        image = torch.stack([torch.full((2, 3), value) for value in (1.0, 5.0)])
        found = PickChannelsd("image", [1, None, 0])({"image": image})["image"]
        assert found.shape == (3, 2, 3)
        assert found.flatten(1).unique(dim=1).flatten().tolist() == [5, 3, 1]

    def test_space_and_kind_of_numbers_stay_and_the_input_is_untouched(self):
        affine = torch.diag(torch.tensor([2.0, 2, 4, 1], dtype=torch.float64))
        image = MetaTensor(torch.arange(4, dtype=torch.uint8).reshape(2, 2, 1, 1), affine=affine)
        found = PickChannelsd("image", [1, None])({"image": image, "other": 1})
        assert torch.equal(found["image"].affine, affine)
        assert found["image"].dtype == torch.uint8
        assert found["image"].flatten().tolist() == [2, 3, 1, 1]
        assert image.flatten().tolist() == [0, 1, 2, 3]
        assert found["other"] == 1

    def test_arrays_are_taken_and_a_missing_key_is_allowed_if_it_is_said(self):
        assert PickChannelsd("image", [0])({"image": np.ones((2, 3, 3))})["image"].shape == (1, 3, 3)
        assert PickChannelsd("image", [0], allow_missing_keys=True)({}) == {}
        with pytest.raises(KeyError):
            PickChannelsd("image", [0])({})


class TestSelectLabels:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
    @pytest.mark.parametrize("shape", [(1, 2, 3), (1, 3, 2, 1)])
    def test_values_become_classes(self, dtype, shape):
        label = torch.tensor([0, 1, 2, 3, 4, 9], dtype=dtype).reshape(shape)
        result = SelectLabelsd("label", [[4], [1, 3]])({"label": label})["label"]
        assert result.dtype == torch.uint8
        assert result.shape == shape
        assert result.flatten().tolist() == [0, 2, 0, 2, 1, 0]

    def test_swapped_values_do_not_chain(self):
        label = torch.tensor([[1, 2]])
        assert SelectLabelsd("label", [[2], [1]])({"label": label})["label"].tolist() == [[2, 1]]

    def test_metadata_stays_and_the_input_is_untouched(self):
        affine = torch.diag(torch.tensor([2.0, 2, 4, 1], dtype=torch.float64))
        data = {"label": MetaTensor(torch.full((1, 2, 2, 2), 3.0), affine=affine), "other": 1}
        result = SelectLabelsd("label", [[3]])(data)
        assert torch.equal(result["label"].affine, affine)
        assert result["other"] == 1
        assert data["label"].unique().tolist() == [3]

    def test_arrays_and_untracked_tensors(self, monkeypatch):
        monkeypatch.setattr("medtl_ext.transforms.get_track_meta", lambda: False)
        result = SelectLabelsd("label", [1])({"label": np.array([[1, 2]])})["label"]
        assert type(result) is torch.Tensor
        assert result.tolist() == [[1, 0]]

    @pytest.mark.parametrize("values", [[], [[]], [[1], [1, 2]], [1, 1]])
    def test_bad_values(self, values):
        with pytest.raises(InputError, match="every label value once"):
            SelectLabelsd("label", values)

    def test_rounding_noise_and_nan_are_one_warning_that_names_file_and_share(self):
        select = SelectLabelsd("label", [[1], [2, 3]])
        label = MetaTensor(torch.tensor([[0, 0.99998, 2.00003, 2.995, 1e-5, float("nan"), -0.0, 1]]))
        label.meta["filename_or_obj"] = "p1.nii.gz"
        with pytest.warns(UserWarning, match="up to 0.005 off a whole number and 12 % of the label are NaN") as caught:
            found = [select({"label": label})["label"].flatten().tolist() for _ in range(2)]
        assert found == [[0, 1, 2, 2, 0, 0, 0, 1]] * 2
        (warning,) = caught
        assert str(warning.message).startswith("p1.nii.gz: 50 % of the label are up to 0.005 off a whole number")

    @pytest.mark.parametrize("value", [0.9882, 0.5, float("inf"), -1.2])
    def test_fractions_are_no_labels(self, value):
        with pytest.raises(InputError, match=f"^label: the label holds fractional values, such as {value:g}, which is"):
            SelectLabelsd("label", [[1]])({"label": torch.tensor([[0, 1, value]])})


class TestAreaSpacing:
    """Voxels have 1 mm before, unless stated otherwise."""

    @staticmethod
    def volume(values, spacing=(1, 1, 1)):
        values = torch.as_tensor(np.asarray(values))[None]
        return MetaTensor(values, affine=torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))

    def resampled(self, pixdim, spacing=(1, 1, 1), **arrays):
        data = {key: self.volume(array, spacing) for key, array in arrays.items()}
        return {key: done[0] for key, done in AreaSpacingd(list(data), pixdim)(data).items()}

    @staticmethod
    def covered(array, factors):
        """The mean over the area of each new voxel, on a grid of tenths of voxels; the first voxels coincide."""
        for axis, factor in enumerate(factors):
            size = array.shape[axis]
            fine = np.repeat(array, 10, axis)  # tenth i lies from i / 10 - 1 / 2 on
            means = []
            for centre in np.arange(round((size - 1) / factor) + 1) * factor:
                first, last = (round(10 * (centre + side * factor / 2 + 0.5)) for side in (-1, 1))
                means.append(fine.take(range(max(first, 0), min(last, 10 * size)), axis).mean(axis))
            array = np.stack(means, axis)
        return array

    @pytest.mark.parametrize("factors", [(2, 2, 4), (3, 1, 5), (1, 2, 1)])
    def test_images_are_averages_of_what_a_voxel_covers(self, factors):
        image = np.random.default_rng(0).random((13, 9, 21))
        found = self.resampled(factors, image=image)["image"]
        np.testing.assert_allclose(found, self.covered(image, factors), atol=1e-5)

    @pytest.mark.parametrize(
        "image", [np.random.default_rng(0).random((6, 5, 8)), np.eye(6, dtype=np.uint8)[:, :, None]]
    )
    @pytest.mark.parametrize("pixdim", [(1, 1, 1), (0.5, 1, 0.7), (-1, 1, 0)])
    def test_where_nothing_gets_coarser_it_is_that_of_monai(self, image, pixdim):
        data = {"image": self.volume(image), "label": self.volume((image > 0.5).astype(np.uint8))}
        found = AreaSpacingd(["image", "label"], pixdim)(data)
        expected = Spacingd(["image", "label"], pixdim, mode=["bilinear", "nearest"])(data)
        for key in data:
            assert torch.equal(found[key].as_tensor().float(), expected[key].as_tensor())
            assert torch.equal(found[key].affine, expected[key].affine)
        assert found["label"].dtype == torch.uint8

    @pytest.mark.parametrize(
        ("size", "place", "expected"), [(2, 6, [3]), (2, 7, []), (2, 8, [4]), (4, 6, []), (4, 7, []), (4, 8, [])]
    )
    def test_a_plane_of_one_voxel_that_fills_half_of_one_survives(self, size, place, expected):
        """A plane between two voxels covers a quarter of both, and is lost, as by nearest neighbour."""
        label = np.zeros((8, 8, 17), np.uint8)
        label[:, :, place] = 1
        found = self.resampled([1, 1, size], label=label)["label"]
        assert [z for z in range(found.shape[2]) if found[..., z].all()] == expected
        assert found.sum() == 64 * len(expected)

    @pytest.mark.parametrize("rarer", [1, 0])
    def test_a_tie_goes_to_the_rarer_class_of_the_label(self, rarer):
        label = np.full((1, 1, 13), 1 - rarer, np.uint8)
        label[..., 6] = rarer  # half of the voxel around it
        found = self.resampled([1, 1, 2], label=label)["label"].flatten().tolist()
        assert found == [rarer if z == 3 else 1 - rarer for z in range(7)]

    def test_the_class_that_covers_most_wins_though_it_does_not_cover_half(self):
        line = np.array([0, 0, 0, 0, 2, 2, 3, 3, 1, 0, 0, 0, 0], np.int16)
        label = np.tile(line, (3, 3, 1))
        found = self.resampled([1, 1, 6], label=label)["label"]  # around 6: 0.5 of 3, 4 to 8, 0.5 of 9
        assert found[1, 1].tolist() == [0, 3, 0]  # as much of 2, of which there is as much: the higher
        assert found.dtype == torch.int16

    def test_every_class_against_a_count_of_voxels(self):
        label = ndimage.zoom(np.random.default_rng(1).integers(0, 5, (4, 4, 4)), 4.0, order=0).astype(np.uint8)
        found = self.resampled([3, 3, 3], label=label)["label"].numpy()
        counts = np.stack([self.covered((label == number).astype(float), (3, 3, 3)) for number in range(5)])
        clear = np.sort(counts, 0)[-1] > np.sort(counts, 0)[-2] + 1e-3
        assert clear.mean() > 0.5
        np.testing.assert_array_equal(found[clear], counts.argmax(0)[clear])

    def test_coarser_along_one_axis_and_finer_along_another(self):
        label = np.zeros((6, 6, 13), np.uint8)
        label[2:4, 2:4, 5:8] = 1
        found = self.resampled([0.5, 1, 3], label=label)["label"]
        assert found.shape == (11, 6, 5)
        assert sorted({tuple(place[1:]) for place in np.argwhere(found.numpy())}) == [(2, 2), (3, 2)]

    def test_grid_record_and_inverse_are_those_of_monai(self):
        turned = nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(0.2, -0.15, 0.25) @ np.diag([1, -1, 1.2]))
        image = np.random.default_rng(0).random((15, 14, 13))
        label = ndimage.gaussian_filter(image, 2) > 0.5
        values = {"image": image, "label": label.astype(np.uint8)}
        keys = list(values)
        data = {key: MetaTensor(torch.as_tensor(values[key])[None], affine=turned, meta={"name": key}) for key in keys}
        items, back = {}, {}
        for name, step in {
            "ours": AreaSpacingd(keys, [2, 2, 4]),
            "theirs": Spacingd(keys, [2, 2, 4], mode=["bilinear", "nearest"]),
        }.items():
            prepare = Compose([Orientationd(keys, "RAS", labels=None), step])
            items[name] = prepare(data)
            pred = torch.linspace(0, 1, 2 * items[name]["image"].numel()).reshape(2, *items[name]["image"].shape[1:])
            invert = Invertd("pred", transform=prepare, orig_keys="image", nearest_interp=False, to_tensor=True)
            back[name] = invert({**items[name], "pred": MetaTensor(pred)})["pred"]
            again = prepare.inverse(items[name])["label"]
            assert again.shape == data["label"].shape
            assert set(again.unique().tolist()) <= {0, 1}
        for key in keys:
            assert items["ours"][key].shape == items["theirs"][key].shape
            assert torch.equal(items["ours"][key].affine, items["theirs"][key].affine)
            assert items["ours"][key].meta["name"] == key
        assert torch.equal(back["ours"], back["theirs"])
        assert back["ours"].shape == (2, *image.shape)

    def test_plain_tensors_have_voxels_of_one(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI says that the affine is not known
            found = AreaSpacingd("image", [1, 2])({"image": torch.arange(5.0).expand(1, 3, 5)})["image"]
        assert found[0, 0].tolist() == pytest.approx([1 / 3, 2, 11 / 3])

    def test_real_lesions_lose_less_than_by_nearest_neighbour(self, shared_data):
        """Dice of a label with itself after slices of 3 mm and back."""
        for patient in ("patient07", "patient19"):
            load = [LoadImaged("label", ensure_channel_first=True), Orientationd("label", "RAS", labels=None)]
            file = shared_data / f"open_ms/{patient}/lesion.nii.gz"
            item = Compose([*load, SelectLabelsd("label", [1])])({"label": file})
            steps = Spacingd("label", [1, 1, 3], mode="nearest"), AreaSpacingd("label", [1, 1, 3])
            back = [step.inverse(step(item))["label"].flatten() > 0.5 for step in steps]
            nearest, area = (f1_score(item["label"].flatten(), one) for one in back)
            assert area > nearest


def brain(shape=(40, 40, 20)):
    """A bright ball with a dark ventricle inside and traces of resampling around it, and where its body is."""
    rng = np.random.default_rng(0)
    distance = np.linalg.norm(np.indices(shape).T.T - np.array(shape).reshape(3, 1, 1, 1) / 2, axis=0)
    image = np.where(distance < 9, rng.normal(100, 10, shape), rng.normal(0, 1, shape)).astype(np.float32)
    image[distance < 3] = 0
    return image, distance < 9


class TestNormalizeBody:
    def test_mask_has_ventricles_but_no_traces(self):
        image, body = brain()
        np.testing.assert_array_equal(body_mask(image), body)

    @pytest.mark.parametrize("pad", [0, 40])
    def test_mask_does_not_depend_on_the_field_of_view_or_scale(self, pad):
        image, body = brain()
        padded = np.pad(0.001 * image, pad)
        np.testing.assert_array_equal(body_mask(padded), np.pad(body, pad))

    def test_separate_parts_are_kept(self):
        image = np.zeros((20, 20))
        image[2:9, 2:9], image[12:15, 12:15] = 100, 80
        assert body_mask(image).sum() == 49 + 9

    def test_scores(self):
        image, body = brain()
        image[body] = np.maximum(image[body], 50)  # no score is clipped
        result = NormalizeBodyd("image")({"image": image[None]})["image"]
        assert result.dtype == np.float32
        assert result[0][body].mean() == pytest.approx(0, abs=1e-5)
        assert result[0][body].std() == pytest.approx(1, abs=1e-5)
        assert not result[0][~body].any()

    def test_a_vessel_does_not_set_the_range(self):
        image, _ = brain()
        image[20, 20, 3], image[20, 20, 17] = 1e3, -1e3
        result = NormalizeBodyd("image")({"image": image[None]})["image"]
        assert (result.min(), result.max()) == (-4, 6)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_an_image_without_a_body_to_find_is_refused(self, value):
        image, _ = brain()
        image[1, 1, 1] = value
        with pytest.raises(InputError, match="holds NaN or infinite values"):
            NormalizeBodyd("image")({"image": image[None]})

    @pytest.mark.parametrize("value", [0, 5, -3])
    def test_constant_image_becomes_zeros(self, value):
        result = NormalizeBodyd("image")({"image": torch.full((1, 4, 4, 4), float(value))})["image"]
        assert not result.any()

    def test_channels_are_independent(self):
        image, _ = brain()
        alone = NormalizeBodyd("image")({"image": image[None]})["image"]
        both = NormalizeBodyd("image")({"image": np.stack([image, 7 * image])})["image"]
        np.testing.assert_array_equal(both[0], alone[0])
        np.testing.assert_allclose(both[1], alone[0], atol=1e-4)

    def test_metadata_stays(self):
        affine = torch.diag(torch.tensor([2.0, 2, 4, 1], dtype=torch.float64))
        result = NormalizeBodyd("image")({"image": MetaTensor(torch.rand(1, 4, 4, 4), affine=affine)})["image"]
        assert isinstance(result, MetaTensor)
        assert torch.equal(result.affine, affine)

    def test_real_brain(self, shared_data):
        """Values around the brain are not exactly zero here, some of them negative (Lesjak et al. 2017)."""
        image = nibabel.load(shared_data / "open_ms/patient19/FLAIR.nii.gz").get_fdata(dtype=np.float32)
        mask = body_mask(image)
        litres = mask.sum() / 1e6  # voxels of 1 mm^3
        assert 0.9 < litres < 1.5
        assert image.min() < 0
        assert mask[image > 0.1 * image.max()].all()
