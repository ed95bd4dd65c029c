"""What frozen weights allow: saving less for backward.

Knows torch modules only; which of a transformers model's modules it is told about is decided in fastattn.hf.
"""

from .classes import replace_classes, restore_classes
from .dropout import replace_dropouts, restore_dropouts, set_packing
from .feature_cache import FeatureCache
from .linear import Linear, replace_linears, restore_linears
from .recompute import CloseRecorder, Recompute, is_watched

__all__ = [
    "CloseRecorder",
    "FeatureCache",
    "Linear",
    "Recompute",
    "is_watched",
    "replace_classes",
    "replace_dropouts",
    "replace_linears",
    "restore_classes",
    "restore_dropouts",
    "restore_linears",
    "set_packing",
]
