"""Write a collection file for multiple sclerosis patients: FOLDER/PATIENT/{T1,T1CE,T2,FLAIR,lesion}.nii.gz.

The public dataset of Lesjak et al. (Neuroinformatics 2017, doi:10.1007/s12021-017-9348-7, CC BY 4.0) has this layout.
Only the JSON file is written; images stay where they are.
"""

import argparse
from pathlib import Path

from medtl_ext.data import write_collection

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="folder with a subfolder for every patient")
parser.add_argument("--out", type=Path, required=True, help="the collection file to write, such as open_ms.json")
for split in ("train", "val", "test"):
    parser.add_argument(f"--{split}", nargs="*", default=[], metavar="PATIENT", help=f"patients of the {split} split")
arguments = parser.parse_args()

subjects = []
for split in ("train", "val", "test"):
    for patient in getattr(arguments, split):
        files = {
            name: str((arguments.folder / patient / f"{name}.nii.gz").resolve())
            for name in ("T1", "T1CE", "T2", "FLAIR", "lesion")
        }
        labels = {"lesion": files.pop("lesion")}
        subjects.append({"id": patient, "institution": "MS", "split": split, "images": files, "labels": labels})

content = {
    "name": "open_ms",
    "description": "Multiple sclerosis lesions on brain MRI, consensus of three raters (Lesjak et al. 2017)",
    "license": "CC BY 4.0",
    "synthetic": False,
    "labels": {"lesion": {"WMH": 1}},
    "objectives": {"WMH": {"label": "lesion", "values": [1]}},
    "subjects": subjects,
}
print(f"Collection written to {write_collection(arguments.out, content)}")
