"""Collections of subjects, the tasks they pose, their integrity check, slices of volumes, and the brain phantom."""

from medtl_ext.data.classification import ClassificationDataset, load_image_folder, load_medmnist
from medtl_ext.data.collection import Collection, Subject, Task, load_collection, write_collection
from medtl_ext.data.files import ChannelReader
from medtl_ext.data.integrity import IntegrityReport, Issue, check_collection
from medtl_ext.data.phantom import cached_phantom, generate_phantom
from medtl_ext.data.readers import read_collection
from medtl_ext.data.seeds import SeededCacheDataset
from medtl_ext.data.slices import SliceDataset
from medtl_ext.data.splits import split_collection

__all__ = [
    "ChannelReader",
    "ClassificationDataset",
    "Collection",
    "IntegrityReport",
    "Issue",
    "SeededCacheDataset",
    "SliceDataset",
    "Subject",
    "Task",
    "cached_phantom",
    "check_collection",
    "generate_phantom",
    "load_collection",
    "load_image_folder",
    "load_medmnist",
    "read_collection",
    "split_collection",
    "write_collection",
]
