"""What DatasetTr's published raw scores say: its tables anew, and rankers beside it that never look at the target."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from medtl_ext._io import write_csv, write_text
from medtl_ext._validation import require_choices
from medtl_ext.metrics.label_prediction import combine_lp_fu
from medtl_ext.ranking import FriedmanNemenyi, agreement_over_targets, friedman_nemenyi, listed, ranker_table
from medtl_ext.transfer import Run
from medtl_ext.transfer.report import read_columns
from medtl_ext.transfer.truth import page
from medtl_ext.visualize import plot_critical_difference, save_figure

METHODS = {"logme": "LogME", "parc": "PARC", "sfda": "SFDA", "ncti": "NCTI", "leep": "LEEP", "nleep": "NLEEP"}
OURS = "LP x FU"
PARTS = (OURS, "LP", "FU", "LP + FU")
BLIND = ("most images", "most classes", "static", "random")
"""Rankers that never look at the target."""
PRINTED_CD = 2.792
PRECISION = 0.005 + 1e-9  # of two decimals


@dataclass(kw_only=True, eq=False)
class ReproducePublished:
    """A step that computes the paper's correlations, ranks and tests from the raw scores, with baselines beside them.

    Writes ``rankers.csv`` (a row per target, pool of sources and ranker: first choice, regret, weighted Kendall),
    ``broadest.csv`` (a row per target: AUC from the broadest source and from the best other one), ``table2.csv`` (a row
    per target and method: printed, computed, ranks), ``published.md`` and ``critical_difference.png``, and prints what
    was found.

    Args:
        here: where the files go.
        scores: CSV with ``target, source, auc`` and a column per metric, ``lp`` and ``fu``: raw results. A source of
            the target's name is its own model, and no candidate.
        printed: CSV with ``target, method, wtau, rank`` as printed; empty where the paper prints no number. None:
            nothing printed is held against the scores.
        datasets: CSV with ``dataset, images, classes, colour`` of each source and target. None, for architectures: they
            have no breadth.
        broad: sources without which all is computed again, the broadest first.
        cross_domain: LP and FU are turned round (eq. 8), for sources of another domain.
    """

    here: Run
    scores: str
    printed: str | None = None
    datasets: str | None = None
    broad: Sequence[str] = ()
    cross_domain: bool = False

    def run(self) -> pd.DataFrame:
        """The content of ``rankers.csv``."""
        folder = self.here.folder
        raw = read_columns(self.scores, {"target", "source", "auc", "lp", "fu", *METHODS}).assign(seed=0)
        known = None
        if self.datasets:
            known = read_columns(self.datasets, {"dataset", "images", "classes", "colour"}).set_index("dataset")
        pools = {"all sources": raw}
        if self.broad:
            require_choices("broad source", self.broad, raw["source"].unique())
            pools["without the broad"] = raw[~raw["source"].isin(self.broad)]
        parts = [self._rankers(pool, known).assign(pool=name) for name, pool in pools.items()]
        table = pd.concat(parts, ignore_index=True).drop(columns=["prior", "seed"])
        write_csv(folder / "rankers.csv", table)
        means = pd.concat({name: _means(of) for name, of in table.groupby("pool", sort=False)}, names=["pool"])
        lines = [_baselines(of, name) for name, of in table.groupby("pool", sort=False)]
        lines.append(_parts_of_the_product(every := table[table["pool"] == "all sources"]))
        if known is not None and self.broad:
            lines.append(_meaning(*(means.loc[name, "regret"] for name in pools), self.broad[0]))
            beside = _beside_the_broadest(raw, known, self.broad)
            write_csv(folder / "broadest.csv", beside.reset_index())
            lines += _when_it_wins(beside, self.broad)
        if self.printed:
            table2, test, found = _held_against_the_printed(every, self.printed)
            write_csv(folder / "table2.csv", table2)
            title = "Juodelyte et al., Table 2, corrected critical difference"
            save_figure(plot_critical_difference(test, title=title), folder / "critical_difference.png")
            lines = found + lines
        text = "\n".join(f"- {line}" for line in lines)
        note = "Weighted Kendall and regret (AUC that the first choice loses to the best source), means over targets:"
        title = "# Juodelyte et al., from the raw scores"
        write_text(folder / "published.md", page(title, text, note, means.reset_index()))
        print("\n".join(lines))
        return table

    def _rankers(self, raw: pd.DataFrame, known: pd.DataFrame | None) -> pd.DataFrame:
        """Each ranker on each target."""
        own = raw["source"] == raw["target"]

        def judge(ready: pd.DataFrame, truth: pd.Series, static: dict[str, float]) -> pd.DataFrame:
            lp, fu = ready["lp"].to_dict(), ready["fu"].to_dict()
            scaled = ready[["lp", "fu"]].transform(lambda of: (of - of.min()) / (of.max() - of.min()))
            found = {name: ready[column] for column, name in METHODS.items()}
            found[OURS] = pd.Series(combine_lp_fu(lp, fu, cross_domain=self.cross_domain))
            sign = -1 if self.cross_domain else 1
            found |= {"LP": sign * ready["lp"], "FU": sign * ready["fu"], "LP + FU": sign * scaled.sum(axis=1)}
            if known is not None:
                found |= {f"most {column}": known[column].reindex(ready.index) for column in ("images", "classes")}
            found |= {"static": pd.Series(static), "random": pd.Series(0.0, ready.index)}
            return ranker_table(found, truth, groups={"none": ready.index})

        return agreement_over_targets(raw[~own], judge, outcome="auc")


def _baselines(table: pd.DataFrame, pool: str) -> str:
    """What a score that looks at the target is worth beside rankers that do not."""
    means = _means(table)
    picks = table.loc[table["ranker"] == OURS, "pick"]
    first, blind = picks.mode()[0], [name for name in BLIND if name in means.index]
    said = [f"{name} {means.loc[name, 'tau']:.3f} ({means.loc[name, 'regret']:.4f})" for name in (OURS, *blind)]
    best, least = means.loc[blind, "tau"].idxmax(), means.loc[blind, "regret"].idxmin()
    ahead = means.loc[OURS, "tau"] > means.loc[best, "tau"], means.loc[OURS, "regret"] < means.loc[least, "regret"]
    return (
        f"{pool.capitalize()}: {OURS} chooses {first} on {(picks == first).sum()} of {len(picks)} targets. Mean "
        f"weighted Kendall (regret of the first choice): {listed(said)}. Ahead of the best ranker that never looks at "
        f"the target ({best}; {least}): {'yes' if ahead[0] else 'no'} by Kendall, {'yes' if ahead[1] else 'no'} by "
        "regret."
    )


def _meaning(regret: pd.Series, without: pd.Series, broadest: str) -> str:
    saved = 100 * (1 - without[[OURS, "static"]] / without["random"])
    return (
        f"What it means: a pool that holds a source as broad as {broadest} needs no score to find it ({OURS} loses "
        f"{regret[OURS]:.4f}, always {broadest} {regret['most classes']:.4f}). In a pool without one, {OURS} saves "
        f"{saved[OURS]:.0f} % of what a random choice loses and a source that did well on other targets "
        f"{saved['static']:.0f} %: fine-tune that one too before a score is trusted."
    )


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """Ranker -> mean tau and regret over the targets; what ranks nothing has the tau of chance."""
    return table.fillna({"tau": 0.0}).groupby("ranker", sort=False)[["tau", "regret"]].mean()


def _parts_of_the_product(table: pd.DataFrame) -> str:
    """The paper's Figure 6: LP, FU, and the two ways to join them."""
    means, tau = _means(table), table.pivot(index="target", columns="ranker", values="tau")
    said = [f"{name} {means.loc[name, 'tau']:.3f} ({means.loc[name, 'regret']:.4f})" for name in PARTS]
    tests = [
        f"{OURS} is ahead of {name} on {(tau[OURS] > tau[name]).sum()} of {len(tau)} targets (Wilcoxon p "
        f"{stats.wilcoxon(tau[OURS], tau[name]).pvalue:.2f})"
        for name in PARTS[1:]
    ]
    return f"Figure 6, mean weighted Kendall (regret): {listed(said)}; {listed(tests)}."


def _beside_the_broadest(raw: pd.DataFrame, known: pd.DataFrame, broad: Sequence[str]) -> pd.DataFrame:
    """Target -> AUC after transfer from each broad source, from the best other one, and what the target is."""
    auc = raw[raw["source"] != raw["target"]].pivot(index="target", columns="source", values="auc")
    single = auc.drop(columns=list(broad))
    found = auc[list(broad)].assign(best_single=single.max(axis=1), mean_single=single.mean(axis=1))
    best_other = auc.drop(columns=broad[0]).agg(["idxmax", "max"], axis=1)
    found = found.assign(best_other=best_other["idxmax"], margin=found[broad[0]] - best_other["max"].astype(float))
    return found.join(known)


def _when_it_wins(table: pd.DataFrame, broad: Sequence[str]) -> list[str]:
    """The questions of the paper's Tables 4 and 5: on which targets is the broadest source best, and is it breadth?"""
    first, wins, colour = broad[0], table["margin"] > 0, table["colour"].astype(bool)
    counts = [[int(wins[kind].sum()), int((~wins)[kind].sum())] for kind in (colour, ~colour)]
    of_what = [
        f"{name} {stats.spearmanr(table['margin'], table[name]).statistic:+.2f}" for name in ("images", "classes")
    ]
    ahead = [
        f"{name} is ahead of the best single dataset on {(table[name] > table['best_single']).sum()} and of their mean "
        f"on {(table[name] > table['mean_single']).sum()}"
        for name in broad
    ]
    others = listed(f"{row.best_other} ({-row.margin:.4f}) on {row.Index}" for row in table[~wins].itertuples())
    return [
        f"{first} is the best source on {wins.sum()} of {len(table)} targets: on {counts[0][0]} of {sum(counts[0])} in "
        f"colour, {counts[1][0]} of {sum(counts[1])} in grey (Fisher p {stats.fisher_exact(counts).pvalue:.2f}). Ahead "
        f"of it: {others}. Spearman of its margin with the target's {listed(of_what)}.",
        f"Of {len(table)} targets {listed(ahead)}.",
    ]


def _held_against_the_printed(rankers: pd.DataFrame, printed: str) -> tuple[pd.DataFrame, FriedmanNemenyi, list[str]]:
    """Table 2 beside the printed one, its test, and what was found."""
    table = read_columns(printed, {"target", "method", "wtau", "rank"})
    computed = rankers.replace({"ranker": {OURS: "Ours"}}).pivot(index="target", columns="ranker", values="tau")
    computed = computed[[*METHODS.values(), "Ours"]]
    names = {target.lower(): target for target in table["target"].unique()}
    computed.index = [names[target.removesuffix("mnist")] for target in computed.index]
    test = friedman_nemenyi(computed)
    cells = pd.MultiIndex.from_frame(table[["target", "method"]])
    table["computed"] = computed.stack(future_stack=True).reindex(cells).to_numpy()
    table["computed_rank"] = test.table.stack(future_stack=True).reindex(cells).to_numpy()
    both_empty = table["wtau"].isna() & table["computed"].isna()
    table["agrees"] = both_empty | ((table["wtau"] - table["computed"]).abs() <= PRECISION)
    swapped = table[table["rank"] != table["computed_rank"]]
    others = friedman_nemenyi(table.pivot(index="target", columns="method", values="rank"), higher_is_better=False)
    k, n = computed.shape[1], len(computed)
    eight = friedman_nemenyi(computed.assign(another=np.nan)).critical_difference * np.sqrt(k / (k + 2))
    empty, ranks = int(both_empty.sum()), ", ".join(f"{name} {rank:.2f}" for name, rank in test.average_ranks.items())
    pair = ", ".join(f"{row.method} {row.rank:g}, computed {row.computed_rank:g}" for row in swapped.itertuples())
    lines = [
        f"{int(table['agrees'].sum())} of {len(table)} cells agree at two decimals ({empty} of them are empty in both: "
        "SFDA gives one score to all sources there, so nothing is ranked, and it counts as last).",
        f"Average ranks: {ranks}.",
        f"Friedman chi-square {test.chi_square:.3f}, p {test.p:.5f}.",
        f"Critical difference {test.critical_difference:.3f} for {k} methods on {n} targets. Slip: {PRINTED_CD} is "
        f"printed, which is what the quantile for 8 methods gives ({eight:.3f}).",
        f"Slip: the printed ranks of {' and '.join(swapped['method'])} on {', '.join(swapped['target'].unique())} are "
        f"swapped ({pair}); both print the same rounded correlation. The printed average ranks are right; taken at "
        f"their word, the printed ranks would give chi-square {others.chi_square:.3f}.",
        f"With the corrected value: {test.text}",
    ]
    return table, test, lines
