"""How well the public lesion network of docs/examples/sources tells lesions from other voxels bright in FLAIR.

AUC over its candidates, patient by patient, on the grid it was made for. A quarter of an hour a patient on a CPU.

    python benchmarks/lesion_auc.py COLLECTION CHECKPOINT TASK
"""

import argparse
from pathlib import Path

import torch
from monai.transforms import Compose, LoadImaged
from sklearn.metrics import roc_auc_score

from medtl_ext.transfer import SegmentationTask, read_card
from medtl_ext.transfer.sources.network import untouched
from medtl_ext.transfer.sources.pool import source_transforms
from medtl_ext.transforms import SelectLabelsd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("collection", help="such as docs/examples/open_ms_collection.py writes")
parser.add_argument("checkpoint", help="lesion_patch_1.pt")
parser.add_argument("task", help="such as MS-T1+FLAIR-WMH")
parser.add_argument("--card", default="docs/examples/sources/lesion_patch.json")
arguments = parser.parse_args()

target = SegmentationTask(arguments.task, collection=arguments.collection)
card = read_card(Path(arguments.card), trust=True).model_copy(update={"checkpoint": arguments.checkpoint})
network = untouched(card, channels=2)
own = [
    LoadImaged(["image", "label"], reader="medtl_ext.data.ChannelReader", ensure_channel_first=True),
    SelectLabelsd("label", target.label_values),
]
transform = Compose(source_transforms(card, target.channels, own))
for item in (item for split in target.splits for item in target.datalist(split)):
    data = transform(item)
    candidates = data["image"][1] > card.network["threshold"]
    with torch.no_grad():
        lesion = network(data["image"][None])[0].softmax(0)[1]
    truth = (data["label"][0] > 0)[candidates].numpy()
    auc, by_flair = (roc_auc_score(truth, values[candidates].numpy()) for values in (lesion, data["image"][1]))
    print(f"{item['subject']}: AUC {auc:.3f}, of FLAIR alone {by_flair:.3f}, {truth.sum()} of {truth.size} candidates")
