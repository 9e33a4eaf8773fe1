"""A trained network taken elsewhere by MONAI's own commands: it answers a real slice as it did, to 1e-4."""

import copy
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import RISK_MAP, card_of_a_unet
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, onnx_export
from monai.networks.nets import BasicUNet
from monai.transforms import Compose, NormalizeIntensity, SpatialPad

from medtl_ext.data.sample import write_sample
from medtl_ext.networks import Ensemble

CONFIG, META = (str(RISK_MAP.configs / f"{name}.json") for name in ("inference", "metadata"))
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(scope="module")
def real_slice(tmp_path_factory):
    """The middle of a hippocampus, 1 x 1 x 48 x 64."""
    folder = write_sample("hippocampus", tmp_path_factory.mktemp("sample") / "hippocampus").parent
    volume = nib.load(sorted(folder.rglob("*.nii.gz"))[0]).get_fdata(dtype=np.float32)
    prepare = Compose([NormalizeIntensity(), SpatialPad([48, 64])])
    return prepare(volume[None, ..., volume.shape[-1] // 2]).as_tensor()[None]


@pytest.fixture(params=["own", "ensemble", "card"])
def trained(request, tmp_path):
    """The folder of a run with ``model.pt``, and the options that `inference.json` needs for it."""
    torch.manual_seed(0)
    options = {"ckpt": str(tmp_path / "model.pt"), "task": "17-T1-ED"}
    if request.param == "card":
        card_of_a_unet(tmp_path, 2, ["background", "ED"], norm="batch")
        content = json.loads((tmp_path / "theirs.json").read_text()) | {"checkpoint": "model.pt", "window": [48, 64]}
        (tmp_path / "model.json").write_text(json.dumps(content))
        weights = torch.load(tmp_path / "theirs.pt", weights_only=True)
        torch.save({f"net.{name}": value for name, value in weights.items()}, tmp_path / "model.pt")
        return tmp_path, options | {"use_trace": True}
    shutil.copy(RISK_MAP.root / "models" / "grid.json", tmp_path)
    shutil.copy(RISK_MAP.root / "models" / "model.pt", tmp_path)
    if request.param == "ensemble":
        one = BasicUNet(2, 1, 2, features=[8, 16, 32, 64, 128, 8], norm="batch")
        other = copy.deepcopy(one)
        one.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        torch.save(Ensemble([one, other]).state_dict(), tmp_path / "model.pt")
        options |= {"use_trace": True}
    return tmp_path, options


def network_of(options):
    parser = ConfigParser()
    parser.read_config(CONFIG)
    parser.update({name: value for name, value in options.items() if name != "use_trace"})
    return parser.get_parsed_content("network").eval()


@pytest.mark.parametrize("kind", ["ts", "onnx", "pt2"])
def test_an_exported_network_answers_a_real_slice_as_it_did(kind, trained, real_slice, monkeypatch):
    folder, options = trained
    monkeypatch.chdir(RISK_MAP.root)
    file, files = str(folder / f"model.{kind}"), {"meta_file": META, "config_file": CONFIG}
    network = network_of(options)
    asked = options | files | {"filepath": file, "ckpt_file": options["ckpt"], "input_shape": [*real_slice.shape]}
    with torch.no_grad():
        expected = network(real_slice)
    assert expected.std() > 0.1
    if kind == "ts":
        ckpt_export("network", **asked)
        found = torch.jit.load(file)(real_slice)
    elif kind == "onnx":
        runtime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
        onnx_export("network", **asked)
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: real_slice.numpy()})[0])
    else:
        torch.export.save(torch.export.export(network, (real_slice,)), file)
        found = torch.export.load(file).module()(real_slice)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_copy_of_the_bundle_with_a_trained_network_segments_by_itself(tmp_path, monkeypatch):
    folder = write_sample("hippocampus", tmp_path / "hippocampus").parent
    image = sorted(folder.rglob("*.nii.gz"))[0]
    (tmp_path / "images").mkdir()
    shutil.copy(image, tmp_path / "images" / "a.nii.gz")
    taken = shutil.copytree(RISK_MAP.root, tmp_path / "taken", ignore=shutil.ignore_patterns("eval", "sources"))
    config = str(taken / "configs" / "inference.json")
    workflow = ConfigWorkflow(config, workflow_type="infer", input_dir=str(tmp_path / "images"))
    workflow.initialize()
    workflow.run()
    found = nib.load(taken / "eval" / "inference" / "a_seg.nii.gz")
    assert found.shape == nib.load(image).shape
