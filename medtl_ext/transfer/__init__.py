"""The one flow of all bundles: task, sources, scores, ranking with a verdict, arms, audit, truth, study, report.

- `config`, `jobs`: whose folder it is, runs of a config through joblib, the `Run` that every step knows.
- `tasks`: what is asked, for segmentation and for classification.
- `sources`, `scores`: networks to transfer from, and transferability scores from one pass of each.
- `rank`: the ranking and its verdict. `arms`: ways to use the labels, and the audit that compares them.
- `truth`, `study`: every source fine-tuned, and what the rankings were worth, on one target and on several.
- `evaluate`: steps around a training. `report`, `page`: tables and figures of a run, and ``report.html``.
"""

from medtl_ext.transfer.arms import TransferAudit
from medtl_ext.transfer.config import bundle_root, claim_output, current_config, start
from medtl_ext.transfer.evaluate import DataCheck, ScoreImages, ScorePatients, StoppedTraining
from medtl_ext.transfer.jobs import Arm, Job, Run, run_command, run_jobs
from medtl_ext.transfer.page import Report, html_report
from medtl_ext.transfer.rank import RankSources
from medtl_ext.transfer.report import audit_report, compare_report, markdown_table, patient_table, summarize
from medtl_ext.transfer.scores import SCORES, KeepPixels, Maps, Observation, Predictions, Score
from medtl_ext.transfer.sources import SingleSource, Source, find_sources
from medtl_ext.transfer.study import SourceStudy, Study
from medtl_ext.transfer.tasks import ClassificationTask, SegmentationTask, images_to_classify, images_to_segment
from medtl_ext.transfer.truth import FineTuneSources

__all__ = [
    "SCORES",
    "Arm",
    "ClassificationTask",
    "DataCheck",
    "FineTuneSources",
    "Job",
    "KeepPixels",
    "Maps",
    "Observation",
    "Predictions",
    "RankSources",
    "Report",
    "Run",
    "Score",
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
    "claim_output",
    "compare_report",
    "current_config",
    "find_sources",
    "html_report",
    "images_to_classify",
    "images_to_segment",
    "markdown_table",
    "patient_table",
    "run_command",
    "run_jobs",
    "start",
    "summarize",
]
