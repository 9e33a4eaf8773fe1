"""MeshNet: a chain of dilated convolutions that labels a whole head at once.

Alex Fedorov et al., "End-to-end learning of brain tissue segmentation from imperfect labeling", IJCNN 2017,
doi:10.1109/IJCNN.2017.7966333. Weights: those of brainchop, with batch normalisation folded into the convolutions
(Mohamed Masoud et al., "Brainchop: in-browser MRI volumetric segmentation and rendering", Journal of Open Source
Software 8(83), 5098 (2023), doi:10.21105/joss.05098), MIT.
"""

from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU}


class MeshNet(nn.Module):
    """Logits of the size of the image.

    Args:
        in_channels: 1 for T1.
        out_channels: classes, the background first.
        channels: of every layer but the last.
        dilations: of the 3 x 3 x 3 convolutions, one after the other.
        activation: "relu", "elu" or "gelu".

    >>> import torch
    >>> MeshNet(1, 3, 5, [1, 2, 1])(torch.rand(1, 1, 8, 9, 10)).shape
    torch.Size([1, 3, 8, 9, 10])
    """

    def __init__(
        self, in_channels: int, out_channels: int, channels: int, dilations: list[int], activation: str = "relu"
    ):
        super().__init__()
        inputs = [in_channels, *[channels] * (len(dilations) - 1)]
        self.convs = nn.ModuleList(
            nn.Conv3d(count, channels, 3, padding=dilation, dilation=dilation)
            for count, dilation in zip(inputs, dilations, strict=True)
        )
        self.out = nn.Conv3d(channels, out_channels, 1)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, image: Tensor) -> Tensor:
        for convolution in self.convs:
            image = self.activation(convolution(image))
        return self.out(image)
