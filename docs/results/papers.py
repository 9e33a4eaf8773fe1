"""The page ``papers.md``: published numbers of two of the papers, beside baselines that need neither method.

    python docs/results/papers.py > docs/results/papers.md

Everything is computed from the tables in the folder ``papers``, transcribed as printed.
"""

from pathlib import Path

import pandas as pd

from medtl_ext.ranking import known_elsewhere
from medtl_ext.transfer.report import markdown_table

TABLES = Path(__file__).parent / "papers"
RISK_MAP = {"FeTS (Table II)": "risk_map_table2_fets", "iSeg (Table I)": "risk_map_table1_iseg"}
DATASETS = {"fets2022": "FeTS 2022", "iseg2019": "iSeg-2019", "wmh": "WMH"}

HEAD = """# Published numbers beside baselines

```bash
python docs/results/papers.py > docs/results/papers.md
```

We recomputed these numbers from the printed tables of the papers, without training a network. Each table is a CSV
file in the folder `papers` beside this page. A paper compares its method with other methods. You may as well choose
another source, label more slices, or take one step instead of two. So each claim stands here beside what the same
tables say of these choices. The tables hold one number for each cell and no spread over trainings: small differences
may be chance."""


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(TABLES / f"{name}.csv")


def cells(name: str) -> pd.DataFrame:
    """Dice of a table of RiskMap without its printed averages: a row per target and source, a column per method."""
    table = read(name)
    wide = table[table["source"] != "AVERAGE"].pivot(index=["target", "source"], columns="method", values="dice")
    return wide.reindex(table["target"].unique(), level="target")[table["method"].unique()]


def methods(name: str) -> pd.DataFrame:
    """What each method of RiskMap gains over vanilla, and on how many pairs and whole targets."""
    table, wide = read(name), cells(name)
    printed = table[table["source"] == "AVERAGE"].groupby("method")["dice"].mean()
    ahead = wide.gt(wide["vanilla"], axis=0)
    rows = {"Dice": wide.mean(), "gain": wide.mean() / wide["vanilla"].mean() - 1}
    rows |= {"gain of the printed averages": printed / printed["vanilla"] - 1, "pairs ahead": ahead.sum()}
    return pd.DataFrame(rows | {"targets with all sources ahead": ahead.groupby("target").all().sum()}).loc[[*wide]]


def sources(name: str) -> pd.DataFrame:
    """Choosing a source for vanilla, beside the risk map from any: Dice of each target.

    The best elsewhere is the source of the best mean rank on the other targets: chosen without a look at this one.
    """
    wide = cells(name)
    by_target, known = wide.groupby("target", sort=False), wide["vanilla"].reset_index().assign(seed=0)
    rows = {"vanilla, random source": by_target["vanilla"].mean(), "risk map, random source": by_target["ours"].mean()}
    rows |= {"vanilla, best source": by_target["vanilla"].max(), "risk map, best source": by_target["ours"].max()}
    found = pd.DataFrame(rows)
    for target in found.index:
        ranks = pd.Series(known_elsewhere(known, target, 0, outcome="vanilla"))
        best = ranks.index[ranks == ranks.max()]  # several: one of them at random
        found.loc[target, "vanilla, best elsewhere"] = wide.loc[target].loc[best, "vanilla"].mean()
    return found


def slices() -> pd.DataFrame:
    """Table III of RiskMap: mean Dice over its five targets, a row per number of slices."""
    table = read("risk_map_table3_slices").query("target != 'AVERAGE'")
    wide = table.groupby(["slices", "method"])["dice"].mean().unstack().sort_index(ascending=False)
    return wide[["vanilla", "ours"]].assign(gain=wide["ours"] / wide["vanilla"] - 1)


def selection() -> pd.DataFrame:
    """Dice in percent of each way to transfer of SeqTran, Tables 1 and 4, a row per data set."""
    one = read("sequential_transfer_table1").pivot(index="dataset", columns="method", values="dice_pct")
    four = read("sequential_transfer_table4").set_index(["source", "how"]).rename(columns=DATASETS).T
    four.columns = [f"{source}, {how}" for source, how in four]
    return one[["scratch", "direct"]].join(four).loc[[*DATASETS.values()]]


def path_gains() -> pd.DataFrame:
    """What the chosen path gains over each other choice."""
    table = selection()
    path = table.pop("multi, ours")
    gains = table.rdiv(path, axis=0).sub(1).T.add_prefix("gain on ")
    gains["mean of the gains"] = gains.mean(axis=1)
    gains["gain of the means"] = path.mean() / table.mean() - 1
    return gains.assign(ahead=table.lt(path, axis=0).sum())


def best_per_target() -> pd.DataFrame:
    """Table 3 of SeqTran by data set: means of the best single source and the best path, beside those of Table 4."""
    table = read("sequential_transfer_table3").set_index("target")
    first = table.index.str.split("-").str[0]
    dataset = first.map({"16": "FeTS 2022", "iSeg": "iSeg-2019"}).fillna("WMH")
    counts = {"targets": len, "path ahead": lambda of: (of["sequential_dice_pct"] > of["direct_dice_pct"]).sum()}
    found = pd.DataFrame({name: table.groupby(dataset).apply(count) for name, count in counts.items()})
    means = table.groupby(dataset).mean().set_axis(["single, Table 3", "path, Table 3"], axis=1)
    four = selection()[["single, best", "multi, best"]].set_axis(["single, Table 4", "path, Table 4"], axis=1)
    return found.join(means).join(four)


def percent(gain: float) -> str:
    return f"{100 * gain:+.2f} %"


def shown(table: pd.DataFrame, first: str) -> str:
    """The table in Markdown, its index as the first column and gains in percent."""
    gains = {name: table[name].map(percent) for name in table if "gain" in name}
    return markdown_table(table.assign(**gains).rename_axis(first).reset_index())


def risk_map_part(title: str, name: str) -> str:
    every, by_target = methods(name), sources(name)
    means = by_target.mean()
    gained = (means - means["vanilla, random source"]).map("{:.3f}".format)
    pairs, targets = every.loc["ours", ["pairs ahead", "targets with all sources ahead"]].astype(int)
    better = by_target["vanilla, best source"].gt(by_target["risk map, random source"]).sum()
    return f"""### {title}

{shown(every, "method")}

"On every source": ahead of vanilla in {pairs} of {len(cells(name))} pairs, and from every source on
{targets} of {len(by_target)} targets.

{shown(pd.concat([by_target, means.to_frame("mean").T]), "target")}

Gain in Dice over vanilla from a random source:

- with the risk map, from a random source: **{gained["risk map, random source"]}**
- with vanilla from its best source, which is known only afterwards: **{gained["vanilla, best source"]}**
- with vanilla from the source that is best on the other targets: {gained["vanilla, best elsewhere"]}
- with the risk map from its best source: {gained["risk map, best source"]}

Vanilla from its best source is ahead of the risk map from a random one on **{better} of {len(by_target)}** targets."""


def sequential_part() -> str:
    gains, best = path_gains(), best_per_target()
    mean, of_means = (gains[name].map(percent) for name in ("mean of the gains", "gain of the means"))
    return f"""## The best sequential path (Yang et al.)

### The chosen path against every other choice (Tables 1 and 4)

Dice in percent:

{shown(selection().T, "choice")}

The gain of the path that the method chooses (`multi, ours`) over each other choice, and the data sets on which it is
ahead:

{shown(gains, "over")}

The paper's headline of +2.58 % is the mean of the gains over `direct`, the path's own first task: **{mean["direct"]}**
when it is rounded. The gain over the single source that the same method calls nearest (`single, ours`) is
**{mean["single, ours"]}**. Computed from the means, they are {of_means["direct"]} and {of_means["single, ours"]}.
If you can already rank single sources, the second number is what a path adds.

### The best path and the best single source of each target (Table 3)

{shown(best, "data set")}

The best path is ahead on {best["path ahead"].sum()} of {best["targets"].sum()} targets. Both are known only afterwards.
Some means of Table 3 differ from those that Table 4 prints as `best`."""


def page() -> str:
    few = slices()
    parts = [HEAD, "## Transfer risk map (Duan et al.)", *(risk_map_part(*one) for one in RISK_MAP.items())]
    parts += [
        "The paper prints +4.37 % and +1.81 %. It rounded the averages to four digits before dividing.",
        "### Fewer slices (Table III, iSeg, mean of five targets)",
        shown(few, "slices"),
        f"The risk map with 100 slices ({few.loc[100, 'ours']:.3f}) is level with vanilla with 400 "
        f"({few.loc[400, 'vanilla']:.3f}).",
    ]
    return "\n\n".join([*parts, sequential_part()])


if __name__ == "__main__":
    print(page())
