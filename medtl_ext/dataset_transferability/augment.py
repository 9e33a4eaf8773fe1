"""Augmentations of pictures, as DatasetTr has them."""

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from medtl_ext._validation import require_choice

OPERATIONS = {
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "sharpness": lambda picture: ImageEnhance.Sharpness(picture).enhance(2),
}


def on_picture(image: torch.Tensor, operation: str) -> torch.Tensor:
    """An operation of Pillow on an image, by way of 8 bit.

    Args:
        image: C x H x W, grey or RGB, -1 to 1.
        operation: "autocontrast", "equalize", or "sharpness", which doubles it.

    Returns:
        The same shape and range, float32.

    >>> on_picture(torch.tensor([[[0.0, 0.5]]]), "autocontrast")
    tensor([[[-1.,  1.]]])
    """
    grey, pixels = len(image) == 1, torch.as_tensor(image).add(1).mul(127.5).round().clamp(0, 255).byte().numpy()
    changed = OPERATIONS[require_choice("operation", operation, OPERATIONS)]
    picture = changed(Image.fromarray(pixels[0] if grey else np.moveaxis(pixels, 0, -1)))
    array = np.asarray(picture, dtype=np.float32)
    return torch.as_tensor((array[None] if grey else np.moveaxis(array, -1, 0)) / 127.5 - 1)
