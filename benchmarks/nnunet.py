"""nnU-Net from scratch on the labelled patients of a task, scored on its test patients in their own space.

    pip install nnunetv2
    python benchmarks/nnunet.py COLLECTION TASK NEW_FOLDER --epochs 5

Trains on the patients of split ``train`` (fold "all": nobody is kept back) with all defaults but the number of epochs,
over which its schedule is stretched. Writes metrics.csv with the columns of the bundles, and prints the wall time.
"""

import argparse
import json
import os
from pathlib import Path
from time import perf_counter

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.transforms import LoadImaged

from medtl_ext.metrics import compute_segmentation_scores
from medtl_ext.transfer import SegmentationTask
from medtl_ext.transforms import SelectLabelsd


def write_case(item: dict, folder: Path, part: str, target: SegmentationTask) -> None:
    """A patient's channels and classes as nnU-Net names them."""
    data = LoadImaged(["image", "label"], reader="medtl_ext.data.ChannelReader", ensure_channel_first=True)(dict(item))
    label = SelectLabelsd("label", target.label_values)(data)["label"][0]
    arrays = {f"images{part}/{item['subject']}_{channel:04}": image for channel, image in enumerate(data["image"])}
    for name, array in (arrays | {f"labels{part}/{item['subject']}": label.byte()}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array.numpy(), np.asarray(data["image"].affine)), folder / f"{name}.nii.gz")


def train(folder: Path, raw: Path, configuration: str, epochs: int, steps: int) -> Path:
    """Plan, prepare and train; says how long a training took; gives the folder of results."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    api.extract_fingerprints([1], num_processes=1)
    plans = api.plan_experiments([1])
    api.preprocess([1], plans, configurations=[configuration], num_processes=[1])
    settings = json.loads((folder / "preprocessed" / raw.name / f"{plans}.json").read_text())
    settings["continue_training"] = False
    dataset = json.loads((raw / "dataset.json").read_text())
    trainer = nnUNetTrainer(settings, configuration, "all", dataset, device=torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, steps, 1
    trainer.save_every = 1
    began = perf_counter()
    trainer.run_training()
    seconds = perf_counter() - began
    print(f"trained {epochs * steps} steps in {seconds:.0f} s, {seconds / epochs / steps:.3f} s each", flush=True)
    return Path(trainer.output_folder_base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection")
    parser.add_argument("task")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=250, help="of an epoch; 250 is nnU-Net's own")
    arguments = parser.parse_args()

    target, folder = SegmentationTask(arguments.task, collection=arguments.collection), arguments.folder.resolve()
    raw = folder / "raw" / "Dataset001_Target"
    os.environ |= {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
    os.environ |= {"nnUNet_n_proc_DA": str(max(torch.get_num_threads(), 1)), "nnUNet_compile": "false"}
    for split, part in (("train", "Tr"), ("test", "Ts")):
        for item in target.datalist(split):
            write_case(item, raw, part, target)
    names = dict(enumerate(target.channels))
    labels = {"background": 0} | {name: value for value, name in enumerate(target.class_names, 1)}
    dataset = {"channel_names": names, "labels": labels, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(dataset | {"numTraining": len(target.datalist("train"))}))
    results = train(folder, raw, arguments.configuration, arguments.epochs, arguments.steps)

    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(results), ("all",))
    predictor.predict_from_files(str(raw / "imagesTs"), str(folder / "predicted"), num_processes_preprocessing=1)
    rows = []
    for item in target.datalist("test"):
        truth, found = (
            nib.load(where / f"{item['subject']}.nii.gz") for where in (raw / "labelsTs", folder / "predicted")
        )
        for value, name in enumerate(target.class_names, 1):
            one, other = (np.asarray(image.dataobj) == value for image in (found, truth))
            dice = 2 * (one & other).sum() / (one.sum() + other.sum()) if one.any() or other.any() else 1.0
            row = {"method": "nnunet", "seed": 0, "split": "test", "subject": item["subject"], "class": name}
            rows.append(row | {"dice": dice} | compute_segmentation_scores(one, other, truth.affine))
    table = pd.DataFrame(rows)
    table.to_csv(folder / "metrics.csv", index=False)
    print(f"Dice {table.groupby('subject')['dice'].mean().mean():.4f} over {table['subject'].nunique()} test patients")


if __name__ == "__main__":
    main()
