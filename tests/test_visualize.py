"""Figures checked on what they show: panels, titles, orientation, and the numbers behind the marks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from medtl_ext import InputError
from medtl_ext.visualize import (
    method_group,
    plot_audit,
    plot_comparison,
    plot_montage,
    plot_overlay,
    plot_risk_maps,
    save_figure,
    to_display,
)

WIDTH, DEPTH = 10, 14  # x, y


@pytest.fixture
def label():
    """One block of class 1, front right of the patient."""
    array = np.zeros((WIDTH, DEPTH), dtype=int)
    array[6:9, 9:13] = 1
    return array


def small_print(figure):
    return figure.get_supxlabel()


def written(figure, tmp_path):
    save_figure(figure, tmp_path / "figure.png")
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]  # no temporary file is left
    return (tmp_path / "figure.png").stat().st_size


def drawn(panel):
    return np.asarray(panel.images[0].get_array())


class TestOrientation:
    def test_front_right_of_the_patient_is_top_left_of_the_picture(self):
        array = np.zeros((WIDTH, DEPTH))
        array[WIDTH - 1, DEPTH - 1] = 1
        picture = to_display(array)
        assert picture.shape == (DEPTH, WIDTH)
        assert picture[0, 0] == 1

    def test_as_rendered(self):
        """Look at the pixels: a bright corner at the front right must light the top left of the panel, marked R."""
        image = np.full((WIDTH, DEPTH), 0.1)
        image[-3:, -3:] = 1.0
        figure = plot_montage({"p1": {"T1": image}})
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., 0].astype(float)
        box = figure.axes[0].get_window_extent()
        top = len(pixels) - int(box.y1)
        panel = pixels[top + 2 : top + int(box.height) - 2, int(box.x0) + 2 : int(box.x1) - 2]
        height, width = panel.shape
        assert panel[: height // 8, : width // 8].mean() > 200
        assert panel[: height // 8, -(width // 8) :].mean() < 60
        assert panel[-(height // 8) :, : width // 8].mean() < 60
        sides = {text.get_text(): text.get_position()[0] for text in figure.axes[0].texts}
        assert sides["R"] < sides["L"]
        assert "radiological" in small_print(figure)

    def test_a_volume_is_not_a_slice(self):
        with pytest.raises(InputError, match="one slice"):
            to_display(np.zeros((2, 3, 4)))


class TestMontage:
    def test_rows_columns_and_labels(self, label, tmp_path):
        image = np.random.default_rng(0).random((WIDTH, DEPTH))
        figure = plot_montage(
            {"p1": {"T1": image, "tumour": label}, "p2": {"T1": image}},
            class_names={"tumour": ["ED", "ET"]}, title="Phantom", synthetic=True,
        )  # fmt: skip
        assert [panel.get_title() for panel in figure.axes] == ["T1", "tumour", "", ""]
        assert [panel.get_ylabel() for panel in figure.axes] == ["p1", "", "p2", ""]
        assert np.array_equal(drawn(figure.axes[1]), to_display(label))
        assert not figure.axes[3].images
        assert [text.get_text() for text in figure.axes[3].get_legend().get_texts()] == ["ED", "ET"]
        assert "synthetic phantom" in small_print(figure)
        assert figure.get_suptitle() == "Phantom"
        assert written(figure, tmp_path) > 5000

    def test_needs_an_image(self):
        with pytest.raises(InputError, match="at least one image"):
            plot_montage({})


class TestRiskMaps:
    def test_one_scale_for_before_and_after(self, tmp_path):
        before = np.linspace(1, 10, WIDTH * DEPTH).reshape(WIDTH, DEPTH)
        after = np.ones((WIDTH, DEPTH))
        figure = plot_risk_maps(before, after, image=np.random.default_rng(0).random((WIDTH, DEPTH)))
        titles = [panel.get_title().strip() for panel in figure.axes]
        assert titles == ["image", "before fine-tuning\nmean 5.50", "after fine-tuning\nmean 1.00", ""]
        assert figure.axes[1].images[0].get_clim() == figure.axes[2].images[0].get_clim()
        assert np.allclose(drawn(figure.axes[1]), to_display(before))
        assert "risk weight" in figure.axes[3].get_ylabel()
        assert "synthetic" not in small_print(figure)
        assert written(figure, tmp_path) > 5000

    def test_hard_is_bright_for_weights_and_for_leep(self):
        hard, easy = plot_risk_maps([[1.0, 10.0]], [[1.0, 1.0]]), plot_risk_maps([[0, -2.0]], [[0, 0]], quantity="leep")
        weights, leep = hard.axes[0].images[0], easy.axes[0].images[0]
        assert sum(weights.to_rgba(10.0)[:3]) > sum(weights.to_rgba(1.0)[:3])
        assert sum(leep.to_rgba(-2.0)[:3]) > sum(leep.to_rgba(0.0)[:3])
        assert "LEEP" in easy.axes[-1].get_ylabel()

    def test_volume_shows_its_middle_slice_and_nan_stays_out(self):
        volume = np.ones((WIDTH, DEPTH, 5))
        volume[..., 2] = 3
        volume[0, 0, 2] = np.nan
        figure = plot_risk_maps(volume, volume)
        assert figure.axes[0].get_title().endswith("mean 3.00")
        assert np.isnan(np.ma.filled(drawn(figure.axes[0]), np.nan)[-1, -1])

    @pytest.mark.parametrize(
        ("before", "after", "quantity", "message"),
        [
            (np.ones((3, 4)), np.ones((4, 3)), "weight", "one shape"),
            (np.full((3, 4), np.nan), np.full((3, 4), np.nan), "weight", "no finite value"),
            (np.ones((3, 4)), np.ones((3, 4)), "leap", "did you mean 'leep'"),
        ],
    )
    def test_bad_input(self, before, after, quantity, message):
        with pytest.raises(InputError, match=message):
            plot_risk_maps(before, after, quantity=quantity)


class TestOverlay:
    def test_outlines_lie_on_the_label_and_dice_is_told(self, label, tmp_path):
        image = np.random.default_rng(0).random((WIDTH, DEPTH))
        half = label.copy()
        half[6:9, 11:13] = 0  # half of the block: Dice 2 * 6 / (12 + 6)
        figure = plot_overlay(
            [image, image], [label, 0 * label], {"full": [half, 0 * label]},
            subjects=["p1", "p2"], class_names=["ED"], title="Slices", synthetic=True,
        )  # fmt: skip
        assert len(figure.axes) == 6
        assert figure.axes[2].get_title() == "full\nDice of the slice 0.67"
        assert figure.axes[5].get_title() == "nothing to segment"
        (contour,) = figure.axes[1].collections
        x, y = contour.get_paths()[0].vertices.T
        rows, columns = np.nonzero(to_display(label))
        assert (x.min(), x.max()) == (columns.min() - 0.5, columns.max() + 0.5)
        assert (y.min(), y.max()) == (rows.min() - 0.5, rows.max() + 0.5)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ED"]
        assert "synthetic phantom" in small_print(figure)
        assert written(figure, tmp_path) > 5000

    def test_needs_one_slice_per_subject(self, label):
        with pytest.raises(InputError, match="2 subjects but 1 slices in 'full'"):
            plot_overlay([label] * 2, [label] * 2, {"full": [label]}, subjects=["p1", "p2"], class_names=["ED"])


class TestAudit:
    @pytest.fixture
    def table(self):
        rows = [("full", 0.6, 0.5, 0.7, 0.0, np.nan, np.nan), ("scratch", 0.5, 0.4, 0.6, -0.1, -0.2, 0.0)]
        columns = ["arm", "mean", "low", "high", "difference", "difference_low", "difference_high"]
        table = pd.DataFrame(rows, columns=columns)
        test = table.iloc[::-1].assign(split="test", mean=[0.7, 0.3])
        return pd.concat([table.assign(split="val"), test])

    @pytest.fixture
    def patients(self):
        keys = [(s, m, f"{s}{i}") for s, n in (("val", 3), ("test", 1)) for m in ("full", "scratch") for i in range(n)]
        return pd.DataFrame(keys, columns=["split", "method", "subject"]).assign(dice=np.linspace(0.4, 0.7, len(keys)))

    def test_shows_patients_means_intervals_and_differences(self, patients, table, tmp_path):
        figure = plot_audit(patients, table, recommended="full", title="Audit", synthetic=True)
        validation, differences, test = figure.axes
        assert validation.get_title(loc="left") == "validation: 3 patients"
        assert differences.get_title(loc="left") == "validation: difference to the best"
        assert test.get_title(loc="left") == "test: 1 patient"
        shown = np.concatenate([np.ma.getdata(dots.get_offsets())[:, 0] for dots in validation.collections])
        assert shown == pytest.approx(patients.loc[patients["split"] == "val", "dice"].to_numpy())
        bars = [line.get_xdata() for line in validation.lines]
        assert [list(bar) for bar in bars] == [[0.5, 0.7], [0.6], [0.4, 0.6], [0.5]]
        assert [list(line.get_xdata()) for line in test.lines][1::2] == [[0.3], [0.7]]  # the arms of validation's order
        assert list(differences.lines[-2].get_xdata()) == [-0.2, 0.0]
        names = {tick.get_text(): tick.get_fontweight() for tick in validation.get_yticklabels()}
        assert names == {"full": "bold", "scratch": "normal"}
        assert validation.get_xlim() == test.get_xlim()
        assert validation.get_ylim()[0] > validation.get_ylim()[1]  # the best arm is at the top
        assert "synthetic phantom" in small_print(figure)
        assert written(figure, tmp_path) > 5000


class TestComparison:
    @pytest.fixture
    def summary(self):
        rows = [
            (pair, slices, method, 0.1 * k + slices / 1000, sd, p)
            for pair in ("A", "B")
            for slices in (50, 200)
            for k, (method, sd, p) in enumerate(
                [("risk_map", 0.02, 0.01), ("vanilla", np.nan, np.nan), ("prior_image", 0.01, 0.9)]
            )
        ]
        return pd.DataFrame(rows, columns=["pair", "slices", "method", "mean", "sd", "p_holm"])

    def test_panels_groups_and_marks(self, summary, tmp_path):
        figure = plot_comparison(summary, title="Comparison", synthetic=True)
        assert [panel.get_title(loc="left") for panel in figure.axes] == ["A", "B"]
        panel = figure.axes[0]
        assert [tick.get_text() for tick in panel.get_yticklabels()] == ["vanilla", "risk_map", "prior_image"]
        dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in panel.lines if line.get_marker() == "o"]
        assert sorted(x for x, _ in dots) == pytest.approx([0.05, 0.15, 0.2, 0.25, 0.3, 0.4])
        stars = [(text.get_text(), text.xy[0]) for text in panel.texts]  # the risk map, at both slice numbers
        assert stars == [("*", pytest.approx(0.05 + 0.02)), ("*", pytest.approx(0.2 + 0.02))]
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend == ["baseline", "weighting", "control", "50 slices", "200 slices"]
        assert "synthetic phantom" in small_print(figure)
        assert written(figure, tmp_path) > 5000

    def test_one_slice_number_needs_no_key(self, summary):
        figure = plot_comparison(summary[summary["slices"] == 50])
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["baseline", "weighting", "control"]

    def test_groups(self):
        names = ["vanilla", "full", "trs_map", "frequency", "full_prior_image"]
        assert [method_group(name) for name in names] == [
            "baseline", "baseline", "weighting", "control", "all parameters"
        ]  # fmt: skip


def test_a_failed_save_leaves_nothing(tmp_path):
    figure = plot_montage({"p1": {"T1": np.ones((3, 4))}})
    with pytest.raises(ValueError, match="not supported"):
        save_figure(figure, tmp_path / "figure.nonsense")
    assert not list(tmp_path.iterdir())
