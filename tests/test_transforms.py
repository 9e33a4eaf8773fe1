"""Label values to classes, and intensities inside the body."""

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medtl_ext import InputError
from medtl_ext.transforms import NormalizeBodyd, PickChannelsd, SelectLabelsd, body_mask


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

    def test_missing_key(self):
        with pytest.raises(KeyError, match="label"):
            SelectLabelsd("label", [[1]])({})
        assert SelectLabelsd("label", [[1]], allow_missing_keys=True)({}) == {}


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
