"""Encoders of images."""

from . import Reads, VisionFamily

_VIT = VisionFamily(
    model_type="vit",
    base="ViTModel",
    layers="layers",
    attention="attention",
    heads=(("ViTForImageClassification", Reads.FIRST),),
)

FAMILIES = (_VIT,)
