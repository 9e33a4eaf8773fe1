"""The one flow of all bundles: task, sources, scores, ranking with a verdict, arms, audit, truth, study, report.

- `config`, `jobs`: whose folder it is, runs of a config through joblib, the `Run` that every step knows.
- `tasks`: what is asked, for segmentation and for classification.
- `sources`, `scores`: networks to transfer from, and transferability scores from one pass of each.
- `rank`: the ranking and its verdict. `arms`: ways to use the labels, and the audit that compares them.
- `truth`, `study`: every source fine-tuned, and what the rankings were worth, on one target and on several.
- `evaluate`: steps around a training. `report`, `pictures`, `page`: tables and figures of a run, its test patients, and
  ``report.html``.
"""

from medtl_ext.transfer.arms import TransferAudit
from medtl_ext.transfer.config import bundle_root, start
from medtl_ext.transfer.evaluate import DataCheck, ScoreImages, ScorePatients, StoppedTraining
from medtl_ext.transfer.jobs import Arm, Job, Run
from medtl_ext.transfer.page import Report
from medtl_ext.transfer.pictures import ImagePictures, Pictures
from medtl_ext.transfer.rank import RankSources
from medtl_ext.transfer.report import audit_report, compare_report, markdown_table, patient_table
from medtl_ext.transfer.scores import SCORES, KeepPixels, Predictions
from medtl_ext.transfer.sources.card import Card, read_card
from medtl_ext.transfer.sources.pool import CheckChannels, Checkpoint, SingleSource, Source, source_name
from medtl_ext.transfer.study import SourceStudy, Study
from medtl_ext.transfer.tasks import (
    ClassificationTask,
    SegmentationTask,
    images_to_classify,
    images_to_segment,
    planned_grid,
)
from medtl_ext.transfer.truth import FineTuneSources

__all__ = [
    "SCORES",
    "Arm",
    "Card",
    "CheckChannels",
    "Checkpoint",
    "ClassificationTask",
    "DataCheck",
    "FineTuneSources",
    "ImagePictures",
    "Job",
    "KeepPixels",
    "Pictures",
    "Predictions",
    "RankSources",
    "Report",
    "Run",
    "ScoreImages",
    "ScorePatients",
    "SegmentationTask",
    "SingleSource",
    "Source",
    "SourceStudy",
    "StoppedTraining",
    "Study",
    "TransferAudit",
    "audit_report",
    "bundle_root",
    "compare_report",
    "images_to_classify",
    "images_to_segment",
    "markdown_table",
    "patient_table",
    "planned_grid",
    "read_card",
    "source_name",
    "start",
]
