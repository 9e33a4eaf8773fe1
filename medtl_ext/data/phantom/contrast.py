"""The images: how bright each tissue is in each modality, and what the scanner adds."""

import numpy as np
from scipy import ndimage

from medtl_ext.data.phantom.anatomy import Anatomy
from medtl_ext.data.phantom.fields import SHAPE, SPACING, smooth_noise
from medtl_ext.data.phantom.scanner import CLASSES, Institution, Scanner

# Mean signal; white matter on T1 is about 0.9. What shows a lesion: FLAIR oedema and WMH, T1CE the rim and its core.
SIGNAL = {
    #        CSF   GM    WM    vent. ED    NCR   ET    WMH
    "T1": (0.28, 0.64, 0.88, 0.24, 0.54, 0.38, 0.56, 0.76),
    "T1CE": (0.32, 0.64, 0.86, 0.24, 0.55, 0.36, 1.22, 0.76),
    "T2": (1.10, 0.66, 0.48, 1.20, 0.98, 1.10, 0.84, 0.70),
    "FLAIR": (0.22, 0.62, 0.50, 0.10, 0.95, 0.56, 0.78, 0.92),
}
# Standard deviation of that mean between subjects: lesions vary much more than healthy tissue.
SUBJECT_SPREAD = {
    "T1": (0.03, 0.02, 0.02, 0.02, 0.05, 0.07, 0.06, 0.04),
    "T1CE": (0.03, 0.02, 0.02, 0.02, 0.05, 0.07, 0.15, 0.04),
    "T2": (0.06, 0.03, 0.02, 0.06, 0.08, 0.10, 0.08, 0.06),
    "FLAIR": (0.03, 0.02, 0.02, 0.02, 0.08, 0.16, 0.10, 0.08),
}
# Standard deviation of the smooth texture within one subject's tissue, all modalities.
TEXTURE = (0.05, 0.03, 0.02, 0.01, 0.06, 0.07, 0.09, 0.05)
# How each modality shows the two texture fields of a subject: related between modalities, never the same.
TEXTURE_MIX = {"T1": (0.7, 0.7), "T1CE": (-0.7, 0.7), "T2": (0.7, -0.7), "FLAIR": (-0.7, -0.7)}
ISOINTENSE = 0.55  # share of the grey-white contrast that is left at about six months of age


def render(
    anatomy: Anatomy, institution: Institution, modality: str, textures: list[np.ndarray], stream: np.random.Generator
) -> np.ndarray:
    """The ideal image of ``anatomy`` in ``modality``: no blur, noise or bias yet; 0 outside the brain.

    ``textures`` (fine, coarse) are what all modalities of a subject share.
    """
    drawn = stream.normal(SIGNAL[modality], SUBJECT_SPREAD[modality])
    means = dict(zip(CLASSES, drawn.tolist(), strict=True))
    if institution.cohort.isointense:
        middle = (means["GM"] + means["WM"]) / 2
        means |= {name: middle + ISOINTENSE * (means[name] - middle) for name in ("GM", "WM")}
    fine, coarse = TEXTURE_MIX[modality]
    texture = fine * textures[0] + coarse * textures[1]
    image = np.zeros(SHAPE, np.float32)
    for name, spread in zip(CLASSES, TEXTURE, strict=True):
        if name in anatomy.fractions:
            mean = np.float32(means[name] + institution.scanners[modality].protocol_shift[name])
            image += anatomy.fractions[name] * (mean + np.float32(spread) * texture)
    if modality == "T1CE":  # vessels in the sulci take up contrast agent
        threads = smooth_noise(stream, 5)
        image += 0.55 * np.clip(1.5 * threads - 2.2, 0, 1.2) * (anatomy.fractions["CSF"] > 0.35)
    return np.clip(image, 0, None) * anatomy.brain


def acquire(image: np.ndarray, brain: np.ndarray, scanner: Scanner, stream: np.random.Generator) -> np.ndarray:
    """Scan an ideal ``image``: raw int16 values, at least 1 in the brain and 0 outside."""
    blur = scanner.blur / SPACING[0]
    image = ndimage.gaussian_filter(image, (blur, blur, 0.15))
    image = np.clip(image, 0, None) ** np.float32(scanner.gamma)
    coil = smooth_noise(stream, 90)
    image *= np.exp(np.float32(scanner.bias * stream.uniform(0.5, 1.2)) * coil)
    sigma = np.float32(scanner.noise * stream.uniform(0.8, 1.3))
    real, imaginary = sigma * stream.standard_normal((2, *SHAPE), dtype=np.float32)
    magnitude = np.hypot(image + real, imaginary)
    gain = scanner.gain * stream.lognormal(0, 0.05)
    return np.where(brain, np.clip(np.rint(gain * magnitude), 1, 32767), 0).astype(np.int16)
