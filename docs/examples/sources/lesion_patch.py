"""The cascade of patch networks of nicMSlesions, as a network that takes volumes.

Sergi Valverde et al., "Improving automated multiple sclerosis lesion segmentation with a cascaded 3D convolutional
neural network approach", NeuroImage 155, 159-168 (2017), doi:10.1016/j.neuroimage.2017.04.034, and "One-shot domain
adaptation in multiple sclerosis lesion segmentation using convolutional neural networks", NeuroImage: Clinical 21,
101638 (2019), doi:10.1016/j.nicl.2018.101638. Weights: baseline_2ch of nicMSlesions, GPL-3.0.
"""

import torch
from torch import Tensor, nn

SIDE = 11  # voxels of a patch
BACKGROUND = 10.0  # logit of what is no candidate


class PReLU(nn.Module):
    """A slope for each position, as Keras has it."""

    def __init__(self, *shape: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(shape))

    def forward(self, features: Tensor) -> Tensor:
        return torch.where(features > 0, features, self.alpha * features)


def _convolution(inputs: int, outputs: int, side: int) -> nn.Sequential:
    convolution = nn.Conv3d(inputs, outputs, 3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm3d(outputs, eps=1e-3), PReLU(outputs, side, side, side))


def _dense(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), PReLU(outputs))


class PatchNetwork(nn.Module):
    """Two logits for the voxel in the middle of a patch: N x channels x 11 x 11 x 11 to N x 2.

    >>> PatchNetwork()(torch.rand(3, 2, 11, 11, 11)).shape
    torch.Size([3, 2])
    """

    def __init__(self, in_channels: int = 2):
        super().__init__()
        self.features = nn.Sequential(
            _convolution(in_channels, 32, SIDE),
            _convolution(32, 32, SIDE),
            nn.MaxPool3d(2),
            _convolution(32, 64, SIDE // 2),
            _convolution(64, 64, SIDE // 2),
            nn.MaxPool3d(2),
        )
        self.head = nn.Sequential(_dense(512, 256), _dense(256, 128), _dense(128, 64), nn.Linear(64, 2))

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(self.features(patches).flatten(1))


class LesionNetwork(PatchNetwork):
    """Logits of every voxel: of the patch around it where it is bright in FLAIR, background elsewhere.

    The last linear layer sees 64 features of each candidate, N x 64 of a batch of patches: no map of the volume.

    Args:
        in_channels: of the volumes, each with zero mean and unit variance in the brain and 0 outside.
        flair: the channel in which candidates are bright.
        threshold: candidates are brighter, in standard deviations.
        cascade: candidates of which the first network is convinced are decided by the second, whose weights are
            named as the first one's with ``second.`` in front.
        batch_size: patches at once.

    >>> volume = torch.zeros(1, 2, 12, 13, 14)
    >>> volume[0, :, 5, 6, 7] = 1.0
    >>> logits = LesionNetwork().eval()(volume)
    >>> logits.shape, int((logits[:, 0] != 10).sum())
    (torch.Size([1, 2, 12, 13, 14]), 1)
    """

    def __init__(
        self,
        in_channels: int = 2,
        flair: int = 1,
        threshold: float = 0.5,
        cascade: bool = False,
        batch_size: int = 512,
    ):
        super().__init__(in_channels)
        self.second = PatchNetwork(in_channels) if cascade else None
        self.flair, self.threshold, self.batch_size = flair, threshold, batch_size

    def _of_patches(self, patches: Tensor) -> Tensor:
        logits = super().forward(patches)
        convinced = logits[:, 1] > logits[:, 0]
        if self.second is not None and convinced.any():
            logits = logits.index_put((convinced,), self.second(patches[convinced]))
        return logits

    def forward(self, volume: Tensor) -> Tensor:
        output = volume.new_zeros(len(volume), 2, *volume.shape[2:])
        output[:, 0] = BACKGROUND
        patches = nn.functional.pad(volume, [SIDE // 2] * 6)
        for axis in (2, 3, 4):
            patches = patches.unfold(axis, SIDE, 1)  # a view: only candidates are ever copied
        candidates = (volume[:, self.flair] > self.threshold).nonzero()
        for batch in candidates.split(self.batch_size) if len(candidates) else ():
            item, x, y, z = batch.unbind(1)
            output[item, :, x, y, z] = self._of_patches(patches[item, :, x, y, z]).to(output.dtype)
        return output
