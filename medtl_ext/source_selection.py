"""The parts of the bundle ``source_selection``: prior knowledge about sources, PriorSel's filters, and settling ties.

Prior knowledge is what is known before a network is used: tags, size, and the similarity of the regions of interest.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.transforms import Compose, LoadImaged, Orientationd, ResizeWithPadOrCrop, ResizeWithPadOrCropd
from scipy import stats

from medtl_ext._io import write_csv
from medtl_ext._validation import InputError, require_choice, require_number
from medtl_ext.affinity import mean_label_dice, pairwise_ssim, shape_descriptors, shape_similarity
from medtl_ext.data.plan import Grid
from medtl_ext.ranking import TOP, SourceRanking, audit_verdict, ranker_table
from medtl_ext.transfer import SCORES, Job, RankSources, Run, SegmentationTask, Source, SourceStudy
from medtl_ext.transfer.arms import finetuning_job
from medtl_ext.transfer.jobs import run_command
from medtl_ext.transfer.report import read_columns
from medtl_ext.transfer.sources.pool import source_collection
from medtl_ext.transfer.study import Key
from medtl_ext.transforms import AreaSpacingd, SelectLabelsd
from medtl_ext.visualize import plot_scores_against_outcome, save_figure

logger = logging.getLogger(__name__)

METHODS = {"pooled": "h_score", "paper": "h_score_map"}
"""Method -> its deciding score, if ``decide_by`` is not given."""
PUBLISHED = {"hscore": "H-score", "otce": "OTCE"}
"""Columns of PriorSel's Table IV -> their names in its Table VI."""
SSIM: dict[str, dict[str, Any]] = {"global": {}, "local": {"k1": 0.01, "k2": 0.03, "window": "gaussian"}}
PRIORS = ("none", "modality", "modality + SSIM")
"""What is ranked: all sources, those of the target's modality, or those that pass both of PriorSel's filters."""
SIMILARITIES = {"ssim": "label SSIM", "roi_dice": "Dice of mean label maps", "roi_shape": "shape descriptors"}


def region_labels(
    task: SegmentationTask, *, spacing: Sequence[float], roi_size: Sequence[int], axcodes: str = "RAS"
) -> list[torch.Tensor]:
    """The task's training labels on the common grid, bool, True in the foreground classes.

    With a ``roi_size`` of two numbers, the number of slices of each volume does not change.
    """
    prepare = Compose(
        [
            LoadImaged(keys="label", reader="medtl_ext.data.ChannelReader", ensure_channel_first=True),
            Orientationd(keys="label", axcodes=axcodes, labels=None),
            SelectLabelsd(keys="label", values=task.label_values),
            AreaSpacingd(keys="label", pixdim=spacing),
            ResizeWithPadOrCropd(keys="label", spatial_size=[*roi_size, -1][:3]),
        ]
    )
    labels = (prepare({"label": item["label"]})["label"] for item in task.datalist("train"))
    return [torch.as_tensor(label)[0] > 0 for label in labels]


def roi_similarity(
    source: Sequence[torch.Tensor], target: Sequence[torch.Tensor], *, spacing: Sequence[float], ssim: str = "global"
) -> dict[str, float]:
    """The similarity of two sets of label volumes (bool, any number of slices) by three measures; higher: more similar.

    The centres of all volumes are aligned.

    Args:
        source, target: the label volumes.
        spacing: size of a voxel in mm.
        ssim: "global": over whole volumes, with the constants of SeqTran; "local": in the windows of each slice, with
            the constants of Wang 2004, which PriorSel cites; see `medtl_ext.affinity.pairwise_ssim`.

    Returns:
        ``ssim`` (mean over all pairs of volumes), ``roi_dice`` (Dice of the mean label maps) and ``roi_shape``
        (similarity of shape descriptors).
    """
    depth = max(volume.shape[-1] for volume in (*source, *target))
    pad = ResizeWithPadOrCrop(spatial_size=[*source[0].shape[:-1], depth])
    first, second = (
        torch.stack([torch.as_tensor(pad(volume[None].to(torch.uint8)))[0] for volume in volumes])
        for volumes in (source, target)
    )
    shapes = (shape_descriptors(labels, spacing=spacing) for labels in (first, second))
    return {
        "ssim": float(pairwise_ssim(first, second, **SSIM[ssim]).mean()),
        "roi_dice": float(mean_label_dice(first, second)),
        "roi_shape": float(shape_similarity(*shapes).mean()),
    }


def filter_by_priors(
    table: pd.DataFrame, *, minimum_ssim: float | None = None, top_k: int | None = None
) -> pd.DataFrame:
    """PriorSel's two filters: first by the target's modality, then by the similarity of the regions of interest.

    Args:
        table: one row per source that can be used, with ``modality``, ``same_modality`` and ``ssim``.
        minimum_ssim: keep sources with at least this SSIM of labels.
        top_k: keep this number of sources with the highest SSIM, and those equal to the last one. With neither option,
            the better half (rounded up) is kept.

    Returns:
        Columns ``kept`` (bool) and ``reason``, one row per source. A source with an unknown modality or unknown labels
        is kept. A filter that would drop all sources is not applied, with a warning.

    Raises:
        InputError: ``top_k`` is below 1.
    """
    if top_k is not None:
        require_number("top_k", top_k, 1, whole=True)
    ssim, left = table["ssim"].astype(float), ~table["same_modality"].eq(False)
    notes = [
        f"modality {modality}: {'same' if same else 'dropped'}" if isinstance(modality, str) else "modality not known"
        for modality, same in zip(table["modality"], left, strict=True)
    ]
    if not left.any():
        notes, left = [_not_applied("no source has the target's modality")] * len(table), ~left
    known = ssim[left].dropna().sort_values(ascending=False, kind="stable")
    good, rules = known, []
    if minimum_ssim is not None:
        good = good[good >= minimum_ssim]
        rules.append(f"at least {minimum_ssim:g}")
    if top_k is not None or minimum_ssim is None:
        count = top_k if top_k is not None else (len(known) + 1) // 2
        rules.append(f"the best {count} of {len(good)}")
        good = good[good.round(9) >= good.round(9).iloc[min(count, len(good)) - 1]] if len(good) else good
    rule, missing = ", of these ".join(rules), "label SSIM not known"
    alike = {
        source: f"label SSIM {value:.3f}: {'kept' if source in good else 'dropped'} (keeps {rule})"
        for source, value in known.items()
    }
    if 0 < len(known) == left.sum() and not len(good):
        good, alike, missing = known, {}, _not_applied(f"no source has a label SSIM of {rule}")
    reasons = [
        f"{note}; {alike.get(source, missing)}" if left[source] else note
        for source, note in zip(table.index, notes, strict=True)
    ]
    return pd.DataFrame({"kept": left & (ssim.isna() | table.index.isin(good.index)), "reason": reasons})


def _not_applied(why: str) -> str:
    said = f"{why}: this filter would drop all sources, so it is not applied"
    warnings.warn(said, UserWarning, stacklevel=3)
    logger.warning("%s", said)
    return f"filter not applied ({why})"


def groups_by_priors(ready: pd.DataFrame, *, minimum_ssim: float | None, top_k: int | None) -> dict[str, pd.Index]:
    """Kind of prior knowledge -> the sources that it keeps, if it keeps any."""
    filtered = filter_by_priors(ready, minimum_ssim=minimum_ssim, top_k=top_k)
    right = ready.index[~ready["same_modality"].eq(False)]
    groups = dict(zip(PRIORS, (ready.index, right, ready.index[filtered["kept"]]), strict=True))
    return {prior: group for prior, group in groups.items() if len(group)}


@dataclass(kw_only=True, eq=False)
class SelectSource(RankSources):
    """The ranking of `medtl_ext.transfer.RankSources` with prior knowledge: shown beside it, or used to filter first.

    Args:
        method: "pooled" ranks all sources by the shrunk H-score; "paper" (PriorSel) first filters by modality and label
            SSIM, and ranks the others by the H-score map.
        decide_by: the deciding score, instead of the method's own.
        minimum_ssim, top_k: see `filter_by_priors`.
        grid: the grid on which regions of interest are compared.
        ssim: which SSIM of labels, see `roi_similarity`.
        settle: fine-tune from the tied sources, train from scratch, and decide by the validation patients.
        options: see `medtl_ext.transfer.RankSources`.
    """

    scores = tuple(name for name in SCORES if name not in ("lp", "fu", "lp_fu", "ncti"))
    carried = ("collection", "source_collection", "phantom_subjects", "train_slices", "background_share")
    carried += ("spacing", "roi_size")

    method: str
    decide_by: str | None
    minimum_ssim: float | None
    top_k: int | None
    grid: Grid
    settle: bool = False
    ssim: str = "global"

    def __post_init__(self) -> None:
        self.decide_by = self.decide_by or METHODS[require_choice("method", self.method, METHODS)]
        self._similar: dict[Any, dict[str, float]] = {}
        self.filters = {"minimum_ssim": self.minimum_ssim, "top_k": self.top_k}

    def check(self) -> None:
        super().check()
        require_choice("ssim", self.ssim, SSIM)
        if self.top_k is not None:
            require_number("top_k", self.top_k, 1, whole=True)
        split = self.here.config["val_split"]
        if self.settle and split != "val":
            raise InputError(f"--settle needs validation patients, but --val_split is {split}; give --settle false.")

    def facts(self, source: Source) -> dict[str, Any]:
        found = super().facts(source) | {key: getattr(source.card, key) for key in ("network", "n_classes", "encoder")}
        for tag in self.target.tags:
            found[tag] = source.card.tags.get(tag)
            found[f"same_{tag}"] = None if found[tag] is None else found[tag] == getattr(self.target, tag)
        known = source.task is not None and source.left_out is None
        return found | (self._similarity(source.task) if known else dict.fromkeys(SIMILARITIES, np.nan))

    @property
    def _grid(self) -> dict[str, Any]:
        frame = {"spacing": self.grid.spacing, "roi_size": self.grid.frame[:2]}
        return frame | {"axcodes": self.here.config["axcodes"]}

    @cached_property
    def _own_regions(self) -> list[torch.Tensor]:
        return region_labels(self.target, **self._grid)

    def _similarity(self, task: str) -> dict[str, float]:
        """The similarity of a source's regions; it is kept, because tasks of several modalities may share labels."""
        source = self.target.other(task, collection=source_collection(self.here.config))
        key = (tuple(item["label"] for item in source.datalist("train")), str(source.label_values))
        if key not in self._similar:
            labels = region_labels(source, **self._grid)
            self._similar[key] = roi_similarity(labels, self._own_regions, spacing=self.grid.spacing, ssim=self.ssim)
        return self._similar[key]

    @cached_property
    def priors(self) -> pd.DataFrame:
        return filter_by_priors(self.table.loc[self.ranked], **self.filters)

    def candidates(self) -> list[str]:
        return [name for name in self.ranked if self.method != "paper" or self.priors.loc[name, "kept"]]

    def groups(self, ready: pd.DataFrame) -> dict[str, pd.Index]:
        return groups_by_priors(ready, **self.filters)

    def reasons(self, table: pd.DataFrame) -> pd.Series:
        notes = self.priors["reason"].copy()
        if self.method != "paper":
            notes = "all are ranked; PriorSel's filters would say: " + notes
        label = SCORES[self.decide_by].label
        for name in table.index[table["status"].eq("ranked") & table["score"].isna()]:
            unknown = self.decide_by == "otce" and self.seen[name].source_pixels is None
            notes[name] = f"no {label}{': its own images are not known' if unknown else ''}; {notes[name]}"
        return notes.reindex(table.index).fillna(table["left_out"])

    def remarks(self, ranking: SourceRanking) -> list[str]:
        said = []
        if self.method == "paper":
            first, other = ranking.default, self.rank(self.ranked).default
            text = f"the first choice {'is the same,' if first == other else 'would be'} {other}"
            if other is None:
                text = f"there would be no best guess{' either' if first is None else ''}"
            said.append(f"Without prior knowledge {text}.")
        said.append(
            "No score can judge training from scratch: train both and compare validation patients (--settle true, or "
            "the audit of risk_map)."
        )
        known = [source for source in self.pool.values() if source.left_out is None and source.card.foreign]
        filled = [source.name for source in known if None in source.channels(self.target)[0]]
        said += [f"A missing channel is filled with a constant for {', '.join(filled)}."] if filled else []
        out = [f"{name} ({source.left_out})" for name, source in self.pool.items() if source.left_out]
        return said + ([f"Left out: {'; '.join(out)}."] if out else [])

    def settled(self, ranking: SourceRanking) -> dict[str, Any] | None:
        if not self.settle:
            return None
        folder = self.here.folder / "settle"
        names = ranking.tied or tuple(self.candidates())
        jobs = {name: finetuning_job(self.here, folder / name, self.pool[name]) for name in names}
        jobs["scratch"] = finetuning_job(self.here, folder / "scratch", None)
        self.here.train(list(jobs.values()), "fine-tuning what is tied")
        dice = {name: self.target.patients(job, "val") for name, job in jobs.items()}
        verdict = audit_verdict(dice, synthetic=self.target.synthetic)
        means = {name: float(np.mean(list(values.values()))) for name, values in dice.items()}
        return {"source": verdict.recommendation or verdict.default, "text": verdict.text, "dice": means}

    def command(self, source: Source | None) -> str:
        """The command that runs ``risk_map`` from the winner; None: the training from scratch."""
        if source is None:
            files = [self.here.configs / name for name in ("train.json", "scratch.json")]
            return run_command(files, {"target_task": self.target.name} | self.changed())
        options = {"target_task": self.target.name, "source": source.option} | self.changed()
        options |= {"trust_sources": True} if self.trust_sources and source.card.foreign else {}
        return run_command([self.here.configs.parent.parent / "risk_map" / "configs" / "train.json"], options)

    def said_besides(self) -> dict[str, Any]:
        return {"method": self.method}


class SelectionStudy(SourceStudy):
    """PriorSel's claims over several targets and seeds; see `medtl_ext.transfer.SourceStudy`.

    A seed also changes the training of the pool. Also writes ``priors.png`` and ``roi_similarity.csv`` (one row per
    target and source as in Tables II and III: Dice and similarities, averaged over seeds).
    """

    title = "Source selection studied"
    head = (
        "{targets} targets x {sources} sources x {seeds} seeds; Dice of test patients after fine-tuning with a frozen "
        "encoder and cross-entropy (PriorSel's protocol)."
    )

    def groups(self, ready: pd.DataFrame) -> dict[str, pd.Index]:
        return groups_by_priors(ready, minimum_ssim=None, top_k=None)

    def claims(self, table: pd.DataFrame, mean: pd.DataFrame, jobs: Mapping[Key, Job]) -> list[str]:
        sources = table[table["source"] != "scratch"]
        return [*_prior_claims(mean), _modality_claim(sources), _similarity_claim(sources)]

    def figures(self, sources: pd.DataFrame) -> None:
        shown = {"scores": SIMILARITIES, "outcome": "gain", "synthetic": self.synthetic}
        title = "Similarity of the region of interest and Dice after transfer"
        named = sources.set_index(sources["source"] + " to " + sources["target"])
        figure = plot_scores_against_outcome(named, title=title, **shown)
        save_figure(figure, self.here.folder / "priors.png")
        keys = ["target", "source", "same_institution", "same_modality"]
        pairs = sources.groupby(keys, sort=False, dropna=False)[["dice", *SIMILARITIES]].mean().reset_index()
        pairs = pairs.sort_values(["target", "ssim"], ascending=[True, False], kind="stable")
        write_csv(self.here.folder / "roi_similarity.csv", pairs)


def _prior_claims(mean: pd.DataFrame) -> list[str]:
    """Does prior knowledge lower the footrule, over rankers and targets, and what does it cost?"""
    scores = mean[mean["ranker"].isin([score.label for score in SCORES.values()])].set_index(["ranker", "target"])
    columns = [*(f"footrule_{k}" for k in TOP), "regret"]
    without = scores.loc[scores["prior"] == PRIORS[0], columns]
    claims = []
    for prior in PRIORS[1:]:
        both = without.join(scores.loc[scores["prior"] == prior, columns], rsuffix="_given")
        said = []
        for k in TOP:
            pair = both[[f"footrule_{k}", f"footrule_{k}_given"]].dropna()
            if len(pair):
                before, after = pair.iloc[:, 0], pair.iloc[:, 1]
                said.append(
                    f"top {k}: {before.mean():.2f} to {after.mean():.2f} (lower in {int((after < before).sum())}, "
                    f"higher in {int((after > before).sum())} of {len(pair)})"
                )
        regret = both[["regret", "regret_given"]].dropna().mean()
        claims.append(
            f"**Does prior knowledge ({prior}) lower the footrule?** {'; '.join(said)}; regret of the first choice "
            f"{regret['regret']:.3f} to {regret['regret_given']:.3f}. Counts are of score x target, seeds averaged."
        )
    return claims


def _modality_claim(sources: pd.DataFrame) -> str:
    """PriorSel, Table I: a source of the same modality is better than one of the same task."""
    modality, objective = (sources[name].astype(float) > 0 for name in ("same_modality", "same_objective"))
    kinds = {"modality": sources[modality & ~objective], "objective": sources[~modality & objective]}
    both = pd.DataFrame({kind: of.groupby("target")["dice"].mean() for kind, of in kinds.items()}).dropna()
    if both.empty:
        return "**Same modality or same task?** No target has sources of both kinds."
    difference = both["modality"] - both["objective"]
    won, alike = int((difference > 0).sum()), int((difference == 0).sum())
    test = "no sign test"
    if alike < len(both):  # ties say nothing of the sign
        test = f"sign test p {stats.binomtest(won, len(both) - alike).pvalue:.2g}"
    test += f" without the {alike} alike" if 0 < alike < len(both) else ""
    return (
        f"**Same modality or same task (PriorSel, Table I)?** Same modality and other objective: mean Dice "
        f"{both['modality'].mean():.3f}; other modality and same objective: {both['objective'].mean():.3f}; same "
        f"modality is better on {won} of {len(both)} targets ({test}, mean difference {difference.mean():+.3f})."
    )


def _similarity_claim(sources: pd.DataFrame) -> str:
    """PriorSel, Tables II and III: a source whose regions are more like the target's gives a higher Dice."""
    modality, institution = (sources[f"same_{tag}"].astype(float) > 0 for tag in ("modality", "institution"))
    groups = {"all sources": sources, "within the modality": sources[modality]}
    groups |= {"within the institution": sources[institution], "other institutions": sources[~institution]}
    said = []
    for column, label in SIMILARITIES.items():
        for where, group in groups.items():
            taus = group.groupby(["target", "seed"])[[column, "dice"]].apply(
                lambda rows: stats.kendalltau(*rows.to_numpy().T).statistic
            )
            per_target = taus.groupby("target").mean().dropna()
            if len(per_target):
                said.append(
                    f"{label}, {where}: {per_target.mean():+.2f} (positive on {int((per_target > 0).sum())} of "
                    f"{len(per_target)} targets)"
                )
    question = "**Does higher RoI similarity go with higher Dice (PriorSel, Tables II and III)?**"
    return f"{question} Kendall's tau: {'; '.join(said)}."


@dataclass(kw_only=True, eq=False)
class ReproduceTable6:
    """A step that computes PriorSel's Table VI from its Table IV, and compares every cell with a random order.

    Writes ``table6.csv`` (one row per target, method and prior knowledge: the footrule of the top 1 to 4, as computed,
    as printed in the paper, and as expected for a random order of the kept sources) and prints it.

    Args:
        here: the run.
        scores: CSV with ``target, source, modality, target_modality, dice, hscore, otce, ssim``: its Table IV, with the
            similarity of the regions from its Table II.
        printed: CSV with ``target, method, top1`` to ``top4`` as printed.
    """

    here: Run
    scores: str
    printed: str

    def run(self) -> pd.DataFrame:
        """The content of ``table6.csv``."""
        columns = {"target", "source", "modality", "target_modality", "dice", *PUBLISHED, "ssim"}
        raw, tops = read_columns(self.scores, columns), [f"footrule_{k}" for k in TOP]
        parts = []
        for target, sources in raw.groupby("target"):
            ready = sources.set_index("source")
            ready["same_modality"] = ready["modality"] == ready["target_modality"]
            groups = groups_by_priors(ready, minimum_ssim=None, top_k=None)
            found = {label: ready[column] for column, label in PUBLISHED.items()}
            found["random"] = pd.Series(0.0, ready.index)
            table = ranker_table(found, ready["dice"], groups=groups).set_index(["ranker", "prior"])
            chance = table.loc["random", tops].add_prefix("random_")
            parts.append(table.loc[list(PUBLISHED.values())].join(chance, on="prior").assign(target=target))
        table = pd.concat(parts).reset_index()
        table["method"] = table["ranker"] + table["prior"].map({PRIORS[0]: " w/o PK", PRIORS[2]: " w/ PK"})
        printed = read_columns(self.printed, {"target", "method", *(f"top{k}" for k in TOP)})
        table = table.merge(printed, on=["target", "method"], how="left")
        both = table.dropna(subset=["top1"])
        agree = int((both[tops].to_numpy() == both[[f"top{k}" for k in TOP]].to_numpy()).sum())
        write_csv(self.here.folder / "table6.csv", table)
        print(f"{agree} of {len(both) * len(TOP)} printed cells agree. Footrule (expected for a random order):")
        for row in table.to_dict("records"):
            cells = [f"top {k}: {row[f'footrule_{k}']:g} ({row[f'random_footrule_{k}']:.1f})" for k in TOP]
            print(f"{row['target']}, {row['ranker']}, prior knowledge {row['prior']}: {', '.join(cells)}")
        return table
