"""An encoder of images: attention is all there is to change."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .call import KEYWORD, Options, begin
from .families import Reads, VisionFamily


@dataclass(frozen=True)
class EnterVision:
    """Before the bare model: say which backend attention is to use."""

    options: Options
    family: VisionFamily

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict):
        return args, {**kwargs, KEYWORD: begin(model, args, kwargs, self.options, self.family, Reads.BARE)}
