"""nnU-Net's own predictions beside those of its folder read as a source: train three small networks, then compare.

    pip install nnunetv2 && python benchmarks/nnunet_folder.py NEW_FOLDER

Target: 0.001 from nnU-Net in 32 bits. It adds up windows in 16, whose rounding (the last figure) is large in corners.
"""

import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from monai.transforms import Compose, LoadImage
from monai.utils import convert_to_dst_type

from medtl_ext.transfer.sources.allowed import transforms_of
from medtl_ext.transfer.sources.card import read_card
from medtl_ext.transfer.sources.network import untouched
from medtl_ext.transfer.sources.nnunet import CropNonzerod, nnunet_card

# Two kinds of data: thick slices of CT and MRI with classes, and MRI of two sequences in a body with regions.
THICK = {"channel_names": {"0": "CT", "1": "MRI"}, "labels": {"background": 0, "ball": 1, "core": 2}}
BODY = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "whole": [1, 2], "core": 2}}
BODY["regions_class_order"] = [1, 2]
CASES = {  # dataset, planner, spacing x, y, z around which that of its images lies, configurations
    "thick slices along x": (THICK, "ExperimentPlanner", (4.0, 0.8, 0.8), ["2d", "3d_fullres"]),
    "regions in a body": (BODY, "nnUNetPlannerResEncM", (1.0, 1.0, 1.2), ["3d_fullres"]),
}


def draw(folder: Path, name: str, dataset: dict[str, Any], spacing: np.ndarray, length: int, seed: int) -> list[str]:
    """A ball with a core in noise, written as nnU-Net wants its cases; returns the files of its channels."""
    import SimpleITK

    size = [int(length * min(1, 1.6 / step)) for step in spacing]
    files = [str(folder / "imagesTr" / f"{name}_000{channel}.nii.gz") for channel in range(2)]
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in size[::-1]], indexing="ij"))
    radius = np.sqrt(((grid - rng.uniform(-0.2, 0.2, (3, 1, 1, 1))) ** 2).sum(0))
    label = (radius < 0.6).astype(np.uint8) + (radius < 0.3)
    body = (((grid / 0.8) ** 2).sum(0) < 1) & (radius > 0.1)  # nothing outside, and a hole within
    for channel, file in [(0, str(folder / "labelsTr" / f"{name}.nii.gz")), *enumerate(files, 1)]:
        noise = rng.normal(-50 if dataset is THICK else 100, 30, label.shape) * channel
        image = label if channel == 0 else (100 * label + noise) * (body if dataset is BODY else 1)
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        written = SimpleITK.GetImageFromArray(image.astype(np.float32 if channel else np.uint8))
        written.SetSpacing([float(value) for value in spacing])
        SimpleITK.WriteImage(written, file)
    return files


def train(folder: Path, dataset: dict[str, Any], planner: str, spacing: tuple, configurations: list) -> Iterator[Path]:
    """Train nnU-Nets for a few iterations; gives their results folders."""
    os.environ |= {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "false"}
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    raw = folder / "raw" / "Dataset001_Balls"
    for index in range(3):
        draw(raw, f"case{index}", dataset, np.multiply(spacing, 1 + 0.2 * index), 40 + index, index)
    dataset = {**dataset, "numTraining": 3, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(dataset))
    api.extract_fingerprints([1], num_processes=1)
    plans = api.plan_experiments([1], experiment_planner_class_name=planner)
    api.preprocess([1], plans, configurations=configurations, num_processes=[1])
    settings = json.loads((folder / "preprocessed" / "Dataset001_Balls" / f"{plans}.json").read_text())
    settings["continue_training"] = False
    for configuration in configurations:
        trainer = nnUNetTrainer(dict(settings), configuration, "all", dataset, device=torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 3, 1
        trainer.run_training()
        yield Path(trainer.output_folder_base)


def predict(content: Mapping[str, Any], files: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The preprocessed image and its logits, both with nnU-Net's axes, and the probabilities in the file's grid."""
    card = read_card(content)
    steps = transforms_of(card.preprocessing, ["image"])
    image = Compose(steps)({"image": LoadImage(ensure_channel_first=True, dtype=np.float32)(files)})["image"]
    as_it_comes = card.model_copy(update={"classes": None})  # regions are no classes yet
    with torch.no_grad():
        logits = untouched(as_it_comes, channels=len(card.channels))(image[None])[0]

    # Back as nnU-Net goes: logits are resampled, then made probabilities, and outside the crop all is background.
    classes, found = len(logits) == card.n_classes, convert_to_dst_type(logits, image)[0]
    for step in reversed([step for step in steps if hasattr(step, "inverse")]):
        if isinstance(step, CropNonzerod):
            found = found.softmax(0) if classes else found.sigmoid()
        found = step.inverse({"image": found})["image"]
    found[0] += 1 - found.sum(0) if classes else 0
    there = [0, *[1 + axis for axis in card.axes]]
    return image.as_tensor().permute(there), logits.permute(there), found.as_tensor()


def compare(results: Path, files: list[str]) -> dict[str, float]:
    """The largest differences from nnU-Net's own predictor on an image."""
    from nnunetv2.inference import predict_from_raw_data as inference

    predictor = inference.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(results), ("all",))
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    prepare = configuration.preprocessor_class(verbose=False).run_case
    image, _, _ = prepare(files, None, plans, configuration, predictor.dataset_json)
    rounded = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
    read, properties = plans.image_reader_writer_class().read_images(files)
    gaussian = partial(inference.compute_gaussian.__wrapped__, dtype=torch.float32)
    with patch("torch.half", torch.float32), patch.object(inference, "compute_gaussian", gaussian):
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
        _, probabilities = predictor.predict_single_npy_array(read, properties, save_or_return_probabilities=True)
    theirs = {"image": image, "logits": logits.numpy(), "probabilities": probabilities.transpose(0, 3, 2, 1)}
    ours = predict(nnunet_card(results), files)
    found = {name: np.abs(theirs[name] - one.numpy()).max() for name, one in zip(theirs, ours, strict=True)}
    return found | {"its rounding": (rounded - logits).abs().max()}


def main(folder: Path) -> None:
    for name, (dataset, planner, spacing, configurations) in CASES.items():
        where = folder / name.replace(" ", "_")
        with redirect_stdout(StringIO()):
            trained = list(train(where, dataset, planner, spacing, configurations))
        for results, (what, length) in itertools.product(trained, [("one window", 32), ("several windows", 64)]):
            files = draw(where / what, "case", dataset, np.multiply(spacing, 1.1), length, seed=9)
            with redirect_stdout(StringIO()):
                found = compare(results, files)
            print(f"{name}, {results.name.split('__')[-1]}, {what}:", *[f"{key} {found[key]:.2g}" for key in found])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
