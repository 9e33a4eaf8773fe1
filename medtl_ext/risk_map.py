"""What is particular to the bundle ``risk_map``: its pictures, and the comparison of its methods."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import LoadImage, Orientation
from torch import nn
from torch.utils.data import Dataset

from medtl_ext._io import atomic_path, write_csv, write_json, write_text
from medtl_ext._validation import InputError, require_choice, require_number
from medtl_ext.data import SliceDataset, Task
from medtl_ext.losses import risk_map
from medtl_ext.metrics import LEEPMap, compute_leep_map
from medtl_ext.networks import load_weights, read_weights
from medtl_ext.ranking import bootstrap_interval
from medtl_ext.transfer import Arm, Run, SegmentationTask, Source, Study, compare_report, patient_table
from medtl_ext.transfer.evaluate import own_weights
from medtl_ext.transfer.jobs import read_table
from medtl_ext.transfer.rank import SYNTHETIC
from medtl_ext.transfer.sources.pool import pretraining_job, source_collection
from medtl_ext.transfer.study import Arms, require_lists
from medtl_ext.transfer.truth import page
from medtl_ext.transfer.viewer import MOST, packed
from medtl_ext.visualize import plot_montage, plot_overlay, plot_risk_maps, save_figure

N_PATIENTS = 3
PLACEBO = "placebo"
"""The method that all others are compared with once more, with other seeds: what chance alone does."""
OTHER_SEED = 1000
RISKS = {"loss (-LEEP)": torch.neg, "weight (eq. 5)": risk_map}
"""What is called risk, from a LEEP map."""
MEASURES = {"mean": "mean", "entropy": "entropy", "top": "top 5 %"}
TO = " -> "
"""Between a source and its target in the name of a pair."""


@dataclass(kw_only=True, eq=False)
class Pictures:
    """A step that shows the weights of the loss and what is segmented of test patients.

    Writes ``maps.png``, ``overlay.png`` and ``viewer.json``, the volumes of the viewer in the report.

    Args:
        here, target: the run, and the target task.
        evaluator: its network and inferer segment the patients, with the weights of this run and of its audit.
        postprocessing: the evaluator's: makes one-hot ``pred`` and ``label`` of an item, on the grid that is scored.
        training: the slices trained on, with their weight maps if they have their own; None: nothing was trained.
        dataset: of the test patients: its datalist's ``image`` and ``subject`` as ``data``, and its items as the
            evaluator takes them.
        patients: how many are shown, on their own images: the worst, the median and the best by the Dice of the arm
            that is advised (else of this run), then the others, worst first. The first three are drawn, each in the
            slice that holds most foreground across the axis of the largest voxels.
    """

    here: Run
    target: SegmentationTask
    evaluator: SupervisedEvaluator
    postprocessing: Callable
    training: SliceDataset | None
    dataset: Dataset
    patients: int = N_PATIENTS

    def run(self) -> None:
        """Draw, unless the run is to leave no figures."""
        if not (self.here.leads and self.here.figures):
            return
        require_number("patients", self.patients, 1, whole=True)
        said = {"synthetic": self.target.synthetic, "photographs": self.target.photographs}
        maps = self._draw_maps({"title": self.here.config["method"], **said})
        folder = self.here.folder
        arms = {path.parent.name: path for path in sorted(folder.glob("audit/*/model.pt"))}
        method = self.here.config["method"]
        arms[method] = arms.pop(method, folder / "model.pt")
        dice = pd.DataFrame({arm: _dice(path.with_name("metrics.csv")) for arm, path in arms.items()})
        ranks = self._ranks(dice)
        entries = [self.dataset.data[place] for place in ranks]
        items = [self.dataset[place] for place in ranks]
        found = {arm: done for arm, path in arms.items() if (done := self._segment(path, items))}
        files, subjects = ([entry[key] for entry in entries] for key in ("image", "subject"))
        volumes = [self._volume(*one) for one in zip(files, items, *found.values(), strict=True)]
        views = self._views(dict(zip(subjects, ranks.values(), strict=True)), volumes, dice[list(found)])
        content = {"classes": list(self.target.class_names), "photographs": self.target.photographs}
        write_json(folder / "viewer.json", content | {"views": [*views, *maps]})

        rows = [self._row(*volume) for volume in volumes[:N_PATIENTS]]
        images, truths, aspects, sides, *segmented = zip(*rows, strict=True)
        options = {"subjects": subjects[:N_PATIENTS], "class_names": self.target.class_names}
        options |= {"aspects": aspects, "sides": sides, **said}
        figure = plot_overlay(images, truths, dict(zip(found, segmented, strict=True)), **options)
        save_figure(figure, folder / "overlay.png")

    def _views(
        self, ranks: Mapping[str, str], volumes: Sequence[tuple[MetaTensor, int]], dice: pd.DataFrame
    ) -> Iterator[dict[str, Any]]:
        """Each patient for the viewer; the columns of ``dice`` are the arms that were segmented."""
        most = min(MOST["patient"], MOST["report"] // len(ranks))
        for (subject, rank), (volume, channels) in zip(ranks.items(), volumes, strict=True):
            image, labels = np.split(volume.numpy(), [channels])
            layers = dict(zip(["truth", *dice], labels.astype(np.uint8), strict=True))
            image = image if self._in_colour else image[:1]
            view = packed(image, layers, spacing=volume.pixdim.tolist(), most=most)
            for layer in view["layers"][1:]:
                layer["dice"] = round(float(dice.loc[subject, layer["name"]]), 4)
            yield {"name": subject, "rank": rank} | view

    def _ranks(self, dice: pd.DataFrame) -> dict[int, str]:
        """Place of each patient that is shown, and in words where they stand among all, the worst first."""
        audit, arm = self.here.folder / "audit.json", self.here.config["method"]
        if audit.is_file():
            arm = json.loads(audit.read_text(encoding="utf-8"))["default"] or arm
        known = [dice.loc[entry["subject"], arm] for entry in self.dataset.data]
        ranked = np.argsort(known, kind="stable").tolist()
        first = {ranked[-1]: "best", ranked[len(ranked) // 2]: "median", ranked[0]: "worst"}
        places = [*dict.fromkeys([*reversed(first), *ranked])][: self.patients]
        words = {place: first.get(place, f"number {ranked.index(place) + 1}") for place in places}
        return {place: f"{word} of {len(ranked)} by Dice of {arm}" for place, word in words.items()}

    def _volume(self, file: Any, item: Mapping[str, Any], *done: Mapping[str, MetaTensor]) -> tuple[MetaTensor, int]:
        """Image, truth and segmentations as the channels of one volume in RAS, and how many are the image's."""
        truth = done[0]["label"]
        image = LoadImage(reader="medtl_ext.data.ChannelReader", ensure_channel_first=True)(file)
        if image.shape[1:] != truth.shape[1:]:  # scored on the grid of the training
            image = item["image"]
        parts = [one.as_subclass(torch.Tensor).float() for one in (image, truth, *(arm["pred"] for arm in done))]
        return Orientation("RAS", labels=None)(MetaTensor(torch.cat(parts), affine=truth.affine)), len(image)

    def _row(self, volume: MetaTensor, channels: int) -> tuple[Any, ...]:
        """Image, truth, how much higher than wide a pixel is, sides, and segmentations of one slice of a patient."""
        sizes = volume.pixdim.numpy().round(3)
        axis = 2 - int(np.where(np.array(volume.shape[1:]) == 1, np.inf, sizes)[::-1].argmax())
        image, labels = volume.as_tensor().movedim(axis + 1, -1).tensor_split([channels])
        shown = next((label for label in labels if label.any()), labels[0])
        z = int(shown.gt(0).sum((0, 1)).argmax()) if shown.any() else labels.shape[-1] // 2
        width, height = np.delete(sizes, axis)
        truth, *segmented = labels[..., z].int()
        return self._shown(image[..., z]), truth, height / width, "RL" if axis else "AP", *segmented

    def _draw_maps(self, options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Draw; a map of all images can be looked at too, over the mean of the images that it was made of."""
        folder, views = self.here.folder, []
        if self.training is None:
            return views
        plain = self.training.plain()
        maps = [folder / f"leep_{when}.nii.gz" for when in ("before", "after")]
        if all(path.is_file() for path in maps):
            image = torch.stack([self._shown(item["image"]) for item in plain]).mean(0)
            before, after = (nib.load(path).get_fdata() for path in maps)
            views.append(self._view_of_maps(before=before, after=after))
            worst = _worst(before)  # a map of slices is the same in all of them
            before, after = before[worst], after[worst]
            image = image[worst] if plain[0]["image"].ndim == 4 else image
            figure = plot_risk_maps(before, after, image=image, quantity="leep", **options)
        elif "weight" in plain[0]:
            items = [plain[place] for place in np.linspace(0, len(plain) - 1, N_PATIENTS).astype(int)]
            rows = {}
            for item in items:
                image, label, weight = self._shown(item["image"]), item["label"][0].int(), item["weight"][0]
                if label.ndim == 3:  # of a whole volume the slice that holds most foreground
                    item["slice"] = place = int(label.gt(0).sum((0, 1)).argmax())
                    image, label, weight = image[..., place], label[..., place], weight[..., place]
                rows[f"{item['subject']}, slice {item['slice']}"] = {"image": image, "label": label, "weight": weight}
            figure = plot_montage(rows, **options)
        else:
            return views
        save_figure(figure, folder / "maps.png")
        return views

    def _view_of_maps(self, **maps: np.ndarray) -> dict[str, Any]:
        image = torch.stack([item["image"] for item in self.training.plain()]).mean(0)
        image = image[..., None] if image.ndim == 3 else image  # a map of slices is the same in all of them
        values = torch.stack([torch.as_tensor(one[..., : image.shape[-1]]) for one in maps.values()])
        affine = next(iter(self.training.geometry.values()))[0]
        volume = Orientation("RAS", labels=None)(MetaTensor(torch.cat([image, values]).float(), affine=affine))
        image, values = np.split(volume.numpy(), [len(image)])
        names = [f"LEEP {when} the training" for when in maps]
        image = image if self._in_colour else image[:1]
        view = packed(image, {}, maps=dict(zip(names, values, strict=True)), spacing=volume.pixdim.tolist())
        return {"name": "The images trained on", "rank": "their mean, and how transferable each pixel is"} | view

    def _shown(self, image: torch.Tensor) -> torch.Tensor:
        """The first channel, or all three of a colour image last."""
        return image.as_subclass(torch.Tensor).movedim(0, -1) if self._in_colour else image[0]

    @property
    def _in_colour(self) -> bool:
        return Task(self.target.name).channels == ("R", "G", "B")

    def _segment(self, path: Path, items: Sequence[Any]) -> list[dict[str, MetaTensor]] | None:
        """``pred`` and ``label`` of each patient, as the evaluator scores a checkpoint, if it fits its network.

        An arm may have a network of its own, as the untouched source with another head.
        """
        network, device = self.evaluator.network, self.evaluator.state.device
        weights = read_weights(path)  # a damaged file is none that does not fit
        try:
            load_weights(network, weights, min_share=1.0, name=str(path))
        except InputError:
            return None
        network.eval()
        found = []
        for item in items:
            with torch.no_grad():
                logits = self.evaluator.inferer(item["image"][None].to(device), network)[0].cpu()
            done = self.postprocessing({**item, "pred": logits})
            found.append({key: done[key].argmax(0, keepdim=True).to(torch.uint8) for key in ("pred", "label")})
        return found


def _dice(metrics: Path) -> pd.Series:
    """Mean Dice over the classes of each subject that was tested, as it was scored."""
    table = read_table(metrics)
    return table[table["split"] == "test"].groupby("subject")["dice"].mean()


@dataclass(kw_only=True, eq=False)
class CompareMethods(Study):
    """A study that fine-tunes with every method on every pair, sample size, source checkpoint and seed, and reports.

    Training from scratch needs no source, and the untouched source no seed: they run once for each distinct result.
    Writes the files of `medtl_ext.transfer.compare_report`, and every run below ``runs``. Where a target has several
    sources, these are runs of it in that report, and ``matrix.csv`` and ``matrix.md`` have each, as the paper's tables.

    Args:
        pairs: (source task, target task) each.
        methods: names of overlay configs beside ``train.json``.
        reference: the method that all are compared with, which must be among them; "placebo" is the same once more with
            other seeds.
        runs: the repetitions, ``{"seed": ..., "source_seed": ...}`` each. A seed draws target slices, fresh weights and
            batches; a source seed stands for another pre-trained source checkpoint.
        train_slices: numbers of labelled target slices.
        overlays: names of configs that every run shares, the sources' too, such as "paper"; the settings win over them.
    """

    also: ClassVar[Sequence[str]] = ()
    """Overlays that a kind of comparison needs."""

    pairs: Sequence[Sequence[str]]
    methods: Sequence[str]
    reference: str
    runs: Sequence[Mapping[str, int]]
    train_slices: Sequence[int]
    overlays: Sequence[str] = ()

    def first(self) -> str:
        return self.pairs[0][1]

    @property
    def several(self) -> bool:
        """Whether any target has more sources than one."""
        return len({target for _, target in self.pairs}) < len({tuple(pair) for pair in self.pairs})

    def check(self) -> dict[str, Any]:
        require_lists(pairs=self.pairs, methods=self.methods, runs=self.runs, train_slices=self.train_slices)
        shared: dict[str, Any] = {}
        for name in (*self.also, *self.overlays):
            path = self.here.configs / f"{name}.json"
            require_choice("overlay", name, sorted(path.stem for path in self.here.configs.glob("*.json")))
            shared |= json.loads(path.read_text(encoding="utf-8"))
        settings = self.here.config["settings"]
        return {key: value for key, value in shared.items() if key[0] != "_" and key not in settings}

    def arms(self) -> Arms:
        """Each distinct training once, after that of its source."""
        here, config = self.here, self.here.config
        for method in self.methods:
            require_choice("method", method, [*sorted(path.stem for path in here.configs.glob("*.json")), PLACEBO])
        if self.reference not in self.methods:
            raise InputError(f"methods is {list(self.methods)}; add {self.reference}, which all are compared with.")
        for name in dict.fromkeys(target for _, target in self.pairs):
            self.open(name).check({"train", config["val_split"], "test"})
        tasks = dict.fromkeys(source for source, _ in self.pairs)
        for task in tasks:
            self.kind(task, collection=source_collection(config), phantom_subjects=config["phantom_subjects"])
        pool = {
            (task, seed): pretraining_job(config, config["source_dir"], Source(task, "task", task=task), seed=seed)
            for task, seed in product(tasks, {one["source_seed"] for one in self.runs})
        }
        found: dict[Path, tuple[dict[str, Any], Arm]] = {}
        for slices, one, (source, target), method in product(self.train_slices, self.runs, self.pairs, self.methods):
            once = self.several and method == "scratch"
            folder = here.folder / "runs" / (target if once else f"{source}_to_{target}") / str(slices) / method
            columns = {"pair": target if once else f"{source}{TO}{target}", "slices": slices, "method": method}
            columns |= {"source_seed": np.nan, "seed": np.nan}
            if method != "scratch":
                folder /= f"source{one['source_seed']}"
                columns["source_seed"] = one["source_seed"]
            if method != "zero_shot":
                folder /= f"seed{one['seed']}"
                columns["seed"] = one["seed"]
            before = pool[source, one["source_seed"]]
            overlay, seed = (self.reference, one["seed"] + OTHER_SEED) if method == PLACEBO else (method, one["seed"])
            options = {"target_task": target, "train_slices": slices, "seed": seed}
            options |= {"source": {"task": source, "checkpoint": before.model}, "audit#arms": []}
            job = here.job(folder, overlay, **options)
            found.setdefault(folder, (columns, Arm(method, (before, job))))
        return list(found.values())

    def report(self, table: pd.DataFrame, arms: Arms) -> None:
        if self.several:
            patients = patient_table(table[table["split"] == "test"])
            dice = patients.groupby(["slices", "pair", "method"], sort=False)["dice"].mean().reset_index()
            write_matrix(dice, self.here.folder, reference=self.reference, synthetic=self.synthetic)
            parts = table["pair"].str.rpartition(TO)
            table = table.assign(pair=parts[2], source=parts[0].where(parts[0] != "").astype(object))
        compare_report(table, self.here.folder, reference=self.reference, synthetic=self.synthetic)


@dataclass(kw_only=True, eq=False)
class Condensation:
    """A step that says where the risk is before and after fine-tuning, in ``risk.csv`` and ``risk.npz`` (Fig. 2).

    Risk is what is lost, -LEEP, and beside it the weight of eq. 5, which every map's own extremes scale anew. The maps
    of all images have P(y|z) at each pixel, as the paper's; of the first split they are ``before`` and ``after`` in
    ``risk.npz``. A patient has too few slices for that: there it is over all pixels of the patient. A row without
    ``patient`` is of the map of all.

    Args:
        here: the run, whose own weights are what fine-tuning gave.
        source, network: the untouched source, and the network that was trained.
        slices: the slices of each split.
    """

    here: Run
    source: nn.Module
    network: nn.Module
    slices: Mapping[str, SliceDataset]

    def run(self) -> None:
        """Pass over the slices with both networks; of several processes each makes the whole pass."""
        load_weights(self.network, own_weights(self.here.folder, self.here.config["method"]), min_share=1.0)
        networks, maps = {"before": self.source, "after": self.network}, {}
        rows: list[dict[str, Any]] = []
        for (split, dataset), (when, network) in product(self.slices.items(), networks.items()):
            whole, found = LEEPMap(), {}
            for patient, images, labels in _patients(dataset.plain()):
                probs = _predicted(network, images)
                whole.update(probs, labels)
                found[patient] = compute_leep_map(probs, labels, estimator="global")
            found[None] = whole.compute()
            maps.setdefault(when, found[None])
            for (patient, leep), (risk, of) in product(found.items(), RISKS.items()):
                row = {"when": when, "split": split, "patient": patient, "risk": risk}
                rows.append(row | concentration(of(leep)))
        if not self.here.leads:
            return
        image = torch.stack([item["image"][0] for item in next(iter(self.slices.values())).plain()]).mean(0)
        with atomic_path(self.here.folder / "risk.npz") as temporary:
            np.savez(temporary, image=image, **maps)
        write_csv(self.here.folder / "risk.csv", pd.DataFrame(rows))


def _patients(slices: SliceDataset) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The images and labels of each patient, N x channels x *spatial and N x *spatial."""
    items: dict[str, list[dict[str, Any]]] = {}
    for item in slices:
        items.setdefault(item.get("patient", item["subject"]), []).append(item)
    for patient, of in items.items():
        yield patient, torch.stack([one["image"] for one in of]), torch.stack([one["label"][0] for one in of]).long()


def _predicted(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Class probabilities of images, one at a time, for whole volumes may be large."""
    device = next(network.parameters()).device
    with torch.no_grad():
        return torch.cat([network.eval()(image[None].to(device)).float().softmax(1).cpu() for image in images])


def concentration(risk: torch.Tensor) -> dict[str, float]:
    """How much risk a map holds, and in how few pixels: its mean, its entropy, and the share of the top 5 %.

    Args:
        risk: values of 0 or more, of any shape; NaN is left out.

    Returns:
        ``mean``; ``entropy`` of the pixels' shares as a part of its maximum, 1 where all have the same risk, 0 where
        one pixel has all; ``top``, the share of the 5 % of pixels that have most, 0.05 where all have the same.

    >>> {name: round(value, 3) for name, value in concentration(torch.tensor([0.5] * 2 + [0.0] * 38)).items()}
    {'mean': 0.025, 'entropy': 0.188, 'top': 1.0}
    """
    values = risk[~risk.isnan()].double()
    shares = values / values.sum() if values.any() else torch.full_like(values, 1 / len(values))
    entropy = float(torch.special.entr(shares).sum()) / math.log(len(values))
    top = float(shares.topk(math.ceil(len(values) / 20)).values.sum())
    return {"mean": float(values.mean()), "entropy": entropy, "top": top}


class CompareMaps(CompareMethods):
    """The comparison of where the risk is after each method, by runs with the overlay ``condensation`` too.

    Writes ``condensation.csv`` (a row per pair, slices, kind of risk, split and network: what `concentration` says over
    patients, its change from before and what it is less that of the reference, with 95 % bootstrap intervals over
    patients, and of the map of all images), ``condensation.md`` and ``condensation.png``.
    """

    reads = "risk.csv"
    also = ("condensation",)

    def check(self) -> dict[str, Any]:
        if "zero_shot" in self.methods:
            raise InputError("methods has zero_shot, which is what every map shows before fine-tuning; leave it out.")
        return super().check()

    def report(self, table: pd.DataFrame, arms: Arms) -> None:
        keys, folder = ["pair", "slices", "risk", "split"], self.here.folder
        networks = table["method"].where(table["when"] == "after", "before")
        groups = table.assign(network=networks).groupby(keys, sort=False)
        found = pd.concat({key: _condensed(of, self.reference) for key, of in groups}, names=keys)
        write_csv(folder / "condensation.csv", found.reset_index(keys))
        parts = [
            "# Does the risk condense?",
            "Mean over patients with its 95 % bootstrap interval; in brackets of the map of all images, without one. "
            "Entropy: 1 where the risk is everywhere the same, 0 in one pixel. Top 5 %: the share of the risk in the "
            "pixels that have most, 0.05 where it is everywhere the same." + f" {SYNTHETIC}" * self.synthetic,
        ]
        for (pair, slices, risk, split), of in found.groupby(keys, sort=False):
            parts += [f"## {risk}: {pair}, {slices} slices, {split} patients", _condenses(of, self.reference)]
            parts.append(_condensed_in_words(of, self.reference))
        write_text(folder / "condensation.md", page(*parts))
        first, maps = arms[0][0], {}
        for columns, arm in arms:
            if (columns["pair"], columns["slices"]) == (first["pair"], first["slices"]):
                maps.setdefault(columns["method"], np.load(arm.last.output_dir / "risk.npz"))
        before, image = (maps[self.reference][name] for name in ("before", "image"))
        worst = _worst(before)
        after = {name: of["after"][worst] for name, of in maps.items()}
        said = {"quantity": "leep", "title": first["pair"], "synthetic": self.synthetic}
        save_figure(plot_risk_maps(before[worst], after, image=image[worst], **said), folder / "condensation.png")


def _worst(leep: np.ndarray) -> tuple[Any, ...]:
    """Where a map is cut to be drawn: that of volumes in its worst slice."""
    return (...,) if leep.ndim == 2 else (..., int(np.nanmean(leep, (0, 1)).argmin()))


def _condensed(of: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Each measure of each network, of means over runs."""
    whole = of[of["patient"].isna()].groupby("network", sort=False)[[*MEASURES]].mean()
    patients = of.groupby(["patient", "network"])[[*MEASURES]].mean().unstack("network")
    rows = []
    for network in whole.index:
        row: dict[str, Any] = {"network": network, "patients": len(patients)}
        for measure in MEASURES:
            values = patients[measure]
            row[f"{measure}_of_all"] = whole.loc[network, measure]
            for name, other in (("", 0.0), ("_change", values["before"]), (f"_less_{reference}", values[reference])):
                compared = values[network] - other
                low, high = bootstrap_interval(compared)
                row |= {measure + name: compared.mean(), f"{measure}{name}_low": low, f"{measure}{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def _condenses(of: pd.DataFrame, reference: str) -> str:
    """The paper's claim in one sentence: does more of the risk end in the worst pixels than after the reference?"""
    top, less = of.set_index("network")["top"], of.set_index("network").drop(["before", reference])
    more = less.index[less[f"top_less_{reference}_low"] > 0]
    fewer = less.index[less[f"top_less_{reference}_high"] < 0]
    return (
        f"The worst 5 % of the pixels hold {top['before']:.3f} of the risk before and {top[reference]:.3f} after "
        f"{reference}. More than that: {', '.join(more) or 'after no method'}; less: {', '.join(fewer) or 'after none'}"
        " (95 % intervals over patients)."
    )


def _condensed_in_words(of: pd.DataFrame, reference: str) -> pd.DataFrame:
    def words(row: Mapping[str, Any], name: str, sign: str = "") -> str:
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        if low == high == 0:  # against itself
            return ""
        return f"{row[name]:{sign}.3f}" + ("" if np.isnan(low) else f" ({low:{sign}.3f} to {high:{sign}.3f})")

    shown = []
    for row in of.to_dict("records"):
        cells = {"network": row["network"]}
        for measure, name in MEASURES.items():
            cells[name] = f"{words(row, measure)} [{row[f'{measure}_of_all']:.3f}]"
            cells[f"{name}, change"] = words(row, f"{measure}_change", "+")
            cells[f"{name}, less {reference}"] = words(row, f"{measure}_less_{reference}", "+")
        shown.append(cells)
    return pd.DataFrame(shown)


def write_matrix(dice: pd.DataFrame, folder: Path, *, reference: str = "vanilla", synthetic: bool = False) -> None:
    """Write the Dice of every source on every target, as in the paper's Tables I to III: ``matrix.csv``, ``matrix.md``.

    Args:
        dice: columns ``slices, pair, method, dice``; a pair is "source -> target", or the target alone for what no
            source has a part in, which then stands beside each of them.
        folder: where to.
        reference: the method that the others gain over.
        synthetic: the data are synthetic, which the page then says.
    """
    parts = dice["pair"].str.rpartition(TO)
    cells = dice.assign(source=parts[0], target=parts[2])
    alone = cells["source"] == ""
    sources = cells.loc[~alone, ["target", "source"]].drop_duplicates()
    cells = pd.concat([cells[~alone], cells[alone].drop(columns="source").merge(sources, on="target")])
    keys = ["slices", "target", "method"]
    order = pd.MultiIndex.from_frame(dice.assign(target=parts[2])[keys].drop_duplicates())
    wide = cells.pivot(index=keys, columns="source", values="dice").reindex(order)
    wide = wide[[name for name in dict.fromkeys([*cells["target"], *cells["source"]]) if name in wide]]
    compared = wide.xs(reference, level="method").reindex(order.droplevel("method")).set_axis(order)
    means = pd.DataFrame({"mean": wide.mean(axis=1), "reference": compared.mean(axis=1)})
    means["ahead"], means["sources"] = wide.gt(compared).sum(axis=1), wide.count(axis=1)
    means["gain"] = means["mean"] / means["reference"] - 1
    whole = wide.join(means[["mean", "gain", "ahead", "sources"]])
    write_csv(folder / "matrix.csv", whole.reset_index())

    groups = means.assign(every=means["ahead"] == means["sources"]).groupby(["slices", "method"], sort=False)
    total = groups[["mean", "reference"]].mean().join(groups[["ahead", "sources", "every"]].sum())
    total["gain"], total["targets"] = total["mean"] / total["reference"] - 1, groups.size()
    parts = [
        "# Every source on every target",
        f"Mean Dice of the test patients; in brackets the gain over {reference}, of the means; on how many pairs of a "
        "source and a target it is ahead; and on how many targets from every source." + f" {SYNTHETIC}" * synthetic,
        _by_slices(total, ("ahead", "sources"), ("every", "targets")),
        "## Each target, mean over its sources",
        _by_slices(means, ("ahead", "sources")),
    ]
    for slices, of in whole.groupby(level="slices", sort=False):
        shown = of.droplevel("slices").assign(gain=of["gain"].map(_percent).to_numpy()).reset_index()
        parts += [f"## {slices} slices", shown]
    write_text(folder / "matrix.md", page(*parts))


def _percent(gain: float, around: str = "{}") -> str:
    """A gain as it is shown; over a mean of 0 there is none."""
    return around.format(f"{gain:+.2%}") if np.isfinite(gain) else ""


def _by_slices(means: pd.DataFrame, *counts: tuple[str, str]) -> pd.DataFrame:
    """Mean, gain and counts in words, a column for each number of slices."""
    words = means["mean"].map("{:.3f}".format) + means["gain"].map(lambda gain: _percent(gain, " ({})"))
    for some, most in counts:
        words += ", " + means[some].astype(str) + " of " + means[most].astype(str)
    return words.unstack("slices", sort=False).rename(columns="{} slices".format).reset_index()
