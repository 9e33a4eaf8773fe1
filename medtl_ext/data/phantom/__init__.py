"""A synthetic brain MRI dataset, made on the spot: the default data of every bundle. Nothing in it is a patient."""

from medtl_ext.data.phantom.generate import cached_phantom, generate_phantom
from medtl_ext.data.phantom.scanner import INSTITUTIONS, MODALITIES

__all__ = ["INSTITUTIONS", "MODALITIES", "cached_phantom", "generate_phantom"]
