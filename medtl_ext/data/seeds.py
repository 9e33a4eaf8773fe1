"""Datasets whose random transforms are seeded by the item, not by the process that loads it."""

import numpy as np
import torch
from monai.data import CacheDataset
from monai.transforms import Compose, Randomizable


class ItemSeeds:
    """A dataset that seeds its random transforms for every item, so that any number of workers gives the same batches.

    Nothing is seeded until `medtl_ext.handlers.EpochSeed` says which epoch it is. The random transforms of
    ``transform`` then share one random state; those inside `monai.transforms.OneOf` keep their own.
    """

    transform: Compose
    _epoch: torch.Tensor | None = None
    _state = np.random.RandomState()  # of all such datasets: two of them may have transforms in common

    def seed_epoch(self, seed: int) -> None:
        """Set the seed of the items to come, in memory that persistent workers of a loader see too."""
        if self._epoch is None:
            self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._epoch.fill_(seed)

    def seed_item(self, index: int) -> None:
        """Seed the random transforms for one item of this epoch."""
        if self._epoch is None:
            return
        for step in self.transform.transforms:
            # MONAI's loader seeds the transforms too, in each worker.
            if isinstance(step, Randomizable) and not isinstance(step, Compose) and step.R is not self._state:
                step.set_random_state(state=self._state)
        self._state.seed(np.random.SeedSequence([int(self._epoch), index]).generate_state(4))


class SeededCacheDataset(ItemSeeds, CacheDataset):
    """MONAI's `CacheDataset` with the same batches for any number of workers; see `ItemSeeds`.

    >>> from monai.transforms import RandFlip
    >>> len(SeededCacheDataset([np.zeros((1, 4, 4))], Compose([RandFlip()]), progress=False))
    1
    """

    def _transform(self, index: int) -> object:
        self.seed_item(index)
        return super()._transform(index)
