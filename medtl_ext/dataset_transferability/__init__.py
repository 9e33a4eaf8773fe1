"""What is particular to the bundle ``dataset_transferability``: LP x FU, the target's own model, a published table."""

from medtl_ext.dataset_transferability.augment import on_picture
from medtl_ext.dataset_transferability.published import ReproducePublished
from medtl_ext.dataset_transferability.ranking import DatasetStudy, RankDatasets, RankOwnModel

__all__ = ["DatasetStudy", "RankDatasets", "RankOwnModel", "ReproducePublished", "on_picture"]
