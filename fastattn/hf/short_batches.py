"""Short batches of the kind of a long one: what they cost tells what the long one costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError

# Samples; tokens of source and target; how many of these all samples but the first lack where the model
# packs. So many, and so different, that growth with either, with their squares or product is told apart.
_SHAPES = (
    (2, 16, 16, 1, 3),
    (4, 16, 16, 1, 3),
    (2, 48, 16, 1, 1),
    (2, 32, 16, 9, 5),
    (2, 16, 48, 5, 1),
    (2, 16, 32, 1, 9),
    (2, 32, 48, 5, 17),
)


@dataclass(frozen=True)
class Batch:
    """A model's keyword arguments, and what in them is (B, N) or (B, M)."""

    inputs: dict[str, Tensor]
    # B; N of the tokens, M of an encoder-decoder's targets, 0 where there is none
    shape: tuple[int, int, int]
    has_targets: bool
    pad: int  # what stands for padding in input_ids, and
    eos: int  # what ends every sample of this batch; each -1 where there is none

    @staticmethod
    def of(model: nn.Module, inputs: dict[str, Tensor]) -> Batch:
        configs = [c for module in model.modules() if (c := getattr(module, "config", None)) is not None]
        has_targets = any(getattr(config, "is_encoder_decoder", False) for config in configs)
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.dim() > 0}
        if not tensors:
            raise InvalidArgumentError("inputs", f"without a tensor: {sorted(inputs)}", "model's inputs")
        source = tensors.get("input_ids", tensors.get("inputs_embeds"))
        targets = [x for name, x in tensors.items() if has_targets and _is_target(name, x)]
        shape = (
            len(next(iter(tensors.values()))),
            0 if source is None else source.shape[1],
            targets[0].shape[1] if targets else 0,
        )
        pad, eos = (_token(configs, name) for name in ("pad_token_id", "eos_token_id"))
        ids = tensors.get("input_ids")
        # A classifier of an encoder-decoder reads there, and wants it in every sample.
        ends = has_targets and ids is not None and bool((ids == eos).any(-1).all())
        return Batch(inputs, shape, has_targets, pad, eos if ends else -1)

    def probes(self, *, padded: bool) -> Iterator[Batch]:
        """Short ones of different shapes, with padding at the end of all samples but the first or without."""
        _, source, target = self.shape
        done = set()
        for samples, n, m, *missing in _SHAPES:
            shape = (samples, n if source else 0, m if target else 0)
            if shape not in done:
                done.add(shape)
                yield self._cut(shape, missing if padded else (0, 0))

    def _cut(self, shape: tuple[int, int, int], missing: tuple[int, int]) -> Batch:
        def cut(name: str, x):
            if not isinstance(x, Tensor) or x.dim() == 0:
                return x
            x = x[torch.arange(shape[0]) % len(x)]
            side = 1 if self.has_targets and _is_target(name, x) else 0
            length = self.shape[1 + side]
            if x.dim() < 2 or x.shape[1] != length:
                return x
            x = x[:, torch.arange(shape[1 + side]) % length]
            is_mask = name in ("attention_mask", "decoder_attention_mask")
            x = torch.ones_like(x) if is_mask else x
            if name == "input_ids":
                return self._ended(x, missing[side])
            if missing[side] and (is_mask or name == "labels"):
                x[1:, -missing[side] :] = 0 if is_mask else -100
            return x

        inputs = {name: cut(name, x) for name, x in self.inputs.items()}
        return replace(self, inputs=inputs, shape=shape)

    def _ended(self, ids: Tensor, missing: int) -> Tensor:
        """The tokens by which a head knows where a sample ends, there and nowhere else."""
        special = (ids == self.pad) | (ids == self.eos)
        if not special.all():
            ids[special] = ids[~special][0]
        padding = torch.zeros_like(special)
        if missing:
            padding[1:, -missing:] = True
        if self.pad >= 0:
            ids[padding] = self.pad
        if self.eos >= 0:
            ids[torch.arange(len(ids)), (~padding).sum(1) - 1] = self.eos
        return ids


def _token(configs: list, name: str) -> int:
    """The first that is one: some models end at any of several."""
    return next((token for config in configs if isinstance(token := getattr(config, name, None), int)), -1)


def _is_target(name: str, x: Tensor) -> bool:
    return x.dim() > 1 and (name == "labels" or name.startswith("decoder_"))
