"""MedTL: transfer learning for medical images, as MONAI bundles and the parts they are made of."""

from medtl_ext._validation import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "__version__"]
