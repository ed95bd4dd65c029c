"""The Triton backend: kernels for every NVIDIA GPU since Ampere and for AMD's CDNA and RDNA3.

A kernel's file reads from top to bottom like its algorithm: forward.py, decode.py, backward.py,
query_gradient.py, key_gradient.py and bias_backward.py over the helpers of tiles.py and rng.py. launch.py
turns a problem into launches, configs.py chooses tiles. rows.py leaves padding out and puts it back.
"""

from .backend import backend

__all__ = ["backend"]
