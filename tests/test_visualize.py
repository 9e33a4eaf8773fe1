"""Figures checked on what they show: panels, titles, orientation, and the numbers behind the marks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from medtl_ext import InputError
from medtl_ext.ranking import baseline_rankings, bootstrap_ranking, friedman_nemenyi
from medtl_ext.visualize import (
    method_group,
    plot_audit,
    plot_comparison,
    plot_critical_difference,
    plot_montage,
    plot_overlay,
    plot_ranking,
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


class TestRanking:
    @pytest.fixture
    def table(self):
        return pd.DataFrame(
            {
                "source": ["ED", "ET", "NCR"],
                "score": [0.6, 0.5, np.nan],
                "low": [0.5, 0.45, np.nan],
                "high": [0.75, 0.55, np.nan],
                "rank": [1, 2, 3],
                "rank_low": [1.0, 1.0, 3.0],
                "rank_high": [2.0, 2.0, 3.0],
                "rank_mean": [1.2, 1.8, 3.0],
                "p_best": [0.8, 0.2, 0.0],
                "random_rank": [3, 1, 2],
                "source_size_rank": [2, 3, 1],
            }
        )

    def test_scores_ranks_baselines_and_how_often_first(self, table, tmp_path):
        figure = plot_ranking(table, tied=["ED", "ET"], metric="LEEP", title="Sources", synthetic=True)
        scores, ranks, firsts = figure.axes
        assert [panel.get_title(loc="left") for panel in figure.axes] == ["LEEP", "rank", "ranked first"]
        assert [list(line.get_xdata()) for line in scores.lines] == [[0.5, 0.75], [0.6], [0.45, 0.55], [0.5]]
        assert [text.get_text() for text in scores.texts] == ["no score"]
        assert scores.texts[0].get_position()[1] == 2

        own = [line for line in ranks.lines if line.get_markerfacecolor() != "none"]
        assert [list(line.get_xdata()) for line in own] == [[1, 2], [1], [1, 2], [2]]
        hollow = [line for line in ranks.lines if line.get_markerfacecolor() == "none"]
        marks = {shape: [line for line in hollow if line.get_marker() == shape] for shape in "so"}
        assert [line.get_xdata()[0] for line in marks["s"]] == [3, 1, 2]  # random
        assert [line.get_xdata()[0] for line in marks["o"]] == [2, 3, 1]  # source size
        assert [round(line.get_ydata()[0]) for line in marks["s"]] == [0, 1, 2]  # in the row of their source

        assert [bar.get_width() for bar in firsts.patches] == [0.8, 0.2, 0]
        assert (
            firsts.patches[0].get_facecolor() == firsts.patches[1].get_facecolor() != firsts.patches[2].get_facecolor()
        )
        names = {tick.get_text(): tick.get_fontweight() for tick in scores.get_yticklabels()}
        assert names == {"ED": "bold", "ET": "bold", "NCR": "normal"}
        assert scores.get_ylim()[0] > scores.get_ylim()[1]  # the best is at the top
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend == ["tied at the top", "others", "by random", "by source size"]
        assert "synthetic phantom" in small_print(figure)
        assert "hollow: rank by a baseline" in small_print(figure)
        assert written(figure, tmp_path) > 5000

    @pytest.mark.parametrize(
        ("tied", "recommended", "words"),
        [(["ED"], "ED", "preferred"), (["ED"], None, "best guess"), ([], None, "others")],
    )
    def test_key_says_what_the_colour_means(self, table, tied, recommended, words):
        plain = table.drop(columns=["random_rank", "source_size_rank"])
        figure = plot_ranking(plain, tied=tied, recommended=recommended)
        assert figure.legends[0].get_texts()[0].get_text() == words
        assert "hollow" not in small_print(figure)

    def test_shows_what_the_ranking_says_even_of_one_patient(self, tmp_path):
        ranking = bootstrap_ranking({"ED": [0.2], "ET": [0.7]}, baselines=baseline_rankings(["ED", "ET"]))
        figure = plot_ranking(ranking.table, tied=ranking.tied, recommended=ranking.recommendation)
        assert [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "D"] == [0.7, 0.2]
        assert [bar.get_width() for bar in figure.axes[2].patches] == [0, 0]
        assert written(figure, tmp_path) > 5000


class TestCriticalDifference:
    RANKS = pd.Series({"SFDA": 4.6, "LEEP": 1.5, "GBC": 3.4, "LogME": 2.0, "PARC": 3.5})
    GROUPS = (("LEEP", "LogME"), ("LogME", "GBC", "PARC"))

    def test_axis_bars_and_names(self, tmp_path):
        figure = plot_critical_difference(
            self.RANKS, critical_difference=1.6, groups=self.GROUPS, title="Metrics", synthetic=True
        )
        (panel,) = figure.axes
        texts = {text.get_text(): text for text in panel.texts}
        assert list(texts)[:6] == ["1", "2", "3", "4", "5", "critical difference 1.60"]
        assert [texts[str(rank)].get_position()[0] for rank in range(1, 6)] == [1, 2, 3, 4, 5]
        drawn = [(list(line.get_xdata()), list(line.get_ydata()), line.get_linewidth()) for line in panel.lines]
        assert any(xs == [1, 2.6] and ys[0] == ys[1] > 0 for xs, ys, _ in drawn)  # the difference, to scale, above
        bars = [(xs, ys[0]) for xs, ys, width in drawn if width == 4]
        assert [xs for xs, _ in bars] == [[1.5, 2.0], [2.0, 3.5]]
        assert 0 > bars[0][1] > bars[1][1]

        left = ["LEEP  1.50", "LogME  2.00", "GBC  3.40"]
        right = ["3.50  PARC", "4.60  SFDA"]
        assert list(texts)[6:] == left + right
        for side, names in (("right", left), ("left", right)):
            assert {texts[name].get_ha() for name in names} == {side}
        heights = {name: texts[name].get_position()[1] for name in left + right}
        assert bars[1][1] > heights[left[0]] > heights[left[1]] > heights[left[2]]
        assert heights[right[1]] > heights[right[0]]
        for name, rank in zip(left + right, (1.5, 2.0, 3.4, 3.5, 4.6), strict=True):  # each name hangs on its rank
            assert any(xs[:2] == [rank, rank] and ys[1:] == [heights[name]] * 2 for xs, ys, _ in drawn)
        assert texts["LEEP  1.50"].get_fontweight() == "bold"
        assert figure.get_suptitle() == "Metrics"
        assert "synthetic phantom" in small_print(figure)
        assert written(figure, tmp_path) > 5000

    def test_nothing_is_cut_off(self):
        """Long names and a critical difference longer than the axis stay inside the picture."""
        figure = plot_critical_difference(
            {"a name as long as a task of a collection": 1.0, "another name of the same length": 2.0},
            critical_difference=1.4, groups=[],
        )  # fmt: skip
        FigureCanvasAgg(figure).draw()
        width, height = figure.canvas.get_width_height()
        for artist in [*figure.axes[0].texts, *figure.axes[0].lines]:
            box = artist.get_window_extent()
            assert 0 <= box.x0 <= box.x1 <= width
            assert 0 <= box.y0 <= box.y1 <= height

    def test_takes_the_result_of_the_test(self):
        rng = np.random.default_rng(0)
        result = friedman_nemenyi(pd.DataFrame(rng.random((20, 4)) + np.array([0, 0, 1, 1]), columns=list("abcd")))
        figure = plot_critical_difference(
            result.average_ranks, critical_difference=result.critical_difference, groups=result.groups
        )
        bars = [sorted(line.get_xdata()) for line in figure.axes[0].lines if line.get_linewidth() == 4]
        assert bars == [sorted(result.average_ranks[list(group)]) for group in result.groups]
        assert len(bars) == 2

    def test_bad_input(self):
        with pytest.raises(InputError, match="at least two methods; found 1"):
            plot_critical_difference({"LEEP": 1.0}, critical_difference=1, groups=[])
        with pytest.raises(InputError, match="groups names PRAC, which has no average rank"):
            plot_critical_difference(self.RANKS, critical_difference=1, groups=[("LEEP", "PRAC")])


def test_a_failed_save_leaves_nothing(tmp_path):
    figure = plot_montage({"p1": {"T1": np.ones((3, 4))}})
    with pytest.raises(ValueError, match="not supported"):
        save_figure(figure, tmp_path / "figure.nonsense")
    assert not list(tmp_path.iterdir())
