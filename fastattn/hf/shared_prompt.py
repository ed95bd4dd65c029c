"""One prompt in front of many queries: computed once, held once, read once for the whole batch.

Plain in-context learning computes the demonstrations anew for every query, and a cached prefix is expanded to
the batch's size. Here a layer's keys and values of the prompt exist once; every query of the batch attends to
them in one pass over them (prefix_attention; Juravsky et al., "Hydragen", arXiv:2402.05099), so that B
queries of R tokens behind a prompt of P cost P + B R tokens of work rather than B (P + R). Results are those
of the plain concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutput

from ..errors import InvalidArgumentError, UnsupportedError
from . import packed_queries
from .packed_queries import Ids, PackedQueries
from .prompt_attention import KEYWORD, Branches, PromptPass
from .prompt_cache import PromptCache
from .prompt_model import check_positions, check_weights_unchanged, language_model, weights_state

_NOT_FOR_GENERATE = (
    "past_key_values",
    "use_cache",
    "cache_implementation",
    "inputs_embeds",
    "assistant_model",
    "prompt_lookup_num_tokens",
)


class SharedPrompt:
    """A prompt in front of every query to a patched causal language model.

    Args:
        model: a patched decoder with a language modelling head (transformers' own or in a peft LoRA model).
        prompt_ids: the prompt's tokens, (P,) or (1, P) int, or a list of them. Or, instead of it,
        prompt_embeds: (P, C) or (1, P, C), what stands in the place of token embeddings: a soft prompt.
        requires_grad: keep the prompt's graph, so that a backward pass through `forward` or `classify`
            reaches prompt_embeds and the model's trained weights through the prompt as well. One backward
            pass: make a new SharedPrompt for each training step. Without it the prompt is a constant.

    Attributes:
        keys, values: for each layer, (1, Hkv, P, D) as attention reads them.
        length: P.

    Raises:
        UnsupportedModelError: not a causal language model of a supported family.
        InvalidArgumentError: the model is not patched; no prompt; one longer than the model's positions; a
            constant prompt from a model in training mode, whose dropout would be frozen into it.
        UnsupportedError: gradient checkpointing, which keeps no keys and values, in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt_ids: Ids | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        requires_grad: bool = False,
    ):
        self._lm, self._base = language_model(model)
        if (prompt_ids is None) == (prompt_embeds is None):
            raise InvalidArgumentError("prompt_ids", "given with or without both", "it or prompt_embeds")
        if not requires_grad and self._lm.training:
            raise InvalidArgumentError(
                "model", "in training mode", "model.eval(), or requires_grad=True and a new prompt each step"
            )
        if requires_grad and not torch.is_grad_enabled():
            raise InvalidArgumentError("requires_grad", True, "False under torch.no_grad()")
        device = self._lm.get_input_embeddings().weight.device
        if prompt_embeds is None:
            self._ids = packed_queries.as_ids("prompt_ids", prompt_ids).to(device)
            inputs, self.length = {"input_ids": self._ids[None]}, len(self._ids)
        else:
            self._ids = None
            embeds = prompt_embeds if prompt_embeds.dim() == 3 else prompt_embeds[None]
            if embeds.dim() != 3 or embeds.shape[0] != 1 or embeds.shape[1] == 0:
                raise InvalidArgumentError(
                    "prompt_embeds", f"of shape {tuple(prompt_embeds.shape)}", "(P, C) or (1, P, C), P >= 1"
                )
            inputs, self.length = {"inputs_embeds": embeds}, embeds.shape[1]
        check_positions(self._lm, "prompt", self.length)
        self.requires_grad = requires_grad
        self._weights = weights_state(self._lm)
        with torch.set_grad_enabled(requires_grad):
            self._compute(inputs)

    def _compute(self, inputs: dict[str, Tensor]) -> None:
        cache = DynamicCache()
        # The last position's logits predict a query's first token.
        out = self._lm(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if cache.get_seq_length() != self.length:
            raise UnsupportedError(
                f"{type(self._lm).__name__} kept no keys and values of the prompt: gradient checkpointing in "
                "training mode drops them; model.gradient_checkpointing_disable()"
            )
        self.keys = tuple(layer.keys for layer in cache.layers)
        self.values = tuple(layer.values for layer in cache.layers)
        self._last_logits = out.logits[:, -1]  # (1, V)

    @property
    def nbytes(self) -> int:
        """Bytes of the prompt's keys and values: once, whatever the batch."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def forward(
        self,
        input_ids: Ids | Sequence[Ids] | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> CausalLMOutput:
        """The model's logits and loss for queries behind the prompt, as for prompt and query concatenated.

        Args:
            input_ids: (B, N) int with attention_mask, or a list of B queries of any lengths.
            attention_mask: (B, N), 0 at padding, wherever that lies; None: all are tokens.
            inputs_embeds: (B, N, C) in the place of input_ids. Differentiable.
            labels: (B, N) int; a token's label is what stands there, predicted from the token before, the
                first one's from the prompt. -100 is left out, as are the labels at padding.

        Returns:
            logits (B, N, V), zero at padding; loss, the mean cross-entropy over the labels, or None.

        Raises:
            InvalidArgumentError: malformed, a query without tokens, or weights that train while the prompt
                is a constant: their gradient through it would be missing.
        """
        self._check_constant_prompt()
        queries = packed_queries.pack(input_ids, attention_mask, inputs_embeds, self._device)
        logits = self._run(queries, torch.arange(queries.total, device=self._device))
        loss = None
        if labels is not None:
            targets = queries.gather("labels", labels)
            before = self._last_logits.expand(queries.batch, -1)
            predictors = torch.cat((logits, before))[queries.predecessors(queries.total)]
            loss = nn.functional.cross_entropy(predictors.float(), targets, ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=queries.pad(logits))

    __call__ = forward

    def classify(
        self, queries: Ids | Sequence[Ids], labels: Sequence[Ids], attention_mask: Tensor | None = None
    ) -> Tensor:
        """The log-likelihood of every label behind every query, all of them in one packed pass.

        A query's tokens are computed once, whatever the number of labels; a label of m tokens adds m - 1.

        Args:
            queries: (B, N) int with attention_mask, or a list of B queries of any lengths.
            labels: L verbalised labels, each one or more tokens; as text they continue a query.

        Returns:
            (B, L) float32: log p(label | prompt, query), summed over the label's tokens. Differentiable if
            the prompt was made with requires_grad=True; else computed without a graph.
        """
        if self._lm.training and not self.requires_grad:
            raise InvalidArgumentError("model", "in training mode", "model.eval() to classify")
        packed = packed_queries.pack(queries, attention_mask, None, self._device)
        names = [
            packed_queries.as_ids(f"labels[{i}]", label).to(self._device) for i, label in enumerate(labels)
        ]
        if not names:
            raise InvalidArgumentError("labels", "empty", "one label or more")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.requires_grad):
            return packed_queries.label_log_likelihoods(packed, names, self._run)

    @torch.no_grad()
    def generate(
        self, queries: Ids | Sequence[Ids], attention_mask: Tensor | None = None, **options
    ) -> Tensor:
        """transformers' `generate` behind the prompt: greedy, sampling or beams.

        Args:
            queries: (B, N) int with attention_mask, or a list of B queries of any lengths.
            options: as model.generate takes them, save those of the cache and of assisted decoding, which
                does not begin behind one. max_length and min_length count the prompt, except behind
                prompt_embeds.

        Returns:
            What model.generate returns: tokens (B, N + new), queries padded on the left, without the prompt.
        """
        if self._lm.training:
            raise InvalidArgumentError("model", "in training mode", "model.eval() to generate")
        for name in _NOT_FOR_GENERATE:
            if name in options:
                raise InvalidArgumentError(name, options[name], "nothing in generate behind a shared prompt")
        packed = packed_queries.pack(queries, attention_mask, None, self._device)
        pad = self._lm.generation_config.pad_token_id
        padded, mask = packed.left_padded(0 if pad is None else pad)
        ids, in_front = padded, 0
        if self._ids is not None:
            # What looks back at all tokens, such as a repetition penalty, shall see the prompt right before
            # the query. So padding goes in front of it, as tokens of the prompt: nothing reads them there.
            in_front = self.length
            ids = self._ids[:1].repeat(len(padded), in_front + padded.shape[1])
            for row, query in zip(ids, packed.ids.split(packed.lengths), strict=True):
                row[-in_front - len(query) :] = torch.cat((self._ids, query))
        mask = torch.cat((mask.new_ones(len(padded), self.length), mask), dim=1)
        check_positions(self._lm, "prompt and query", mask.shape[1])
        self._check_weights()
        cache = PromptCache(self.keys, self.values)
        out = self._lm.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        sequences = out if isinstance(out, Tensor) else out.sequences
        new = sequences[:, in_front + padded.shape[1] :]
        sequences = torch.cat((padded.repeat_interleave(len(new) // len(padded), 0), new), dim=1)
        if isinstance(out, Tensor):
            return sequences
        out.sequences = sequences
        return out

    @property
    def _device(self) -> torch.device:
        return self.keys[0].device

    def _run(self, queries: PackedQueries, keep: Tensor, branches: Branches | None = None) -> Tensor:
        """(len(keep), V): the logits of these tokens of a packed row behind the prompt."""
        self._check_weights()
        check_positions(self._lm, "prompt and query", self.length + int(queries.positions.max()) + 1)
        prompt = PromptPass(self.keys, self.values, branches)
        ones = torch.ones(1, queries.total, dtype=torch.bool, device=self._device)
        out = self._lm(
            **queries.inputs,
            attention_mask=ones,  # from position_ids alone transformers would build a mask of pairs of tokens
            position_ids=self.length + queries.positions[None],
            use_cache=False,
            logits_to_keep=keep,
            **queries.keywords,
            **{KEYWORD: prompt},
        )
        return out.logits[0]

    def _check_weights(self) -> None:
        check_weights_unchanged(self._lm, self._weights)

    def _check_constant_prompt(self) -> None:
        if torch.is_grad_enabled() and not self.requires_grad:
            trained = next((name for name, p in self._base.named_parameters() if p.requires_grad), None)
            if trained is not None:
                raise InvalidArgumentError(
                    "requires_grad",
                    False,
                    f"True while weights train ({trained} does): their gradient through the prompt would be "
                    "missing; or torch.no_grad(), or freeze them",
                )
