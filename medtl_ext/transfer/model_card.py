"""The model card of the network that an audit advises: its training data, its scores, and what it is not for."""

import re

import pandas as pd

from medtl_ext import __version__
from medtl_ext._io import write_text
from medtl_ext.data import load_collection
from medtl_ext.ranking import Verdict
from medtl_ext.transfer.jobs import Run, read_table
from medtl_ext.transfer.report import markdown_table
from medtl_ext.transfer.sources.pool import SingleSource, source_collection
from medtl_ext.transfer.tasks import SegmentationTask, patients_of

NOT_FOR = """\
- Decisions about a patient: it is a result of research on few patients, not a medical device.
- Images of another modality, institution or question than in its training: its scores do not apply to them.
- Uses that the licences above do not allow: weights are derived from the training images."""
SYNTHETIC = "- Anything but trying the software: no patient was scanned, the images are synthetic."


def write_model_card(here: Run, target: SegmentationTask, source: SingleSource, verdict: Verdict, *, seed: int) -> None:
    """Write ``MODEL_CARD.md`` beside the weights that an audit advises.

    Args:
        here: the run; its ``audit.csv`` has the scores.
        target, source: the target task, and the source of the training.
        verdict: of the audit.
        seed: of the chosen training.
    """
    arm, collection = verdict.default, target.collection
    sentences = re.split(r"(?<=\.) ", verdict.text)
    facts = {
        "finds": f"{', '.join(target.class_names)} in {', '.join(target.channels)} of institution {target.institution}",
        "advice": next((said for said in sentences if "best guess" in said), sentences[0]),
        "arm": f"{arm}, seed {seed}, with medtl {__version__}",
        "trained on": "nobody: it is the source as it is",
        "images": "synthetic, of no patient" if target.synthetic else "of patients",
    }
    if folds := [said for said in sentences if said.startswith("Cross-validation")]:
        facts["split val"] = folds[0]
    if arm != "zero_shot":
        learnt = {split: len(patients_of(target.datalist(split))) for split in target.splits}
        of = _licensed(collection.name, collection.license)
        facts["trained on"] = f"{learnt['train']} patients of {of}, {learnt.get('val', 0)} more to choose by"
    if arm != "scratch" and (given := source.given) is not None:
        known, licence = [given.name, given.card.description, given.card.trained_on], given.card.licence
        if given.kind == "task":
            where = source_collection(here.config)
            of = collection if where is None else load_collection(where)
            known, licence = [*known, f"trained on this task of {of.name}"], of.license
        facts["source"] = _licensed("; ".join(filter(None, known)), licence)
        if source.card is not None and not (here.folder / "model.json").is_file():
            facts["to use it"] = "use the source itself: the weights alone do not say how its network is built"
    scores = read_table(here.folder / "audit.csv").query("arm == @arm")
    scores = scores[["split", "patients", "trainings", "mean", "low", "high"]]
    parts = [f"# Model card of model.pt: {target.name}", "## The network"]
    facts = {name: " ".join(text.split()).replace("|", "/") for name, text in facts.items()}  # some texts are foreign
    parts += [markdown_table(pd.DataFrame(facts.items(), columns=["", ""]))]
    parts += ["## Dice of the arm, with 95 % intervals", markdown_table(scores), "## Not for"]
    parts += [NOT_FOR + f"\n{SYNTHETIC}" * target.synthetic]
    write_text(here.folder / "MODEL_CARD.md", "\n\n".join(parts))


def _licensed(what: str, licence: str | None) -> str:
    return f"{what} (licence: {licence or 'not said'})"
