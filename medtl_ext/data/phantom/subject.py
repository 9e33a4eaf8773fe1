"""One subject, from anatomy to images and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medtl_ext.data.phantom.anatomy import deform, grow_brain
from medtl_ext.data.phantom.atlas import Atlas
from medtl_ext.data.phantom.contrast import draw_textures, render
from medtl_ext.data.phantom.fields import Grid, random_stream
from medtl_ext.data.phantom.lesions import add_tumour, add_white_matter_hyperintensities, place_tumour, push_aside
from medtl_ext.data.phantom.scanner import Institution, acquire


@dataclass(frozen=True)
class Subject:
    """Images (int16, by modality) and labels (uint8, by label file) on one grid."""

    grid: Grid
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


def make_subject(
    atlas: Atlas, institution: Institution, index: int, *, seed: int, modalities: Sequence[str]
) -> Subject:
    """Subject ``index`` of an institution. Every part has a random stream of its own, so that none disturbs another."""
    grid = Grid()

    def stream(part: str) -> np.random.Generator:
        return random_stream(seed, institution.name, index, part)

    cohort, shape, lesions = institution.cohort, stream("anatomy"), stream("tumour")
    points = deform(grid, shape, size=cohort.size)
    tumour = None
    if "tumour" in cohort.labels:
        tumour = place_tumour(atlas, grid, points, lesions, core_radius=institution.core_radius)
        points = push_aside(grid, points, tumour)
    anatomy = grow_brain(atlas, grid, points, shape, atrophy=institution.atrophy)

    labels = {"tissue": anatomy.tissue_label()}
    if "wmh" in cohort.labels:
        labels["wmh"] = add_white_matter_hyperintensities(anatomy, stream("wmh"), load=institution.wmh_load)
    if tumour:
        labels["tumour"] = add_tumour(
            anatomy,
            tumour,
            lesions,
            oedema=institution.oedema,
            necrosis=institution.necrosis,
            annotator_offset=institution.annotator_offset,
        )
        for name in ("tissue", "wmh"):  # what lies under a tumour cannot be seen: it is none of the healthy tissues
            labels[name][labels["tumour"] > 0] = 0

    textures = draw_textures(anatomy, stream("texture"))
    images = {}
    for modality in modalities:
        scanner, noise = institution.scanners[modality], stream(modality)
        ideal = render(
            anatomy,
            textures,
            modality,
            noise,
            protocol_shift=scanner.protocol_shift,
            isointense=cohort.isointense,
        )
        images[modality] = acquire(ideal, anatomy.brain, grid, scanner, noise)
    return Subject(grid, images, {name: labels[name] for name in cohort.labels})
