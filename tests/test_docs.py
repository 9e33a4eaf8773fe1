"""The documentation: links lead somewhere, the drop-in examples do what their page says, and the site builds."""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

import medtl_ext
from medtl_ext import InputError
from medtl_ext.losses import RiskWeightedLoss, risk_map
from medtl_ext.metrics import compute_h_score, compute_leep, compute_leep_image_maps

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "docs" / "examples"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/results/*.md", "bundles/*/docs/README.md", "tutorials/README.md")
    for path in REPOSITORY.glob(pattern)
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))


@each_page
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text)
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@each_page
def test_a_page_says_nothing_of_the_machine_it_was_written_on(page):
    assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|opt|Users)/", page.read_text())


# The drop-in examples


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """The folder of a stock bundle: five bright balls in noise, no two volumes alike in size, and a trained model."""
    folder = tmp_path_factory.mktemp("foreign")
    generator = np.random.default_rng(0)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for name in ("imagesTr", "labelsTr"):
        (folder / "data" / name).mkdir(parents=True)
    for number in range(5):
        shape = (24 + 2 * number, 24, 20)
        centre = np.array(shape) / 2 + generator.uniform(-3, 3, 3)
        distance = np.linalg.norm(np.indices(shape) - centre[:, None, None, None], axis=0)
        image = generator.normal(size=shape) + 2 * (distance < 5)
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), folder / "data/imagesTr" / f"{number}.nii.gz")
        nib.save(
            nib.Nifti1Image((distance < 5).astype(np.uint8), affine), folder / "data/labelsTr" / f"{number}.nii.gz"
        )
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


@pytest.fixture(autouse=True)
def no_determinism_left_behind():
    yield
    torch.use_deterministic_algorithms(False)


def predictions(workflow: ConfigWorkflow, network: torch.nn.Module, dataset_id: str) -> list[tuple]:
    """What a network says of every volume of a dataset, without an engine: (logits, labels)."""
    network.eval()
    inferer = workflow.parser.get_parsed_content("validate#inferer")
    with torch.no_grad():
        items = workflow.parser.get_parsed_content(dataset_id)
        return [
            (inferer(item["image"][None].as_tensor(), network)[0], item["label"][0].as_tensor().long())
            for item in items
        ]


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
    workflow = run(foreign, "drop_in_loss", output_dir=str(foreign / "loss"))
    content = workflow.parser.get_parsed_content
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
        torch.testing.assert_close(
            torch.as_tensor(patch["weight"]).as_subclass(torch.Tensor), patch["label"].as_tensor() + 1.0
        )


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


def test_both_overlays_train_and_report_together(foreign):
    workflow = run(foreign, "drop_in_loss", "drop_in_metrics", epochs=1)
    metrics = workflow.parser.get_parsed_content("validate#evaluator").state.metrics
    assert {"val_mean_dice", "leep", "h_score"} == set(metrics)
    assert metrics["leep"] < 0


def test_a_source_of_other_classes_gives_a_map_too(foreign):
    stored = torch.load(foreign / "models" / "source.pt", weights_only=True)
    source = json.loads((EXAMPLES / "foreign_bundle.json").read_text())["network_def"] | {"out_channels": 3}
    weights = workflow_of(foreign, network_def=source).parser.get_parsed_content("network_def").state_dict()
    weights |= {name: value for name, value in stored.items() if value.shape == weights[name].shape}
    torch.save(weights, foreign / "models" / "three.pt")
    options = {"source_ckpt": str(foreign / "models" / "three.pt"), "source_def": source, "epochs": 1}
    content = run(foreign, "drop_in_loss", **options).parser.get_parsed_content
    assert all(
        1 <= float(item["weight"].min()) < float(item["weight"].max()) for item in content("train#weighted").data
    )


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
        if "data" not in path.parts and path.name != "_io.py"
        for name in re.findall(r'/ "([\w.]+\.(?:csv|md|png|html|txt|npz|json|graphml|nii\.gz))"', path.read_text())
    }
    assert "metrics.csv" in names
    names -= {path.name for path in (REPOSITORY / "bundles").glob("*/configs/*.json")}  # what they read
    missing = [name for name in sorted(names) if f"`{name}`" not in page]
    assert not missing, f"docs/outputs.md says nothing of {', '.join(missing)}"


# The site


def public_modules() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pkgutil.walk_packages(medtl_ext.__path__, "medtl_ext.")
        return [module.name for module in found if not re.search(r"\._", module.name)]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-c", "docs", "-d", tmp_path / "tree"]
    done = subprocess.run([*command, ".", tmp_path / "html"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = tmp_path / "html" / "docs" / "build" / "api"
    assert not [name for name in public_modules() if not (reference / f"{name}.html").is_file()]
    assert "N x Z x *spatial" in (reference / "medtl_ext.metrics.leep.html").read_text()
    assert (
        'href="medtl_ext.metrics.leep.html#medtl_ext.metrics.leep.LEEPMap"'
        in (reference / "medtl_ext.losses.html").read_text()
    ), "a name as it is imported is a link to where it is defined"
