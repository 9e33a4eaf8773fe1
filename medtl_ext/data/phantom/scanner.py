"""The institutions: who is scanned there, on what scanner, and how wide the annotators draw."""

from dataclasses import dataclass

from medtl_ext._validation import require_choice
from medtl_ext.data.phantom.fields import random_stream

MODALITIES = ("T1", "T1CE", "T2", "FLAIR")
CLASSES = ("CSF", "GM", "WM", "ventricle", "ED", "NCR", "ET", "WMH")


@dataclass(frozen=True)
class Cohort:
    """The patients of an institution. Ranges are (low, high); every institution draws its own value from them."""

    labels: tuple[str, ...]  # label files of each subject
    size: float  # mean brain length relative to the atlas
    atrophy: tuple[float, float]  # mm, 1 = the atlas
    wmh_load: tuple[float, float]  # 0 = none, 1 = an older clinical cohort
    isointense: bool = False  # grey and white matter hard to tell apart, as at six months


TUMOUR = Cohort(("tumour", "tissue", "wmh"), size=0.92, atrophy=(0.6, 2.2), wmh_load=(0.1, 0.5))
OLDER = Cohort(("tissue", "wmh"), size=0.92, atrophy=(1.8, 3.2), wmh_load=(0.8, 1.3))
INFANT = Cohort(("tissue",), size=0.86, atrophy=(0.3, 0.5), wmh_load=(0.0, 0.0), isointense=True)
INSTITUTIONS = (
    dict.fromkeys(("01", "04", "06", "13", "14", "17", "18", "20"), TUMOUR)
    | dict.fromkeys(("I1", "I2"), INFANT)
    | dict.fromkeys(("S", "U"), OLDER)
)


class Institution:
    """The character of an institution, which does not depend on the seed of the subjects; lengths in mm.

    Raises:
        InputError: the phantom has no such institution.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.cohort = INSTITUTIONS[require_choice("institution", name, INSTITUTIONS)]
        self.scanners = {modality: Scanner(name, modality) for modality in MODALITIES}
        stream = random_stream("institution", name)
        self.atrophy = stream.uniform(*self.cohort.atrophy)
        self.wmh_load = stream.uniform(*self.cohort.wmh_load)
        self.core_radius = stream.uniform(13.5, 18.5)  # typical radius of a tumour's core
        self.oedema = stream.uniform(0.8, 1.3)  # how far oedema reaches, 1 = typical
        self.necrosis = stream.uniform(0.35, 0.8)  # how much of the core is necrotic, 0 to 1
        self.annotator_offset = stream.uniform(-0.8, 0.8)  # annotators draw tumours this much too wide


class Scanner:
    """How an institution acquires one modality."""

    def __init__(self, institution: str, modality: str) -> None:
        stream = random_stream("scanner", institution, modality)
        shifts = stream.normal(0, 0.035, len(CLASSES)).tolist()
        self.protocol_shift = dict(zip(CLASSES, shifts, strict=True))  # added to the mean signal of each class
        self.gamma = stream.lognormal(0, 0.12)  # exponent of the signal: 1 = linear
        self.blur = stream.uniform(0.5, 1.6)  # in-plane standard deviation, mm
        self.noise = stream.uniform(0.015, 0.055)  # standard deviation of the Rician noise, in units of the signal
        self.bias = stream.uniform(0.03, 0.14)  # strength of the coil's bias field: log-signal standard deviation
        self.gain = stream.uniform(300, 600)  # raw units for a signal of 1
