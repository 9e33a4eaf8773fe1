"""One subject, from anatomy to images and labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medtl_ext.data.phantom.anatomy import deform, grow_brain
from medtl_ext.data.phantom.atlas import Atlas
from medtl_ext.data.phantom.contrast import acquire, render
from medtl_ext.data.phantom.fields import random_stream, smooth_noise
from medtl_ext.data.phantom.lesions import add_tumour, add_white_matter_hyperintensities, place_tumour
from medtl_ext.data.phantom.scanner import Institution


def make_subject(
    atlas: Atlas, institution: Institution, index: int, *, seed: int, modalities: Sequence[str]
) -> dict[str, np.ndarray]:
    """Images (int16, by modality) and labels (uint8, by label file) of subject ``index`` of an institution.

    Every part has a random stream of its own, so that none disturbs another.
    """

    def stream(part: str) -> np.random.Generator:
        return random_stream(seed, institution.name, index, part)

    cohort, shape, lesions = institution.cohort, stream("anatomy"), stream("tumour")
    points = deform(shape, size=cohort.size)
    if "tumour" in cohort.labels:
        points, *core = place_tumour(atlas, points, lesions, core_radius=institution.core_radius)
    anatomy = grow_brain(atlas, points, shape, atrophy=institution.atrophy)

    labels = {"tissue": anatomy.tissue_label()}
    if "wmh" in cohort.labels:
        labels["wmh"] = add_white_matter_hyperintensities(anatomy, stream("wmh"), load=institution.wmh_load)
    if "tumour" in cohort.labels:
        labels["tumour"] = add_tumour(anatomy, *core, lesions, institution)
        for name in ("tissue", "wmh"):  # what lies under a tumour cannot be seen: it is none of the healthy tissues
            labels[name][labels["tumour"] > 0] = 0

    texture = stream("texture")
    textures = [smooth_noise(texture, length) for length in (4, 7)]
    images = {}
    for modality in modalities:
        noise = stream(modality)
        ideal = render(anatomy, institution, modality, textures, noise)
        images[modality] = acquire(ideal, anatomy.brain, institution.scanners[modality], noise)
    return images | labels
