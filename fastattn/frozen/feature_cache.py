"""What a frozen backbone returns, computed once for each text: from the second epoch on, the head alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError, MissingDependencyError


def _last(output, mask: Tensor) -> Tensor:
    hidden = output.last_hidden_state
    position = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), position]


def _mean(output, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(output.last_hidden_state.dtype)
    return (output.last_hidden_state * weights).sum(1) / weights.sum(1).clamp(min=1)


# From the backbone's output and the bool mask to (B, C). By name, so that a key can say which it was.
FEATURES: dict[str, Callable[..., Tensor]] = {
    "first": lambda output, mask: output.last_hidden_state[:, 0],
    "last": _last,
    "mean": _mean,
    "pooler": lambda output, mask: output.pooler_output,
}


class FeatureCache:
    """`cache(input_ids=..., attention_mask=...)` is what `backbone` returns for a batch, computed only once.

    A sample's key is a hash of its tokens (without padding behind the last one; padding before them moves
    their positions, so it counts), of every frozen weight and buffer of the backbone and of their dtypes, of
    its modules and their configs, and of autocast's dtype; so no other model finds these features. Weights
    that train are not part of it, and features that depend on one are refused. What a module of your own
    keeps neither there nor in its repr needs a directory of its own. Every sample that is not found is
    computed, those of one call as one batch; features agree with those of any other batch up to rounding.

    Args:
        backbone: in eval mode throughout, as dropout would be drawn once and for all.
        features: of the last hidden state "first" (the first position, which classifiers on [CLS] read),
            "last" (the last real token) or "mean" (of all real tokens), or "pooler": the backbone's pooled
            output.
        directory: where features outlive the process, one safetensors file for each call that computed some;
            several processes may share it. None keeps them in memory.

    Raises:
        InvalidArgumentError: features is none of these.
        MissingDependencyError: the directory has features, and safetensors is not installed.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        features: str = "first",
        directory: str | os.PathLike | None = None,
    ):
        if features not in FEATURES:
            raise InvalidArgumentError("features", repr(features), ", ".join(map(repr, FEATURES)))
        self.backbone, self.features = backbone, features
        self.hits = self.misses = 0
        self._directory = None if directory is None else Path(directory)
        self._found: dict[str, Tensor] = {}
        self._versions: tuple | None = None
        self._weights = ""
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(self._directory.glob("*.safetensors")):
                self._found.update(_safetensors().load_file(path))

    def __len__(self) -> int:
        return len(self._found)

    def __call__(
        self, *, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Tensor
    ) -> Tensor:
        """(B, C) features; every argument is (B, N), and goes to the backbone under its name.

        Raises:
            InvalidArgumentError: an input is not (B, N); the backbone is in training mode, features found or
                not; or a weight that trains shapes the features.
            MissingDependencyError: a directory was named, and safetensors is not installed.
        """
        self._check_mode()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": mask, **others}
        for name, value in inputs.items():
            if not isinstance(value, Tensor) or value.dim() != 2 or value.shape != input_ids.shape:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InvalidArgumentError(
                    name, shape, f"a tensor of the shape (B, N) {tuple(input_ids.shape)}"
                )
        keys = self._keys(inputs)
        missing = [row for row, key in enumerate(keys) if key not in self._found]
        missing = list({keys[row]: row for row in missing}.values())
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        if missing:
            self._compute([keys[row] for row in missing], {n: x[missing] for n, x in inputs.items()})
        return torch.stack([self._found[key] for key in keys]).to(input_ids.device)

    def _check_mode(self) -> None:
        if any(module.training for module in self.backbone.modules()):
            name = next(name for name, module in self.backbone.named_modules() if module.training)
            where = f"in training mode ({name})" if name else "in training mode"
            raise InvalidArgumentError(
                "backbone", where, "backbone.eval(): its dropout is drawn at every step"
            )

    def _compute(self, keys: list[str], inputs: dict[str, Tensor]) -> None:
        # With gradients on, as that shows whether a trained weight was part of it; if not, nothing is saved.
        with torch.enable_grad():
            computed = FEATURES[self.features](self.backbone(**inputs), inputs["attention_mask"] != 0)
        if computed.requires_grad:
            allowed = "one that is frozen as far as the features go: backbone.requires_grad_(False)"
            raise InvalidArgumentError("backbone", "one whose trained weights shape the features", allowed)
        rows = dict(zip(keys, computed.cpu().clone().unbind(0), strict=True))
        if self._directory is not None:
            name = hashlib.blake2b("".join(keys).encode(), digest_size=16).hexdigest()
            part = self._directory / f"{name}.{os.getpid()}.part"
            _safetensors().save_file({key: row.contiguous() for key, row in rows.items()}, part)
            part.replace(self._directory / f"{name}.safetensors")
        self._found.update(rows)

    def _keys(self, inputs: dict[str, Tensor]) -> list[str]:
        """One for each row."""
        model = f"{self._hash_of_weights()} {_arithmetic(inputs['input_ids'].device)}"
        mask = inputs["attention_mask"] != 0
        ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).tolist()
        contents = [(name, x.cpu()) for name, x in sorted(inputs.items())]
        keys = []
        for row, end in enumerate(ends):
            digest = hashlib.blake2b(model.encode(), digest_size=20)
            for name, x in contents:
                digest.update(f"{name} {x.dtype} {end} ".encode())
                digest.update(_bytes(x[row, :end]))
            keys.append(digest.hexdigest())
        return keys

    def _hash_of_weights(self) -> str:
        """Read again only when a tensor was replaced or modified in place, or the model was."""
        frozen = [(name, p) for name, p in self.backbone.named_parameters() if not p.requires_grad]
        tensors = [*frozen, *self.backbone.named_buffers()]
        versions = (
            repr(self.backbone),
            _configs(self.backbone),
            *((name, x.data_ptr(), x._version, x.dtype) for name, x in tensors),
        )
        if versions != self._versions:
            digest = hashlib.blake2b(digest_size=20)
            kind = type(self.backbone)
            digest.update(f"{kind.__module__}.{kind.__qualname__} {self.features}".encode())
            digest.update(f"{versions[:2]}".encode())
            for name, x in tensors:
                digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
                digest.update(_bytes(x))
            self._weights, self._versions = digest.hexdigest(), versions
        return self._weights


def _configs(model: nn.Module) -> tuple[str, ...]:
    """What transformers models are told beside their weights: heads, windows, activations."""
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "to_dict")}
    # Where a model came from, and by which version it was saved, changes nothing.
    origin = ("_name_or_path", "transformers_version")
    settings = [{k: v for k, v in config.to_dict().items() if k not in origin} for config in configs.values()]
    return tuple(json.dumps(each, sort_keys=True, default=str) for each in settings)


def _arithmetic(device: torch.device) -> str:
    """What autocast makes of the weights' dtypes."""
    if not torch.is_autocast_enabled(device.type):
        return ""
    return f"autocast {torch.get_autocast_dtype(device.type)}"


def _bytes(x: Tensor) -> memoryview:
    flat = x.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError("safetensors", "hf") from error
    return safetensors.torch
