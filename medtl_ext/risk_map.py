"""What is particular to the bundle ``risk_map``: its pictures, and the comparison of its methods."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from torch import nn

from medtl_ext._io import atomic_path, write_csv, write_text
from medtl_ext._validation import InputError, require_choice
from medtl_ext.data import SliceDataset
from medtl_ext.losses import risk_map
from medtl_ext.metrics import LEEPMap, compute_leep_map
from medtl_ext.networks import load_weights
from medtl_ext.ranking import bootstrap_interval
from medtl_ext.transfer import Arm, Run, Source, Study, compare_report, patient_table
from medtl_ext.transfer.evaluate import own_weights
from medtl_ext.transfer.jobs import run_command, short_path
from medtl_ext.transfer.pictures import N_PATIENTS, Pictures
from medtl_ext.transfer.rank import SYNTHETIC
from medtl_ext.transfer.report import PLACEBO
from medtl_ext.transfer.sources.pool import pretraining_job, source_collection
from medtl_ext.transfer.study import Arms, require_lists
from medtl_ext.transfer.truth import page
from medtl_ext.transfer.viewer import MOST
from medtl_ext.visualize import plot_montage, plot_risk_maps, save_figure

OTHER_SEED = 1000
RISKS = {"loss (-LEEP)": torch.neg, "weight (eq. 5)": risk_map}
"""What is called risk, from a LEEP map."""
MEASURES = {"mean": "mean", "entropy": "entropy", "top": "top 5 %"}
TO = " -> "
"""Between a source and its target in the name of a pair."""


@dataclass(kw_only=True, eq=False)
class MapPictures(Pictures):
    """The same with the weights of the loss, in ``maps.png`` and, where they are a map of all images, in the viewer.

    Args:
        training: the slices trained on, with their weight maps if they have their own; None: nothing was trained.
        options: see `medtl_ext.transfer.Pictures`.
    """

    training: SliceDataset | None

    def maps(self) -> list[dict[str, Any]]:
        """Draw; a map of all images can be looked at too, over the mean of the images that it was made of."""
        folder, views = self.here.folder, []
        options = {"title": self.here.config["method"], **self.said}
        if self.training is None:
            return views
        plain = self.training.plain()
        maps = [folder / f"leep_{when}.nii.gz" for when in ("before", "after")]
        if all(path.is_file() for path in maps):
            image = torch.stack([self.slice(item["image"]) for item in plain]).mean(0)
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
                image, label, weight = self.slice(item["image"]), item["label"][0].int(), item["weight"][0]
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
        volume = self.upright(torch.cat([image, values]).float(), affine)
        image, values = np.split(volume.numpy(), [len(image)])
        names = [f"LEEP {when} the training" for when in maps]
        view = self.view(image, {}, volume.pixdim, dict(zip(names, values, strict=True)), MOST["patient"])
        return {"name": "The images trained on", "rank": "their mean, and how transferable each pixel is"} | view


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
        said = {"reference": self.reference, "synthetic": self.synthetic}
        compare_report(table, self.here.folder, what_next=self._what_next, **said)

    def _what_next(self, preferred: str | None) -> str:
        """The run of what is preferred; or compare again with more trainings, which finds these done."""
        record, configs = self.here.folder / "settings.json", self.here.configs
        settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
        if preferred is not None:
            (source, target), files = self.pairs[0], [configs / f"{name}.json" for name in ("train", preferred)]
            options = {"source": source, "target_task": target, "train_slices": self.train_slices[-1], **settings}
            return f"To run it:\n{run_command(files, options)}"
        seed = 1 + max(run["seed"] for run in self.runs)
        runs = [*self.runs, *({"seed": more, "source_seed": more} for more in (seed, seed + 1))]
        options = {name: getattr(self, name) for name in ("pairs", "methods", "reference", "train_slices", "overlays")}
        options |= {"runs": runs, "settings": settings, "output_dir": str(short_path(self.here.folder))}
        return f"To train each method twice more:\n{run_command([configs / 'compare.json'], options)}"


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
        lead: list[str] = []
        for (pair, slices, risk, split), of in found.groupby(keys, sort=False):
            parts += [f"## {risk}: {pair}, {slices} slices, {split} patients", _condenses(of, self.reference)]
            parts.append(_condensed_in_words(of, self.reference))
            if split == "test" and not lead:  # the verdict first, of patients that no network saw
                lead = [f"{pair}, {slices} slices, {split} patients, {risk}: {parts[-2]}"]
        parts[1:1] = lead
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
