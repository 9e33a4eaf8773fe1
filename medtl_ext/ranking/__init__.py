"""Statistics: arms compared on the same patients, sources ranked for a target, methods compared over targets.

- `paired`: compares the arms of a transfer audit on the same patients, and gives a verdict.
- `sources`: ranks candidate sources by a transferability score, with a patient bootstrap, baselines and a verdict.
- `agreement`: how well a ranking agrees with the truth, whether methods differ over several targets, and how useful the
  rankings of a study were.
"""

from medtl_ext.ranking._words import listed
from medtl_ext.ranking.agreement import (
    CEILING,
    TOP,
    FriedmanNemenyi,
    agreement_over_targets,
    friedman_nemenyi,
    known_elsewhere,
    mean_auc,
    noise_ceiling,
    ranker_table,
    spearman_footrule,
    verdict_claim,
    weighted_kendall,
)
from medtl_ext.ranking.paired import (
    MINIMUM_PATIENTS,
    PairedComparison,
    Verdict,
    audit_verdict,
    bootstrap_interval,
    holm,
    late_gain,
    paired_comparison,
)
from medtl_ext.ranking.sources import SourceRanking, baseline_rankings, bootstrap_ranking

__all__ = [
    "CEILING",
    "MINIMUM_PATIENTS",
    "TOP",
    "FriedmanNemenyi",
    "PairedComparison",
    "SourceRanking",
    "Verdict",
    "agreement_over_targets",
    "audit_verdict",
    "baseline_rankings",
    "bootstrap_interval",
    "bootstrap_ranking",
    "friedman_nemenyi",
    "holm",
    "known_elsewhere",
    "late_gain",
    "listed",
    "mean_auc",
    "noise_ceiling",
    "paired_comparison",
    "ranker_table",
    "spearman_footrule",
    "verdict_claim",
    "weighted_kendall",
]
