"""nnU-Net's own predictions beside those of its folder read as a source: train three small networks, then compare.

    pip install nnunetv2
    python benchmarks/nnunet.py [FOLDER]

Target: images equal to 0.0001, logits to 0.05 of at most about 10 (nnU-Net adds up windows in 16 bits), probabilities
in the file's grid to 0.01.
"""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImage

from medtl_ext.networks import read_weights
from medtl_ext.sources.nnunet import CropNonzerod, nnunet_card, nnunet_network, sliding_window

# Two kinds of data: thick slices of CT and MRI with classes, and MRI of two sequences in a body with regions.
THICK = {"channel_names": {"0": "CT", "1": "MRI"}, "labels": {"background": 0, "ball": 1, "core": 2}}
BODY = {
    "channel_names": {"0": "T1", "1": "FLAIR"},
    "labels": {"background": 0, "whole": [1, 2], "core": 2},
    "regions_class_order": [1, 2],
}
CASES = {  # configuration, planner, dataset, and the spacing x, y, z around which that of its images lies
    "2d, thick slices": ("2d", "ExperimentPlanner", THICK, (0.8, 0.8, 4.0)),
    "3d, thick slices along x": ("3d_fullres", "ExperimentPlanner", THICK, (4.0, 0.8, 0.8)),
    "3d, regions in a body, residual": ("3d_fullres", "nnUNetPlannerResEncM", BODY, (1.0, 1.0, 1.2)),
}
ITERATIONS = 5


def draw(path: Path, dataset: Mapping[str, Any], spacing: np.ndarray, size: list[int], seed: int) -> None:
    """A ball with a core in noise, written as nnU-Net wants its cases; ``path`` has no suffix."""
    import SimpleITK

    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in size[::-1]], indexing="ij"))
    radius = np.sqrt(((grid - rng.uniform(-0.2, 0.2, (3, 1, 1, 1))) ** 2).sum(0))
    label = (radius < 0.6).astype(np.uint8) + (radius < 0.3)
    for channel in range(2):
        image = 100 * label + rng.normal(-50 if dataset is THICK else 100, 30, label.shape) * (1 + channel)
        if dataset is BODY:  # nothing outside, and a hole within
            image = np.where(((grid / 0.8) ** 2).sum(0) < 1, image, 0) * (radius > 0.1)
        written = SimpleITK.GetImageFromArray(image.astype(np.float32))
        written.SetSpacing([float(value) for value in spacing])
        SimpleITK.WriteImage(written, f"{path}_000{channel}.nii.gz")
    written = SimpleITK.GetImageFromArray(label)
    written.SetSpacing([float(value) for value in spacing])
    SimpleITK.WriteImage(written, str(path).replace("imagesTr", "labelsTr") + ".nii.gz")


def train(folder: Path, configuration: str, planner: str, dataset: Mapping[str, Any], spacing: tuple) -> Path:
    """Train an nnU-Net for a few iterations; returns its results folder."""
    os.environ |= {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "false"}
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    raw = folder / "raw" / "Dataset001_Balls"
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    for index in range(3):
        scale = 1 + 0.2 * index
        size = [int((40 + index) * min(1, 1.6 / step)) for step in spacing]
        draw(raw / "imagesTr" / f"case{index}", dataset, np.multiply(spacing, scale), size, index)
    dataset = {**dataset, "numTraining": 3, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(dataset))
    api.extract_fingerprints([1], num_processes=1)
    plans = api.plan_experiments([1], experiment_planner_class_name=planner)
    api.preprocess([1], plans, configurations=[configuration], num_processes=[1])
    file = folder / "preprocessed" / "Dataset001_Balls" / f"{plans}.json"
    settings = json.loads(file.read_text()) | {"continue_training": False}
    trainer = nnUNetTrainer(settings, configuration, "all", dataset, device=torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, ITERATIONS, 1
    trainer.run_training()
    return Path(trainer.output_folder_base)


def predict(card: Mapping[str, Any], files: list[str]) -> tuple[MetaTensor, torch.Tensor, torch.Tensor]:
    """The preprocessed image and its logits, both with nnU-Net's axes, and the probabilities in the file's grid."""
    steps = [(locate(step["_target_"]), dict(step)) for step in card["preprocessing"]]
    steps = [step("image", **{key: one[key] for key in one if key != "_target_"}) for step, one in steps]
    image = Compose(steps)({"image": LoadImage(ensure_channel_first=True, dtype=np.float32)(files)})["image"]
    network = nnunet_network(card["network"]).eval()
    network.load_state_dict(read_weights(card["checkpoint"]))
    flat = card["dimensions"] == 2
    axes, there = card["axes"][flat:], [0, *[1 + axis for axis in card["axes"]]]
    window = [card["window"][sorted(axes).index(axis)] for axis in axes]
    mirror = [2 + axes.index(axis) for axis in card["mirror"]]
    flips = [some for count in range(len(mirror) + 1) for some in itertools.combinations(mirror, count)]

    def mirrored(patch: torch.Tensor) -> torch.Tensor:
        return sum(network(patch.flip(some)).flip(some) for some in flips) / len(flips)

    turned = image.as_tensor().permute(there)
    with torch.no_grad():
        found = sliding_window(turned.movedim(1, 0) if flat else turned[None], window, mirrored, card["overlap"])
    logits = found.movedim(0, 1) if flat else found[0]

    # Back as nnU-Net goes: logits are resampled, then made probabilities, and outside the crop all is background.
    data = {"image": MetaTensor(logits.permute(*np.argsort(there).tolist()), meta=image.meta)}
    data["image"].applied_operations = image.applied_operations
    for step in reversed(steps):
        if isinstance(step, CropNonzerod):
            classes = len(card["classes"]) == len(logits)
            data["image"] = torch.softmax(data["image"], 0) if classes else torch.sigmoid(data["image"])
        data = step.inverse(data) if hasattr(step, "inverse") else data
    probabilities = data["image"].as_tensor()
    if classes:
        probabilities[0] += 1 - probabilities.sum(0)
    return turned, logits, probabilities


def compare(results: Path, files: list[str]) -> dict[str, float]:
    """The largest differences from nnU-Net's own predictor on an image."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(results), ("all",))
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    prepare = configuration.preprocessor_class(verbose=False)
    image, _, _ = prepare.run_case(files, None, plans, configuration, predictor.dataset_json)
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
    read, properties = plans.image_reader_writer_class().read_images(files)
    _, probabilities = predictor.predict_single_npy_array(read, properties, save_or_return_probabilities=True)
    theirs = {"image": image, "logits": logits.float().numpy(), "probabilities": probabilities.transpose(0, 3, 2, 1)}
    ours = predict(nnunet_card(results), files)
    return {name: float(np.abs(theirs[name] - one.numpy()).max()) for name, one in zip(theirs, ours, strict=True)}


def main(folder: Path) -> None:
    for index, (name, (configuration, planner, dataset, spacing)) in enumerate(CASES.items()):
        where = folder / str(index)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            results = train(where, configuration, planner, dataset, spacing)
            found = {}
            for what, count in (("one window", 32), ("several", 64)):
                size = [int(count * min(1, 1.6 / step)) for step in spacing]
                for part in ("imagesTr", "labelsTr"):
                    (where / what / part).mkdir(parents=True)
                draw(where / what / "imagesTr" / "case", dataset, np.multiply(spacing, 1.1), size, seed=9)
                found[what] = compare(results, [f"{where / what / 'imagesTr' / 'case'}_000{n}.nii.gz" for n in (0, 1)])
        for what, largest in found.items():
            words = ", ".join(f"{key} {value:.2g}" for key, value in largest.items())
            print(f"{name}, {what}: largest differences: {words}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
