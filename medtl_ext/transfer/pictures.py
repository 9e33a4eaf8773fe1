"""Test patients with the truth and what every arm of a run says of them, for the report; the worst come first."""

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.data import Dataset, MetaTensor
from monai.metrics import compute_dice
from monai.transforms import AsDiscreted, Compose, LoadImage, Orientation
from PIL import Image
from torch import nn

from medtl_ext._io import write_csv, write_json
from medtl_ext._validation import InputError, require_number
from medtl_ext.data import Task
from medtl_ext.metrics import compute_leep_map
from medtl_ext.networks import holding, load_weights, read_weights
from medtl_ext.transfer.arms import UNTRAINED
from medtl_ext.transfer.jobs import Run, read_table
from medtl_ext.transfer.tasks import PROBABILITIES, ClassificationTask, SegmentationTask
from medtl_ext.transfer.truth import FineTuneSources
from medtl_ext.transfer.viewer import MOST, packed
from medtl_ext.visualize import plot_overlay, save_figure

N_PATIENTS, N_IMAGES = 3, 12
SIDE = 256
"""Pixels of the longer side of a picture, at most."""
FOLDERS = ("audit", "arms", "settle", "finetune")
"""Below these in the folder of a run its arms are, each in a folder of its name."""
SAME = 0.01
"""In mean Dice; what is further from what was scored was scored with other settings."""


@dataclass(kw_only=True, eq=False)
class Pictures:
    """A step that shows test patients with the truth and the segmentations of every arm that the run has trained.

    Writes ``overlay.png`` and ``viewer.json``, the volumes of the viewer in the report; nothing where there is no arm.
    With the arm ``zero_shot``, the untouched source, its LEEP at each voxel is shown too, with P(y|z) of the patient.

    Args:
        here, target: the run, and the target task.
        network, inferer: segment the patients, with the weights of each arm. An arm that they do not segment as it was
            scored (its network, shift or cleaning is another) is named and not shown.
        preprocessing: of a test patient, as the network takes it.
        postprocessing: makes one-hot ``pred`` and ``label`` of it, on the grid that is scored.
        patients: how many are shown, on their own images: the worst, the median and the best by the Dice of the arm
            that is advised (else of this run, else of the best), then the others, worst first. The first three are
            drawn, each in the slice that holds most foreground across the axis of the largest voxels.
        checkpoint: weights that the run scored, where these are not its own.
    """

    here: Run
    target: SegmentationTask
    network: nn.Module
    inferer: Callable
    preprocessing: Callable
    postprocessing: Compose
    patients: int = N_PATIENTS
    checkpoint: str | None = None

    def run(self) -> None:
        """Draw, unless the run is to leave no figures."""
        if not (self.here.leads and self.here.figures):
            return
        require_number("patients", self.patients, 1, whole=True)
        maps, folder = self.maps(), self.here.folder
        arms = self._arms()
        if not arms:
            return
        dice = pd.DataFrame({arm: _dice(metrics) for arm, (_, metrics) in arms.items()})
        dataset = Dataset(self.target.datalist("test"), self.preprocessing)
        by = _advised(dice, folder / "audit.json", self.here.config["method"])
        ranks = _ranks(by[[entry["subject"] for entry in dataset.data]], self.patients)
        entries = [dataset.data[place] for place in ranks]
        items = [dataset[place] for place in ranks]
        files, subjects = ([entry[key] for entry in entries] for key in ("image", "subject"))
        found = {arm: done for arm, (path, _) in arms.items() if (done := self._segment(arm, path, items))}
        for arm, done in list(found.items()):
            if not np.allclose([one["dice"] for one in done], dice.loc[subjects, arm], atol=SAME):
                del found[arm]
        if not found:
            return
        volumes = [self._volume(*one) for one in zip(files, items, *found.values(), strict=True)]
        views = self._views(dict(zip(subjects, ranks.values(), strict=True)), volumes, dice[list(found)])
        content = {"classes": list(self.target.class_names), "photographs": self.target.photographs}
        content |= {"by": by.name, "left_out": [arm for arm in arms if arm not in found], "views": [*views, *maps]}
        write_json(folder / "viewer.json", content)

        rows = [self._row(*volume, len(found)) for volume in volumes[:N_PATIENTS]]
        images, truths, aspects, sides, *segmented = zip(*rows, strict=True)
        options = {"subjects": subjects[:N_PATIENTS], "class_names": self.target.class_names}
        options |= {"aspects": aspects, "sides": sides, **self.said}
        figure = plot_overlay(images, truths, dict(zip(found, segmented, strict=True)), **options)
        save_figure(figure, folder / "overlay.png")

    def maps(self) -> list[dict[str, Any]]:
        """Further views, which a method may draw."""
        return []

    @property
    def said(self) -> dict[str, bool]:
        """What every figure is told."""
        return {"synthetic": self.target.synthetic, "photographs": self.target.photographs}

    def _arms(self) -> dict[str, tuple[Path, Path]]:
        """Weights and scores of each arm, those of the run itself last."""
        folder, method = self.here.folder, self.here.config["method"]
        paths = [path for name in FOLDERS for path in sorted(folder.glob(f"{name}/*/model.pt"))]
        arms = {path.parent.name: (path, path.with_name("metrics.csv")) for path in paths}
        if (folder / "metrics.csv").is_file():
            own = Path(self.checkpoint or folder / "model.pt"), folder / "metrics.csv"
            arms[method] = arms.pop(method, own)
        return arms

    def _segment(self, arm: str, path: Path, items: Sequence[Any]) -> list[dict[str, torch.Tensor]] | None:
        """``pred`` and ``label`` of each patient, as the evaluator scores a checkpoint, if it fits its network.

        An arm may have a network of its own, as the untouched source with another head. Of that source ``leep`` too.
        """
        device = next(self.network.parameters()).device
        weights = read_weights(path)  # a damaged file is none that does not fit
        network = holding(self.network, weights).to(device)
        try:
            load_weights(network, weights, min_share=1.0, name=str(path))
        except InputError:
            return None
        network.eval()
        decided, found = self.postprocessing.get_index_of_first(lambda step: isinstance(step, AsDiscreted)), []
        for item in items:
            with torch.no_grad():
                logits = self.inferer(item["image"][None].to(device), network)[0].cpu()
            soft = self.postprocessing({**item, "pred": logits}, end=decided)
            probs, label = soft["pred"], soft["label"]
            done = self.postprocessing(soft, start=decided)
            shown = {key: done[key].argmax(0, keepdim=True).to(torch.uint8) for key in ("pred", "label")}
            shown["dice"] = compute_dice(done["pred"][None], done["label"][None], False, ignore_empty=False).mean()
            if arm == UNTRAINED and label.unique().numel() > 1:
                shown["leep"] = compute_leep_map(probs[None], label[None], estimator="global")[None].float()
            found.append(shown)
        return found

    def _volume(self, file: Any, item: Mapping[str, Any], *done: Mapping[str, torch.Tensor]) -> tuple[MetaTensor, int]:
        """Image, truth, segmentations and any map as channels of one volume in RAS, and how many are the image's."""
        truth = done[0]["label"]
        image = LoadImage(reader="medtl_ext.data.ChannelReader", ensure_channel_first=True)(file)
        if image.shape[1:] != truth.shape[1:]:  # scored on the grid of the training
            image = item["image"]
        parts = [image, truth, *(arm["pred"] for arm in done), *(arm["leep"] for arm in done if "leep" in arm)]
        volume = torch.cat([part.as_subclass(torch.Tensor).float() for part in parts])
        return self.upright(volume, truth.affine), len(image)

    @staticmethod
    def upright(volume: torch.Tensor, affine: Any) -> MetaTensor:
        """Channels of a volume in RAS."""
        return Orientation("RAS", labels=None)(MetaTensor(volume, affine=affine))

    def _views(
        self, ranks: Mapping[str, str], volumes: Sequence[tuple[MetaTensor, int]], dice: pd.DataFrame
    ) -> Iterator[dict[str, Any]]:
        """Each patient for the viewer; the columns of ``dice`` are the arms that were segmented."""
        most = min(MOST["patient"], MOST["report"] // len(ranks))
        for (subject, rank), (volume, channels) in zip(ranks.items(), volumes, strict=True):
            image, labels, maps = np.split(volume.numpy(), [channels, channels + 1 + dice.shape[1]])
            layers = dict(zip(["truth", *dice], labels.astype(np.uint8), strict=True))
            leep = {f"LEEP of {UNTRAINED}": values for values in maps}
            view = self.view(image, layers, volume.pixdim, leep, most)
            for layer in view["layers"][1 : len(layers)]:
                layer["dice"] = round(float(dice.loc[subject, layer["name"]]), 4)
            yield {"name": subject, "rank": rank} | view

    def view(
        self, image: np.ndarray, labels: Mapping[str, np.ndarray], sizes: Any, maps: Mapping[str, np.ndarray], most: int
    ) -> dict[str, Any]:
        """See `packed`; of the image all three channels where they are colours, else the first."""
        image = image if self._in_colour else image[:1]
        return packed(image, labels, maps=maps, spacing=sizes.tolist(), most=most)

    def _row(self, volume: MetaTensor, channels: int, arms: int) -> tuple[Any, ...]:
        """Image, truth, how much higher than wide a pixel is, sides, and segmentations of one slice of a patient."""
        sizes = volume.pixdim.numpy().round(3)
        axis = 2 - int(np.where(np.array(volume.shape[1:]) == 1, np.inf, sizes)[::-1].argmax())
        image, labels, _ = volume.as_tensor().movedim(axis + 1, -1).tensor_split([channels, channels + 1 + arms])
        shown = next((label for label in labels if label.any()), labels[0])
        z = int(shown.gt(0).sum((0, 1)).argmax()) if shown.any() else labels.shape[-1] // 2
        width, height = np.delete(sizes, axis)
        truth, *segmented = labels[..., z].int()
        return self.slice(image[..., z]), truth, height / width, "RL" if axis else "AP", *segmented

    def slice(self, image: torch.Tensor) -> torch.Tensor:
        """The first channel, or all three of a colour image last."""
        return image.as_subclass(torch.Tensor).movedim(0, -1) if self._in_colour else image[0]

    @property
    def _in_colour(self) -> bool:
        return Task(self.target.name).channels == ("R", "G", "B")


def _dice(metrics: Path) -> pd.Series:
    """Mean Dice over the classes of each subject that was tested, as it was scored."""
    table = read_table(metrics)
    return table[table["split"] == "test"].groupby("subject")["dice"].mean()


def _advised(scores: pd.DataFrame, verdict: Path, method: str | None) -> pd.Series:
    """Scores of the arm that a verdict advises, else of the run's own, else of the best."""
    if verdict.is_file():
        method = json.loads(verdict.read_text(encoding="utf-8"))["default"] or method
    return scores[method if method in scores else scores.mean().idxmax()]


def _ranks(scores: pd.Series, count: int) -> dict[int, str]:
    """Place of each that is shown, and in words where it stands among all, the worst first."""
    ranked = np.argsort(scores.to_numpy(), kind="stable").tolist()
    first = {ranked[-1]: "best", ranked[len(ranked) // 2]: "median", ranked[0]: "worst"}
    places = [*dict.fromkeys([*reversed(first), *ranked])][:count]
    words = {place: first.get(place, f"number {ranked.index(place) + 1}") for place in places}
    return {place: f"{word} of {len(ranked)}" for place, word in words.items()}


@dataclass(kw_only=True, eq=False)
class ImagePictures:
    """The same for classification: test images with their class, and what every arm says of them.

    Arms are the trainings that the run has, or the untouched sources of a ranking alone. Writes ``images.csv`` (of each
    test image the probability of its class by every arm, the most wrong first) and ``pictures.json``, the images on the
    page; nothing where there is no arm.

    Args:
        here, target: the run, and the target task.
        ranking: with a method ``untouched``, see `medtl_ext.dataset_transferability.RankDatasets`; None where there is
            none.
        truth: the fine-tunings of all sources, where they are done.
        patients: how many images are on the page, chosen as by `Pictures`, by the probability of their class.
    """

    here: Run
    target: ClassificationTask
    ranking: Any = None
    truth: FineTuneSources | None = None
    patients: int = N_IMAGES

    def run(self) -> None:
        """Write, unless the run is to leave no figures."""
        if not (self.here.leads and self.here.figures):
            return
        require_number("patients", self.patients, 1, whole=True)
        items, folder, classes = self.target.datalist("test"), self.here.folder, self.target.class_names
        arms = self._trained([item["name"] for item in items])
        if untrained := not arms and self.ranking is not None:
            arms = self.ranking.untouched(items)
        if not arms:
            return
        known = ["name", "subject"] if self.target.dataset.subjects else ["name"]
        table = pd.DataFrame({key: [item[key] for item in items] for key in known})
        labels = np.array([item["label"] for item in items])
        right = pd.DataFrame({arm: probs[np.arange(len(items)), labels] for arm, probs in arms.items()})
        by = _advised(right, folder / "ranking.json", self.here.config.get("method"))
        table = table.assign(**{"class": [classes[label] for label in labels]}).join(right)
        write_csv(folder / "images.csv", table.loc[by.sort_values(kind="stable").index])
        images = []
        for place, rank in _ranks(by, self.patients).items():
            best = {arm: int(probs[place].argmax()) for arm, probs in arms.items()}
            said = [[arm, classes[k], float(arms[arm][place, k]), k == int(labels[place])] for arm, k in best.items()]
            image = {"name": items[place]["name"], "rank": rank, "class": classes[labels[place]], "said": said}
            images.append(image | {"data": _jpeg(items[place]["image"])})
        write_json(folder / "pictures.json", {"untrained": untrained, "by": by.name, "images": images})

    def _trained(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Probabilities of the test images, N x classes, by each training."""
        found = {name: job.read("predictions.csv") for name, job in (self.truth.best if self.truth else {}).items()}
        if (own := self.here.folder / "predictions.csv").is_file():
            found[self.here.config["method"]] = read_table(own)
        tests = {arm: table[table["split"] == "test"].set_index("name").loc[names] for arm, table in found.items()}
        return {arm: table.filter(regex=PROBABILITIES).to_numpy() for arm, table in tests.items()}


def _jpeg(image: np.ndarray) -> str:
    """An image of C x H x W, uint8, at most so large as a page shows it, in base64."""
    picture = Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1))
    picture.thumbnail((SIDE, SIDE))
    picture.save(file := BytesIO(), "JPEG", quality=92)
    return base64.b64encode(file.getvalue()).decode()
