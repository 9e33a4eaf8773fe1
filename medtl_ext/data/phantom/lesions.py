"""Lesions: white-matter hyperintensities, and a tumour with oedema, enhancing rim and necrosis."""

import numpy as np
from scipy import ndimage

from medtl_ext.data.phantom.anatomy import BRAIN_CENTRE, Anatomy, soft_step
from medtl_ext.data.phantom.atlas import Atlas
from medtl_ext.data.phantom.fields import SHAPE, grid_points, smooth_noise
from medtl_ext.data.phantom.scanner import Institution

TUMOUR_LABELS = {"ED": 1, "ET": 2, "NCR": 3}  # oedema, enhancing tumour, necrosis
WMH_LABELS = {"WMH": 1}


def add_white_matter_hyperintensities(anatomy: Anatomy, stream: np.random.Generator, *, load: float) -> np.ndarray:
    """Put hyperintensities into the white matter and return their label (uint8).

    Caps and bands grow out of the ventricles, thickest at the frontal and occipital horns; deep spots are scattered
    over the white matter. ``load`` is the site's mean burden: 1 is an older clinical cohort, 0.2 a few specks.
    """
    load *= stream.lognormal(0, 0.4)
    band_noise, spot_noise = smooth_noise(stream, 9), smooth_noise(stream, 5)

    to_horns = np.abs(grid_points()[1] - BRAIN_CENTRE[1]) / 45  # 0 at the middle of the brain, 1 at the horns
    thickness = 0.2 + 2.6 * load * (0.3 + 0.8 * to_horns) + 1.6 * band_noise  # mm
    bands = soft_step(thickness - anatomy.to_ventricles, width=1.0) * (anatomy.to_ventricles > -1) * (load > 0.15)

    away_from_cortex = anatomy.to_brain < -9
    spots = soft_step(spot_noise - (3.15 - 0.4 * load), width=0.25) * away_from_cortex

    share = np.maximum(bands, spots) * np.clip(1.3 * anatomy.fractions["WM"], 0, 1)
    anatomy.replace("WMH", 0.9 * share)
    return ((share > 0.5) & anatomy.brain).astype(np.uint8)


def place_tumour(
    atlas: Atlas, points: np.ndarray, stream: np.random.Generator, *, core_radius: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Draw a tumour in the cerebrum's deep white matter and let it push the brain aside.

    Its core is an ellipsoid of about the site's typical ``core_radius`` (mm, of the sphere with the same volume). The
    brain makes room for a share of the core's volume (mass effect, fading with distance); the rest replaces tissue.

    Returns:
        The atlas positions ``points`` after that; every voxel's distance from the centre, mm, shorter along the long
        axes; and the radius of the core.
    """
    grid = grid_points()
    coarse = points[:, ::2, ::2, ::2]
    white = atlas.white.at(coarse)
    above_cerebellum = coarse[2] > -12
    allowed = above_cerebellum & (atlas.to_brain.at(coarse) < -14) & (atlas.to_ventricles.at(coarse) > 4)
    chance = np.where(allowed, white.astype(np.float64) ** 2 + 0.02, 0).ravel()
    index = np.unravel_index(stream.choice(chance.size, p=chance / chance.sum()), white.shape)
    centre = (grid[:, ::2, ::2, ::2][:, *index] + stream.uniform(-2, 2, 3)).astype(np.float32)
    aspect = stream.uniform(0.75, 1.3, 3)
    aspect = (aspect / np.cbrt(aspect.prod())).astype(np.float32)
    core_radius = float(np.clip(core_radius * stream.lognormal(0, 0.3), 6, 24))
    pushed_volume = stream.uniform(0.1, 0.5) * core_radius**3

    offset = grid - centre[:, None, None, None]
    radius = np.sqrt(((offset / aspect[:, None, None, None]) ** 2).sum(axis=0))
    source_radius = np.cbrt(np.maximum(radius**3 - pushed_volume, (0.5 * radius) ** 3))
    fade = np.exp(-((radius / (2.2 * core_radius)) ** 2))
    pull = (1 - source_radius / np.maximum(radius, 1e-3)) * fade
    return points - offset * pull, radius, core_radius


def add_tumour(
    anatomy: Anatomy, radius: np.ndarray, core_radius: float, stream: np.random.Generator, institution: Institution
) -> np.ndarray:
    """Grow the nested tumour into the brain and return its label (uint8, `TUMOUR_LABELS`).

    Oedema spreads along the white matter around the core; the core is necrosis inside an enhancing rim with gaps. The
    institution decides how far each part reaches and how wide its annotators draw; ``radius`` is of `place_tumour`.
    """
    lobes, crinkles, blobs = (smooth_noise(stream, length) for length in (12, 8, 14))
    room = anatomy.brain & (anatomy.to_brain < -1.5) & (anatomy.fractions["ventricle"] < 0.5)
    white = ndimage.gaussian_filter(anatomy.fractions["WM"], 1.0)

    # Signed distances to the three boundaries, mm, positive inside.
    core = core_radius - radius - 2.2 * lobes - 0.9 * crinkles
    reach = institution.oedema * stream.uniform(5, 15) * (0.25 + white)
    oedematous = core + reach + 2.5 * blobs - 5 * (anatomy.fractions["ventricle"] > 0.5)
    rim = stream.uniform(2.2, 4.6) + crinkles  # thickness of the enhancing rim
    viable = 0.3 * core_radius * (1 - min(institution.necrosis * stream.uniform(0.7, 1.3), 1))
    necrotic = core - rim - viable

    oedema_share = soft_step(oedematous, width=1.1) * room
    core_share = soft_step(core, width=0.7) * room
    necrosis_share = soft_step(necrotic, width=0.8) * core_share
    gaps = soft_step(blobs - 1.5, width=0.25) * (1 - necrosis_share)  # where the rim does not enhance
    anatomy.replace("ED", oedema_share * (0.8 + 0.2 * np.clip(0.5 + 0.5 * lobes, 0, 1)))
    anatomy.replace("ET", core_share * (1 - necrosis_share) * (1 - 0.7 * gaps))
    anatomy.replace("NCR", necrosis_share)

    too_wide = institution.annotator_offset
    drawn_core = (core > -0.5 * too_wide) & room
    label = np.zeros(SHAPE, np.uint8)
    label[(oedematous > -too_wide) & room] = TUMOUR_LABELS["ED"]
    label[drawn_core & (gaps < 0.6)] = TUMOUR_LABELS["ET"]
    label[drawn_core & (necrosis_share > 0.5)] = TUMOUR_LABELS["NCR"]
    return label
