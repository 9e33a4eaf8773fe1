"""What is published: the wheel, the source distribution and the bundles' zip files, used away from the repository."""

import ast
import configparser
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medtl_ext.data import generate_phantom

REPOSITORY = Path(__file__).resolve().parent.parent
BUNDLES = sorted(path.name for path in (REPOSITORY / "bundles").iterdir() if (path / "models" / "model.pt").is_file())


def test_every_import_at_the_top_of_a_module_is_declared():
    """A package that only another package brings can go away with it."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    declared = {re.split(r"[<>=!~]", line)[0].lower() for line in lines}
    distributions = packages_distributions()
    imported = {
        name.split(".")[0]
        for path in (REPOSITORY / "medtl_ext").rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    foreign = imported - set(sys.stdlib_module_names) - {"medtl_ext"}
    missing = [name for name in sorted(foreign) if declared.isdisjoint(map(str.lower, distributions.get(name, [])))]
    assert not missing, f"install_requires of setup.cfg says nothing of {', '.join(missing)}"


def run(*command, cwd: Path, **variables: str) -> str:
    """Run a command in a folder without the repository on its path, and return what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"} | variables
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The working tree as a commit of its own, so that building leaves nothing behind in the repository."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("checkout")
    names = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=REPOSITORY).split("\0")
    for name in filter(None, names):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "test"]):
        run("git", *command, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def published(checkout) -> Path:
    """The folder that `python -m build` fills: it makes the wheel from the source distribution."""
    pytest.importorskip("build")
    run(sys.executable, "-m", "build", cwd=checkout)
    return checkout / "dist"


@pytest.fixture(scope="module")
def installed(published, tmp_path_factory) -> dict[str, str]:
    """The variables under which Python finds the package installed from the wheel, before any other."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = next(published.glob("*.whl"))
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel, cwd=folder)
    variables = {"PYTHONPATH": str(folder)}
    where = run(sys.executable, "-c", "import medtl_ext; print(medtl_ext.__file__)", cwd=folder.parent, **variables)
    assert where.startswith(str(folder))
    return variables


@pytest.mark.slow
def test_the_wheel_and_the_source_hold_the_package_and_its_licence(checkout, published):
    modules = run("git", "ls-files", "medtl_ext", cwd=checkout).split()
    assert "medtl_ext/py.typed" in modules
    wheel = zipfile.ZipFile(next(published.glob("*.whl"))).namelist()
    assert not set(modules) - set(wheel)
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"medtl_ext", "medtl"}
    assert [name for name in wheel if name.endswith("licenses/LICENSE")]
    with tarfile.open(next(published.glob("*.tar.gz"))) as archive:
        source = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert not {"LICENSE", "README.md", "setup.cfg", "pyproject.toml", *modules} - source
    assert not [name for name in source if name.startswith(("bundles", "docs", "tutorials", "benchmarks"))]


@pytest.mark.slow
def test_every_module_can_be_imported_away_from_the_repository(installed, tmp_path):
    code = (
        "import importlib, pkgutil, medtl_ext\n"
        "for module in pkgutil.walk_packages(medtl_ext.__path__, 'medtl_ext.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "        print(module.name)\n"
    )
    imported = run(sys.executable, "-W", "error::SyntaxWarning", "-c", code, cwd=tmp_path, **installed).split()
    assert {"medtl_ext.metrics.leep", "medtl_ext.data.phantom.atlas"} <= set(imported)


@pytest.mark.slow
def test_the_command_line_works_away_from_the_repository(installed, tmp_path):
    assert "--institutions" in run(
        sys.executable, "-m", "medtl_ext.data", "phantom", "--help", cwd=tmp_path, **installed
    )
    options = ["--out", "phantom", "--institutions", "I1", "--subjects", "1"]
    run(sys.executable, "-m", "medtl_ext.data", "phantom", *options, cwd=tmp_path, **installed)
    assert (tmp_path / "phantom" / "collection.json").is_file()


@pytest.fixture(scope="module")
def zips(checkout) -> Path:
    """The folder of zip files that the command in the documentation makes."""
    page = (checkout / "docs" / "install.md").read_text()
    (command,) = [block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "git archive" in block]
    run("bash", "-ec", command, cwd=checkout)
    return checkout / "dist"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A volume for the bundles that segment, its middle slice for the one that classifies."""
    folder = tmp_path_factory.mktemp("phantom")
    generate_phantom(folder / "c", institutions=["17"], subjects=1, n_jobs=1, progress=False)
    for kind in ("volumes", "pictures"):
        (folder / kind).mkdir()
    shutil.copy(next(folder.rglob("T2.nii.gz")), folder / "volumes" / "T2.nii.gz")
    volume = nib.load(folder / "volumes" / "T2.nii.gz").get_fdata()
    middle = volume[..., volume.shape[2] // 2]
    Image.fromarray((255 * middle / middle.max()).astype(np.uint8)).save(folder / "pictures" / "T2.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLES)
def test_a_zipped_bundle_is_what_monai_expects(name, zips, tmp_path):
    version = json.loads((REPOSITORY / "bundles" / name / "configs" / "metadata.json").read_text())["version"]
    content = zipfile.ZipFile(zips / f"{name}_v{version}.zip").namelist()
    assert {entry.split("/")[0] for entry in content} == {name}
    assert {f"{name}/LICENSE", f"{name}/models/model.pt", f"{name}/configs/metadata.json"} <= set(content)
    assert not [entry for entry in content if entry.startswith((f"{name}/eval", f"{name}/models/sources"))]
    url = (zips / f"{name}_v{version}.zip").as_uri()
    options = ["--name", name, "--url", url, "--bundle_dir", "downloaded", "--progress", "False"]
    run(sys.executable, "-m", "monai.bundle", "download", *options, cwd=tmp_path)
    assert (tmp_path / "downloaded" / name / "configs" / "inference.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLES)
def test_an_unzipped_bundle_loads_and_runs_elsewhere(name, zips, images, installed, tmp_path):
    run(sys.executable, "-m", "zipfile", "-e", next(zips.glob(f"{name}_v*.zip")), tmp_path / "models", cwd=tmp_path)
    code = (
        "import monai.bundle, torch\n"
        f"network = monai.bundle.load({name!r}, bundle_dir='models', workflow_type='inference')\n"
        f"weights = torch.load('models/{name}/models/model.pt', weights_only=True)\n"
        "own = network.cpu().state_dict()\n"
        "assert own.keys() == weights.keys() and all(torch.equal(own[key], weights[key].cpu()) for key in own)\n"
    )
    run(sys.executable, "-c", code, cwd=tmp_path, **installed)

    config = Path("models") / name / "configs" / "inference.json"
    given = images / ("pictures" if name == "dataset_transferability" else "volumes")
    options = ["--config_file", config, "--input_dir", given, "--output_dir", "out"]
    run(sys.executable, "-m", "monai.bundle", "run", *options, cwd=tmp_path, **installed)
    if (tmp_path / "out" / "predictions.csv").is_file():  # the bundle that classifies
        (row,) = csv.reader((tmp_path / "out" / "predictions.csv").read_text().splitlines())
        assert row[0] == "T2.png"
        assert sum(map(float, row[1:])) == pytest.approx(1)
        return
    (segmented,) = (tmp_path / "out").rglob("*.nii.gz")
    image, segmentation = nib.load(images / "volumes" / "T2.nii.gz"), nib.load(segmented)
    assert segmentation.shape == image.shape
    np.testing.assert_allclose(segmentation.affine, image.affine, atol=1e-4)
    assert set(np.unique(segmentation.dataobj)) <= {0, 1}
