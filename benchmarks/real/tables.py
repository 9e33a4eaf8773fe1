"""The comparisons of benchmarks/real in one table: a row per method, a column per pair and number of labelled patients.

    python benchmarks/real/tables.py real/risk_map/* --out docs/results/risk_map_real

Writes OUT.csv (all rows of ``comparison.csv`` of each folder) and prints the table in Markdown. Its last column is the
mean over the cells of the difference to the reference, with a 95 % interval over them: another pair is another draw.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from medtl_ext.transfer.report import markdown_table

COLUMNS = ["pair", "slices", "method", "mean", "sd", "difference", "differs", "runs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = pd.concat([pd.read_csv(folder / "comparison.csv") for folder in given.folders], ignore_index=True)
    rows = rows[rows["pair"] != "all pairs"]
    rows.round(4).to_csv(given.out.with_suffix(".csv"), index=False)
    best = rows.groupby(["pair", "slices"])["mean"].transform("max")
    dice = rows["mean"].map("{:.3f}".format)
    cells = dice.where(rows["mean"] < best, "**" + dice + "**")
    cells += (" ± " + rows["sd"].map("{:.3f}".format)).where(rows["sd"].notna(), "")
    cells += rows["differs"].map({True: " *", False: ""})
    rows["cell"], rows["column"] = cells, rows["pair"] + ", " + rows["slices"].astype(str)
    wide = rows.pivot(index="method", columns="column", values="cell").fillna("")
    wide = wide.reindex(index=rows["method"].unique(), columns=rows["column"].unique())
    ahead = rows.groupby("method")["difference"].agg(["mean", "sem", "count"])
    width = ahead["sem"] * stats.t.ppf(0.975, np.maximum(ahead["count"] - 1, 1))
    words = [f"{m:+.3f} ({m - w:+.3f} to {m + w:+.3f})" for m, w in zip(ahead["mean"], width, strict=True)]
    wide["over the cells"] = pd.Series(words, ahead.index).where(ahead["mean"] != 0, "reference")
    print(markdown_table(wide.reset_index()))


if __name__ == "__main__":
    main()
