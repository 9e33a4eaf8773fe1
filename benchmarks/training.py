"""What each ingredient of a training is worth: scratch or fine-tuning with one of them changed, on test patients.

    python benchmarks/training.py COLLECTION TARGET --source SOURCE --arms scratch full --steps 500 1000 --seeds 0 1 2

The ingredients are the options in training.json, each laid over the default. Trainings that are done are not repeated.
Prints and writes training.csv: mean Dice of the patients, over seeds with its standard deviation; minutes each took.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from medtl_ext.transfer.jobs import Job, run_jobs

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "risk_map"
INGREDIENTS = json.loads(Path(__file__).with_suffix(".json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection")
    parser.add_argument("target")
    parser.add_argument("--source", help="for the arms that start from one")
    parser.add_argument("--arms", nargs="+", default=["scratch"], help="configs of the bundle")
    parser.add_argument("--ingredients", nargs="+", default=list(INGREDIENTS), choices=INGREDIENTS, metavar="NAME")
    parser.add_argument("--steps", nargs="+", type=int, default=[1000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("training"))
    parser.add_argument("--source_dir", type=Path, help="of trained sources; by default below --out")
    parser.add_argument("--n_jobs", type=int)
    given = parser.parse_args()

    config = json.loads((BUNDLE / "configs" / "train.json").read_text()) | {"bundle_root": str(BUNDLE)}
    common = {"collection": given.collection, "target_task": given.target, "source": given.source}
    common |= {"source_dir": str(given.source_dir or given.out / "sources"), "audit#arms": [], "check_data": False}
    runs = pd.MultiIndex.from_product(
        [given.arms, given.ingredients, given.steps, given.seeds], names=["arm", "ingredient", "steps", "seed"]
    ).to_frame(index=False)
    jobs = []
    for arm, ingredient, steps, seed in runs.itertuples(index=False):
        options = {"seed": seed, "iterations_per_epoch": 25, "epochs": steps // 25} | common | INGREDIENTS[ingredient]
        folder = given.out / given.target / f"{arm} {ingredient} {steps} {seed}".replace(" ", "_")
        jobs.append(Job(config, folder, [BUNDLE / "configs" / f"{arm}.json"], options))
    run_jobs(jobs, n_jobs=given.n_jobs, description="trainings")
    for split in ("val", "test"):
        runs[split] = [(table := job.read())[table["split"] == split]["dice"].mean() for job in jobs]
    curves = [job.read("curve.csv") for job in jobs]
    runs["minutes"] = [curve["minutes"].iloc[-1] for curve in curves]
    runs["still gaining"] = [curve["dice"].iloc[-1] - curve["dice"].iloc[-3] for curve in curves]
    table = runs.drop(columns="seed").groupby(["arm", "ingredient", "steps"], sort=False).agg(["mean", "std"]).round(4)
    table.to_csv(given.out / "training.csv")
    print(table.to_string())


if __name__ == "__main__":
    main()
