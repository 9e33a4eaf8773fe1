"""Figures checked on what they show: panels, titles, orientation, and the numbers behind the marks."""

from functools import partial
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from medtl_ext import InputError
from medtl_ext.ranking import baseline_rankings, bootstrap_ranking
from medtl_ext.visualize import (
    method_group,
    plot_audit,
    plot_comparison,
    plot_critical_difference,
    plot_montage,
    plot_overlay,
    plot_ranking,
    plot_risk_maps,
    plot_scores_against_outcome,
    save_figure,
    to_display,
)

WIDTH, DEPTH = 10, 14  # x, y
IMAGE = np.random.default_rng(0).random((WIDTH, DEPTH))
LABEL = np.zeros((WIDTH, DEPTH), dtype=int)  # one block of class 1, front right of the patient
LABEL[6:9, 9:13] = 1
MAP = np.linspace(1, 10, WIDTH * DEPTH).reshape(WIDTH, DEPTH)
ORANGE, BLUE = "#D55E00", "#0072B2"


def drawn(panel):
    return np.asarray(panel.images[0].get_array())


def titles(figure):
    return [panel.get_title(loc="left") for panel in figure.axes]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def across(marks):
    """Where the bars end, or where the dots are, along the horizontal axis."""
    bars = [path.vertices[:, 0].tolist() for path in marks.get_paths()]
    return bars if hasattr(marks, "get_segments") else marks.get_offsets().filled(np.nan)[:, 0].tolist()


def rows_named(panel):
    assert panel.get_ylim()[0] > panel.get_ylim()[1]  # the first row is at the top
    return {tick.get_text(): tick.get_fontweight() for tick in panel.get_yticklabels()}


def outside(figure):
    """Texts and lines that the picture cuts off."""
    FigureCanvasAgg(figure).draw()
    width, height = figure.canvas.get_width_height()
    artists = [*figure.texts, *(artist for panel in figure.axes for artist in (*panel.texts, *panel.lines))]
    boxes = {artist: artist.get_window_extent() for artist in artists}
    return [a for a, box in boxes.items() if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]


class TestOrientation:
    def test_front_right_of_the_patient_is_top_left_of_the_picture(self):
        array = np.zeros((WIDTH, DEPTH))
        array[WIDTH - 1, DEPTH - 1] = 1
        assert to_display(array).shape == (DEPTH, WIDTH)
        assert to_display(array)[0, 0] == 1

    def test_as_drawn(self):
        """Rows of the picture run down and its columns to the right, where the patient's left is."""
        figure = plot_montage({"p1": {"T1": IMAGE}})
        panel = figure.axes[0]
        assert np.array_equal(drawn(panel), to_display(IMAGE))
        assert panel.images[0].get_extent() == [-0.5, WIDTH - 0.5, DEPTH - 0.5, -0.5]
        assert (panel.get_xlim(), panel.get_ylim()) == ((-0.5, WIDTH - 0.5), (DEPTH - 0.5, -0.5))
        sides = {text.get_text(): text.get_position()[0] for text in panel.texts}
        assert sides["R"] < sides["L"]
        assert "radiological" in figure.get_supxlabel()


class TestMontage:
    def test_rows_columns_and_labels(self):
        images = {"p1": {"T1": IMAGE, "tumour": LABEL}, "p2": {"T1": IMAGE}}
        figure = plot_montage(images, class_names={"tumour": ["ED", "ET"]})
        assert [panel.get_title() for panel in figure.axes] == ["T1", "tumour", "", ""]
        assert [panel.get_ylabel() for panel in figure.axes] == ["p1", "", "p2", ""]
        assert np.array_equal(drawn(figure.axes[1]), to_display(LABEL))
        shown = figure.axes[1].images[0].to_rgba([0, 1, 7, 9])  # a class beyond the colours has the last one
        assert shown.tolist() == [list(to_rgba(colour)) for colour in ("black", "#56B4E9", "#E69F00", "#E69F00")]
        assert not figure.axes[3].images
        assert [text.get_text() for text in figure.axes[3].get_legend().get_texts()] == ["ED", "ET"]


class TestRiskMaps:
    def test_one_scale_for_before_and_after(self):
        figure = plot_risk_maps(MAP, np.ones((WIDTH, DEPTH)), image=IMAGE)
        names = [panel.get_title().strip() for panel in figure.axes]
        assert names == ["image", "before fine-tuning\nmean 5.50", "after fine-tuning\nmean 1.00", ""]
        assert figure.axes[1].images[0].get_clim() == figure.axes[2].images[0].get_clim()
        assert np.allclose(drawn(figure.axes[1]), to_display(MAP))
        assert "risk weight" in figure.axes[3].get_ylabel()

    @pytest.mark.parametrize(("quantity", "hard", "easy"), [("weight", 10.0, 1.0), ("leep", -2.0, 0.0)])
    def test_hard_is_bright(self, quantity, hard, easy):
        figure = plot_risk_maps([[easy, hard]], [[easy, easy]], quantity=quantity)
        colours = figure.axes[0].images[0]
        assert sum(colours.to_rgba(hard)[:3]) > sum(colours.to_rgba(easy)[:3])
        assert ("LEEP" in figure.axes[-1].get_ylabel()) == (quantity == "leep")

    def test_nan_stays_out(self):
        before = np.full((WIDTH, DEPTH), 3.0)
        before[0, 0] = np.nan
        panel = plot_risk_maps(before, before).axes[0]
        assert panel.get_title().endswith("mean 3.00")
        assert np.isnan(np.ma.filled(drawn(panel), np.nan)[-1, -1])


class TestOverlay:
    def test_outlines_lie_on_the_label_and_dice_is_told(self):
        half = LABEL.copy()
        half[6:9, 11:13] = 0  # half of the block: Dice 2 * 6 / (12 + 6)
        predictions = {"full": [half, 0 * LABEL]}
        options = {"subjects": ["p1", "p2"], "class_names": ["ED", "ET"]}
        truths = [torch.as_tensor(LABEL, dtype=torch.float32), 0 * LABEL]  # as a loader gives them
        figure = plot_overlay([IMAGE] * 2, truths, predictions, **options)
        assert len(figure.axes) == 6
        assert figure.axes[2].get_title() == "full\nDice of the slice 0.67"  # ET is in neither and does not count
        assert figure.axes[5].get_title() == "nothing to segment"
        assert [len(panel.collections) for panel in figure.axes] == [0, 1, 1, 0, 0, 0]
        x, y = np.concatenate(figure.axes[1].collections[0].get_segments()).T
        rows, columns = np.nonzero(to_display(LABEL))
        assert (x.min(), x.max()) == (columns.min() - 0.5, columns.max() + 0.5)
        assert (y.min(), y.max()) == (rows.min() - 0.5, rows.max() + 0.5)
        assert legend(figure) == ["ED", "ET"]

    def test_a_small_structure_is_zoomed_in_and_a_single_pixel_has_a_contour(self):
        image, label = np.ones((200, 160)), np.zeros((200, 160), dtype=int)
        label[50, 0] = label[53, 2] = 1  # one of them at the border
        options = {"subjects": ["p1", "p2"], "class_names": ["ED"], "aspects": [2.0, 1.0], "sides": ["AP", "RL"]}
        whole = np.ones_like(label)
        figure = plot_overlay([image] * 2, [label, whole], {"full": [label, whole]}, **options)
        zoomed, other = figure.axes[1], figure.axes[4]
        assert [panel.get_ylabel() for panel in figure.axes[::3]] == ["p1\nzoomed in", "p2"]
        assert [panel.get_aspect() for panel in (zoomed, other)] == [2, 1]
        shown = [panel.images[0].get_array().shape for panel in (zoomed, other)]
        assert shown[1] == (160, 200)
        assert shown[0][0] < 30
        assert shown[0][1] < 70
        assert [len(panel.collections[0].get_segments()) for panel in (zoomed, other)] == [8, 2 * (160 + 200)]
        assert [text.get_text() for panel in figure.axes for text in panel.texts] == [*"AP", *"RL"]
        assert "the patient's front (A) is on the left" in figure.get_supxlabel().replace("\n", " ")
        assert "Dice of the slice 1.00" in figure.axes[2].get_title()


def overlaid(**predictions):
    return plot_overlay([LABEL] * 2, [LABEL] * 2, predictions, subjects=["p1", "p2"], class_names=["ED"])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (partial(to_display, np.zeros((2, 3, 4))), "one slice"),
        (partial(plot_montage, {}), "at least one image"),
        (partial(plot_risk_maps, np.ones((3, 4)), np.ones((4, 3))), "one shape"),
        (partial(plot_risk_maps, np.full((3, 4), np.nan), np.full((3, 4), np.nan)), "no finite value"),
        (partial(plot_risk_maps, np.ones((3, 4)), np.ones((3, 4)), quantity="leap"), "did you mean 'leep'"),
        (partial(overlaid, full=[LABEL]), "2 subjects but 1 slices in 'full'"),
    ],
)
def test_what_cannot_be_shown_is_refused(ask, message):
    with pytest.raises(InputError, match=message):
        ask()


def audit(**options):
    ends = ["difference_low", "difference_high"]
    rows = [("full", 0.6, 0.5, 0.7, 0.0, np.nan, np.nan), ("scratch", 0.5, 0.4, 0.6, -0.1, -0.2, 0.0)]
    table = pd.DataFrame(rows, columns=["arm", "mean", "low", "high", "difference", *ends])
    table = pd.concat([table.assign(split="val"), table.iloc[::-1].assign(split="test", mean=[0.7, 0.3])])
    keys = [(s, m, f"{s}{i}") for s, n in (("val", 3), ("test", 1)) for m in ("full", "scratch") for i in range(n)]
    patients = pd.DataFrame(keys, columns=["split", "method", "subject"]).assign(dice=np.linspace(0.4, 0.7, len(keys)))
    return patients, plot_audit(patients, table, recommended="full", **options)


def test_audit_shows_patients_means_intervals_and_differences():
    patients, figure = audit()
    assert titles(figure) == ["validation: 3 patients", "validation: difference to the best", "test: 1 patient"]
    validation, differences, test = figure.axes
    dots, bars, diamonds = validation.collections
    assert across(dots) == patients.loc[patients["split"] == "val", "dice"].to_list()
    assert np.floor(dots.get_offsets()[:, 1]).tolist() == [0, 0, 0, 1, 1, 1]  # in the row of their arm
    assert across(bars) == [[0.5, 0.7], [0.4, 0.6]]
    assert across(diamonds) == [0.6, 0.5]
    assert across(test.collections[2]) == [0.3, 0.7]  # the arms in validation's order
    assert across(differences.collections[0])[1] == [-0.2, 0.0]
    assert rows_named(validation) == {"full": "bold", "scratch": "normal"}
    assert validation.get_xlim() == test.get_xlim()


def comparison(*sizes, **options):
    methods = (("risk_map", 0.02, True), ("vanilla", np.nan, False), ("prior_image", 0.01, False))
    rows = [
        (pair, slices, method, 0.1 * k + slices / 1000, sd, (0.1 * k, 0.1 * k + slices / 500), differs)
        for pair in ("A", "B")
        for slices in sizes
        for k, (method, sd, differs) in enumerate(methods)
    ]
    table = pd.DataFrame(rows, columns=["pair", "slices", "method", "mean", "sd", "run_means", "differs"])
    return plot_comparison(table, **options)


class TestComparison:
    def test_panels_groups_and_marks(self):
        figure = comparison(50, 200)
        assert titles(figure) == ["A", "B"]
        panel = figure.axes[0]
        assert rows_named(panel) == {"vanilla": "bold", "risk_map": "normal", "prior_image": "normal"}
        bars, runs, dots = panel.collections
        assert across(bars)[0] + across(bars)[3] == pytest.approx([0.03, 0.07, 0.18, 0.22])
        assert across(dots) == pytest.approx([0.05, 0.15, 0.25, 0.2, 0.3, 0.4])
        heights = dots.get_offsets()[:, 1].tolist()  # blank rows between the groups, and few slices above many
        assert heights == pytest.approx([1.83, -0.17, 3.83, 2.17, 0.17, 4.17])
        assert [tuple(dots.get_facecolors()[i]) for i in (0, 3)] == [to_rgba("white"), to_rgba(ORANGE)]
        assert [line.get_xdata()[0] for line in panel.lines] == pytest.approx([0.15, 0.3])  # of the reference
        assert across(runs)[:2] == pytest.approx([0, 0.1])
        assert runs.get_offsets()[::2, 1].tolist() == pytest.approx(heights)
        stars = [(text.get_text(), text.xy[0]) for text in panel.texts]  # the risk map, at both slice numbers
        assert stars == [("*", pytest.approx(0.05 + 0.02)), ("*", pytest.approx(0.2 + 0.02))]
        assert legend(figure) == ["baseline", "weighting", "control", "50 slices", "200 slices"]

    def test_one_slice_number_needs_no_key(self):
        figure = comparison(50)
        assert legend(figure) == ["baseline", "weighting", "control"]
        assert figure.axes[0].collections[2].get_offsets()[:, 1].tolist() == [2, 0, 4]

    def test_groups(self):
        groups = {"vanilla": "baseline", "full": "baseline", "trs_map": "weighting", "frequency": "control"}
        groups["full_prior_image"] = "all parameters"
        assert {method: method_group(method) for method in groups} == groups


def ranking(table, tied=(), recommendation=None):
    return SimpleNamespace(table=table, tied=tied, recommendation=recommendation, resamples=1000)


class TestRanking:
    COLUMNS = ("source", "score", "low", "high", "rank", "rank_low", "rank_high", "p_best", "random_rank", "size_rank")
    ROWS = (
        ("ED", 0.6, 0.5, 0.75, 1, 1, 2, 0.8, 3, 2),
        ("ET", 0.5, 0.45, 0.55, 2, 1, 2, 0.2, 1, 3),
        ("NCR", np.nan, np.nan, np.nan, 3, 3, 3, 0.0, 2, 1),
    )
    TABLE = pd.DataFrame(ROWS, columns=COLUMNS)

    def test_scores_ranks_baselines_and_how_often_first(self):
        figure = plot_ranking(ranking(self.TABLE, ["ED", "ET"]), metric="LEEP")
        assert titles(figure) == ["LEEP", "rank", "ranked first"]
        scores, ranks, firsts = figure.axes
        bars, diamonds = scores.collections
        assert across(bars)[:2] == [[0.5, 0.75], [0.45, 0.55]]
        assert across(diamonds)[:2] == [0.6, 0.5]
        assert [(text.get_text(), text.get_position()[1]) for text in scores.texts] == [("no score", 2)]
        bars, diamonds, by_chance, by_size = ranks.collections
        assert across(bars)[:2] == [[1, 2], [1, 2]]
        assert across(diamonds)[:2] == [1, 2]
        assert np.isnan(across(diamonds)[2])
        assert [across(by_chance), across(by_size)] == [[3, 1, 2], [2, 3, 1]]
        assert by_chance.get_offsets()[:, 1].round().tolist() == [0, 1, 2]  # in the row of their source
        assert [bar.get_width() for bar in firsts.patches] == [0.8, 0.2, 0]
        assert [bar.get_facecolor() for bar in firsts.patches] == [to_rgba(c) for c in (ORANGE, ORANGE, BLUE)]
        assert rows_named(scores) == {"ED": "bold", "ET": "bold", "NCR": "normal"}
        assert legend(figure) == ["tied at the top", "others", "by random", "by size"]
        assert figure.get_supxlabel().endswith("hollow: rank by a baseline")

    @pytest.mark.parametrize(
        ("tied", "best", "words"), [(["ED"], "ED", "preferred"), (["ED"], None, "best guess"), ([], None, "others")]
    )
    def test_key_says_what_the_colour_means(self, tied, best, words):
        plain = self.TABLE.drop(columns=["random_rank", "size_rank"])
        figure = plot_ranking(ranking(plain, tied, best))
        assert legend(figure)[0] == words
        assert "hollow" not in figure.get_supxlabel()

    def test_shows_what_the_ranking_says_even_of_one_patient(self):
        figure = plot_ranking(bootstrap_ranking({"ED": [0.2], "ET": [0.7]}, baselines=baseline_rankings(["ED", "ET"])))
        assert legend(figure)[0] == "others"  # nothing is told apart, nor said to be tied
        assert across(figure.axes[0].collections[1]) == [0.7, 0.2]
        assert [bar.get_width() for bar in figure.axes[2].patches] == [0, 0]


def diagram(ranks, critical_difference, *groups, **options):
    test = {"average_ranks": pd.Series(ranks), "critical_difference": critical_difference, "groups": groups}
    return plot_critical_difference(SimpleNamespace(**test), **options)


RANKS = {"LEEP": 1.5, "LogME": 2.0, "GBC": 3.4, "PARC": 3.5, "SFDA": 4.6}


class TestCriticalDifference:
    def test_axis_bars_and_names(self):
        figure = diagram(RANKS, 1.6, ("LEEP", "LogME"), ("LogME", "GBC", "PARC"))
        (panel,) = figure.axes
        assert panel.get_xticks().tolist() == [1, 2, 3, 4, 5]
        assert panel.get_xlim() == (1, 5)
        texts = {text.get_text().strip(): text for text in panel.texts}
        names = ["LEEP  1.50", "LogME  2.00", "GBC  3.40", "4.60  SFDA", "3.50  PARC"]
        assert list(texts) == [*names, "critical difference 1.60"]
        lines = [(np.sort(line.get_xdata()), line.get_ydata(), line.get_linewidth()) for line in panel.lines]
        assert any(xs.tolist() == [1, 2.6] and ys[0] == ys[1] > 0 for xs, ys, _ in lines)  # to scale, above the axis
        assert [xs[[0, -1]].tolist() for xs, _, width in lines if width == 4] == [[1.5, 2.0], [2.0, 3.5]]
        assert [name for name in texts if texts[name].get_fontweight() == "bold"] == ["LEEP  1.50"]

    def test_long_names_and_a_difference_longer_than_the_axis_are_not_cut_off(self):
        ranks = {"a name as long as a task of a collection": 1.0, "another name of the same length": 2.0}
        assert outside(diagram(ranks, 1.4)) == []


class TestOutcome:
    COLUMNS = ("parc", "leep", "h_score", "nce", "otce")
    NAMES = dict.fromkeys(("gbc", *COLUMNS, "nan"), "a score") | {"leep": "LEEP"}
    TABLE = pd.DataFrame(np.random.default_rng(0).random((4, 5)), columns=COLUMNS).assign(
        nan=np.nan, dice=[0.4, 0.6, 0.7, 0.5], auc=[0.9, 0.8, 0.7, 0.6]
    )

    def test_scores_against_dice_by_modality(self):
        table = self.TABLE.assign(same_modality=[True, False, None, True])
        figure = plot_scores_against_outcome(table, scores=self.NAMES, outcome="dice", scratch=0.55, title="Worth")
        assert titles(figure) == ["a score", "LEEP", "a score", "a score", "a score"]
        for column, panel in zip(self.COLUMNS, figure.axes, strict=True):
            (dots,) = panel.collections
            assert dots.get_offsets().tolist() == table[[column, "dice"]].to_numpy().tolist()
            assert dots.get_facecolors().tolist() == [list(to_rgba(c, 0.8)) for c in (ORANGE, BLUE, BLUE, ORANGE)]
            assert panel.lines[0].get_ydata()[0] == 0.55
        assert (figure.get_suptitle(), figure.get_supylabel()) == ("Worth", "Dice")
        said = "orange: same modality as the target, blue: another; dashed: training from scratch"
        assert figure.get_supxlabel() == said

    def test_one_score_against_auc(self):
        names = {"leep": "LEEP"}
        figure = plot_scores_against_outcome(self.TABLE, scores=names, outcome="auc", scratch=0.5)
        assert figure.axes[0].collections[0].get_offsets()[:, 1].tolist() == self.TABLE["auc"].tolist()
        assert figure.get_supylabel() == "AUC"
        assert figure.get_supxlabel() == "dashed: training from scratch"

    def test_similarities_against_what_a_source_gains(self):
        table = self.TABLE.assign(same_modality=True, target=[*"aabb"], seed=0)
        figure = plot_scores_against_outcome(table, scores={"leep": "label SSIM"}, outcome="gain")
        gains = figure.axes[0].collections[0].get_offsets()[:, 1].tolist()
        assert gains == pytest.approx([-0.1, 0.1, 0.1, -0.1])
        assert figure.get_supylabel() == "Dice less the target's mean"
        assert figure.get_supxlabel().replace("\n", " ") == "orange: same modality as the target, blue: another"
        assert not figure.axes[0].lines


FIGURES = {
    "montage": lambda **options: plot_montage({"p1": {"T1": IMAGE}}, **options),
    "risk maps": lambda **options: plot_risk_maps(MAP, MAP, **options),
    "overlay": lambda **options: plot_overlay([IMAGE], [LABEL], {}, subjects=["p"], class_names=["ED"], **options),
    "audit": lambda **options: audit(**options)[1],
    "comparison": lambda **options: comparison(50, **options),
    "ranking": lambda **options: plot_ranking(ranking(TestRanking.TABLE), **options),
    "critical difference": lambda **options: diagram(RANKS, 1.6, **options),
    "outcome": lambda **options: plot_scores_against_outcome(
        TestOutcome.TABLE.assign(leep=0.4).rename({0: '<b>"&'}),
        scores={"leep": "LEEP"},
        outcome="auc",
        scratch=0.5,
        **options,
    ),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_title_and_origin_of_the_data_stand_on_every_figure_and_nothing_is_cut_off(draw):
    figure = draw(title="What is shown", synthetic=True)
    assert figure.get_suptitle().replace("\n", " ") == "What is shown"
    assert figure.get_supxlabel().startswith("synthetic phantom; ")
    assert "synthetic" not in draw().get_supxlabel()
    assert outside(figure) == []


MARKS = {
    "audit": ["val0: method full, dice 0.4", "full: mean 0.6, low 0.5, high 0.7", "full: difference 0"],
    "comparison": [
        "risk_map: slices 50, mean 0.05, sd 0.02",
        "vanilla: slices 50, mean 0.15",
        "risk_map: slices 50, run 0",
    ],
    "ranking": ["ED: score 0.6, low 0.5, high 0.75", "ED: random rank 3", "ED: first in 80.0% of the resamples"],
    "critical difference": ["LEEP  1.50", "3.50  PARC"],
    "outcome": ['<b>"&: leep 0.4, auc 0.9'],
}


@pytest.mark.parametrize("name", FIGURES)
def test_marks_say_their_names_and_values_in_a_browser(name, tmp_path):
    texts, ids = [], []
    for place in ("one", "two"):
        save_figure(FIGURES[name](), tmp_path / f"{place}.png")
        if (drawn := tmp_path / f"{place}.svg").is_file():
            elements = list(ElementTree.parse(drawn).iter())
            assert not [one for one in elements if one.tag.endswith("}a")]
            texts += [one[0].text for one in elements if one.get("role") == "img"]
            ids += [one.get("id") for one in elements if "id" in one.attrib]
    assert set(MARKS.get(name, [])) <= set(texts)
    assert len(ids) == len(set(ids))


def test_too_many_marks_are_pixels(tmp_path):
    table = pd.DataFrame({"leep": np.arange(3000), "auc": np.arange(3000)})
    save_figure(plot_scores_against_outcome(table, scores={"leep": "LEEP"}, outcome="auc"), tmp_path / "many.png")
    text = (tmp_path / "many.svg").read_text()
    assert "<image" in text
    assert len(text) < 50_000


def test_saved_whole_or_not_at_all(tmp_path):
    figure = plot_montage({"p1": {"T1": np.ones((3, 4))}})
    with pytest.raises(ValueError, match="not supported"):
        save_figure(figure, tmp_path / "figure.nonsense")
    assert not list(tmp_path.iterdir())
    save_figure(figure, tmp_path / "figure.png")
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]  # no temporary file is left
    assert (tmp_path / "figure.png").stat().st_size > 5000
