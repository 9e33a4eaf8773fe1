"""DatasetTr's Table 2 from its published raw scores: what agrees, and which printed cells are slips."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from medtl_ext._io import write_csv, write_text
from medtl_ext.metrics.label_prediction import combine_lp_fu
from medtl_ext.ranking import FriedmanNemenyi, friedman_nemenyi, weighted_kendall
from medtl_ext.transfer import Run
from medtl_ext.transfer.report import read_columns
from medtl_ext.visualize import plot_critical_difference, save_figure

METHODS = {"logme": "LogME", "parc": "PARC", "sfda": "SFDA", "ncti": "NCTI", "leep": "LEEP", "nleep": "NLEEP"}
PRINTED_CD = 2.792
PRECISION = 0.005 + 1e-9  # of two decimals


@dataclass(kw_only=True, eq=False)
class ReproduceTable2:
    """A step that computes the table's weighted Kendall correlations, ranks and tests from the raw scores.

    Writes ``table2.csv`` (a row per target and method: printed, computed, ranks), ``table2.md`` and
    ``critical_difference.png``, and prints what was found.

    Args:
        here: where the files go.
        scores: CSV with ``target, source, auc`` and a column per metric, ``lp`` and ``fu``: the authors' raw results.
        printed: CSV with ``target, method, wtau, rank`` as printed; empty where the paper prints no number.
    """

    here: Run
    scores: str
    printed: str

    def run(self) -> pd.DataFrame:
        """The content of ``table2.csv``."""
        table, test, lines = _compared(self.scores, self.printed)
        folder = self.here.folder
        write_csv(folder / "table2.csv", table)
        text = "\n".join(f"- {line}" for line in lines)
        write_text(folder / "table2.md", f"# Table 2 of Juodelyte et al., from the raw scores\n\n{text}")
        figure = plot_critical_difference(test, title="Juodelyte et al., Table 2, corrected critical difference")
        save_figure(figure, folder / "critical_difference.png")
        print("\n".join(lines))
        return table


def _compared(scores: str, printed: str) -> tuple[pd.DataFrame, FriedmanNemenyi, list[str]]:
    """The table beside the printed one, its test, and what was found."""
    raw = read_columns(scores, {"target", "source", "auc", "lp", "fu", *METHODS})
    table = read_columns(printed, {"target", "method", "wtau", "rank"})
    computed = pd.DataFrame({target: _column(target, models) for target, models in raw.groupby("target")}).T
    names = {name.removesuffix("mnist"): name for name in computed.index}
    computed.index = [next(t for t in table["target"].unique() if t.lower() == short) for short in names]
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


def _column(target: str, models: pd.DataFrame) -> dict[str, float]:
    """Weighted Kendall of every method on a target; the target's own model is no candidate."""
    models = models.set_index("source")
    others = models.drop(index=target)
    truth = others["auc"].to_dict()
    scores = {name: others[column].to_dict() for column, name in METHODS.items()}
    scores["Ours"] = combine_lp_fu(models["lp"].to_dict(), models["fu"].to_dict(), exclude=target)
    return {name: weighted_kendall(values, truth) for name, values in scores.items()}
