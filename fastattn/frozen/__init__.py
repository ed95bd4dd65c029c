"""What frozen weights allow: saving less for backward.

Knows torch modules only; which of a transformers model's modules it is told about is decided in fastattn.hf.
"""

from .dropout import replace_dropouts, restore_dropouts, set_packing
from .feature_cache import FeatureCache
from .recompute import CloseRecorder, Recompute

__all__ = [
    "CloseRecorder",
    "FeatureCache",
    "Recompute",
    "replace_dropouts",
    "restore_dropouts",
    "set_packing",
]
