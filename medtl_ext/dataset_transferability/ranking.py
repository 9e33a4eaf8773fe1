"""Source datasets ranked for a classification target, with what the paper's LP x FU says and the target's own model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose

from medtl_ext._io import write_csv
from medtl_ext._validation import InputError
from medtl_ext.metrics.base import probabilities_and_labels
from medtl_ext.metrics.leep import check_probabilities
from medtl_ext.ranking import SourceRanking, listed
from medtl_ext.transfer import SCORES, ClassificationTask, Job, RankSources, SourceStudy
from medtl_ext.transfer.jobs import read_table
from medtl_ext.transfer.sources.pool import keys_of, source_transforms
from medtl_ext.transfer.study import Key
from medtl_ext.transfer.tasks import POOLED


@dataclass(kw_only=True, eq=False)
class RankDatasets(RankSources):
    """The ranking of `medtl_ext.transfer.RankSources` for classification.

    The target's own model is scored and never ranked. Where a score cannot be resampled over patients, as LP, FU and
    LP x FU, the answer is an order and never a preference.

    Args:
        options: see `medtl_ext.transfer.RankSources`.
    """

    scores = ("lp_fu", "lp", "fu", "leep", "nleep", "logme", "parc", "sfda", "ncti", "gbc", "h_score")
    carried = ("collection", "phantom_subjects", "train_per_class", "val_per_class", "image_size", "in_channels")
    carried += ("network_def", "seed")

    def check(self) -> None:
        if (size := self.image_shape[1]) < 16:
            raise InputError(f"image_size is {size}; expected at least 16.")
        super().check()
        if self.decide_by not in self.metrics:
            raise InputError(f"decide_by is {self.decide_by}, not in metrics: {', '.join(self.metrics)}; add it there.")
        self.target.check(["train", "val", "test"])

    def remarks(self, ranking: SourceRanking) -> list[str]:
        ready, dataset, said = self.table.loc[self.ranked], self.target.dataset, []
        if len(ready) > 1 and ready[self.decide_by].nunique(dropna=True) == 1:
            said.append(f"All sources have the same {SCORES[self.decide_by].label}: it ranks nothing here.")
        if dataset.subjects is None and ranking.resamples:
            said.append(
                "Which images are of one patient is not known, so every image counts as a patient of its own: if some "
                "share one, the intervals are too narrow."
            )
        if self.decide_by != "lp_fu" and "lp_fu" in ready and ready["lp_fu"].notna().any():
            turned = " (turned round for sources of another domain)" if self.cross_domain else ""
            first = list(ready.index[ready["lp_fu"] == ready["lp_fu"].max()])
            alike = " (all alike)" if len(first) > 1 else ""
            said.append(f"The paper's LP x FU{turned} would pick {listed(first)}{alike}.")
        if own := [name for name in self.seen if self.pool[name].own]:
            said.append(f"{listed(own)} is the target's own model: scored, not ranked.")
        counts = zip(dataset.class_names, dataset.counts("train"), dataset.counts("val"), strict=True)
        images = ", ".join(f"{name} {train} and {val}" for name, train, val in counts)
        return [*said, f"Training and validation images by class: {images}."]

    def said_besides(self) -> dict[str, Any]:
        units = len(next(iter(self.seen.values())).maps.names)
        return {"units": units, "patients_known": self.target.dataset.subjects is not None}

    def untouched(self, items: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """What each source says of further images without any training, N x classes of the target.

        Its own classes are read as the target's by the P(y|z) of the training images, as LEEP does.
        """
        found = {}
        for name, seen in self.seen.items():
            source, steps = self.pool[name], self.transforms
            if source.card.foreign:
                steps = source_transforms(source.card, self.target.channels, steps, keys=keys_of(self.target))
            network = source.build(self.here.config["network_def"], self.target, self.image_shape)
            probs = []
            with torch.no_grad():
                for batch in DataLoader(Dataset(items, Compose(steps)), batch_size=128):
                    probs += probabilities_and_labels({"pred": network(batch["image"]), "label": batch["label"]})[0]
            known, asked = (check_probabilities("pred", one).double() for one in (seen.maps[0], torch.stack(probs)))
            joint = torch.eye(self.target.n_classes, dtype=known.dtype)[seen.maps[1]].T @ known
            found[name] = (asked @ (joint / joint.sum(0).clamp(min=1e-12)).T).numpy()
        return found


@dataclass(kw_only=True, eq=False)
class RankOwnModel:
    """A step that says where each score would rank the target's own model, had it been a candidate: ``own_model.csv``.

    A score of feature quality alone finds no better source for a data set than the data set itself. LP x FU is 0 for
    a model that need not change (the paper's point). Nothing is written where no source is the target's own model.

    Args:
        ranking: of the sources, the own model among them.
    """

    ranking: RankDatasets

    def run(self) -> pd.DataFrame | None:
        """Columns ``score, rank, candidates``."""
        own = [name for name in self.ranking.seen if self.ranking.pool[name].own]
        if not own or not self.ranking.here.leads:
            return None
        table = pd.DataFrame(self.ranking.values(list(self.ranking.seen)))
        ranks = table.rank(ascending=False, method="min", na_option="bottom").loc[own[0]]
        found = pd.DataFrame({"score": [SCORES[name].label for name in ranks.index], "rank": ranks.to_numpy(int)})
        found["candidates"] = len(table)
        write_csv(self.ranking.here.folder / "own_model.csv", found)
        return found


class DatasetStudy(SourceStudy):
    """Several classification targets and seeds, of one pool; see `medtl_ext.transfer.SourceStudy`."""

    title = "Dataset transferability studied"
    head = "{targets} targets, {sources} sources, {seeds} seeds; AUC of the test images after fine-tuning everything."
    seeds_pool, kind = False, ClassificationTask
    where = ("collection", "phantom_subjects", "image_size", "in_channels")

    def claims(self, table: pd.DataFrame, mean: pd.DataFrame, jobs: Mapping[Key, Job]) -> list[str]:
        pooled = [_pooled_claim(table)] if table["data"].str.contains(POOLED, regex=False).any() else []
        files = [job.output_dir / "own_model.csv" for job in jobs.values()]
        tables = [read_table(file) for file in files if file.is_file()]
        if not tables:
            return pooled
        own = pd.concat(tables)
        first = own.assign(first=own["rank"] == 1).groupby("score", sort=False)["first"].agg(["sum", "count"])
        said = ", ".join(f"{name} {row['sum']} of {row['count']}" for name, row in first.iterrows())
        return [
            *pooled,
            "**Is a target its own best source?** Ranked first among the candidates had it been one (the paper's "
            f"argument against scores of feature quality alone): {said}.",
        ]


def _pooled_claim(table: pd.DataFrame) -> str:
    """The paper's claim of diversity: is a network of several datasets a better source than one of a single one?"""
    known = table.dropna(subset=["data"])
    pooled = known["data"].str.contains(POOLED, regex=False)
    means = [known[of].groupby(["target", "source"])["auc"].mean().groupby("target") for of in (pooled, ~pooled)]
    mean, best = ((means[0].mean() - other).dropna() for other in (means[1].mean(), means[1].max()))
    return (
        f"**Is a pooled source better than its parts?** AUC against the mean of the single datasets {mean.mean():+.3f} "
        f"(higher on {(mean > 0).sum()} of {len(mean)} targets), against the best of them {best.mean():+.3f} (higher "
        f"on {(best > 0).sum()}; which it is, nobody knows beforehand)."
    )
