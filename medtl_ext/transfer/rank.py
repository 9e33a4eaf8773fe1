"""Which source should I transfer from? Score each source on the target, rank with intervals, and give a verdict."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose
from torch import nn
from tqdm import tqdm

from medtl_ext import __version__
from medtl_ext._io import write_csv, write_json, write_text
from medtl_ext._validation import InputError, require_choice, require_choices, require_number
from medtl_ext.data.plan import stored_options
from medtl_ext.ranking import SourceRanking, baseline_rankings, bootstrap_ranking, listed
from medtl_ext.ranking._words import ONLY_A_SCORE, SYNTHETIC
from medtl_ext.transfer.arms import finetuning_job
from medtl_ext.transfer.config import identity
from medtl_ext.transfer.jobs import Run, run_command
from medtl_ext.transfer.report import records
from medtl_ext.transfer.scores import (
    SCORES,
    Observation,
    TargetSlices,
    kept_pass,
    observe,
    patients_of,
    resampled_scores,
    score_values,
)
from medtl_ext.transfer.sources.network import warn_of_other_order
from medtl_ext.transfer.sources.pool import (
    Source,
    TargetTask,
    find_sources,
    keys_of,
    source_collection,
    source_transforms,
    train_sources,
)
from medtl_ext.visualize import plot_ranking, save_figure

logger = logging.getLogger(__name__)

# Settings of a ranking that a single pass does not depend on.
OF_THE_LIST = ("sources", "metrics", "decide_by", "n_resamples", "minimum_win", "minimum_gap")


@dataclass(kw_only=True, eq=False)
class RankSources:
    """A step that ranks the candidate sources of a target, and says which source to use and how certain that is.

    The sources are those of the config's option ``sources``. Writes ``ranking.csv``, ``ranking.json``, ``ranking.png``
    and ``answer.txt``, and prints the answer.

    Args:
        here, target: the run, and the target task.
        evaluator: a MONAI evaluator over the target's training images, with the metrics ``samples`` and
            ``predictions``.
        image_shape: channels x *spatial of the images for the networks.
        metrics: names of scores, see `medtl_ext.transfer.SCORES`.
        decide_by: the score that decides. A score that cannot be resampled has no interval, and so gives no verdict.
        n_resamples, minimum_win, minimum_gap: see `medtl_ext.ranking.bootstrap_ranking`.
        source_dir, pool_seed: folder of the sources' networks, and the seed of their training.
        check_data: read every file of a source task before it is trained on.
        trust_sources: allow code in a source to run; see `medtl_ext.transfer.sources.pool.find_sources`.
        transforms: the bundle's deterministic transforms; a source with its own preprocessing uses only their loading.
        cross_domain: reverse FU in LP x FU, for sources of another domain than the target.
    """

    scores: ClassVar[Sequence[str]] = tuple(SCORES)
    """Those that ``metrics`` may name."""
    carried: ClassVar[Sequence[str]] = ()
    """Options that a fine-tuning must share with the ranking."""

    here: Run
    target: TargetTask
    evaluator: SupervisedEvaluator
    image_shape: Sequence[int]
    metrics: Sequence[str]
    decide_by: str
    n_resamples: int
    minimum_win: float
    minimum_gap: float
    source_dir: str
    pool_seed: int
    check_data: bool = True
    trust_sources: bool = False
    transforms: Sequence[Callable] = ()
    cross_domain: bool = False

    def check(self) -> None:
        """Refuse what cannot work before anything long runs.

        Raises:
            InputError: an unknown score, a number out of range, or no labelled training image of the target.
        """
        self.target.datalist("train")
        self.metrics = require_choices("metric", self.metrics, self.scores)
        require_choice("decide_by", self.decide_by, self.scores)
        require_number("minimum_win", self.minimum_win, 0.5, 1, above=True)
        require_number("minimum_gap", self.minimum_gap, 0, 1)
        require_number("n_resamples", self.n_resamples, 1, whole=True)

    # What is known about the sources, in the order in which it is computed

    @cached_property
    def pool(self) -> dict[str, Source]:
        """The sources by name; those that can be used are trained."""
        config = self.here.config
        where = {"collection": source_collection(config), "trust": self.trust_sources}
        found = find_sources(config["sources"], self.target, **where)
        if all(source.left_out for source in found):
            reasons = "; ".join(f"{source.name}: {source.left_out}" for source in found)
            raise InputError(f"no source can be used ({reasons}); give other --sources.")
        how = {"folder": self.source_dir, "seed": self.pool_seed, "check": self.check_data}
        return {source.name: source for source in train_sources(found, self.here, self.target, **how)}

    @cached_property
    def seen(self) -> dict[str, Observation]:
        """The outputs of each source for the target; sources that turn out not to fit are left out of the pool."""
        seen, with_fu = {}, bool({"fu", "lp_fu"} & {*self.metrics, self.decide_by})
        ready = [source for source in self.pool.values() if source.left_out is None]
        for source in tqdm(ready, "scoring", unit="source", disable=None if self.here.progress else True):
            try:
                network = source.build(self.here.config["network_def"], self.target, self.image_shape)
                observed = partial(self.observed, source, network, with_fu)
                # Several processes have to agree on who passes; what is code has no content that can be told.
                kept = idist.get_world_size() == 1 and not source.card.trusted
                file = kept and Path(self.source_dir, "passes", f"{self._content(source, network, with_fu)}.npz")
                seen[source.name] = kept_pass(file, source, observed) if kept else observed()
            except InputError as error:
                if not source.card.foreign:
                    raise
                reason = str(error).removeprefix(f"source {source.name}: ")
                logger.warning("source %s is left out: %s", source.name, reason)
                self.pool[source.name] = replace(source, left_out=reason)
        if not seen:
            raise InputError("no network takes the target's images; see the warnings above, give other --sources.")
        return seen

    def observed(self, source: Source, network: nn.Module, with_fu: bool) -> Observation:
        """One pass of a source on its own grid; its probabilities are then resampled to the target's slices."""
        own, onto = self.evaluator.data_loader, None
        if not source.card.foreign:
            stored, config = stored_options(Path(source.card.checkpoint).with_name("grid.json")), self.here.config
            if any(stored[name] != config[name] for name in {"spacing", "normalize"} & stored.keys()):
                advice = f"if all sources share its grid, give it by --spacing {stored['spacing']} and --normalize"
                logger.warning("source %s is scored on another grid than it was trained on; %s.", source.name, advice)
            return observe(source, network, self.evaluator, with_fu=with_fu)
        keys = keys_of(self.target)
        transforms = source_transforms(source.card, self.target.channels, self.transforms, keys=keys)
        if self.target.per_pixel:
            data = [item for item in self.target.datalist("train") if item["subject"] in own.dataset.geometry]
            images, onto = Dataset(data, Compose(transforms)), TargetSlices(own.dataset)
            warn_of_other_order(network, [images[place] for place in {0, len(images) - 1}])
        else:
            images = Dataset(own.dataset.data, Compose(transforms))
        loader = DataLoader(images, batch_size=1 if onto else own.batch_size)
        try:
            self._read(loader)
            return observe(source, network, self.evaluator, with_fu=with_fu, onto=onto)
        finally:
            self._read(own)

    def _content(self, source: Source, network: nn.Module, with_fu: bool) -> str:
        """A hash of all that a pass depends on: images, weights, the source's card and the run's settings."""
        config, card = self.here.config, source.card.model_dump(exclude={"name", "checkpoint"})
        settings = [identity(config, without=OF_THE_LIST), config.get("score"), card, with_fu, __version__]
        digest = hashlib.sha256(f"{json.dumps(settings)}{network}{self._images}".encode())
        for tensor in network.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @cached_property
    def _images(self) -> str:
        """A hash of the images and labels that all sources are compared on."""
        data, digest = self.evaluator.data_loader.dataset, hashlib.sha256()
        for item in data if self.target.per_pixel else data.data:
            for name, value in sorted(item.items()):
                array = np.asarray(value)
                digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _read(self, loader: DataLoader) -> None:
        """Let the evaluator read from this loader."""
        self.evaluator.data_loader = loader
        self.evaluator.state.epoch_length = len(loader)

    @property
    def ranked(self) -> list[str]:
        """The sources that are ranked: all but the target's own model, which is only scored."""
        return [name for name in self.seen if not self.pool[name].own]

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per source: what is known beforehand, every score, and why the source was left out, if it was."""
        scores = self.values(self.ranked)
        if own := [name for name in self.seen if self.pool[name].own]:
            alone = [metric for metric in self.metrics if SCORES[metric].combine is None]
            mine = score_values(alone, {name: self.seen[name] for name in own}, seed=self.here.seed)
            scores = {metric: values | mine.get(metric, {}) for metric, values in scores.items()}
        facts = pd.DataFrame([self.facts(source) for source in self.pool.values()]).set_index("source")
        table = facts.join(pd.DataFrame(scores, columns=list(self.metrics), dtype=float))
        left_out = {name: source.left_out for name, source in self.pool.items()}
        return table.assign(left_out=pd.Series(left_out, dtype=object))

    def values(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Score -> source -> value; scores that are relative to a pool are computed for these sources."""
        how = {"seed": self.here.seed, "cross_domain": self.cross_domain}
        return score_values(self.metrics, {name: self.seen[name] for name in names}, **how)

    def facts(self, source: Source) -> dict[str, Any]:
        """What is known about a source before its network is used."""
        own = np.nan if source.job is None else self.target.own(source.job)
        known = {"source": source.name, "kind": source.kind, self.target.own_task: source.task}
        known |= {self.target.own_size: source.size, self.target.own_outcome: own}
        return known | {"checkpoint": source.card.checkpoint}

    # The ranking

    def rank(self, names: Sequence[str]) -> SourceRanking:
        """Rank the sources of these names by the deciding score, with a verdict."""
        score, table = SCORES[self.decide_by], self.table.loc[list(names)]
        options = {"minimum_win": self.minimum_win, "minimum_gap": self.minimum_gap, "seed": self.here.seed}
        options |= {"metric": score.label, "synthetic": self.target.synthetic}
        own = table[self.target.own_outcome].astype(float).dropna().to_dict()
        sizes = table[self.target.own_size].astype(float)
        known = {"sizes": None if sizes.isna().all() else sizes.to_dict()}
        known["other_targets"] = {"its own task": own} if own else None
        options["baselines"] = baseline_rankings(list(names), seed=self.here.seed, **known)
        seen, how = {name: self.seen[name] for name in names}, {"cross_domain": self.cross_domain}
        scores = resampled_scores(self.decide_by, seen, seed=self.here.seed, **how)
        if score.resamples == 0:
            return _without_interval(scores(np.ones(patients_of(seen), dtype=int)), options)
        resamples = min(self.n_resamples, score.resamples)
        return bootstrap_ranking(scores, patients=patients_of(seen), n_resamples=resamples, **options)

    def candidates(self) -> list[str]:
        """The sources to rank; a method may drop some."""
        return self.ranked

    def groups(self, ready: pd.DataFrame) -> dict[str, pd.Index]:
        """Kind of prior knowledge -> the sources that it keeps; see `medtl_ext.transfer.truth.agreement_table`."""
        return {"none": ready.index}

    def run(self) -> SourceRanking | None:
        """Rank, decide and write the results; only the first of several processes does it, the others return None."""
        table = self.table
        if not self.here.leads:
            return None
        ranking = self.rank(self.candidates())
        settled, winner = self.settled(ranking), ranking.default
        sentences = [ranking.text, *self.remarks(ranking)]
        if settled is not None:
            sentences.append(f"Settled by fine-tuning: {settled['text']}")
            winner = settled["source"]
        answer = " ".join(filter(None, sentences))
        command = None if winner is None else self.command(self.pool.get(winner))
        table, folder = self.ranking_table(table, ranking), self.here.folder
        if self.here.figures:
            figure = plot_ranking(
                ranking,
                metric=SCORES[self.decide_by].label,
                title=f"Which source to transfer from, for {self.target.name}",
                synthetic=self.target.synthetic,
            )
            save_figure(figure, folder / "ranking.png")
        write_csv(folder / "ranking.csv", table)
        verdict = {key: getattr(ranking, key) for key in ("recommendation", "tied", "default", "patients", "resamples")}
        content = {"target": self.target.name, "decided_by": self.decide_by} | verdict
        content |= {"synthetic": self.target.synthetic, "answer": answer, "command": command, "settled": settled}
        content |= self.said_besides() | {"baselines": records(ranking.baselines), "table": records(table)}
        write_json(folder / "ranking.json", content)
        hint = f"\n\nTo use {winner}:\n{command}" if command else ""
        write_text(folder / "answer.txt", answer + hint)
        print(answer + hint.replace("\n\n", "\n"))
        return ranking

    def remarks(self, ranking: SourceRanking) -> list[str]:
        """Further sentences of the answer."""
        return []

    def settled(self, ranking: SourceRanking) -> dict[str, Any] | None:
        """Decide between tied sources by finished trainings, if that is asked for."""
        return None

    def command(self, source: Source) -> str:
        """The command for the next step: a fine-tuning from a source."""
        overrides = finetuning_job(self.here, Path(), source).overrides
        options = {"target_task": self.here.config["target_task"]} | self.changed()
        options |= {name: value for name, value in overrides.items() if name not in ("check_data", "seed")}
        options |= {"trust_sources": True} if self.trust_sources and source.card.foreign else {}
        return run_command([self.here.configs / name for name in ("train.json", "finetune.json")], options)

    def changed(self) -> dict[str, Any]:
        """The options that a fine-tuning must share with the ranking, if they differ from ``train.json``."""
        config = self.here.config
        default = json.loads((self.here.configs / "train.json").read_text(encoding="utf-8"))
        return {name: config[name] for name in self.carried if config[name] != default[name]}

    def ranking_table(self, table: pd.DataFrame, ranking: SourceRanking) -> pd.DataFrame:
        """The ranked sources, best first, then the dropped and left-out ones, then scratch."""
        table = ranking.table.set_index("source").join(table, how="right")
        status = {name: "left out" if source.left_out else "own model" for name, source in self.pool.items()}
        status |= dict.fromkeys(self.ranked, "dropped") | dict.fromkeys(ranking.table["source"], "ranked")
        table.insert(0, "status", pd.Series(status))
        table.insert(1, "reason", self.reasons(table))
        table = table.sort_values("rank", kind="stable", na_position="last").drop(columns="left_out")
        table = table.reindex([*table.index, "scratch"])
        why = "training from scratch has no score: compare it by a training"
        table.loc["scratch", ["status", "reason"]] = ["no score", why]
        return table.rename_axis("source").reset_index()

    def reasons(self, table: pd.DataFrame) -> pd.Series:
        """Why each source was kept, dropped or left out."""
        return table["left_out"].fillna("")

    def said_besides(self) -> dict[str, Any]:
        """Further entries of ``ranking.json``."""
        return {}


def _without_interval(scores: Mapping[str, float], options: Mapping[str, Any]) -> SourceRanking:
    """The order by a score that cannot be resampled, without a verdict."""
    ranking = bootstrap_ranking({name: [score] for name, score in scores.items()}, **options)
    table = ranking.table
    first = list(table.loc[table["score"] == table["score"].max(), "source"])
    default = first[0] if len(first) == 1 else None
    best = f"The best guess is {default}."
    if default is None:
        reason = f"{listed(first)} have the same score" if first else "no source has a score"
        best = f"There is no best guess: {reason}."
    order = [f"{row.source} {row.score:.3f}" for row in table.itertuples()]
    text = (
        f"No evidence to prefer: {options['metric']} has no interval over patients, so it gives no verdict. "
        f"By its value the order is {listed(order, 8)}. {best} {ONLY_A_SCORE}"
        f"{f' {SYNTHETIC}' if options['synthetic'] else ''}"
    )
    return replace(ranking, recommendation=None, default=default, text=text, patients=0)
