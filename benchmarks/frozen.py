"""For which networks would kept features of a frozen encoder pay?

    python benchmarks/frozen.py

A training step with a frozen encoder costs E + 3 D: the encoder's forward pass, and of the decoder the forward pass and
a backward pass of about twice that. With kept features it costs 3 D, so it is 1 + E / 3 D times as fast: 1.5 times
takes E >= 1.5 D. Prints both, counted by PyTorch without computing anything: 10^9 operations for one image.
"""

import re

import pandas as pd
import torch
from monai.networks.nets import BasicUNet, DynUNet, FlexibleUNet, SwinUNETR
from torch.utils.flop_counter import FlopCounterMode

PLAIN = {"in_channels": 1, "out_channels": 2}
DYNUNET = {"spatial_dims": 3, "kernel_size": [3] * 5, "strides": [1, 2, 2, 2, 2], "upsample_kernel_size": [2] * 4}
OURS, FLEXIBLE = r"conv_0|down_\d", "encoder"
# Network, its arguments, names of the parts that are the encoder, size of an image.
NETWORKS = {
    "BasicUNet, as the bundles have it": (BasicUNet, {"features": (8, 16, 32, 64, 128, 8)}, OURS, (96, 96)),
    "BasicUNet, MONAI's default": (BasicUNet, {}, OURS, (96, 96)),
    "DynUNet, five levels": (DynUNet, DYNUNET, r"skip_layers(\.next_layer)*\.(downsample|conv\d)", (96, 96, 96)),
    "FlexibleUNet, EfficientNet-B2": (FlexibleUNet, {"backbone": "efficientnet-b2"}, FLEXIBLE, (224, 224)),
    "FlexibleUNet, EfficientNet-B7": (FlexibleUNet, {"backbone": "efficientnet-b7"}, FLEXIBLE, (224, 224)),
    "FlexibleUNet, ResNet-34": (FlexibleUNet, {"backbone": "resnet34"}, FLEXIBLE, (224, 224)),
    "FlexibleUNet, ResNet-152": (FlexibleUNet, {"backbone": "resnet152"}, FLEXIBLE, (224, 224)),
    "SwinUNETR": (SwinUNETR, {"feature_size": 24, "spatial_dims": 3}, "swinViT", (96, 96, 96)),
}


def main() -> None:
    rows = []
    for name, (kind, arguments, encoder, size) in NETWORKS.items():
        network = kind(**PLAIN | {"spatial_dims": len(size)} | arguments).eval().to("meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 1, *size, device="meta"))
        counts = {part.partition(".")[2]: sum(of.values()) for part, of in counter.get_flop_counts().items()}
        whole, inside = counter.get_total_flops(), sum(counts[part] for part in counts if re.fullmatch(encoder, part))
        gain = 1 + inside / (3 * (whole - inside))
        rows.append(
            {"network": name, "E": inside / 1e9, "D": (whole - inside) / 1e9, "E / D": inside / (whole - inside)}
        )
        rows[-1]["times as fast, at most"] = gain
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
