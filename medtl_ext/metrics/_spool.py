"""Storage for batches of tensors that are needed again: in memory while it is small, on disk when it grows."""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch

#: Bytes that one spool holds in memory before it moves to a temporary file.
MEMORY_LIMIT = 256 * 2**20


class PredictionSpool:
    """A queue of tensor batches that can be read any number of times and keeps each tensor's dtype and shape.

    Beyond `MEMORY_LIMIT` everything moves to a file in the system's temporary folder (`TMPDIR` chooses another). The
    file has no name: it disappears with the spool, or with the process. Spools can be pickled, so that a worker process
    can return its metric.

    >>> spool = PredictionSpool()
    >>> spool.append(torch.tensor([0.5, 0.5]), torch.tensor([1]))
    >>> [[tensor.tolist() for tensor in batch] for batch in spool]
    [[[0.5, 0.5], [1]]]
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=MEMORY_LIMIT)  # noqa: SIM115 - closed by close()
        self._batches: list[list[tuple[int, torch.dtype, torch.Size]]] = []

    def append(self, *tensors: torch.Tensor) -> None:
        """Add one batch of tensors from any device."""
        batch = []
        offset = self._file.seek(0, 2)
        for tensor in tensors:
            # As bytes, because NumPy has no bfloat16.
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            self._file.write(data)
            batch.append((offset, tensor.dtype, tensor.shape))
            offset += data.nbytes
        self._batches.append(batch)

    def close(self) -> None:
        """Delete everything and free the memory or the file."""
        self._file.close()
        self._batches = []

    __del__ = close

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for batch in list(self._batches):  # a copy: a metric may be merged with itself
            yield [self._read(*entry) for entry in batch]

    def _read(self, offset: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(offset)
        self._file.readinto(memoryview(tensor.flatten().view(torch.uint8).numpy()))
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return {"batches": list(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        for batch in state["batches"]:
            self.append(*batch)
