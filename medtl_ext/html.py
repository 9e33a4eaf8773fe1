"""One page of a finished run to look at and to send: ``report.html``, made from what the run left in its own folder."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import monai
import numpy as np
import pandas as pd
import torch
from jinja2 import Environment, StrictUndefined

from medtl_ext import __version__
from medtl_ext._io import atomic_path
from medtl_ext._validation import InputError
from medtl_ext.bundle import current_config, run_command, shell_word

__all__ = ["html_report"]

CAPTIONS = {
    "agreement": "What each ranking was worth",
    "audit": "Transfer audit: the score of every patient and arm, and the differences that decide",
    "critical_difference": "Average ranks; what a bar joins cannot be told apart",
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

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5d6670; --line: #d9dde1; --paper: #fff; --tint: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa4ae; --line: #3a4147; --paper: #16191c; --tint: #20252a; } }
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; line-height: 1.25; } h2 { margin: 2.2rem 0 .6rem; } h3 { margin: 1.2rem 0 .3rem; }
.question, .small, figcaption { color: var(--soft); } .small { font-size: .85rem; }
.verdict { padding: .3rem 1.1rem; border-left: .3rem solid #0072b2; background: var(--tint); }
.synthetic { padding: .5rem 1.1rem; border: 2px solid #d55e00; }
figure { margin: 1.4rem 0; } figure img { max-width: 100%; height: auto; background: #fff; }
.scroll { overflow-x: auto; } summary { cursor: pointer; padding: .4rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--tint); } th, td { white-space: nowrap; } td.number { text-align: right; }
td.long { min-width: 9rem; max-width: 24rem; white-space: normal; overflow-wrap: anywhere; }
tr > :first-child { position: sticky; left: 0; background: var(--tint); }
pre { padding: .7rem; background: var(--tint); white-space: pre-wrap; font-size: .85rem; }
@media print { :root { --ink: #000; --soft: #444; --paper: #fff; --tint: #f3f5f7; } body { max-width: none; }
  figure, tr { break-inside: avoid; } .scroll { overflow: visible; } table { font-size: .6rem; } }
</style>
</head>
<body>
{% macro inline(text) %}{% for part in text | parts %}
{% if loop.index0 is odd %}<strong>{{ part }}</strong>{% else %}{{ part }}{% endif %}{% endfor %}{% endmacro %}
{% macro grid(columns, rows) %}<div class="scroll"><table>
<thead><tr>{% for name in columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}
<td class="{{ "number" if cell | number else "long" if cell | length > 24 }}">{{ inline(cell) }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endmacro %}
{% macro show(blocks) %}{% for kind, content in blocks %}
{% if kind == "heading" %}<h3>{{ inline(content) }}</h3>
{% elif kind == "list" %}<ul>{% for item in content %}<li>{{ inline(item) }}</li>{% endfor %}</ul>
{% elif kind == "table" %}{{ grid(content[0], content[1:]) }}
{% elif kind == "command" %}<pre><code>{{ content }}</code></pre>
{% else %}<p>{{ inline(content) }}</p>{% endif %}{% endfor %}{% endmacro %}
<header><h1>{{ title }}</h1><p class="question">{{ question }}</p></header>
<main>
{% if synthetic %}<p class="synthetic"><strong>Synthetic data.</strong> Everything on this page was computed from
synthetic images; it says nothing about a clinic.</p>{% endif %}
{% if verdict %}<section class="verdict">{{ show(verdict) }}</section>{% endif %}
{% if figures %}<h2>Figures</h2>{% for name, caption, data in figures %}
<figure><img src="data:image/png;base64,{{ data }}" alt="{{ caption }}">
<figcaption>{{ caption }} ({{ name }})</figcaption></figure>{% endfor %}{% endif %}
{% if details or tables %}<h2>Tables</h2>{{ show(details) }}{% for table in tables %}
<details{% if table.open %} open{% endif %}><summary><strong>{{ table.caption }}</strong>
<span class="small">({{ table.source }})</span></summary>
{{ grid(table.columns, table.rows) }}
{% if table.hidden %}<p class="small">{{ table.hidden }} more rows are in {{ table.source }}.</p>{% endif %}
</details>{% endfor %}{% endif %}
<h2>How it was made</h2>
{% if command %}<p>To do it again:</p><pre><code>{{ command }}</code></pre>{% endif %}
{% if options %}<details><summary>Options</summary>{{ grid(["option", "value"], options) }}</details>{% endif %}
<p class="small">{{ versions }}. In the folder of this run: {{ files | join(", ") }}.</p>
</main>
</body>
</html>
"""


def html_report(output_dir: str | os.PathLike[str], *, title: str, question: str, synthetic: bool) -> Path:
    """Write ``report.html``: the verdict of a finished run, its figures, its tables, and how it was made.

    Everything is read from the run's own folder (not from folders in it): texts (``answer.txt``, ``audit.json`` and
    other JSON with a ``text``, Markdown pages), PNG figures, CSV tables, ``config.json``. A CSV beside a Markdown page
    of its name is left out, for the page holds its tables. The page needs no other file and no network.

    Args:
        output_dir: folder of the run.
        title, question: heading of the page, and the question that the run answers.
        synthetic: the data are synthetic, which the page then says before anything else.

    Returns:
        Path of the page.

    Raises:
        InputError: there is nothing to report in the folder.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "answer.txt").write_text("Use <14-T2-ED>.")
    >>> page = html_report(folder, title="Source selection", question="Which source?", synthetic=True)
    >>> "Use &lt;14-T2-ED&gt;." in page.read_text()
    True
    """
    folder = Path(output_dir)
    verdict, details = _texts(folder)
    figures = [(p.name, _caption(p), base64.b64encode(p.read_bytes()).decode()) for p in sorted(folder.glob("*.png"))]
    tables = [t for p in sorted(folder.glob("*.csv")) if not p.with_suffix(".md").is_file() for t in _tables(p)]
    if not (verdict or details or figures or tables):
        raise InputError(f"{folder} holds no text, table or figure to report; give the folder of a finished run.")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"parts": lambda text: re.split(r"\*\*(.+?)\*\*", text), "number": _is_number}
    page = environment.from_string(_PAGE).render(
        title=title,
        question=question,
        synthetic=synthetic,
        verdict=verdict,
        details=details,
        figures=figures,
        tables=tables,
        command=_command(folder),
        options=_options(folder),
        versions=f"medtl {__version__}, monai {monai.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        files=sorted(path.name + "/" * path.is_dir() for path in folder.glob("[!.]*") if path.name != "report.html"),
    )
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "report.html"


def _texts(folder: Path) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """The blocks of all texts: what they conclude, and, from a page's first table on, the rest."""
    details: list[tuple[str, Any]] = []
    said = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        text = content.get("text") if isinstance(content, dict) and path.name != "config.json" else None
        if isinstance(text, str) and text not in said:  # an answer may quote the audit
            said += f"\n\n{text}"
    verdict = _blocks(said)
    for path in sorted(folder.glob("*.md")):
        blocks = _blocks(path.read_text(encoding="utf-8"))
        kinds = [kind for kind, _ in blocks]
        first = kinds.index("table") if "table" in kinds else len(blocks)
        # A table belongs to the heading above it, or to the line that leads to it.
        above = [place for place in range(1, first) if kinds[place] == "heading"]
        cut = first if first == len(blocks) else (above or [max(first - 1, 0)])[-1]
        verdict += [block for place, block in enumerate(blocks[:cut]) if place or block[0] != "heading"]
        details += blocks[cut:]
    return verdict, details


def _blocks(text: str) -> list[tuple[str, Any]]:
    """Headings, lists, tables, commands and paragraphs of the Markdown that our reports are written in."""
    blocks: list[tuple[str, Any]] = []
    for block in re.split(r"\n\s*\n|\n(?=python -m )", text.strip()):
        lines = block.strip().splitlines()
        if block.startswith("#"):
            blocks.append(("heading", block.lstrip("# ")))
        elif block.startswith("- "):
            items = [line.removeprefix("- ") for line in lines]
            if blocks and blocks[-1][0] == "list":
                blocks[-1][1].extend(items)
            else:
                blocks.append(("list", items))
        elif block.startswith("|"):
            rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]
            blocks.append(("table", [rows[0], *rows[2:]]))
        elif block:
            blocks.append(("command" if block.startswith("python -m ") else "paragraph", block))
    return blocks


def _tables(path: Path) -> list[dict[str, Any]]:
    """A CSV file as a table, and above scores per patient their mean."""
    table = pd.read_csv(path, dtype={"subject": str, "patient": str})  # a patient 007 is not 7
    tables = [_table(path, table, _caption(path))]
    scores = [name for name in ("dice", "iou") if name in table]
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
    if table.shape[1] <= LONG or len(table) > LONG:  # what is wide and short is shown on its side
        grid = list(zip(*grid, strict=True))
    shown = {"columns": grid[0], "rows": grid[1:], "open": len(table) <= LONG, "hidden": max(len(table) - MOST, 0)}
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


def _caption(path: Path) -> str:
    return CAPTIONS.get(path.stem, path.stem.replace("_", " ").capitalize())


def _options(folder: Path) -> list[tuple[str, str]]:
    """Options and their plain values, of the config that the run left or, if it left none, that is being evaluated."""
    record = folder / "config.json"
    try:
        config = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else current_config()
    except InputError:  # called by hand
        return []
    steps = ("imports", "initialize", "run", "finalize")
    values = {name: value for name, value in config.items() if value is not None and name not in steps}
    texts = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in values.items()]
    return [(name, text) for name, text in texts if not re.search(r'^[$@]|"[$@]|"_target_"', text) and name[0] != "_"]


def _command(folder: Path) -> str | None:
    """What to type to do the run again, into another folder; or what was typed."""
    record = (folder / "config.json").resolve()
    if record.is_file():
        return run_command([record], {"output_dir": "again"})
    program = getattr(sys.modules["__main__"], "__spec__", None)
    if program is None or program.name != "monai.bundle.__main__":
        return None
    return " ".join(["python -m monai.bundle", *map(shell_word, sys.argv[1:])])
