"""How good is the advice of an audit, judged on the trainings that comparisons of benchmarks/real made?

    python benchmarks/real/advice.py real/risk_map/* --out docs/results/advice.csv

Every training of a comparison has scores of validation and of test patients. For each pair, number of labelled patients
and run, this gives the validation scores of the arms to `medtl_ext.ranking.audit_verdict`, as the audit does, with all
validation patients and with random draws of 5, 10 and 20 of them, and looks at the test patients. Regret: mean Dice of
the best of the arms on the test patients, minus that of the arm that was advised. OUT has a row per audit; the printed
table has the mean over runs, then over pairs, so that each pair counts once. An advice was right if no arm has a higher
mean on the test patients.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from medtl_ext.ranking import audit_verdict
from medtl_ext.transfer.jobs import read_table
from medtl_ext.transfer.report import markdown_table, patient_table

DRAWS = 50
SIZES = [5, 10, 20, None]
CELL = ["pair", "slices"]


def trainings(folder: Path) -> Iterator[pd.DataFrame]:
    """The scores of the patients, of every training of a comparison."""
    for file in sorted(folder.glob("runs/*/*/*/**/metrics.csv")):
        pair, slices, method, *run = file.parent.relative_to(folder / "runs").parts
        numbers = {name.rstrip("0123456789"): int(name.lstrip("abcdefghijklmnopqrstuvwxyz")) for name in run}
        scores = patient_table(read_table(file))[["split", "subject", "dice"]]
        yield scores.assign(pair=pair, slices=int(slices), method=method, run=max(numbers.values()))


def audits(scores: pd.DataFrame, arms: list[str]) -> Iterator[dict[str, object]]:
    """One audit for each size and draw of the validation patients of a run."""
    by_arm = {
        split: of.pivot(index="subject", columns="method", values="dice")[arms] for split, of in scores.groupby("split")
    }
    outcome, generator = by_arm["test"].mean(), np.random.default_rng(0)
    regret = outcome.max() - outcome
    for size in SIZES:
        if size is not None and size >= len(by_arm["val"]):
            continue
        for _ in range(1 if size is None else DRAWS):
            drawn = by_arm["val"].sample(size or len(by_arm["val"]), random_state=generator)
            verdict = audit_verdict({arm: drawn[arm].to_dict() for arm in arms}, n_resamples=999)
            yield {
                "validation patients": "all" if size is None else size,
                "patients": len(drawn),
                "firm": verdict.recommendation is not None,
                "advised": verdict.default,
                "right": regret[verdict.default] == 0,
                "regret": regret[verdict.default],
                "best": outcome.idxmax(),
                "highest on validation": regret[drawn.mean().idxmax()],
                "chance": regret.mean(),
                **{f"always {arm}": regret[arm] for arm in arms},
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of comparisons")
    parser.add_argument("--arms", nargs="+", default=["full", "scratch", "risk_map", "zero_shot"])
    parser.add_argument("--out", type=Path, required=True, help="a CSV file")
    given = parser.parse_args()
    rows = []
    for folder in given.folders:
        scores = pd.concat(trainings(folder), ignore_index=True)
        for (pair, slices, run), of in scores.groupby([*CELL, "run"], sort=False):
            if {*given.arms} <= {*of["method"]}:
                rows += [{"pair": pair, "slices": slices, "run": run} | row for row in audits(of, given.arms)]
    table = pd.DataFrame(rows)
    table.round(4).to_csv(given.out, index=False)
    rules = ["regret", "highest on validation", *(f"always {arm}" for arm in given.arms), "chance"]
    table["firm and right"] = table["right"].astype(float).where(table["firm"])
    values = ["firm", "right", "firm and right", *rules]
    means = table.groupby(["validation patients", *CELL, "run"], sort=False)[values].mean()
    means = means.groupby(["validation patients", *CELL], sort=False).mean()
    shown = means.groupby("validation patients", sort=False).mean()
    shown.insert(0, "pairs", means.groupby("validation patients", sort=False).size())
    print(markdown_table(shown.round(3).reset_index()))


if __name__ == "__main__":
    main()
