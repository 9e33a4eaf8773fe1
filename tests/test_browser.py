"""A report and an index of runs in a browser: what the scripts on the pages do, at the widths and themes of readers."""

import base64
import json
import re
import shutil
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from bundle_runs import DATASETS, RISK_MAP, SEQUENTIAL, SETTLED
from PIL import Image

from medtl_ext.report import write_index
from medtl_ext.transfer import Report
from medtl_ext.transfer.viewer import packed

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'medtl[browser]'")
EVIL = "<script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\">"
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core: pip install 'medtl[browser]'")
SIZES = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser (apt-get install chromium, or playwright install chromium): {error.message[:80]}")
        yield opened
        opened.close()


@pytest.fixture
def opened(browser):
    """A page at a width and in a theme; on leaving there were no errors on it, and nothing of the data was run."""
    pages = []

    def visit(path, width=1280, theme="light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
        pages.append((page, errors := []))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield visit
    for page, errors in pages:
        assert errors == []
        assert page.title() != "evil"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
        page.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run leaves for its page: a box in a volume of 20 x 24 x 16 with a segmentation two voxels off, a map."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    folder.mkdir()
    image, truth = np.random.default_rng(0).normal(size=(1, 20, 24, 16)), np.zeros((20, 24, 16), int)
    truth[6:12, 8:16, 3:9] = 1
    labels = {"truth": truth, EVIL: np.roll(truth, 2, 0)}
    views = [packed(image, labels, spacing=[1, 1, 2]) | {"name": EVIL, "rank": "worst of 2"}]
    views[0]["layers"][1]["dice"] = 0.667
    views += [packed(image, {}, maps={"LEEP": -(image[0] ** 2)}, spacing=[1, 1, 2]) | {"name": "all", "rank": "mean"}]
    content = {"classes": [EVIL], "by": EVIL, "photographs": False, "views": views}
    (folder / "viewer.json").write_text(json.dumps(content))
    (folder / "answer.txt").write_text(f"No evidence to prefer {EVIL}. More.\n\nTo use it:\npython -m x\n")
    (folder / "config.json").write_text(json.dumps({"target_task": "17-T2-ED", "bundle_root": "bundles/risk_map"}))
    scores = {"source": ["b", EVIL, "c", "d"], "dice": [0.5, 0.25, np.nan, 0.75], "rank": [10, 9, 8, 100]}
    pd.DataFrame(scores).to_csv(folder / "scores.csv", index=False)
    here = SimpleNamespace(folder=folder, figures=True, leads=True, config={"seed": 0})
    Report(here=here, title=EVIL, question="Which?", synthetic=False).write()
    return folder


def pixels(page, place: int) -> np.ndarray:
    address = page.locator("#viewer canvas").nth(place).evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB")).astype(int)


def faults(page) -> list[tuple[str, str]]:
    """What axe-core calls serious or critical, and where first."""
    found = axe.Axe().run(page).response["violations"]
    return [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]


@pytest.mark.parametrize(("width", "theme"), SIZES)
def test_volumes_are_drawn_and_scrolled_with_the_keyboard(width, theme, run, opened):
    page = opened(run / "report.html", width, theme)
    page.wait_for_selector("#viewer canvas")
    assert page.locator("#viewer canvas").count() == 3  # image, truth, segmentation
    image, truth, segmented = (pixels(page, place) for place in range(3))
    assert np.ptp(image) > 200
    coloured = [np.ptp(one, axis=-1).astype(bool).mean() for one in (image, truth, segmented)]
    assert coloured[0] == 0
    assert coloured[1] == pytest.approx(coloured[2], rel=0.2)
    assert coloured[1] > 0.05
    slider, said = page.get_by_role("slider", name="axial slice"), page.locator("#viewer [role=status]")
    before = said.inner_text()
    slider.press("ArrowRight")
    assert said.inner_text() != before
    assert (pixels(page, 0) != image).mean() > 0.5
    lightness = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (lightness == "rgb(255, 255, 255)") == (theme == "light")


def test_layers_planes_and_patients_can_be_chosen(run, opened):
    page = opened(run / "report.html")
    page.wait_for_selector("#viewer canvas")
    page.get_by_label("Plane").select_option("all three")
    assert page.locator("#viewer canvas").count() == 9
    labels = page.locator("#viewer canvas").evaluate_all("all => all.map(one => one.ariaLabel)")
    assert [sum(name in label for label in labels) for name in ("axial", "coronal", "sagittal")] == [3, 3, 3]
    heights = page.locator("#viewer canvas").evaluate_all("all => all.map(one => one.height / one.width)")
    assert heights[::3] == pytest.approx([24 / 20, 32 / 20, 32 / 24], rel=0.01)  # in mm
    page.locator("#viewer canvas").first.click(position={"x": 5, "y": 5})
    assert re.findall(r"\d+ of \d+", page.locator("#viewer [role=status]").inner_text())[1:] == ["24 of 24", "20 of 20"]
    page.get_by_label("truth", exact=True).uncheck()
    assert page.locator("#viewer canvas").count() == 6
    assert "Dice 0.667" in page.locator("#viewer").inner_text()
    page.get_by_label("Patient").select_option("1")
    page.wait_for_function("document.querySelector('#viewer .legend').textContent.includes('hard')")
    assert page.get_by_label("Plane").input_value() == "all three"


def test_tables_sort_by_click_and_by_keyboard(run, opened):
    page = opened(run / "report.html", 390)
    table = page.locator("table", has_text="dice").first

    def column(number):
        return table.locator(f"tbody td:nth-child({number})").all_inner_texts()

    table.get_by_role("button", name="rank").click()
    assert column(3) == ["8", "9", "10", "100"]
    table.get_by_role("button", name="dice").press("Enter")
    assert column(2) == ["0.250", "0.500", "0.750", ""]
    table.get_by_role("button", name="dice").press("Enter")
    assert column(2) == ["0.750", "0.500", "0.250", ""]
    assert table.locator("th").nth(1).get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize(("width", "theme"), SIZES)
def test_an_index_leads_to_reports_and_can_be_filtered(width, theme, run, opened):
    (run.parent / EVIL.replace("/", "")).mkdir(exist_ok=True)
    (run.parent / EVIL.replace("/", "") / "settings.json").write_text("{}")
    page = opened(write_index(run.parent).resolve(), width, theme)
    assert faults(page) == []
    assert page.locator("tbody tr:visible").count() == 2
    page.get_by_label("Show runs with").fill("risk_map prefer")
    assert page.locator("tbody tr:visible").count() == 1
    assert page.locator("#shown").inner_text() == "1 of 2"
    page.get_by_role("link", name="one").click()
    page.wait_for_selector("#viewer canvas")


# The reports of the bundles, by the runs that the tests of all bundles look at too

WITH_PATIENTS = [RISK_MAP, SEQUENTIAL, SETTLED]


@pytest.mark.usefixtures("no_determinism_left_behind")
@pytest.mark.parametrize("bundle", [*WITH_PATIENTS, DATASETS], ids=str)
def test_the_report_of_a_bundle_works_at_all_widths_and_themes(bundle, whole_run, opened, tmp_path):
    report = whole_run(bundle) / "report.html"
    assert report.stat().st_size < 12e6
    for width, theme in (SIZES[0], SIZES[-1]):
        page = opened(report, width, theme)
        first = page.locator("main > *:not(.synthetic)").first
        assert first.get_attribute("class") == "verdict"
        assert page.locator("h2").first.inner_text() == "What to do next"
        page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
        page.locator("th button").first.click()
        assert page.locator("th[aria-sort=ascending]").count() == 1
        if bundle in WITH_PATIENTS:
            page.wait_for_selector("#viewer canvas")
            before = pixels(page, 0)
            assert np.ptp(before) > 200
            page.get_by_role("slider", name="slice").first.press("ArrowRight")
            assert (pixels(page, 0) != before).any()
        figure = page.locator("figure", has=page.locator("svg")).first
        marks, said = figure.locator("svg [role=img]"), figure.locator("output")
        marks.nth(3).dispatch_event("pointerover")
        assert said.inner_text() == marks.nth(3).locator("title").text_content()
        figure.locator(".scroll").press("ArrowRight")
        assert said.inner_text() == marks.first.locator("title").text_content()
        assert page.locator("figure svg").count() == page.locator("output").count()
        assert page.locator(".panels img").count() == (12 if bundle is DATASETS else 0)
        page.screenshot(path=tmp_path / f"{width}_{theme}.png", full_page=True)
        assert faults(page) == []
