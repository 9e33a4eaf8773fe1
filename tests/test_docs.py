"""The documentation: links lead somewhere, the drop-in examples do what their page says, and the site builds."""

import html
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

import medtl_ext
from medtl_ext import InputError, visualize
from medtl_ext.losses import RiskWeightedLoss, risk_map
from medtl_ext.metrics import compute_h_score, compute_leep, compute_leep_image_maps

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "docs" / "examples"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/results/*.md", "bundles/*/docs/README.md", "tutorials/README.md")
    for path in REPOSITORY.glob(pattern)
)
pytestmark = pytest.mark.usefixtures("no_determinism_left_behind")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))


def test_no_published_table_names_a_folder_of_a_machine():
    tables = sorted((REPOSITORY / "docs").rglob("*.csv"))
    assert tables
    assert not [
        path.name for path in tables if re.search(r"(?<![\w.])/(?:home|root|work|tmp|Users)/", path.read_text())
    ]


@each_page
def test_links_lead_somewhere_and_nothing_is_said_of_the_machine_it_was_written_on(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|opt|Users)/", text)


# The drop-in examples


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """The folder of a stock bundle: five bright balls in noise, no two volumes alike in size, and a trained model."""
    folder = tmp_path_factory.mktemp("foreign")
    generator = np.random.default_rng(0)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for number in range(5):
        shape = (24 + 2 * number, 24, 20)
        centre = np.array(shape) / 2 + generator.uniform(-3, 3, 3)
        distance = np.linalg.norm(np.indices(shape) - centre[:, None, None, None], axis=0)
        image, label = generator.normal(size=shape) + 2 * (distance < 5), distance < 5
        for name, values in {"imagesTr": image.astype(np.float32), "labelsTr": label.astype(np.uint8)}.items():
            (folder / "data" / name).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values, affine), folder / "data" / name / f"{number}.nii.gz")
    run(folder)
    (folder / "models" / "model.pt").rename(folder / "models" / "source.pt")
    return folder


def workflow_of(folder: Path, *overlays: str, **options) -> ConfigWorkflow:
    files = [str(EXAMPLES / f"{name}.json") for name in ("foreign_bundle", *overlays)]
    workflow = ConfigWorkflow(files, workflow_type="train", bundle_root=str(folder), **options)
    workflow.initialize()
    return workflow


def run(folder: Path, *overlays: str, **options) -> ConfigWorkflow:
    workflow = workflow_of(folder, *overlays, **options)
    workflow.run()
    workflow.finalize()
    return workflow


def predictions(workflow: ConfigWorkflow, network: torch.nn.Module, dataset_id: str) -> list[tuple]:
    """What a network says of every volume of a dataset, without an engine: (logits, labels)."""
    inferer, items = (workflow.parser.get_parsed_content(name) for name in ("validate#inferer", dataset_id))
    with torch.no_grad():
        logits = [inferer(item["image"][None].as_tensor(), network.eval())[0] for item in items]
    return [(one, item["label"][0].as_tensor().long()) for one, item in zip(logits, items, strict=True)]


def test_the_foreign_bundle_is_stock_monai():
    text = (EXAMPLES / "foreign_bundle.json").read_text()
    assert "medtl" not in text
    targets = set(re.findall(r'"_target_": "([^"]+)"', text))
    assert all("." not in name or name.startswith(("torch.", "monai.", "ignite.")) for name in targets)


def test_the_loss_drops_into_a_stock_bundle(foreign, monkeypatch):
    """Weights by hand are those of the handler, and it is the patches' own weights that the loss gets."""
    given = []
    forward = RiskWeightedLoss.forward

    def spy(self, input, target, weight=None):
        given.append(weight)
        return forward(self, input, target, weight)

    monkeypatch.setattr(RiskWeightedLoss, "forward", spy)
    workflow = run(foreign, "drop_in_loss", "drop_in_metrics", output_dir=str(foreign / "loss"))
    content = workflow.parser.get_parsed_content
    reported = content("validate#evaluator").state.metrics
    assert {"val_mean_dice", "leep", "h_score"} == set(reported)
    assert reported["leep"] < 0
    pairs = predictions(workflow, content("source_network"), "leep#dataset")
    maps = compute_leep_image_maps([logits.softmax(0) for logits, _ in pairs], [labels for _, labels in pairs])
    held = [item["weight"] for item in content("train#weighted").data]
    assert len({weight.shape for weight in held}) == 3
    for expected, weight in zip(risk_map(maps), held, strict=True):
        torch.testing.assert_close(weight[0].double(), expected, rtol=1e-4, atol=1e-4)
    assert max(float(weight.max()) for weight in held) == pytest.approx(10)

    assert given
    assert all(weight is not None and weight.shape[1:] == (1, 16, 16, 16) for weight in given)
    trained, source = (content(name).state_dict() for name in ("network", "source_network"))
    assert any(not torch.equal(trained[name], source[name]) for name in source)
    stored = torch.load(foreign / "models" / "source.pt", weights_only=True)
    assert all(torch.equal(source[name], stored[name]) for name in source)


def test_the_weights_follow_their_pixels_through_crops_and_flips(foreign):
    dataset = workflow_of(foreign, "drop_in_loss").parser.get_parsed_content("train#weighted")
    for item in dataset.data:
        item["weight"] = item["label"].as_tensor() + 1.0
    patches = [patch for number in range(len(dataset)) for patch in dataset[number]]
    assert {int(patch["label"].max()) for patch in patches} == {1}
    for patch in patches:
        weight = torch.as_tensor(patch["weight"]).as_subclass(torch.Tensor)
        torch.testing.assert_close(weight, patch["label"].as_tensor() + 1.0)


def test_the_metrics_drop_into_a_stock_bundle(foreign):
    options = {"run": ["$@validate#evaluator.run()"], "network": "$@network_def.to(@device)"}
    plain = run(foreign, **options).parser.get_parsed_content("validate#evaluator").state.metrics
    workflow = run(foreign, "drop_in_metrics", **options)
    metrics = workflow.parser.get_parsed_content("validate#evaluator").state.metrics
    assert set(metrics) == {"val_mean_dice", "leep", "h_score"}
    assert metrics["val_mean_dice"] == plain["val_mean_dice"]

    pairs = predictions(workflow, workflow.parser.get_parsed_content("network"), "validate#dataset")
    logits = torch.cat([logits.flatten(1) for logits, _ in pairs], 1).T
    labels = torch.cat([labels.flatten() for _, labels in pairs])
    assert metrics["leep"] == pytest.approx(float(compute_leep(logits.softmax(1), labels)), rel=1e-5)
    assert metrics["h_score"] == pytest.approx(float(compute_h_score(logits, labels)), rel=1e-4)


def test_without_the_overlays_transforms_the_metric_says_what_is_wrong(foreign):
    stock = json.loads((EXAMPLES / "foreign_bundle.json").read_text())["train"]["postprocessing"]
    leep = {"validate#evaluator#additional_metrics": {"leep": {"_target_": "medtl_ext.metrics.LEEP"}}}
    workflow = workflow_of(foreign, "drop_in_metrics", **leep, **{"validate#postprocessing": stock})
    with pytest.raises(InputError, match="raw logits"):
        workflow.parser.get_parsed_content("validate#evaluator").run()


def test_a_source_of_other_classes_gives_a_map_too(foreign):
    stored = torch.load(foreign / "models" / "source.pt", weights_only=True)
    source = json.loads((EXAMPLES / "foreign_bundle.json").read_text())["network_def"] | {"out_channels": 3}
    weights = workflow_of(foreign, network_def=source).parser.get_parsed_content("network_def").state_dict()
    weights |= {name: value for name, value in stored.items() if value.shape == weights[name].shape}
    torch.save(weights, foreign / "models" / "three.pt")
    options = {"source_ckpt": str(foreign / "models" / "three.pt"), "source_def": source, "epochs": 1}
    items = run(foreign, "drop_in_loss", **options).parser.get_parsed_content("train#weighted").data
    assert all(1 <= float(item["weight"].min()) < float(item["weight"].max()) for item in items)


def test_what_the_page_shows_is_in_the_examples():
    page = (REPOSITORY / "docs" / "drop_in.md").read_text()
    blocks = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    overlays = {}
    for name in ("drop_in_loss", "drop_in_metrics"):
        overlays |= json.loads((EXAMPLES / f"{name}.json").read_text())
    assert blocks
    for block in blocks:
        assert json.loads(f"{{{block}}}").items() <= overlays.items()


# The pages


def test_every_file_that_a_run_writes_is_on_the_page_of_outputs():
    page = (REPOSITORY / "docs" / "outputs.md").read_text()
    names = {
        name
        for path in (REPOSITORY / "medtl_ext").rglob("*.py")
        if "data" not in path.parts and path.name not in ("_io.py", "__main__.py")  # which reads pages
        for name in re.findall(r'/ "([\w.]+\.(?:csv|md|png|html|txt|npz|json|graphml|nii\.gz))"', path.read_text())
    }
    assert "metrics.csv" in names
    names -= {path.name for path in (REPOSITORY / "bundles").glob("*/configs/*.json")}  # what they read
    missing = [name for name in sorted(names) if f"`{name}`" not in page]
    assert not missing, f"docs/outputs.md says nothing of {', '.join(missing)}"


# The gallery

GALLERY = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "gallery.md").read_text(), re.DOTALL)


def picture_of(code: str) -> Path:
    return Path(re.search(r'"(docs/images/gallery/\S+)"', code)[1])


def test_the_gallery_has_every_figure():
    drawn = set(re.findall(r"\bplot_\w+", "".join(GALLERY)))
    assert drawn == {name for name in dir(visualize) if name.startswith("plot_")}


@pytest.mark.parametrize("code", GALLERY, ids=lambda code: picture_of(code).stem)
def test_the_code_of_the_gallery_draws_its_pictures(code, tmp_path, monkeypatch):
    picture = picture_of(code)
    (tmp_path / picture).parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    drawn, kept = (Image.open(folder / picture).convert("L").resize((64, 64)) for folder in (tmp_path, REPOSITORY))
    assert np.abs(np.asarray(drawn, dtype=float) - np.asarray(kept, dtype=float)).mean() < 4  # of 255: fonts may differ


# The site


def broken_links(site: Path) -> set[str]:
    """Links and pictures of built pages that lead to no file of the site, or to no place in it."""
    pages = {page: page.read_text() for page in site.resolve().rglob("*.html")}
    places = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    broken = set()
    for page, text in pages.items():
        for link in set(re.findall(r'\b(?:href|src)="([^"]+)"', text)):
            if not re.match(r"[a-z]+:", link):
                file, _, place = unquote(html.unescape(link)).partition("#")
                there = (page.parent / file.partition("?")[0]).resolve() if file else page
                if not there.is_file() or (place and place not in places.get(there, ())):
                    broken.add(f"{page.relative_to(site.resolve())}: {link}")
    return broken


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">b</a><a href="b.html#there">b</a><img src="c.png">')
    (tmp_path / "b.html").write_text('<p id="here"></p><a href="https://example.org/c">c</a><a href="#here">here</a>')
    assert broken_links(tmp_path) == {"a.html: b.html#there", "a.html: c.png"}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-c", "docs", "-d", tmp_path / "tree"]
    done = subprocess.run([*command, ".", tmp_path / "html"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = tmp_path / "html" / "docs" / "build" / "api"
    modules = [module.name for module in pkgutil.walk_packages(medtl_ext.__path__, "medtl_ext.")]
    public = [name for name in modules if not re.search(r"\._", name)]
    assert not [name for name in public if not (reference / f"{name}.html").is_file()]
    assert "N x Z x *spatial" in (reference / "medtl_ext.metrics.leep.html").read_text()
    link = 'href="medtl_ext.metrics.leep.html#medtl_ext.metrics.leep.LEEPMap"'  # a name as it is imported
    assert link in (reference / "medtl_ext.losses.html").read_text()
    assert not broken_links(tmp_path / "html")
