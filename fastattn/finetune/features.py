"""A classifier's head on features of its frozen backbone that are computed once for each text."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastattn.finetune.errors import UserInputError
from fastattn.frozen import FeatureCache

__all__ = ["CachedHead"]

KINDS = ("first", "last", "mean")  # the one that a head reads shows by its logits
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the largest logit; wrong features are off by it


class CachedHead:
    """The logits of a classifier whose backbone is frozen, from a FeatureCache.

    The model's own code runs its head: with one position a text, its features, in the place of the backbone.

    Args:
        model: a sequence classifier; its backbone goes to eval mode, and is to stay there.
        directory: of the FeatureCache.
        inputs: a batch to find out on what the head reads of the backbone's output.

    Raises:
        UserInputError: no one position, nor their mean, gives the model's logits.
    """

    def __init__(self, model: nn.Module, directory: str, inputs: dict[str, Tensor]):
        self.model = model
        if model.config.is_encoder_decoder:
            raise self._refusal(f"{type(model).__name__} has two stacks")
        if model.base_model is model:
            raise self._refusal(f"{type(model).__name__} has no backbone of its own")
        self.freeze_dropout()
        before = model.training
        model.eval()
        with torch.no_grad():
            expected = model(**inputs).logits
            for kind in KINDS:
                self.cache = self._open(kind, directory)
                found = self.logits(inputs)
                scale = TOLERANCE.get(model.base_model.dtype, 5e-2) * expected.abs().max()
                if found.shape == expected.shape and (found - expected).abs().max() <= scale:
                    break
            else:
                raise self._refusal(f"the head of {type(model).__name__} reads more than one position a text")
        model.train(before)
        self.freeze_dropout()

    def freeze_dropout(self) -> None:
        """The backbone's, after model.train(); the head's own dropout stays."""
        self.model.base_model.eval()

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, classes), as model(**inputs).logits with the backbone in eval mode."""
        model, name = self.model, self.model.base_model_prefix
        features = self.cache(**inputs)[:, None]
        backbone = getattr(model, name)
        # Any token but padding, for heads that look for the last one.
        ids = torch.full(features.shape[:2], int(model.config.pad_token_id == 0))
        setattr(model, name, _Found(backbone, features))
        try:
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        finally:
            setattr(model, name, backbone)

    def _open(self, kind: str, directory: str) -> FeatureCache:
        try:
            return FeatureCache(self.model.base_model, features=kind, directory=directory)
        except (OSError, SafetensorError) as error:  # it cannot be made, or holds a broken file of features
            raise self._refusal(f"{directory} cannot be used: {error}") from error

    @staticmethod
    def _refusal(reason: str) -> UserInputError:
        return UserInputError(f"--feature-cache: {reason}")


class _Found(nn.Module):
    """Returns what a backbone would, but for one position a text. Its pooler trains with the head."""

    def __init__(self, backbone: nn.Module, features: Tensor):
        super().__init__()
        self.backbone, self.features = backbone, features

    def forward(self, *args, **kwargs):
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

        pooled, pooler = None, getattr(self.backbone, "pooler", None)
        if isinstance(pooler, nn.Linear):  # ALBERT's
            pooled = self.backbone.pooler_activation(pooler(self.features[:, 0]))
        elif pooler is not None:
            pooled = pooler(self.features)
        return Output(last_hidden_state=self.features, pooler_output=pooled)
