"""One page over many runs: ``python -m medtl_ext.report FOLDER`` writes ``index.html`` there; the same in MLflow."""

import argparse
import html
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ignite.engine import Engine
from monai.handlers import MLFlowHandler

from medtl_ext._io import write_text
from medtl_ext._validation import InputError
from medtl_ext.transfer.jobs import MINUTES, read_table
from medtl_ext.transfer.page import render, texts_of

MADE_HERE = '<meta name="generator" content="medtl_ext.report">'
RECORDS = ("config.json", "settings.json")
NUMBERS = ("test Dice", "test AUC", "minutes")


def write_index(folder: str | os.PathLike[str]) -> Path:
    """Write a table of all runs below a folder: what was asked, what was advised, and what won on the test patients.

    Beside it the minutes that it took, and when it began. All is read from what the runs left; of one that has not
    ended there is less. Runs that are part of another, such as the arms of an audit, are not listed by themselves.

    Raises:
        InputError: there are no runs, or the folder has an ``index.html`` of somebody else.
    """
    top, page = Path(folder), Path(folder) / "index.html"
    if page.is_file() and MADE_HERE not in page.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{page} is no index of runs, and is not replaced; move it away, or give another folder.")
    rows = [row_of(run, top) for run in sorted(_runs(top))]
    if not rows:
        raise InputError(f"no run in or below {top}: none has a {' or '.join(RECORDS)}; give what --output_dir named.")
    columns = [name for name in list(rows[0])[1:] if any(row[name] for row in rows)]
    write_text(page, render("index.html.jinja", rows=rows, columns=columns, numbers=NUMBERS, made_here=MADE_HERE))
    return page


def _runs(top: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(top):
        if {*RECORDS} & {*files}:
            yield Path(folder)
            inside.clear()  # parts of this run


def row_of(run: Path, top: Path) -> dict[str, str]:
    """What the index says of a run, by column; ``link`` leads to its report, else to its folder."""
    record = next(run / name for name in RECORDS if (run / name).is_file())
    config, report = _content(record), run / "report.html"
    page = report.read_text(encoding="utf-8") if report.is_file() else ""
    asked = [html.unescape(one) for one in re.findall(r'(?:<title>|<p class="question">)(.*?)</', page)]
    try:
        advised = texts_of(run)[0]
    except ValueError:  # a file that was cut off
        advised = ""
    best, minutes = _best(run), run / MINUTES
    return {
        "link": (report if page else run).relative_to(top).as_posix(),
        "run": run.relative_to(top).as_posix(),
        "asked": ". ".join(asked),
        "bundle": Path(config.get("bundle_root", "")).name,
        "target": str(config.get("target_task", "")),
        "advised": advised if page or advised else "no report",
        **dict.fromkeys(("best on test", *NUMBERS), ""),
        **best,
        "minutes": minutes.read_text(encoding="utf-8") if minutes.is_file() else "",
        "begun": datetime.fromtimestamp(record.stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
    }


def _best(run: Path) -> dict[str, str]:
    """The arm, source or method with the highest mean over the test patients or images, and that mean."""
    if arms := _content(run / "audit.json").get("tables", {}).get("test"):
        return {"best on test": arms[0]["arm"], "test Dice": f"{arms[0]['mean']:.3f}"}
    for name in ("truth.csv", "metrics.csv"):
        table = read_table(run / name) if (run / name).is_file() else None
        outcome = None if table is None else next((one for one in ("dice", "auc") if one in table), None)
        if outcome:
            means = table[table.get("split", "test") == "test"] if "split" in table else table
            means = means.groupby(table.columns[0])[outcome].mean()
            unit = "test Dice" if outcome == "dice" else "test AUC"
            return {"best on test": means.idxmax(), unit: f"{means.max():.3f}"} if len(means) else {}
    return {}


def track(folder: str | os.PathLike[str], **where: Any) -> None:
    """Log what the index says of a run to MLflow, and its report, as the last step of a config; see ``mlflow.json``.

    The run of that name that is open there, as a training leaves it, gets them and is closed; else there is a new one.

    Args:
        folder: of the run.
        where: ``tracking_uri, experiment_name, run_name`` of MONAI's `MLFlowHandler`.
    """
    run = Path(folder).resolve()
    row = row_of(run, run.parent) | {"link": str(run)}
    said = {name: value for name, value in row.items() if value and name not in NUMBERS}
    handler = MLFlowHandler(**where, experiment_param=said, artifacts=str(run / "report.html"))
    handler.default_tracking_params = []  # epochs, of which nothing is known here
    end = Engine(lambda *_: None)
    end.state.metrics = {name: float(row[name]) for name in NUMBERS if row[name]}
    handler.start(end)
    handler.epoch_completed(end)
    handler.complete()
    handler.close()


def _content(path: Path) -> dict[str, Any]:
    """Of a JSON file, nothing where it is missing or cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; bad input is printed as one line."""
    parser = argparse.ArgumentParser(prog="python -m medtl_ext.report", description="Write one page over many runs.")
    parser.add_argument("folder", metavar="FOLDER", help="in or below which the runs are; it gets index.html")
    try:
        print("index written to", write_index(parser.parse_args(arguments).folder))
    except (InputError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
