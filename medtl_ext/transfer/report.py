"""From per-patient results to the files a person reads: the transfer audit and the comparison of methods.

Both start from one table with a row per run, patient and class: columns ``method, seed, split, subject, class, dice,
iou``, in a comparison also ``pair, source_seed, slices``. A class that is absent from truth and prediction has Dice 1
(MONAI's ``ignore_empty=False``) and ``empty`` True; every report counts these cases and says so. Classes are averaged
within a patient, and tests are paired over patients; the runs of an arm or method are trainings, over which intervals
and tests go too.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medtl_ext._io import write_csv, write_json, write_text
from medtl_ext._validation import InputError
from medtl_ext.ranking import MINIMUM_PATIENTS, PairedComparison, Verdict, audit_verdict, holm, paired_comparison
from medtl_ext.visualize import SPLIT_NAMES, method_group, plot_audit, plot_comparison, save_figure

RUN_COLUMNS = ["pair", "slices", "split", "method", "source", "source_seed", "seed"]
"""What tells one run from another; a table need not have all of them."""
ALL_PAIRS = "all pairs"
RUN = ["source", "source_seed", "seed"]
"""What tells one training of a method from another."""
ALSO = ["hd95_mm", "lesion_recall"]
"""Shown beside Dice, where a table has them."""


def patient_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Average the classes and the scans of each patient: one row per run and patient.

    It has ``dice``, ``iou``, where given ``hd95_mm`` and ``lesion_recall``, and ``empty``: how many classes are in
    neither truth nor prediction (and score 1).

    Args:
        rows: columns ``method, seed, split, subject, class, dice, iou``, optionally ``pair, slices, source_seed,
            hd95_mm, lesion_recall, empty``, and ``patient``, whom several subjects may be scans of (missing: the
            subject is the patient).

    Returns:
        The patient's name is in ``subject``.

    Raises:
        InputError: a column is missing, a score is not finite, or a run has the same patient and class twice.

    >>> rows = pd.DataFrame({"method": "full", "seed": 0, "split": "val", "subject": "p1", "class": ["ED", "ET"],
    ...                      "dice": [0.8, 0.6], "iou": [0.67, 0.43]})
    >>> patient_table(rows)[["subject", "dice", "iou", "empty"]].round(2).to_dict("records")
    [{'subject': 'p1', 'dice': 0.7, 'iou': 0.55, 'empty': 0}]
    """
    _require_columns(rows, ["method", "seed", "split", "subject", "class", "dice", "iou"])
    run = [column for column in RUN_COLUMNS if column in rows]
    if (twice := rows.duplicated([*run, "subject", "class"])).any():
        first = rows[twice].iloc[0]
        raise InputError(
            f"The results hold {first['method']}, seed {first['seed']}, patient {first['subject']}, "
            f"class {first['class']} twice in split {first['split']}. Keep one row per run, patient and class."
        )
    if (bad := ~np.isfinite(rows[["dice", "iou"]].to_numpy(float)).all(axis=1)).any():
        first = rows[bad].iloc[0]
        raise InputError(
            f"{bad.sum()} of {len(rows)} results are not finite, the first for {first['method']}, patient "
            f"{first['subject']}, class {first['class']}. Score an absent class as 1 (ignore_empty=False)."
        )
    rows = rows.assign(empty=rows["empty"].eq(True) if "empty" in rows else False)
    if "patient" in rows:
        rows = rows.assign(subject=rows["patient"].fillna(rows["subject"]))
    grouped = rows.groupby([*run, "subject"], sort=False, dropna=False)
    means = {name: (name, "mean") for name in ("dice", "iou", *ALSO) if name in rows}
    return grouped.agg(**means, empty=("empty", "sum")).reset_index()


def audit_report(
    rows: pd.DataFrame,
    output_dir: str | os.PathLike[str],
    *,
    method: str,
    synthetic: bool = False,
    margin: float = 0.01,
    title: str = "Transfer audit",
    late_gains: Mapping[str, float] | None = None,
    minutes: Mapping[str, float] | None = None,
    folds: int = 0,
) -> Verdict:
    """Decide a transfer audit on the validation patients, check it on the test patients, and write both down.

    Writes ``audit.csv`` (the tables of both splits), ``audit.json`` (the verdict with all numbers) and ``audit.png``.

    Args:
        rows: as for `patient_table`; every arm is a ``method``; split ``val`` decides, ``test`` checks (optional).
        output_dir: folder to write to.
        method: the chosen method, which must be among the arms.
        synthetic: the data are synthetic, which text and figure then say.
        margin: smallest difference in mean Dice worth acting on.
        title: of the figure.
        late_gains: what the validation Dice of arms gained in the last two fifths of their training. One that gained
            ``margin`` or more was not done: the text names it, for a longer training may change the comparison.
        minutes: what the trainings of arms took together, for the table.
        folds: split ``val`` are the labelled patients of a cross-validation in so many folds, each scored by trainings
            that did not see it; 0: patients that nobody trained on.

    Returns:
        The verdict of the validation patients; its text ends with the check on the test patients.

    Raises:
        InputError: no validation results, the method is missing, or arms were evaluated on different patients.
    """
    patients = patient_table(rows)
    splits, methods = patients["split"].unique(), patients["method"].unique()
    if "val" not in splits:
        raise InputError(f"An audit is decided on split 'val'; found {_listed(splits)} only.")
    if method not in methods:
        raise InputError(f"The audit has no results of '{method}'; found {_listed(methods)}.")
    names = SPLIT_NAMES | ({"val": "labelled"} if folds else {})
    verdicts = {
        split: audit_verdict(
            _trainings(patients[patients["split"] == split]),
            split=names.get(split, split),
            margin=margin,
            folds=folds if split == "val" else 0,
            synthetic=synthetic,
        )
        for split in ("val", "test")
        if split in splits
    }
    verdict = verdicts["val"]
    sentences = [verdict.text, _check(verdict, verdicts["test"].table) if "test" in verdicts else ""]
    sentences += [_unfinished(late_gains or {}, margin), _empty_sentence(rows)]
    verdict = replace(verdict, text=" ".join(filter(None, sentences)))

    output_dir = Path(output_dir)
    table = pd.concat([v.table.assign(split=split) for split, v in verdicts.items()])
    table = table[["split", *verdict.table.columns]]
    also = patients.filter(ALSO).groupby([patients["split"], patients["method"].rename("arm")]).mean()
    table = table.assign(minutes=table["arm"].map(minutes or {}))
    write_csv(output_dir / "audit.csv", table.join(also, on=["split", "arm"]))
    content = {key: value for key, value in asdict(verdict).items() if key != "table"}
    content |= {"method": method, "decided_on": "val", "margin": margin, "synthetic": synthetic}
    content |= {"runs_per_arm": int(verdict.table["trainings"].max()), "folds": folds}
    content |= {"tables": {split: records(of) for split, of in table.groupby("split", sort=False)}}
    write_json(output_dir / "audit.json", content)
    averaged = patients.groupby(["split", "method", "subject"], sort=False, as_index=False)["dice"].mean()
    averaged, table = (of.replace({"split": names}) for of in (averaged, table))
    figure = plot_audit(averaged, table, recommended=verdict.recommendation, title=title, synthetic=synthetic)
    save_figure(figure, output_dir / "audit.png")
    return verdict


def compare_report(
    rows: pd.DataFrame,
    output_dir: str | os.PathLike[str],
    *,
    reference: str = "vanilla",
    synthetic: bool = False,
    what_next: Callable[[str | None], str] | None = None,
) -> pd.DataFrame:
    """Compare methods over pairs, sample sizes, seeds and source checkpoints, by `medtl_ext.ranking.paired_comparison`.

    A method is a sample of trainings: what is said of a difference holds for further patients and further trainings. Of
    runs with the same seed and source checkpoint (or the one of the two that both methods depend on) those of one
    method are paired with those of the other. Where several pairs share a slice number, a further table
    "all pairs" averages each patient over its pairs and sources, which gives the test more patients. Writes
    ``comparison.csv``, ``comparison.md`` and ``comparison.png``.

    Args:
        rows: as for `patient_table`, with ``pair, slices, source_seed``, and ``source`` where a pair is a target with
            several sources, each a training of its own. A method that does not depend on the source
            (scratch) or on the seed (zero_shot) has NaN there and each result once, so that repeats are not counted.
        output_dir: folder to write to.
        reference: the method all others are compared with.
        synthetic: the data are synthetic, which text and figure then say.
        what_next: what to type next, after a colon what for, given the method to prefer, None where there is none. The
            page says it below the verdict.

    Returns:
        One row per pair, slices and method: ``mean, sd, iou, runs, run_means, patients``, then against the reference
        ``difference, difference_low, difference_high`` (paired t interval), ``p``, ``p_holm`` (Holm over the methods of
        that pair and slice number), ``runs_ahead`` of ``runs_matched`` runs, and ``differs``: p_holm is below .05.

    Raises:
        InputError: a column is missing, the test split or the reference has no results, or patients differ between
            methods.
    """
    _require_columns(rows, ["pair", "slices", "source_seed"])
    if "test" not in set(rows["split"]):
        raise InputError(f"No results for split 'test'; found {_listed(rows['split'].unique())}.")
    rows = rows[rows["split"] == "test"]
    patients = _with_all_pairs(patient_table(rows))
    cells = {}
    for (pair, slices), of in patients.groupby(["pair", "slices"], sort=False):
        scores = _scores(of)
        if reference not in scores:
            raise InputError(
                f"Pair {pair} with {slices} slices has no results of the reference '{reference}'; "
                f"found {_listed(scores)}. Run it or choose another reference."
            )
        cells[pair, slices] = _against(of, scores, reference), scores
    table = pd.concat({cell: of for cell, (of, _) in cells.items()}, names=["pair", "slices"])
    table = table.reset_index(["pair", "slices"]).reset_index(drop=True)
    shows = "\n".join(f"- {line}" for line in _what_it_shows(cells, reference))
    verdict, preferred = _verdict(cells, reference)
    parts = ["# Methods compared", verdict, *([what_next(preferred)] if what_next else [])]
    parts += ["## What it shows", shows, _caption(rows, patients, synthetic)]
    for (pair, slices), (cell, _) in cells.items():
        parts += [f"## {pair}, {slices} slices", markdown_table(_in_words(cell, reference))]
    output_dir = Path(output_dir)
    write_csv(output_dir / "comparison.csv", table)
    write_text(output_dir / "comparison.md", "\n\n".join(parts))
    figure = plot_comparison(table, reference=reference, title="Methods compared", synthetic=synthetic)
    save_figure(figure, output_dir / "comparison.png")
    return table


def markdown_table(table: pd.DataFrame) -> str:
    """A table in Markdown: numbers with three digits after the point, nothing for NaN.

    >>> print(markdown_table(pd.DataFrame({"arm": ["full", "scratch"], "dice": [0.5, float("nan")]})))
    | arm | dice |
    | --- | --- |
    | full | 0.500 |
    | scratch |  |
    """

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.3f}"
        return str(value)

    lines = [list(table.columns), ["---"] * table.shape[1], *(map(cell, row) for row in table.itertuples(index=False))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read_columns(path: str | os.PathLike[str], columns: set[str]) -> pd.DataFrame:
    """The table of a CSV file that must have these columns."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as CSV ({str(error).strip()}).") from error
    if missing := sorted(columns - set(table)):
        raise InputError(f"{path} lacks the column(s) {_listed(missing)}.")
    return table


def _require_columns(rows: pd.DataFrame, columns: Iterable[str]) -> None:
    if missing := [column for column in columns if column not in rows]:
        raise InputError(f"The results lack the column(s) {_listed(missing)}; found {_listed(rows.columns)}.")
    if rows.empty:
        raise InputError("The results are empty; nothing to report.")


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names)) or "none"


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain Python values, NaN as null, which JSON has no word for."""
    return json.loads(table.to_json(orient="records", double_precision=10))


Scores = dict[str, pd.DataFrame]
"""Method -> Dice, a row per subject and a column per training: what of `RUN` it depends on, ANY where it does not."""
ANY = -1
PLACEBO = "placebo"
"""The method that all others are compared with once more, with other seeds: what chance alone does."""


def _scores(patients: pd.DataFrame) -> Scores:
    """Of the patients of one split, pair and slice number."""
    run = [key for key in RUN if key in patients]
    keyed = patients.assign(**{key: patients[key].astype(object).fillna(ANY) for key in run})
    by_method = keyed.groupby("method", sort=False)
    return {method: of.pivot_table("dice", "subject", run, sort=False) for method, of in by_method}


def _paired(a: pd.DataFrame, b: pd.DataFrame) -> tuple[PairedComparison, pd.Series]:
    """Two methods, training by training as far as both depend on seed and source; and the gap of each of these."""
    keys = [key for key in a.columns.names if not any(ANY in of.columns.unique(key) for of in (a, b))]
    if keys:
        a, b = (of.T.groupby(keys, sort=False).mean().T for of in (a, b))
        if len(shared := a.columns.intersection(b.columns)):
            a, b = a[shared], b[shared]
            gaps = (a - b).mean()
    if not keys or not len(shared):  # no training of one belongs to one of the other
        a, b, gaps = a.mean(axis=1).to_frame(), b.mean(axis=1).to_frame(), pd.Series(dtype=float)
    return paired_comparison(*(dict(zip(of.index, of.to_numpy().tolist(), strict=True)) for of in (a, b))), gaps


def _trainings(patients: pd.DataFrame) -> dict[str, dict[str, list[float]]]:
    """Of the patients of one split: method -> subject -> Dice of each run, those of a seed at the same place."""
    runs = patients.sort_values([name for name in RUN if name in patients], kind="stable")
    found = runs.groupby(["method", "subject"])["dice"].agg(list)
    order = patients["method"].unique()
    return {method: found[method].to_dict() for method in order}


def _empty_sentence(rows: pd.DataFrame) -> str:
    count = int(rows["empty"].eq(True).sum()) if "empty" in rows else 0
    if count == 0:
        return ""
    return f"In {count} of {len(rows)} cases a class is absent from truth and prediction; these count as Dice 1."


def _unfinished(late_gains: Mapping[str, float], margin: float) -> str:
    """Which arms a longer training may make better."""
    found = _listed(f"{arm} gained {gain:.3f}" for arm, gain in late_gains.items() if gain >= margin)
    if found == "none":
        return ""
    return f"Not trained to the end: {found} in the last two fifths of the training; compare with more --epochs."


def _check(verdict: Verdict, test: pd.DataFrame) -> str:
    """Whether the arm that validation chose also does well on the test patients."""
    means = ", ".join(f"{row.arm} {row.mean:.3f}" for row in test[["arm", "mean"]].itertuples())
    text = f"Check on {test['patients'].iloc[0]} test patients: {means}"
    chosen = test.set_index("arm").loc[verdict.default]
    if chosen["difference"] == 0:
        if test["mean"].eq(chosen["mean"]).sum() > 1:
            return f"{text}; no arm is ahead of {verdict.default} there."
        return f"{text}; {verdict.default} has the highest mean there too."
    best = test["arm"].iloc[0]
    gap, low, high = -chosen[["difference", "difference_high", "difference_low"]]
    return f"{text}; {verdict.default} is {gap:.3f} (95 % interval {low:.3f} to {high:.3f}) behind {best} there."


def _with_all_pairs(patients: pd.DataFrame) -> pd.DataFrame:
    """Add, where several pairs share a slice number, a patient's mean over pairs and their sources as one more."""
    shared = patients.groupby("slices")["pair"].nunique().loc[lambda count: count > 1].index
    keys = ["slices", "split", "method", "source_seed", "seed", "subject"]
    pooled = patients[patients["slices"].isin(shared)].groupby(keys, sort=False, dropna=False, as_index=False)
    pooled = pooled[["dice", "iou", "empty"]].mean().assign(pair=ALL_PAIRS)
    return pd.concat([patients, pooled], ignore_index=True)


def _against(patients: pd.DataFrame, scores: Scores, reference: str) -> pd.DataFrame:
    """Every method of a cell, and against the reference: over patients and trainings."""
    iou = patients.groupby("method", sort=False)["iou"].mean()
    rows = []
    for method, values in scores.items():
        means = values.mean()
        row = {"method": method, "mean": means.mean(), "sd": means.std(), "iou": iou[method], "runs": len(means)}
        row |= {"run_means": tuple(means.round(6)), "patients": len(values), "difference": 0.0}
        row |= dict.fromkeys(["difference_low", "difference_high", "p"], np.nan) | {"runs_ahead": 0, "runs_matched": 0}
        if method != reference:
            found, gaps = _paired(values, scores[reference])
            row |= {"difference": found.difference, "difference_low": found.low, "difference_high": found.high}
            row |= {"p": found.p, "runs_ahead": int((gaps > 0).sum()), "runs_matched": len(gaps)}
        rows.append(row)
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"])
    return table.assign(differs=table["p_holm"] < 0.05)


Cells = Mapping[tuple[str, Any], tuple[pd.DataFrame, Scores]]
"""(pair, slices) -> how the methods compare there, and their Dice."""


def _judged(cells: Cells) -> list[tuple[str, Any]]:
    """Those that decide: all pairs of a number of slices together, where there are several."""
    pooled = {slices for pair, slices in cells if pair == ALL_PAIRS}
    return [(pair, slices) for pair, slices in cells if pair == ALL_PAIRS or slices not in pooled]


def _verdict(cells: Cells, reference: str) -> tuple[str, str | None]:
    """One sentence, and the method that it prefers to the reference: the best one, if it differs in every cell."""
    said, firm = [], set()
    for pair, slices in _judged(cells):
        table = cells[pair, slices][0]
        best = table.loc[table["mean"].idxmax()]
        firm.add(best["method"] if best["differs"] and best["method"] != PLACEBO else None)
        ahead = f"{best['difference']:.3f}{_range(best['difference_low'], best['difference_high'])} ahead"
        what = f"{best['method']} is best, {ahead}" if best["method"] != reference else f"{reference} is best itself"
        said.append(f"{pair}, {slices} slices: {what}")
    method = firm.pop() if len(firm) == 1 else None
    first = f"No evidence to prefer one method to {reference}" if method is None else f"Prefer {method} to {reference}"
    return f"{first}, by mean Dice of test patients ({'; '.join(said)}).", method


def _what_it_shows(cells: Cells, reference: str) -> list[str]:
    """Sentences drawn from the numbers: what beats what over all pairs, and in which pairs not to transfer."""
    lines, alone, judged = [], [], _judged(cells)
    for (pair, slices), (table, scores) in cells.items():
        where = f"{pair}, {slices} slices: "
        if (pair, slices) in judged:
            lines += [where + line for line in (_against_reference(table, reference), *_against_controls(scores))]
        alone += [where + line for line in _scratch(scores)]
    return lines + alone


def _against_reference(cell: pd.DataFrame, reference: str) -> str:
    found = [row for row in cell.itertuples() if row.differs]
    better, worse = (
        _listed(f"{row.method} ({row.difference:+.3f})" for row in found if row.difference * sign > 0)
        for sign in (1, -1)
    )
    return f"better than {reference} (corrected p < .05): {better}; worse: {worse}."


def _against_controls(scores: Scores) -> list[str]:
    """Each risk map against the weightings that never saw the source, by paired t intervals."""
    controls = [method for method in scores if method_group(method) == "control"]
    lines = []
    for method in (name for name in scores if name.startswith("risk_map") and controls):
        found = {control: _paired(scores[method], scores[control])[0] for control in controls}
        gaps = [f"{control} {c.difference:+.3f}{_range(c.low, c.high)}" for control, c in found.items()]
        beats = all(comparison.low > 0 for comparison in found.values()) and len(scores[method]) >= MINIMUM_PATIENTS
        end = "it beats all of them" if beats else "no evidence that knowing the source adds to the best of them"
        lines.append(f"{method} against the controls that never saw the source: {', '.join(gaps)}; {end}.")
    return lines


def _scratch(scores: Scores) -> list[str]:
    """Whether training from scratch has the highest mean of all, and is clear of the runner-up."""
    means = {method: values.mean().mean() for method, values in scores.items()}
    first, *others = sorted(means, key=means.__getitem__, reverse=True)
    if first != "scratch" or not others:
        return []
    gap, _ = _paired(scores["scratch"], scores[others[0]])
    figures = f"ahead of {others[0]} by {gap.difference:.3f}{_range(gap.low, gap.high)}"
    if gap.low > 0 and len(scores["scratch"]) >= MINIMUM_PATIENTS:
        return [f"training from scratch is best, {figures}: do not transfer this source with these methods."]
    return [f"training from scratch has the highest mean, {figures}, which does not settle it."]


def _caption(rows: pd.DataFrame, patients: pd.DataFrame, synthetic: bool) -> str:
    seeds, sources = (_listed(sorted(patients[k].dropna().convert_dtypes().unique())) for k in ("seed", "source_seed"))
    of_each = f" of {patients['source'].nunique()} sources" if "source" in patients else ""
    sentences = [
        f"Dice averaged over classes and test patients: mean ± standard deviation over runs (seeds {seeds}; source "
        f"checkpoints {sources}{of_each}). Difference: paired over {patients['subject'].nunique()} patients in all and "
        "over the runs, with its 95 % t interval and p, Holm-corrected within a table: about further patients and "
        "trainings, or, of a single run, about further patients for these networks. Controls weight pixels without "
        "having seen the source.",
        _empty_sentence(rows),
        "All data are synthetic (brain phantom)." if synthetic else "",
    ]
    return " ".join(filter(None, sentences))


def _range(low: float, high: float) -> str:
    """A 95 % interval in brackets; one patient has none."""
    return "" if np.isnan(low) else f" ({low:+.3f} to {high:+.3f})"


def _in_words(cell: pd.DataFrame, reference: str) -> pd.DataFrame:
    """The table of one pair and number of slices as it is printed."""
    rows = []
    for row in cell.itertuples():
        dice = f"{row.mean:.3f}" + (f" ± {row.sd:.3f}" if np.isfinite(row.sd) else "")
        compared = {
            f"difference to {reference}": f"{row.difference:+.3f}{_range(row.difference_low, row.difference_high)}",
            "runs ahead": f"{row.runs_ahead} of {row.runs_matched}",
            "p (Holm)": f"{row.p_holm:.3f}" if row.p_holm >= 0.001 else "< 0.001",
        }
        if row.method == reference:
            compared = dict.fromkeys(compared, "") | {f"difference to {reference}": "reference"}
        shown = {"method": row.method, "kind": method_group(row.method)}
        shown["Dice"] = f"**{dice}**" if row.mean == cell["mean"].max() else dice
        rows.append(shown | compared | {"patients": row.patients})
    return pd.DataFrame(rows)
