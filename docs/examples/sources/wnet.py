"""The W-Net of Galdran et al.: two small U-Nets, the second of which sees the image and what the first one found.

Adrian Galdran et al., "State-of-the-art retinal vessel segmentation with minimalistic models", Scientific Reports
12, 6174 (2022), doi:10.1038/s41598-022-09675-y; arXiv:2009.01907. Weights for vessels and for arteries and veins: the
authors', MIT. Optic disc and cup: AutoMorph (Zhou et al., TVST 2022, doi:10.1167/tvst.11.7.12), Apache-2.0.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Convolutions, each with ReLU before batch normalisation; with ``shortcut``, a 1 x 1 one past both is added."""

    def __init__(self, inputs: int, outputs: int, *, convolutions: int = 2, shortcut: bool = True):
        super().__init__()
        layers: list[nn.Module] = []
        for channels in [inputs, outputs][:convolutions]:
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(outputs)]
        self.block = nn.Sequential(*layers)
        if shortcut:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, image: Tensor) -> Tensor:
        return self.block(image) + self.shortcut(image) if hasattr(self, "shortcut") else self.block(image)


class Up(nn.Module):
    """Twice the size, joined with the encoder's features of that size, which take a convolution on the way."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.up_layer = nn.Module()
        self.up_layer.block = nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 2, stride=2))
        self.conv_layer = Block(inputs, outputs)
        self.conv_bridge_layer = Block(outputs, outputs, convolutions=1, shortcut=False)

    def forward(self, features: Tensor, skipped: Tensor) -> Tensor:
        return self.conv_layer(torch.cat([self.up_layer.block(features), self.conv_bridge_layer(skipped)], dim=1))


class UNet(nn.Module):
    """One of the two: max pooling between the blocks, a 1 x 1 convolution at the end."""

    def __init__(self, in_channels: int, out_channels: int, channels: list[int]):
        super().__init__()
        pairs = list(pairwise(channels))
        self.first = Block(in_channels, channels[0])
        self.down_path = nn.ModuleList(Block(*pair) for pair in pairs)
        self.up_path = nn.ModuleList(Up(below, above) for above, below in reversed(pairs))
        self.final = nn.Conv2d(channels[0], out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        levels = [self.first(image)]
        for down in self.down_path:
            levels.append(down(nn.functional.max_pool2d(levels[-1], 2)))
        features = levels.pop()
        for up in self.up_path:
            features = up(features, levels.pop())
        return self.final(features)


class WNet(nn.Module):
    """Logits of the second U-Net, which takes the image and the first one's logits.

    Args:
        in_channels: of the image: 3 for colour photographs.
        out_channels: of both outputs: 1 for the sigmoid of one class.
        channels: of each level of both; the sides of an image are divisible by 2 to the number of levels - 1.

    >>> WNet(3, 1, [8, 16, 32])(torch.rand(1, 3, 64, 64)).shape
    torch.Size([1, 1, 64, 64])
    """

    def __init__(self, in_channels: int, out_channels: int, channels: list[int]):
        super().__init__()
        self.unet1 = UNet(in_channels, out_channels, channels)
        self.unet2 = UNet(in_channels + out_channels, out_channels, channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.unet2(torch.cat([image, self.unet1(image)], dim=1))
