"""The plan of a grid from images: each choice with its reason, and how much of the labels survives."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import RISK_MAP, collection_of_one_class, refused
from monai.bundle import ConfigWorkflow
from scipy import ndimage

from medtl_ext import InputError
from medtl_ext.data import load_collection
from medtl_ext.data.__main__ import main
from medtl_ext.data.plan import Grid, grid_steps, label_ceiling, plan_grid, read_grid
from medtl_ext.data.sample import write_sample
from medtl_ext.transforms import NormalizeBodyd

VALUES = [[1]]


def saved(folder, name, *, shape=(20, 24, 18), sizes=(1, 1, 1), image=None, label=None, affine=None):
    """An item of a datalist whose files hold an image and a label."""
    rng = np.random.default_rng(0)
    image = rng.integers(1, 200, shape).astype(np.float32) if image is None else image
    if label is None:
        label = np.zeros(shape, np.uint8)
        label[5:9, 6:12, 4:10] = 1
    affine = np.diag([*sizes, 1]) if affine is None else affine
    files = {"image": folder / f"{name}.nii.gz", "label": folder / f"{name}_label.nii.gz"}
    for key, array in (("image", image), ("label", label)):
        nib.save(nib.Nifti1Image(array, affine), files[key])
    return {"image": str(files["image"]), "label": str(files["label"]), "subject": name}


def planned(items, **options):
    return plan_grid(items, label_values=VALUES, **{"channels": ["T1"], **options})


class TestSpacing:
    def test_the_median_of_each_axis_of_the_oriented_images(self, tmp_path):
        sizes = [(1, 1, 2), (1.2, 1, 3), (1.4, 1, 2.5)]
        items = [saved(tmp_path, str(n), sizes=size) for n, size in enumerate(sizes)]
        turned = np.array([[0, 1.0, 0, 0], [0, 0, -1, 0], [2.5, 0, 0, 0], [0, 0, 0, 1]])  # axes S, R, P
        items.append(saved(tmp_path, "turned", affine=turned))
        grid = planned(items)
        assert grid.spacing == pytest.approx((1.1, 1.0, 2.5))
        assert not grid.native
        assert "median of 4 training images" in grid.why[0]
        assert "from 1 x 1 x 2 to 1.4 x 1 x 3 mm" in grid.why[0]

    def test_images_of_one_spacing_stay_as_they_are(self, tmp_path):
        grid = planned([saved(tmp_path, str(n), sizes=(0.5, 0.5, 3)) for n in range(2)])
        assert grid.native
        assert grid.spacing == (0.5, 0.5, 3)

    def test_what_is_given_is_taken(self, tmp_path):
        normalize = {"_target_": "NormalizeIntensityd", "keys": "image"}
        given = {"spacing": [2, 2, 2], "roi_size": [8, 8, 8], "normalize": normalize, "background_share": 0.25}
        given |= {"axcodes": "LPS", "flip_axes": [0]}
        grid = planned([saved(tmp_path, "a")], **given)
        assert grid.options == given
        assert grid.why == ()

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"spacing": [1, 1]}, r"spacing is \[1, 1\]; expected 3 positive numbers"),
            ({"spacing": [1, 1, 0]}, "spacing is"),
            ({"spacing": "fine"}, "spacing is 'fine'"),
            ({"roi_size": [4]}, "roi_size is .*expected 2 or 3"),
            ({"roi_size": "4d"}, "roi_size is '4d'; expected numbers of voxels, 'auto', '2d' or '3d'"),
        ],
        ids=str,
    )
    def test_what_is_no_grid_is_refused(self, tmp_path, wrong, message):
        with pytest.raises(InputError, match=message):
            planned([saved(tmp_path, "a")], **wrong)

    def test_no_patients(self):
        with pytest.raises(InputError, match="no patient to plan a grid from"):
            planned([])


class TestWindow:
    @pytest.mark.parametrize(
        ("shape", "sizes", "roi_size", "reason"),
        [
            ((20, 24, 18), (1, 1, 1), (32, 32, 32), "3D, volumes: there are up to 18 slices"),
            ((20, 24, 18), (1, 1, 1.6), (32, 32), "2D, slice by slice: voxels are 1.6 times longer along one axis"),
            ((20, 24, 18), (1.6, 1, 1), (32, 32), "2D, slice by slice"),
            ((20, 24, 15), (1, 1, 1), (32, 32), "2D, slice by slice: there are 15 slices at most"),
            ((300, 20, 1), (1, 1, 1), (304, 32), "2D, as the images are"),
            ((90, 100, 70), (1, 1, 1), (64, 64, 64), "3D, volumes"),
            ((200, 20, 60), (1, 1, 1), (128, 32, 64), "3D, volumes"),
            ((700, 300, 2), (1, 1, 1), (512, 304), "2D, slice by slice"),
        ],
        ids=str,
    )
    def test_size_and_dimensions(self, tmp_path, shape, sizes, roi_size, reason):
        grid = planned([saved(tmp_path, "a", shape=shape, sizes=sizes)])
        assert reason in grid.why[1]
        assert len(grid.roi_size) == len(roi_size)
        assert np.prod(grid.roi_size) <= {2: 512**2, 3: 64**3}[grid.dims]
        if np.prod(roi_size) <= {2: 512**2, 3: 64**3}[grid.dims] and max(shape) < 200:
            assert grid.roi_size == roi_size
        assert all(size % 16 == 0 for size in grid.roi_size)
        larger = any(most > seen for most, seen in zip(grid.frame, grid.roi_size, strict=False))
        assert bool(grid.cropping) == larger
        assert ("patches" in grid.why[2]) == larger

    @pytest.mark.parametrize("dims", [2, 3])
    def test_either_can_be_asked_for(self, tmp_path, dims):
        grid = planned([saved(tmp_path, "a")], roi_size=f"{dims}d")
        assert grid.dims == dims
        assert grid.slices == {2: "foreground", 3: "volume"}[dims]

    def test_the_frame_is_the_largest_image_on_the_grid(self, tmp_path):
        items = [saved(tmp_path, "a"), saved(tmp_path, "b", shape=(40, 10, 10))]
        grid = planned(items, spacing=[2, 2, 2])
        shapes = [step_all(items[n], grid)["label"].shape[1:] for n in range(2)]
        assert grid.frame == tuple(np.max(shapes, 0))


def step_all(item, grid):
    data = dict(item)
    for step in grid_steps(grid, label_values=VALUES):
        data = step(data)
    return data


class TestFlips:
    """Axes along which a mirrored image is as similar to the other images as they are to each other."""

    @staticmethod
    def bodies(folder, *sided, places=(8, 8)):
        """Images of a ball in noise. It is in the middle, except along the given axes, where it is at these places."""
        rng, items = np.random.default_rng(0), []
        for number, place in enumerate(places):
            centre = [place if axis in sided else 15.5 for axis in range(3)]
            far = sum((axis - at) ** 2 for axis, at in zip(np.indices((32, 32, 32)), centre, strict=True))
            image = 100.0 * (far < 64) + rng.normal(0, 5, far.shape)
            items.append(saved(folder, str(number), image=image.astype(np.float32)))
        return items

    @pytest.mark.parametrize("sided", [(), (1,), (0, 2)])
    def test_a_body_with_sides_is_not_flipped_along_them(self, tmp_path, sided):
        grid = planned(self.bodies(tmp_path, *sided), roi_size="3d")
        assert grid.flip_axes == tuple(sorted({0, 1, 2} - set(sided)))
        assert [step.flipper.spatial_axis for step in grid.flips] == list(grid.flip_axes)
        assert "similarity of two patients: 0.9" in grid.why[-1]

    def test_axes_are_those_of_the_grid(self, tmp_path):
        assert planned(self.bodies(tmp_path, 0), roi_size="3d", axcodes="ARS").flip_axes == (0, 2)

    def test_images_that_have_no_common_layout_may_be_flipped(self, tmp_path):
        assert planned(self.bodies(tmp_path, 0, 1, places=(4, 12, 20, 28)), roi_size="2d").flip_axes == (0, 1)

    def test_one_image_is_compared_with_itself(self, tmp_path):
        assert planned(self.bodies(tmp_path, 0, places=(8,)), roi_size="3d").flip_axes == (1, 2)


class TestIntensities:
    def test_mr_is_standardised_inside_the_body(self, tmp_path):
        grid = planned([saved(tmp_path, "a")])
        assert isinstance(grid.intensities, NormalizeBodyd)

    @pytest.mark.parametrize(("channel", "air"), [("CT", 0), ("scan", -1000)])
    def test_ct_goes_by_its_foreground(self, tmp_path, channel, air):
        rng = np.random.default_rng(1)
        label = np.zeros((20, 24, 18), np.uint8)
        label[5:15, 5:15, 5:15] = 1
        image = np.where(label, rng.normal(60, 20, label.shape), air + rng.normal(0, 1, label.shape)).astype(np.float32)
        grid = planned([saved(tmp_path, "a", image=image, label=label)], channels=[channel])
        inside = image[label == 1]
        low, high = np.percentile(inside, [0.5, 99.5])
        expected = (image.clip(low, high) - inside.mean()) / inside.std()
        found = grid.intensities({"image": image[None]})["image"][0]
        np.testing.assert_allclose(found, expected, atol=1e-3)
        assert "are CT, clipped to" in grid.why[-3]

    def test_a_label_of_another_size_is_named(self, tmp_path):
        item = saved(tmp_path, "a", label=np.ones((20, 24, 16), np.uint8))
        assert "a_label.nii.gz has another size than its image" in refused(lambda: planned([item], channels=["CT"]))

    @pytest.mark.parametrize(("highest", "range_"), [(1, 1), (200, 255), (3000, 65535)])
    def test_colours_become_0_to_1(self, tmp_path, highest, range_):
        image = np.full((8, 8, 1), highest, np.float32)
        items = [saved(tmp_path, name, shape=(8, 8, 1), image=image, label=image.astype(np.uint8)) for name in "RGB"]
        item = {"image": [one["image"] for one in items], "label": items[0]["label"]}
        grid = planned([item], channels=["R", "G", "B"])
        found = grid.intensities({"image": np.stack([image] * 3)})["image"]
        np.testing.assert_allclose(found, highest / range_, rtol=1e-5)


class TestCeiling:
    def test_against_a_recomputation_without_resampling(self, tmp_path):
        """Every second voxel is kept: each coarse voxel represents the voxels nearest to it."""
        rng = np.random.default_rng(3)
        label = (ndimage.gaussian_filter(rng.normal(size=(32, 32, 24)), 2) > 0.1).astype(np.uint8)
        label[30, 30, 22] = 1  # a part of one voxel
        item = saved(tmp_path, "a", label=label, image=label.astype(np.float32) + 1)
        grid = planned([item], spacing=[1, 1, 4])
        found = label_ceiling([item], grid_steps(grid, label_values=VALUES), n_classes=2)
        coarse = step_all(item, grid)["label"][0].numpy()
        at = np.arange(24) / 4
        back = np.zeros(label.shape)
        for z, place in enumerate(at):  # linear between the two coarse slices around it
            low, share = int(place), place % 1
            high = min(low + 1, coarse.shape[-1] - 1)
            back[..., z] = (1 - share) * (coarse[..., low] == 1) + share * (coarse[..., high] == 1)
        back = back > 0.5
        assert found.dice[0] == pytest.approx(2 * (back & (label == 1)).sum() / (back.sum() + label.sum()), abs=2e-3)
        marked, count = ndimage.label(label, np.ones((3, 3, 3)))
        assert found.parts == count
        assert found.lost == sum(not back[marked == part].any() for part in range(1, count + 1))
        assert found.lost > 0

    def test_the_images_own_grid_loses_nothing(self, tmp_path):
        item = saved(tmp_path, "a")
        grid = planned([item])
        ceiling = label_ceiling([item], grid_steps(grid, label_values=VALUES), n_classes=2)
        assert (ceiling.dice, ceiling.lost) == ((1.0,), 0)
        assert not ceiling.low

    def test_a_patient_without_foreground_has_no_dice(self, tmp_path):
        items = [saved(tmp_path, "a"), saved(tmp_path, "b", label=np.zeros((20, 24, 18), np.uint8))]
        grid = planned(items)
        found = label_ceiling(items, grid_steps(grid, label_values=VALUES), n_classes=2)
        assert found.dice == (1.0,)


class TestFile:
    def test_written_and_read_again(self, tmp_path):
        grid = planned([saved(tmp_path, "a")])
        grid.write(tmp_path / "grid.json")
        assert read_grid(tmp_path / "grid.json", spacing="auto").options == grid.options
        assert read_grid(tmp_path / "grid.json", spacing=[3, 3, 3]).spacing == [3, 3, 3]
        assert json.loads((tmp_path / "grid.json").read_text())["_why_"] == list(grid.why)

    def test_without_one_all_has_to_be_given(self, tmp_path):
        assert read_grid(tmp_path / "grid.json", spacing=[1, 1, 1], roi_size=[8, 8]).dims == 2
        with pytest.raises(InputError, match=r"roi_size is '3d'; expected 2 or 3 positive numbers"):
            read_grid(tmp_path / "grid.json", spacing=[1, 1, 1], roi_size="3d")
        with pytest.raises(InputError, match="does not exist; copy it there, or give --spacing and --roi_size"):
            read_grid(tmp_path / "grid.json", spacing=[1, 1, 1], roi_size="auto")

    @pytest.mark.parametrize("text", ["[]", "{", '{"spacings": 1}'])
    def test_another_file(self, tmp_path, text):
        (tmp_path / "grid.json").write_text(text)
        with pytest.raises(InputError, match=r"is no grid.json of a training"):
            read_grid(tmp_path / "grid.json")


@pytest.fixture
def hippocampus(tmp_path):
    """The options of a run on a task of the sample."""
    path = str(write_sample("hippocampus", tmp_path / "hippocampus"))
    task = str(load_collection(path).tasks()[0])
    return {"collection": path, "target_task": task, "output_dir": str(tmp_path / "run")}


class TestCommand:
    @pytest.fixture
    def plan(self, hippocampus):
        return lambda *words: main(["plan", hippocampus["collection"], hippocampus["target_task"], *map(str, words)])

    def test_plan(self, plan, tmp_path, capsys):
        out = tmp_path / "plan.json"
        assert plan("--out", out) == 0
        said = capsys.readouterr().out
        assert "3D, volumes" in said
        assert "and back: nothing is lost" in said
        assert json.loads(out.read_text())["spacing"] == [1, 1, 1]

    def test_a_coarse_grid_is_told_by_the_exit_status(self, plan, capsys):
        assert plan("--spacing", 4, 4, 8, "--roi_size", "2d") == 1
        assert "2D, as you asked" in capsys.readouterr().out

    def test_a_network_of_ours_costs_what_its_own_grid_does(self, plan, tmp_path, capsys):
        torch.save({}, tmp_path / "model.pt")
        Grid((4, 4, 8), (16, 16)).write(tmp_path / "grid.json")
        assert plan("--source", tmp_path / "model.pt") == 1
        assert "nothing is lost" not in capsys.readouterr().out

    def test_a_plan_is_laid_over_a_bundles_config(self, plan, hippocampus, tmp_path):
        out = tmp_path / "plan.json"
        plan("--spacing", 3, 3, 3, "--roi_size", 16, 16, "--out", out)
        files = [RISK_MAP.configs / "train.json", RISK_MAP.configs / "scratch.json", out]
        config = ConfigWorkflow(config_file=list(map(str, files)), workflow_type="train", **hippocampus)
        config.initialize()
        grid = config.parser.get_parsed_content("grid")
        assert isinstance(grid, Grid)
        assert grid.roi_size == (16, 16)


def test_a_run_says_what_a_coarse_grid_costs(hippocampus, tmp_path, capsys):
    RISK_MAP.run("scratch", **hippocampus | {"spacing": [6.0, 6.0, 8.0], "check_data": True})
    assert "this grid loses much of what is to be found; give a finer --spacing" in capsys.readouterr().out
    assert (tmp_path / "run" / "grid.json").is_file()


def test_inference_wants_the_grid_of_the_training(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.pt")
    image = saved(tmp_path, "a")["image"]
    options = {"input_dir": image, "ckpt": str(tmp_path / "model.pt"), "output_dir": str(tmp_path / "out")}
    assert "which a training writes beside its network" in refused(lambda: RISK_MAP.run(base="inference", **options))


def test_healthy_files_only(tmp_path):
    """If a grid is planned from a file that is no image, the error names the file."""
    item = saved(tmp_path, "a")
    Path(item["image"]).write_bytes(b"expected an image")
    with pytest.raises(InputError, match=r"a\.nii\.gz"):
        planned([item])


def test_collection_of_one_test_patient_plans_from_it(tmp_path):
    item = saved(tmp_path, "a")
    files = {"images": {"T1": item["image"]}, "labels": {"tumour": item["label"]}}
    path = collection_of_one_class(tmp_path, [{"id": "a", "institution": "A", "split": "test", **files}])
    assert main(["plan", str(path), "A-T1-ED"]) == 0


def test_the_check_warns_of_a_planned_grid_that_loses_much(tmp_path, capsys):
    """Two patients have slices of 1 mm and a plate of 1 mm, three have slices of 4 mm: the median is 4 mm."""
    subjects = []
    for number in range(5):
        shape, sizes = ((24, 24, 32), (1, 1, 1)) if number < 2 else ((24, 24, 8), (1, 1, 4))
        label = np.zeros(shape, np.uint8)
        label[4:20, 4:20, [3, 9, 17] if number < 2 else [2]] = 1
        image = np.random.default_rng(number).integers(1, 200, shape).astype(np.float32)
        saved(tmp_path, f"p{number}", shape=shape, sizes=sizes, label=label, image=image)
        files = {"images": {"T1": f"p{number}.nii.gz"}, "labels": {"tumour": f"p{number}_label.nii.gz"}}
        subjects.append({"id": f"p{number}", "institution": "A", "split": "train"} | files)
    assert main(["check", str(collection_of_one_class(tmp_path, subjects))]) == 0
    said = capsys.readouterr().out
    assert "warning: A-T1-ED: spacing 1 x 1 x 4 mm: the median of 5 training images, from 1 x 1 x 1" in said
    assert "connected parts disappear; give a finer grid" in said


def test_a_network_of_ours_keeps_the_grid_that_it_has_seen(hippocampus, tmp_path):
    """A network gets images of its own spacing, also when it is fine-tuned or scored on other patients."""
    torch.save({}, tmp_path / "model.pt")
    (tmp_path / "card.json").write_text('{"checkpoint": "model.pt"}')
    planned([saved(tmp_path, "a")], spacing=[1, 1, 2], roi_size=[48, 32]).write(tmp_path / "grid.json")
    files = [str(RISK_MAP.configs / f"{name}.json") for name in ("train", "evaluate")]
    for config, given in [
        (files[:1], {"source": str(tmp_path / "model.pt")}),
        (files[:1], {"source": str(tmp_path / "card.json")}),
        (files, {"ckpt": str(tmp_path / "model.pt")}),
    ]:
        workflow = ConfigWorkflow(config_file=config, workflow_type="train", **hippocampus, **given)
        workflow.initialize()
        grid = workflow.parser.get_parsed_content("grid")
        assert (grid.spacing, grid.roi_size) == ((1, 1, 2), (48, 32))


@pytest.mark.parametrize("config", ["train", "evaluate"])
def test_a_network_of_ours_whose_grid_is_not_known_is_not_given_another(config, hippocampus, tmp_path):
    torch.save({}, tmp_path / "model.pt")
    given = {"ckpt" if config == "evaluate" else "source": str(tmp_path / "model.pt"), "spacing": "auto"}
    workflow = RISK_MAP.workflow(*(["evaluate"] if config == "evaluate" else []), **hippocampus | given)
    assert "which a training writes beside" in refused(lambda: workflow.parser.get_parsed_content("grid"))
