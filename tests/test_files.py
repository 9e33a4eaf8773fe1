"""Files of every format: reading them as the bundles' configs do, and writing segmentations of the same format."""

import locale
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import AsDiscreted, Compose, Invertd, LoadImaged, Orientationd, Spacingd
from PIL import Image
from tifffile import imwrite

from medtl_ext._validation import InputError
from medtl_ext.data import files, load_collection, sample, write_collection
from medtl_ext.data.duplicates import near_identical, thumbnail
from medtl_ext.data.files import ChannelReader, find_images, read_channels, require_readable, shape_of
from medtl_ext.transforms import SaveSegmentationd

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 2, 0, -5], [0, 0, 4, 3], [0, 0, 0, 1]])
RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 900, (7, 9, 5)).astype(np.int16)
COLOUR = RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8)  # rows, columns


@pytest.fixture
def itk():
    return pytest.importorskip("itk", reason="itk is not installed")


def by_itk(itk, path, voxels):
    """Voxels (X x Y x Z or Y x X) written on the grid of ``AFFINE``, which ITK says in LPS."""
    image = itk.image_from_array(np.ascontiguousarray(voxels.T))
    image.SetSpacing([2.0, 2.0, 4.0])
    image.SetOrigin([-10.0, 5.0, 3.0])
    image.SetDirection(itk.matrix_from_array(np.diag([1.0, -1.0, 1.0])))
    itk.imwrite(image, str(path))
    return path


def series(itk, folder, *, places=range(5), uid="1.2.3"):
    """A DICOM series with a slice at each place."""
    before = locale.setlocale(locale.LC_ALL)
    for place in places:
        image = itk.image_from_array(np.ascontiguousarray(VOLUME[..., place].T))
        entries = {
            "0008|0060": "MR",
            "0020|000e": uid,
            "0020|000d": "1.2",
            "0020|0032": f"-10\\5\\{3 + 4 * place}",
            "0020|0037": "1\\0\\0\\0\\-1\\0",
            "0028|0030": "2\\2",
            "0020|0013": str(place),
        }
        image.SetSpacing([2.0, 2.0])
        for tag, value in entries.items():
            image.GetMetaDataDictionary()[tag] = value
        folder.mkdir(exist_ok=True, parents=True)
        writer = itk.ImageFileWriter[type(image)].New(Input=image, FileName=str(folder / f"{uid}_{place}.dcm"))
        io = itk.GDCMImageIO.New()
        io.KeepOriginalUIDOn()
        writer.SetImageIO(io)
        writer.Update()
    locale.setlocale(locale.LC_ALL, before)  # which GDCM changes
    return folder


def picture(path, pixels, mode=None):
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)
    return str(path)


class TestReading:
    def test_a_volume_is_what_monai_reads(self, tmp_path):
        path = tmp_path / "v.nii.gz"
        nib.save(nib.Nifti1Image(VOLUME, AFFINE), path)
        ours, monai = (
            LoadImaged("image", reader=reader, ensure_channel_first=True)({"image": str(path)})["image"]
            for reader in ("medtl_ext.data.ChannelReader", "NibabelReader")
        )
        assert ours.shape == (1, 7, 9, 5)
        assert ours.dtype == monai.dtype
        assert (ours == monai).all()
        assert (ours.affine == monai.affine).all()

    def test_several_files_are_channels_in_the_order_given(self, tmp_path):
        for number in range(3):
            nib.save(nib.Nifti1Image(VOLUME + number, AFFINE), tmp_path / f"{number}.nii")
        found, meta = read_channels([f"{tmp_path}/{number}.nii" for number in (2, 0, 1)])
        assert [int((channel - VOLUME).max()) for channel in found] == [2, 0, 1]
        assert np.allclose(meta["affine"], AFFINE)

    def test_channels_of_one_4d_file_by_number(self, tmp_path):
        nib.save(nib.Nifti1Image(np.stack([VOLUME, VOLUME + 1, VOLUME + 2], -1), AFFINE), tmp_path / "v.nii.gz")
        found, _ = read_channels([f"{tmp_path}/v.nii.gz#{number}/3" for number in (2, 0)])
        assert (found == np.stack([VOLUME + 2, VOLUME])).all()

    @pytest.mark.parametrize("ending", ["png", "bmp", "tif"])
    def test_a_colour_picture_has_x_along_its_rows(self, tmp_path, ending):
        path = picture(tmp_path / f"a.{ending}", COLOUR)
        found, meta = read_channels([f"{path}#{number}/3" for number in range(3)])
        assert found.shape == (3, 8, 6, 1)
        assert (found[..., 0] == COLOUR.transpose(2, 1, 0)).all()
        assert (meta["affine"] == np.eye(4)).all()

    def test_sixteen_bits_are_kept(self, tmp_path):
        deep = VOLUME[..., 0].astype(np.uint16) * 70
        for ending in ("png", "tif"):
            found, _ = read_channels([picture(tmp_path / f"a.{ending}", deep)])
            assert (found[0, ..., 0] == deep.T).all()

    def test_of_sixteen_bit_colours_in_tiff(self, itk, tmp_path):
        deep = RNG.integers(0, 65536, (6, 16, 3)).astype(np.uint16)
        imwrite(tmp_path / "deep.tif", deep)
        found, _ = read_channels([f"{tmp_path}/deep.tif#{number}/3" for number in range(3)])
        assert (found[..., 0] == deep.transpose(2, 1, 0)).all()
        itk.imwrite(itk.image_from_array(deep, is_vector=True), str(tmp_path / "deep.png"))
        with pytest.raises(InputError, match=r"16 bits per colour, but PIL would keep only 8; save it as TIFF"):
            read_channels([f"{tmp_path}/deep.png#{number}/3" for number in range(3)])

    def test_a_jpeg_and_a_2d_nifti(self, tmp_path):
        assert read_channels([picture(tmp_path / "a.jpg", COLOUR[..., 0])])[0].shape == (1, 8, 6, 1)
        nib.save(nib.Nifti1Image(VOLUME[..., 0], AFFINE), tmp_path / "a.nii")
        found, meta = read_channels([str(tmp_path / "a.nii")])
        assert found.shape == (1, 7, 9, 1)
        assert np.allclose(meta["affine"], AFFINE)

    @pytest.mark.parametrize("ending", ["nrrd", "mha"])
    def test_itk_s_formats_lie_where_nifti_would(self, itk, tmp_path, ending):
        found, meta = read_channels([str(by_itk(itk, tmp_path / f"a.{ending}", VOLUME))])
        assert (found[0] == VOLUME).all()
        assert np.allclose(meta["affine"], AFFINE)

    def test_a_dicom_series(self, itk, tmp_path):
        folder, before = series(itk, tmp_path / "s"), locale.setlocale(locale.LC_ALL)
        found, meta = read_channels([str(folder)])
        assert locale.setlocale(locale.LC_ALL) == before  # so that text stays UTF-8
        upright, expected = (
            nib.as_closest_canonical(nib.Nifti1Image(*pair)) for pair in ((found[0], meta["affine"]), (VOLUME, AFFINE))
        )
        assert (upright.get_fdata() == expected.get_fdata()).all()
        assert np.allclose(upright.affine, expected.affine)

    def test_colours_of_a_mask_are_numbers(self, tmp_path):
        mask = np.zeros((4, 5, 3), np.uint8)
        mask[0, 1], mask[2, 3] = (255, 0, 0), (0, 0, 255)
        for mode in (None, "P"):  # a palette holds the same colours
            path = picture(tmp_path / f"{mode}.png", mask, mode)
            found, _ = read_channels([path + "#rgb"])
            assert found[0, 1, 0, 0] == 255 << 16
            assert np.count_nonzero(found) == 2
        indices = np.asarray(Image.open(picture(tmp_path / "p.png", mask, "P")))
        assert (read_channels([str(tmp_path / "p.png")])[0][0, ..., 0] == indices.T).all()  # or else its indices

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "CMYK"])
    def test_pixels_that_are_no_channels(self, tmp_path, mode):
        path = picture(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), COLOUR, mode)
        with pytest.raises(InputError, match=f"{path} has (an alpha channel|pixels of mode CMYK); save it"):
            read_channels([path])


def broken(folder):
    """Names as in a datalist, and the expected error of each."""
    nib.save(nib.Nifti1Image(VOLUME, AFFINE), folder / "v.nii")
    nib.save(nib.Nifti1Image(VOLUME[1:], AFFINE), folder / "small.nii")
    nib.save(nib.Nifti1Image(VOLUME, AFFINE + 0.5), folder / "shifted.nii")
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 3, 2)), AFFINE), folder / "five.nii")
    pages = [Image.fromarray(COLOUR)] * 3
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    turned = Image.Exif()
    turned[0x0112] = 6
    pages[0].save(folder / "turned.jpg", exif=turned)
    pages[0].resize((400, 400)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-900])
    picture(folder / "rgb.png", COLOUR)
    (folder / "a.docx").touch()
    (folder / "empty.png").touch()
    return [
        (["none.nii"], "does not exist"),
        (["a.docx"], "has no format that can be read"),
        (["v.nii", "small.nii"], r"has shape \(6, 9, 5\), but .*v.nii has \(7, 9, 5\); resample"),
        (["v.nii", "shifted.nii"], "differ in their affines by up to 0.5 mm"),
        (["five.nii"], "store one 3D volume of numbers"),
        (["rgb.png"], 'has 3 channels where one is expected; name the channels of an image, such as "R.G.B"'),
        (["rgb.png#0/2", "rgb.png#1/2"], "has 3 channels, but the collection names 2"),
        (["v.nii#0/2"], "has 1 channel, but the collection names 2"),
        (["v.nii#rgb"], "is no colour file"),
        (["pages.tif"], "has 3 pages"),
        (["turned.jpg"], "rotated by its EXIF entry"),
        (["cut.jpg"], "cannot be read .*truncated"),
        (["empty.png"], "cannot be read"),
    ]


def test_a_shape_is_that_of_what_is_read(tmp_path, itk):
    """For NIfTI the voxels are not read: here the file ends after its header."""
    nib.save(nib.Nifti1Image(VOLUME, AFFINE), tmp_path / "v.nii")
    nib.save(nib.Nifti1Image(VOLUME[..., 0], AFFINE), tmp_path / "flat.nii.gz")
    nib.save(nib.Nifti1Image(np.stack([VOLUME, VOLUME], -1), AFFINE), tmp_path / "two.nii.gz")
    assert shape_of(str(tmp_path / "flat.nii.gz")) == (7, 9, 1)
    assert shape_of(f"{tmp_path}/two.nii.gz#1/2") == VOLUME.shape
    assert shape_of(picture(tmp_path / "p.png", COLOUR) + "#2/3") == (8, 6, 1)
    assert shape_of(str(by_itk(itk, tmp_path / "a.mha", VOLUME))) == VOLUME.shape
    (tmp_path / "v.nii").write_bytes((tmp_path / "v.nii").read_bytes()[:352])
    assert shape_of(str(tmp_path / "v.nii")) == VOLUME.shape


def test_what_cannot_be_read_is_one_line_that_names_the_file(tmp_path):
    for names, message in broken(tmp_path):
        with pytest.raises(InputError, match=message) as caught:
            ChannelReader().get_data([f"{tmp_path}/{name}" for name in names])
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "series"])
def test_what_needs_itk_says_so(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "_itk", lambda: None)
    (tmp_path / name).mkdir() if name == "series" else (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"needs ITK, which is not installed; pip install 'medtl\[itk\]'"):
        read_channels([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda itk, folder: series(itk, folder, places=(0, 1, 2, 4)), "lacks slices: they are 4 mm apart, but 8 mm"),
        (lambda itk, folder: series(itk, series(itk, folder), uid="1.9"), "holds 2 DICOM series"),
    ],
)
def test_a_series_is_whole_and_one(itk, tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        read_channels([str(make(itk, tmp_path / "s"))])


class TestWriting:
    """A segmentation has the format, size and affine of its image."""

    def written(self, folder, file, *, channels=1, **item):
        names = [f"{folder / file}#{number}/{channels}" for number in range(channels)]
        item |= {"image": names if channels > 1 else str(folder / file)}
        load = LoadImaged("image", reader="medtl_ext.data.ChannelReader", ensure_channel_first=True)
        prepare = Compose([load, Orientationd("image", "RAS", labels=None), Spacingd("image", (1.0, 1.0, 2.0))])
        undo = {"transform": prepare, "orig_keys": "image", "nearest_interp": True, "to_tensor": True}
        finish = Compose([Invertd("pred", **undo), AsDiscreted("pred", threshold=128)])
        item = prepare(item)
        item["pred"] = item["image"][:1].clone()
        SaveSegmentationd("pred", folder / "out")(finish(item))
        (file,) = (folder / "out").iterdir()
        return file, *read_channels([str(file)])

    def test_of_nifti_with_the_codes_of_its_header(self, tmp_path):
        image = nib.Nifti1Image(VOLUME, AFFINE)
        image.set_sform(AFFINE, code="mni")
        image.header.set_xyzt_units("mm")
        nib.save(image, tmp_path / "v.nii.gz")
        file, found, meta = self.written(tmp_path, "v.nii.gz")
        assert file.name == "v_seg.nii.gz"
        assert (found[0] == (VOLUME >= 128)).mean() > 0.98  # there and back
        assert np.allclose(meta["affine"], AFFINE)
        header = nib.load(file).header
        assert (int(header["sform_code"]), header.get_xyzt_units()[0], header.get_data_dtype()) == (4, "mm", np.uint8)

    @pytest.mark.parametrize(("given", "ending"), [("png", "png"), ("tif", "tif"), ("bmp", "bmp"), ("jpg", "png")])
    def test_of_a_picture_in_colours_that_are_class_numbers(self, tmp_path, given, ending):
        picture(tmp_path / f"a.{given}", COLOUR)
        file, found, _ = self.written(tmp_path, f"a.{given}", channels=3, name="p1")
        assert file.name == f"p1_seg.{ending}"
        assert found.shape == (1, 8, 6, 1)
        if given != "jpg":
            assert (found[0, ..., 0] == (COLOUR[..., 0].T >= 128)).all()
        assert Image.open(file).mode == "P"

    @pytest.mark.parametrize("ending", ["nrrd", "mha"])
    def test_of_itk_s_formats(self, itk, tmp_path, ending):
        by_itk(itk, tmp_path / f"v.{ending}", VOLUME)
        file, found, meta = self.written(tmp_path, f"v.{ending}")
        assert file.name == f"v_seg.{ending}"
        assert (found[0] == (VOLUME >= 128)).mean() > 0.98
        assert np.allclose(meta["affine"], read_channels([str(tmp_path / f"v.{ending}")])[1]["affine"])

    def test_of_a_dicom_series_as_nifti(self, itk, tmp_path):
        series(itk, tmp_path / "1.2.840")
        file, found, meta = self.written(tmp_path, "1.2.840", name="p1")
        assert file.name == "p1_seg.nii.gz"
        assert (found[0][..., :: int(np.sign(meta["affine"][2, 2]))] == (VOLUME >= 128)).mean() > 0.98
        assert np.allclose(meta["affine"], read_channels([str(tmp_path / "1.2.840")])[1]["affine"])


class TestFindingImages:
    @pytest.fixture
    def folder(self, tmp_path):
        def make(*names):
            for name in names:
                (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
                nib.save(nib.Nifti1Image(VOLUME, AFFINE), tmp_path / name)
            return tmp_path

        return make

    @pytest.mark.parametrize(
        "names",
        [
            ("p1_T1.nii.gz", "p1_FLAIR.nii.gz", "p2_FLAIR.nii", "p2_T1.nii"),
            ("p1_0000.nii.gz", "p1_0001.nii.gz", "p2_0000.nii.gz", "p2_0001.nii.gz"),
            ("p1/T1.nii.gz", "p1/FLAIR.nii.gz", "p2/x_T1.nii.gz", "p2/x_FLAIR.nii.gz"),
        ],
    )
    def test_patients_of_two_channels(self, folder, names):
        found = find_images(str(folder(*names)), ("T1", "FLAIR"))
        assert [item["name"] for item in found] == ["p1", "p2"]
        for item in found:
            for path, endings in zip(item["image"], (("T1", "0000"), ("FLAIR", "0001")), strict=True):
                assert any(ending in path.rpartition("/")[2] for ending in endings)

    def test_one_channel_is_one_file_whatever_its_name(self, folder):
        found = find_images(str(folder("a_0000.nii.gz", "C.NII.GZ", "b/T1.nii")), ("T1",))
        assert [item["name"] for item in found] == ["C", "a_0000", "b"]

    def test_an_analyze_pair_is_one_image(self, tmp_path):
        nib.save(nib.Nifti1Pair(VOLUME, AFFINE), tmp_path / "a.img")
        (item,) = find_images(str(tmp_path), ("T1",))
        assert (read_channels([item["image"]])[0][0] == VOLUME).all()

    def test_a_colour_picture_holds_all_channels(self, tmp_path):
        path = picture(tmp_path / "a.png", COLOUR)
        expected = [{"name": "a", "image": [f"{path}#{number}/3" for number in range(3)]}]
        assert find_images(str(tmp_path), ("R", "G", "B")) == find_images(path, ("R", "G", "B")) == expected

    def test_a_dicom_folder_is_one_image(self, itk, tmp_path):
        series(itk, tmp_path / "all" / "p1")
        for where in (tmp_path / "all", tmp_path / "all" / "p1"):
            assert find_images(str(where), ("T1",)) == [{"name": "p1", "image": str(tmp_path / "all" / "p1")}]

    @pytest.mark.parametrize(
        ("names", "message"),
        [("p1_T1.nii.gz", "p1 has no file of FLAIR beside"), ("p1_T1.nii.gz p1_T1.nii p1_FLAIR.nii", "two T1 of p1")],
    )
    def test_refused(self, folder, names, message):
        with pytest.raises(InputError, match=message):
            find_images(str(folder(*names.split())), ("T1", "FLAIR"))

    def test_nothing_there(self, tmp_path):
        for where in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(InputError, match="give an image"):
                find_images(str(where), ("T1",))

    def test_every_file_is_read_before_anything_begins(self, folder):
        where = folder("a.nii.gz", "b.nii.gz", "c.nii.gz")
        assert len(require_readable(find_images(str(where), ("T1",)))) == 3
        for name in ("a.nii.gz", "b.nii.gz"):
            (where / name).write_bytes((where / name).read_bytes()[:-20])
        with pytest.raises(InputError, match=r"a.nii.gz cannot be read .* \(and 1 more like this\)"):
            require_readable(find_images(str(where), ("T1",)))


class TestSamples:
    def test_all_are_small_and_unknown_ones_are_refused(self, tmp_path):
        files = (file for file in (Path(sample.__file__).parent / "samples").rglob("*") if file.is_file())
        assert sum(file.stat().st_size for file in files) < 6e6
        with pytest.raises(InputError, match="did you mean 'retina'"):
            sample.write_sample("retin", tmp_path / "x")


class TestNearIdentical:
    def test_a_copy_that_was_scaled_and_compressed_is_found_and_no_other(self, tmp_path):
        smooth = np.kron(RNG.random((20, 8, 8)), np.ones((16, 16)))
        stored = picture(tmp_path / "a.jpg", (smooth[3] * 200 + 20).astype(np.uint8))
        images = [*smooth, read_channels([stored])[0][0, ..., 0].T]
        found = list(near_identical([thumbnail(image[..., None]) for image in images], list(range(21))))
        assert [pair[:2] for pair in found] == [(3, 20)]

    @pytest.mark.parametrize("axis", range(3))
    def test_a_mirrored_copy_is_found_and_no_symmetric_other(self, axis):
        smooth = np.kron(RNG.random((12, 6, 6, 6)), np.ones((7, 7, 7)))
        head = smooth.mean(0) + smooth.mean(0)[::-1]
        images = [*(head + 0.3 * smooth), np.flip(head + 0.3 * smooth[5], axis) * 2 + 1]
        found = list(near_identical([thumbnail(image) for image in images], list(range(13))))
        assert [(*pair[:2], pair[3]) for pair in found] == [(5, 12, True)]

    def test_scans_of_one_patient_are_no_news(self):
        image = thumbnail(RNG.random((40, 40, 1)))
        assert list(near_identical([image, image], ["p", "p"])) == []

    def test_what_all_images_share_does_not_count(self):
        """Photographs taken through a round opening."""
        opening = np.hypot(*np.mgrid[-1:1:64j, -1:1:64j]) < 0.9
        images = [(opening * (200 + 25 * np.kron(RNG.random((8, 8)), np.ones((8, 8)))))[..., None] for _ in range(12)]
        thumbnails = [thumbnail(image) for image in images]
        assert np.corrcoef(thumbnails[0].ravel(), thumbnails[1].ravel())[0, 1] > 0.97
        assert list(near_identical(thumbnails, list(range(12)))) == []


def test_a_mask_of_colours_is_declared_by_them(tmp_path):
    mask = np.zeros((6, 8, 3), np.uint8)
    mask[:2], mask[2:4] = (255, 0, 0), (0, 255, 0)
    picture(tmp_path / "m.png", mask)
    picture(tmp_path / "a.png", COLOUR)
    subject = {"id": "p", "institution": "X", "split": "train", "images": {"R+G+B": "a.png"}}
    content = {"name": "colours", "subjects": [subject | {"labels": {"mask": "m.png"}}]}
    content["labels"] = {"mask": {"artery": [255, 0, 0], "vein": [0, 255, 0]}}
    content["objectives"] = {"AV": {"label": "mask", "values": ["vein", "artery"]}}
    collection = load_collection(write_collection(tmp_path / "collection.json", content))
    (item,) = collection.datalist("X-G+R-AV", "train")
    assert [name[-4:] for name in item["image"]] == ["#1/3", "#0/3"]
    assert collection.label_values("X-G+R-AV") == [[255 << 8], [255 << 16]]
    found, _ = read_channels([item["label"]])
    assert [int((found == value).sum()) for (value,) in collection.label_values("X-G+R-AV")] == [16, 16]
