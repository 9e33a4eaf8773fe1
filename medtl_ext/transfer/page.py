"""One page of a finished run to look at and to send: ``report.html``, made from what the run left in its own folder."""

import base64
import json
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai
import numpy as np
import pandas as pd
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt

from medtl_ext import __version__
from medtl_ext._io import write_text
from medtl_ext._validation import InputError
from medtl_ext.ranking import bootstrap_interval, listed
from medtl_ext.transfer.config import on_command_line
from medtl_ext.transfer.jobs import Run, read_table, run_command, shell_word, short_path
from medtl_ext.transfer.tasks import PROBABILITIES, auc_interval, image_auc

CAPTIONS = {
    "agreement": "What each ranking was worth",
    "audit": "Transfer audit: the score of every patient and arm, and the differences that decide",
    "critical_difference": "Average ranks; what a bar joins cannot be told apart",
    "images": "Every test image, the most wrong first: the probability of its class",
    "maps": "Where transfer is hard",
    "metrics": "Every patient and class",
    "overlay": "Patients the network never saw: truth and segmentations",
    "priors": "Similarity known beforehand against the score after fine-tuning",
    "ranking": "The candidate sources, best first",
    "truth": "Every source after fine-tuning, with all scores",
}
"""Stem of a file -> what is written above it; other files are called by their name."""
LONG, MOST = 12, 300
"""Rows from which a table is folded, and rows of it that are shown."""


@dataclass(kw_only=True, eq=False)
class Report:
    """A step that writes ``report.html``: the verdict of a finished run, what to do next, patients to scroll through,
    figures, tables that sort, and how it was made.

    Everything is read from the run's own folder (not from folders in it): texts (``answer.txt``, ``audit.json`` and
    other JSON with a ``text``, Markdown pages), volumes of ``viewer.json`` and images of ``pictures.json``, PNG figures
    or the SVG beside them, whose marks say their values, CSV tables, ``config.json``. A CSV beside a Markdown page of
    its name is left out, for the page holds its tables. The page needs no other file and no network.

    Args:
        here: whose folder it is of; without figures there is no report.
        title, question: heading of the page, and the question that the run answers.
        synthetic: the data are synthetic, which the page then says before anything else.

    >>> import tempfile
    >>> from types import SimpleNamespace
    >>> here = SimpleNamespace(folder=Path(tempfile.mkdtemp()), config={}, figures=True, leads=True)
    >>> _ = (here.folder / "answer.txt").write_text("Use <14-T2-ED>.")
    >>> Report(here=here, title="Source selection", question="Which source?", synthetic=True).write()
    >>> "Use &lt;14-T2-ED&gt;." in (here.folder / "report.html").read_text()
    True
    """

    here: Run
    title: str
    question: str
    synthetic: bool

    def write(self) -> None:
        """Write the page, in the first of several processes.

        Raises:
            InputError: there is nothing to report in the folder.
        """
        if not (self.here.figures and self.here.leads):
            return
        folder = self.here.folder
        lead, verdict, details = texts_of(folder)
        verdict, steps = _commands(verdict)
        shown = {name: file for name in ("viewer", "pictures") if (file := folder / f"{name}.json").is_file()}
        if {**self.here.config.get("settings", {}), **self.here.config}.get("score_space") == "training":
            verdict += "\n\nScores are measured on the training grid, not in the patients' own space."
        images = sorted(folder.glob("*.png"))
        tables = [t for p in sorted(folder.glob("*.csv")) if not p.with_suffix(".md").is_file() for t in _tables(p)]
        if not (lead or verdict or details or images or tables):
            raise InputError(f"{folder} holds no text, table or figure to report; give the folder of a finished run.")
        page = render(
            "report.html.jinja",
            title=self.title,
            question=self.question,
            synthetic=self.synthetic,
            lead=lead,
            verdict=verdict,
            steps=[*steps, *_after_audit(folder), *_after_training(folder)],
            shown={name: json.loads(file.read_text(encoding="utf-8")) for name, file in shown.items()},
            details=details,
            figures=[(path.name, _caption(path), *_drawn(path)) for path in images],
            tables=tables,
            command=_command(folder),
            options=_options(self.here.config),
            versions=f"medtl {__version__}, monai {monai.__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}",
            files=sorted(
                path.name + "/" * path.is_dir() for path in folder.glob("[!.]*") if path.name != "report.html"
            ),
        )
        write_text(folder / "report.html", page)


def render(template: str, **content: Any) -> str:
    """A page from one of the templates beside this file; what comes from data is escaped."""
    files = FileSystemLoader(Path(__file__).parent)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, loader=files)
    environment.filters |= {"number": _is_number, "markdown": _html}
    return environment.get_template(template).render(**content)


def _html(text: str, level: int = 3) -> str:
    """Markdown as our reports are written in it, headings of one level; HTML in it is escaped, a command is code."""
    text = re.sub(r"^(python -m .*)$", r"\n~~~\n\1\n~~~\n", text, flags=re.MULTILINE)
    text = re.sub(r"^#+ ", "#" * level + " ", text, flags=re.MULTILINE)
    rules = ["heading", "list", "table", "fence", "emphasis", "balance_pairs", "fragments_join"]
    page = MarkdownIt("zero").enable(rules, ignoreInvalid=True).render(text)
    page = re.sub(r"<td>(?=[^<]{40})", '<td class="long">', page)
    page = page.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")
    return page.replace("<th></th>", "<td></td>").replace("<th>", '<th scope="col">')


def texts_of(folder: Path) -> tuple[str, str, str]:
    """All texts in Markdown: the sentence that decides, what else they conclude, and, from a table on, the rest.

    An answer is read before an audit, which it may quote, and other texts after both; but what fine-tuning every source
    has shown (``agreement.md``) is read before what a ranking foretold.
    """
    said = [path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))]
    answers = said[: (folder / "answer.txt").is_file()]
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        text = content.get("text") if isinstance(content, dict) and path.name != "config.json" else None
        if isinstance(text, str) and not any(text in other for other in answers):
            answers.append(text)
    answer = "\n\n".join([*(answers or _scored(folder)), *(text for text in said if text not in answers)])
    details = ""
    for path in sorted(folder.glob("*.md")):
        blocks = re.split(r"\n\s*\n", path.read_text(encoding="utf-8").strip())
        blocks = blocks[blocks[0].startswith("# ") :]  # the page has a title
        table = next((place for place, block in enumerate(blocks) if block.startswith("|")), len(blocks))
        # A table belongs to the heading above it, or to the line that leads to it.
        above = [place for place in range(table) if blocks[place].startswith("#")]
        cut = table if table == len(blocks) else (above or [max(table - 1, 0)])[-1]
        said, shown = "\n\n".join(blocks[:cut]), path.stem == "agreement"
        answer = f"{said}\n\n{answer}" if shown else f"{answer}\n\n{said}"
        details += "\n\n" + "\n\n".join(blocks[cut:])
    answer = answer.strip()
    lead = re.match(r"[^#|*\n-].*?[.?!](?=\s|$)", answer)
    return lead[0] if lead else "", answer[lead.end() if lead else 0 :].strip(), details.strip()


def _scored(folder: Path) -> list[str]:
    """How good a network is on the test patients, where that is all that a run says."""
    classifies = (folder / "predictions.csv").is_file()
    file = folder / ("predictions.csv" if classifies else "metrics.csv")
    table = read_table(file) if file.is_file() else pd.DataFrame({"split": []})
    table = table[table["split"] == "test"] if "split" in table else table[:0]
    if not len(table) or not {"dice", "label"} & set(table):
        return []
    if classifies:
        what, score, (low, high), count = "AUC", image_auc(table), auc_interval(table), len(table)
    else:
        dice = table.groupby("patient" if "patient" in table else "subject")["dice"].mean()
        what, score, (low, high), count = "Mean Dice", dice.mean(), bootstrap_interval(dice), len(dice)
    sure = "" if np.isnan(low) else f" (95 % interval {low:.3f} to {high:.3f})"
    return [f"{what} {score:.3f}{sure} on {count} test {'image' if classifies else 'patient'}{'s' * (count > 1)}."]


def _commands(verdict: str) -> tuple[str, list[tuple[str, str]]]:
    """What is said without the commands in it, and these with what they are for."""
    found = r"(?:^|\n)([^\n]+:)\n(python -m [^\n]+)"
    return re.sub(found, "", verdict).strip(), re.findall(found, verdict)


def _after_audit(folder: Path) -> list[tuple[str, str]]:
    """What to do after an audit: use the network that it advises; where it could not decide, what would help."""
    audit, record = folder / "audit.json", (folder / "config.json").resolve()
    if not (audit.is_file() and record.is_file()):
        return []
    found, config = (json.loads(path.read_text(encoding="utf-8")) for path in (audit, record))
    arm, inference = found["default"], Path(config["bundle_root"]) / "configs" / "inference.json"
    places = [folder / "arms" / arm, folder]  # an audit leaves the network that it advises in its own folder
    model = next((place / "model.pt" for place in places if (place / "model.pt").is_file()), None)
    steps = []
    if model is not None and inference.is_file():
        options: dict[str, Any] = {"ckpt": str(short_path(model)), "task": config["target_task"]}
        options |= {"input_dir": "FOLDER_OF_IMAGES", "output_dir": "FOLDER_OF_SEGMENTATIONS"}
        classes = read_table(model.with_name("metrics.csv"))["class"].nunique()
        options |= {"n_classes": classes + 1} if classes > 1 else {}
        carried = {name: config.get(name) for name in ("trust_sources", "clean")}
        options |= {name: value for name, value in carried.items() if value not in (None, False, "validation")}
        options |= _changed_network(config, json.loads(inference.read_text(encoding="utf-8")))
        guess = "" if found["recommendation"] else ", the best guess"
        steps.append((f"Segment images of yours with {arm}{guess}:", run_command([inference], options)))
    if found["recommendation"] is None:
        more = {"audit#seeds": config["audit"]["seeds"] + 2} if "audit" in config else {"seed": config["seed"] + 1}
        apart = listed(found["tied"]) or "the arms"
        why = f"To tell {apart} apart: label more patients, or train more than once:"
        steps.append((why, run_command([record], more | {"output_dir": "more_trainings"})))
    return steps


def _after_training(folder: Path) -> list[tuple[str, str]]:
    """How to classify with the bundle's own network that a run has trained."""
    record, model = (folder / "config.json").resolve(), folder / "model.pt"
    if not (record.is_file() and (folder / "predictions.csv").is_file() and not model.with_suffix(".json").is_file()):
        return []
    config = json.loads(record.read_text(encoding="utf-8"))
    inference = Path(config["bundle_root"]) / "configs" / "inference.json"
    default = json.loads(inference.read_text(encoding="utf-8"))
    classes = read_table(folder / "predictions.csv").filter(regex=PROBABILITIES).shape[1]
    options: dict[str, Any] = {"ckpt": str(short_path(model)), "n_classes": classes, "input_dir": "FOLDER_OF_IMAGES"}
    options |= {name: config[name] for name in ("in_channels", "image_size") if config[name] != default[name]}
    options |= _changed_network(config, default) | {"output_dir": "FOLDER_OF_PROBABILITIES"}
    return [("Classify images of yours:", run_command([inference], options))]


def _changed_network(config: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    network = default["network_def"]
    return {f"network_def#{k}": v for k, v in config["network_def"].items() if network.get(k) != v}


def _tables(path: Path) -> list[dict[str, Any]]:
    """A CSV file as a table, and above scores per patient their mean; of a page's width."""
    table = read_table(path)
    scores = [name for name in ("dice", "iou", "hd95_mm", "lesion_recall") if name in table]
    tables = [_table(path, table.drop(columns=["assd_mm", "lesion_precision"], errors="ignore"), _caption(path))]
    if {"split", "subject", "class"} <= set(table) and scores:
        who = "patient" if "patient" in table else "subject"
        of = [name for name in ("method", "split", "class") if name in table]
        of_scans = table.groupby([*of, who], sort=False)[scores].mean().reset_index()
        groups = of_scans.groupby(of, sort=False)
        means = groups.agg(patients=(who, "nunique"), **{name: (name, "mean") for name in scores})
        means = means.join(groups[scores].std().add_suffix(" sd")).reset_index()
        tables.insert(0, _table(path, means, "Mean over patients"))
    return tables


def _table(path: Path, table: pd.DataFrame, caption: str) -> dict[str, Any]:
    table = table.dropna(axis=1, how="all")
    grid = [[str(name).replace("_", " "), *_rounded(table[name].head(MOST))] for name in table]
    side = table.shape[1] > LONG >= len(table)  # what is wide and short is shown on its side
    if not side:
        grid = list(zip(*grid, strict=True))
    shown = {
        "columns": grid[0],
        "rows": grid[1:],
        "side": side,
        "open": len(table) <= LONG,
        "hidden": max(len(table) - MOST, 0),
    }
    return shown | {"caption": caption, "source": path.name}


def _rounded(column: pd.Series) -> list[str]:
    """Three decimals, none in a column of whole numbers, two digits of what three decimals would show as zero."""
    if not pd.api.types.is_float_dtype(column):
        return ["" if pd.isna(value) else str(value) for value in column]
    whole = (column.dropna() % 1 == 0).all() and column.max() > 1
    tiny = (column.abs() < 5e-4) & (column != 0)
    formats = np.where(tiny, ".1e", ".0f" if whole else ".3f")
    return ["" if pd.isna(value) else f"{value:{how}}" for value, how in zip(column, formats, strict=True)]


def _is_number(text: str) -> bool:
    return re.match(r"[*<\s]*[-+]?\.?\d[\d.]*(e[-+]\d+)?[*]*(\s*[±(].*)?$", text) is not None


def _drawn(path: Path) -> tuple[str, str]:
    """The SVG beside a PNG, or else the PNG in base64, and an empty text for the other."""
    drawn = path.with_suffix(".svg")
    if drawn.is_file():
        return drawn.read_text(encoding="utf-8"), ""
    return "", base64.b64encode(path.read_bytes()).decode()


def _caption(path: Path) -> str:
    return CAPTIONS.get(path.stem, path.stem.replace("_", " ").capitalize())


def _options(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options and their plain values."""
    steps = ("imports", "initialize", "run", "finalize")
    values = {name: value for name, value in config.items() if value is not None and name not in steps}
    texts = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in values.items()]
    return [(name, text) for name, text in texts if not re.search(r'^[$@]|"[$@]|"_target_"', text) and name[0] != "_"]


def _command(folder: Path) -> str | None:
    """What to type to do the run again, into another folder; or what was typed."""
    record = (folder / "config.json").resolve()
    if record.is_file():
        return run_command([record], {"output_dir": "again"})
    return " ".join(["python -m monai.bundle", *map(shell_word, sys.argv[1:])]) if on_command_line() else None
