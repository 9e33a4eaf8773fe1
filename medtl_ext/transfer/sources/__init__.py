"""Sources: a task, a card, a checkpoint, a MONAI bundle or an nnU-Net folder, and the networks that they are."""

from medtl_ext.transfer.sources.card import Card, read_card
from medtl_ext.transfer.sources.network import SourceNetwork, warn_of_other_order
from medtl_ext.transfer.sources.pool import (
    CheckChannels,
    Checkpoint,
    SingleSource,
    Source,
    TargetTask,
    card_at,
    find_sources,
    keys_of,
    pretraining_job,
    source_collection,
    source_name,
    source_transforms,
    train_sources,
)

__all__ = [
    "Card",
    "CheckChannels",
    "Checkpoint",
    "SingleSource",
    "Source",
    "SourceNetwork",
    "TargetTask",
    "card_at",
    "find_sources",
    "keys_of",
    "pretraining_job",
    "read_card",
    "source_collection",
    "source_name",
    "source_transforms",
    "train_sources",
    "warn_of_other_order",
]
