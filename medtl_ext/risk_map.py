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
from medtl_ext.ranking._words import SYNTHETIC
from medtl_ext.transfer import Arm, Run, Source, Study, compare_report, patient_table
from medtl_ext.transfer.arms import MEMBERS, OF_SEEDS
from medtl_ext.transfer.evaluate import own_weights
from medtl_ext.transfer.pictures import N_PATIENTS, Pictures
from medtl_ext.transfer.report import PLACEBO
from medtl_ext.transfer.sources.pool import pretraining_job, source_collection
from medtl_ext.transfer.study import Arms, require_lists
from medtl_ext.transfer.truth import page
from medtl_ext.transfer.viewer import MOST
from medtl_ext.visualize import plot_montage, plot_risk_maps, save_figure

OTHER_SEED = 1000
N_MEMBERS = 3
"""Trainings of which a comparison makes a soup or an ensemble."""
RISKS = {"loss (-LEEP)": torch.neg, "weight (eq. 5)": risk_map}
"""Two definitions of risk, as functions of a LEEP map."""
MEASURES = {"mean": "mean", "entropy": "entropy", "top": "top 5 %"}
TO = " -> "
"""Separates source and target in the name of a pair."""


@dataclass(kw_only=True, eq=False)
class MapPictures(Pictures):
    """`medtl_ext.transfer.Pictures`, and also the weights of the loss: in ``maps.png``, and in the viewer if one map is
    for all images.

    Args:
        training: the training slices, with weight maps if each image has its own; None: nothing was trained.
        options: see `medtl_ext.transfer.Pictures`.
    """

    training: SliceDataset | None

    def maps(self) -> list[dict[str, Any]]:
        """Draw the maps. A map for all images also goes to the viewer, over the mean of the training images."""
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
            worst = _worst(before)
            before, after = before[worst], after[worst]
            image = image[worst] if plain[0]["image"].ndim == 4 else image
            figure = plot_risk_maps(before, after, image=image, quantity="leep", **options)
        elif "weight" in plain[0]:
            items = [plain[place] for place in np.linspace(0, len(plain) - 1, N_PATIENTS).astype(int)]
            rows = {}
            for item in items:
                image, label, weight = self.slice(item["image"]), item["label"][0].int(), item["weight"][0]
                if label.ndim == 3:  # draw the slice of a volume with most foreground
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

    Training from scratch does not depend on the source, and the untouched source does not depend on the seed, so they
    run only once. Writes the files of `medtl_ext.transfer.compare_report`, and every run below ``runs``. If a target
    has several sources, they count as runs of the target in this report; ``matrix.csv`` and ``matrix.md`` have each
    source, as the paper's tables.

    Args:
        pairs: (source task, target task) each.
        methods: names of overlay configs beside ``train.json``.
        reference: the method with which all others are compared; it must be one of ``methods``. "placebo" is the
            reference again with other seeds.
        runs: the repetitions, ``{"seed": ..., "source_seed": ...}`` each. The seed draws target slices, fresh weights
            and batches; another source seed gives another pre-trained source.
        train_slices: numbers of labelled target slices.
        overlays: names of configs for every run, also for the sources, such as "paper"; the settings win over them.
    """

    also: ClassVar[Sequence[str]] = ()
    """Overlays that a kind of comparison needs in addition."""
    config_file = "compare.json"

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
        """True if a target has several sources."""
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
        """Every distinct training once, each after the training of its source."""
        here, config = self.here, self.here.config
        for method in self.methods:
            require_choice("method", method, [*sorted(path.stem for path in here.configs.glob("*.json")), PLACEBO])
        if self.reference not in self.methods:
            problem = f"methods is {list(self.methods)}, without the reference {self.reference}"
            raise InputError(f"{problem}; add it, or give another --reference.")
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
            members = []
            if method in OF_SEEDS:
                place = folder.parents[2] / MEMBERS / folder.parent.name
                seeds = [seed + number * OTHER_SEED for number in range(N_MEMBERS)]
                members = [here.job(place / f"seed{one}", MEMBERS, **options | {"seed": one}) for one in seeds]
                options["members"] = [member.model for member in members]
            job = here.job(folder, overlay, **options)
            found.setdefault(folder, (columns, Arm(method, (before, *members, job))))
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
        """The command that runs the preferred method; or one that adds trainings and reuses the present ones."""
        if preferred is not None:
            made = preferred in OF_SEEDS  # by an audit, of trainings
            options = dict(zip(("source", "target_task"), self.pairs[0], strict=True))
            options |= {"train_slices": self.train_slices[-1]}
            options |= {"audit#arms": [preferred], "audit#seeds": N_MEMBERS} if made else {}
            return f"To run it:\n{self.command('train', MEMBERS if made else preferred, *self.overlays, **options)}"
        seed = 1 + max(run["seed"] for run in self.runs)
        runs = [*self.runs, *({"seed": more, "source_seed": more} for more in (seed, seed + 1))]
        return f"To train each method twice more:\n{self.larger(runs=runs)}"


@dataclass(kw_only=True, eq=False)
class Condensation:
    """A step that measures where the risk is before and after fine-tuning, in ``risk.csv`` and ``risk.npz`` (Fig. 2).

    Two kinds of risk are measured: -LEEP, and the weight of eq. 5, which is scaled by the extremes of each map. The map
    of all images estimates P(y|z) at each pixel, as in the paper; for the first split it is ``before`` and ``after`` in
    ``risk.npz``. A single patient has too few slices for this, so P(y|z) is estimated over all pixels of the patient. A
    row without ``patient`` is about the map of all images.

    Args:
        here: the run; its own weights are those after fine-tuning.
        source, network: the untouched source, and the network that was trained.
        slices: the slices of each split.
    """

    here: Run
    source: nn.Module
    network: nn.Module
    slices: Mapping[str, SliceDataset]

    def run(self) -> None:
        """Pass all slices through both networks; with several processes, each process does the whole pass."""
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
    """Class probabilities of images, computed one at a time, because whole volumes may be large."""
    device = next(network.parameters()).device
    with torch.no_grad():
        return torch.cat([network.eval()(image[None].to(device)).float().softmax(1).cpu() for image in images])


def concentration(risk: torch.Tensor) -> dict[str, float]:
    """How much risk a map holds and how concentrated it is: its mean, its entropy, and the share of the top 5 %.

    Args:
        risk: values of 0 or more, of any shape; NaN is left out.

    Returns:
        ``mean``; ``entropy`` of the pixels' shares, divided by its maximum: 1 if all pixels have the same risk, 0 if
        one pixel has it all; ``top``: the share of the risk in the 5 % of pixels with most risk, 0.05 if all are equal.

    >>> {name: round(value, 3) for name, value in concentration(torch.tensor([0.5] * 2 + [0.0] * 38)).items()}
    {'mean': 0.025, 'entropy': 0.188, 'top': 1.0}
    """
    values = risk[~risk.isnan()].double()
    shares = values / values.sum() if values.any() else torch.full_like(values, 1 / len(values))
    entropy = float(torch.special.entr(shares).sum()) / math.log(len(values))
    top = float(shares.topk(math.ceil(len(values) / 20)).values.sum())
    return {"mean": float(values.mean()), "entropy": entropy, "top": top}


class CompareMaps(CompareMethods):
    """Compares where the risk is after each method; its runs also use the overlay ``condensation``.

    Writes ``condensation.csv`` (one row per pair, slices, kind of risk, split and network: the measures of
    `concentration` over patients, their change from before, and their difference from the reference, with 95 %
    bootstrap intervals over patients; and the measures of the map of all images), ``condensation.md`` and
    ``condensation.png``.
    """

    reads = "risk.csv"
    also = ("condensation",)
    config_file = "figure2.json"

    def check(self) -> dict[str, Any]:
        if "zero_shot" in self.methods:
            raise InputError("methods has zero_shot, which every map shows as 'before'; leave it out.")
        return super().check()

    def report(self, table: pd.DataFrame, arms: Arms) -> None:
        keys, folder = ["pair", "slices", "risk", "split"], self.here.folder
        networks = table["method"].where(table["when"] == "after", "before")
        groups = table.assign(network=networks).groupby(keys, sort=False)
        found = pd.concat({key: _condensed(of, self.reference) for key, of in groups}, names=keys)
        write_csv(folder / "condensation.csv", found.reset_index(keys))
        parts = [
            "# Does the risk condense?",
            "Mean over patients with its 95 % bootstrap interval; in brackets: the map of all images. Entropy: 1 if "
            "the risk is the same everywhere, 0 if it is in one pixel. Top 5 %: the share of the risk in the 5 % of "
            "pixels with most risk, 0.05 if it is the same everywhere." + f" {SYNTHETIC}" * self.synthetic,
        ]
        lead: list[str] = []
        for (pair, slices, risk, split), of in found.groupby(keys, sort=False):
            parts += [f"## {risk}: {pair}, {slices} slices, {split} patients", _condenses(of, self.reference)]
            parts.append(_condensed_in_words(of, self.reference))
            if split == "test" and not lead:  # the verdict on unseen patients comes first
                lead = [f"{pair}, {slices} slices, {split} patients, {risk}: {parts[-2]}"]
        parts[1:1] = [*lead, self._what_next(None)]
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
    """The index of what is drawn: for volumes the slice with most risk."""
    return (...,) if leep.ndim == 2 else (..., int(np.nanmean(leep, (0, 1)).argmin()))


def _condensed(of: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Each measure of each network, from means over runs."""
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
    """The paper's claim in one sentence: is more of the risk in the worst pixels than with the reference?"""
    top, less = of.set_index("network")["top"], of.set_index("network").drop(["before", reference])
    more = less.index[less[f"top_less_{reference}_low"] > 0]
    fewer = less.index[less[f"top_less_{reference}_high"] < 0]
    return (
        f"The worst 5 % of the pixels hold {top['before']:.3f} of the risk before and {top[reference]:.3f} after "
        f"{reference}. They hold more after: {', '.join(more) or 'no method'}; less after: "
        f"{', '.join(fewer) or 'no method'} (95 % intervals over patients)."
    )


def _condensed_in_words(of: pd.DataFrame, reference: str) -> pd.DataFrame:
    def words(row: Mapping[str, Any], name: str, sign: str = "") -> str:
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        if low == high == 0:  # compared with itself
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
        dice: columns ``slices, pair, method, dice``. A pair is "source -> target", or only the target for a method
            without source, which is then repeated for each source.
        folder: folder of the files.
        reference: the method with which the others are compared.
        synthetic: the data are synthetic; then the page says so.
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
        f"Mean Dice of the test patients; in brackets the relative gain of the mean over {reference}. Then the number "
        "of pairs of source and target with a gain, and of targets with a gain from every source."
        + f" {SYNTHETIC}"
        * synthetic,
        _by_slices(total, ("ahead", "sources"), ("every", "targets")),
        "## Each target, mean over its sources",
        _by_slices(means, ("ahead", "sources")),
    ]
    for slices, of in whole.groupby(level="slices", sort=False):
        shown = of.droplevel("slices").assign(gain=of["gain"].map(_percent).to_numpy()).reset_index()
        parts += [f"## {slices} slices", shown]
    write_text(folder / "matrix.md", page(*parts))


def _percent(gain: float, around: str = "{}") -> str:
    """A gain as text; empty if the mean of the reference is 0."""
    return around.format(f"{gain:+.2%}") if np.isfinite(gain) else ""


def _by_slices(means: pd.DataFrame, *counts: tuple[str, str]) -> pd.DataFrame:
    """Mean, gain and counts as text, one column for each number of slices."""
    words = means["mean"].map("{:.3f}".format) + means["gain"].map(lambda gain: _percent(gain, " ({})"))
    for some, most in counts:
        words += ", " + means[some].astype(str) + " of " + means[most].astype(str)
    return words.unstack("slices", sort=False).rename(columns="{} slices".format).reset_index()
