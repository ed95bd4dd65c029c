"""Queries one after another in a single row, however the caller padded them, and labels behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from .prompt_attention import Branches

Ids = Tensor | Sequence[int]


@dataclass(frozen=True)
class PackedQueries:
    """B queries without padding: a row of T tokens, and where they came from."""

    ids: Tensor | None  # int64 (T,), or
    embeds: Tensor | None  # (T, C)
    lengths: tuple[int, ...]  # of every sequence in the row
    positions: Tensor  # int64 (T,): counted behind the prompt
    rows: Tensor | None = (
        None  # int64 (T,): place of each token in the caller's (B, N); None: a list of queries
    )

    padded_shape: tuple[int, int] | None = None

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        return len(self.positions)

    @property
    def inputs(self) -> dict[str, Tensor]:
        if self.ids is None:
            return {"inputs_embeds": self.embeds[None]}
        return {"input_ids": self.ids[None]}

    @property
    def keywords(self) -> dict:
        """How transformers tells attention of packed sequences."""
        offsets = offsets_of(self.lengths, self.positions.device)
        longest = max(self.lengths)
        return {
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def predecessors(self, in_front: int) -> Tensor:
        """(T,): the token before each one; in_front + b for the first of query b."""
        before = torch.arange(self.total, device=self.positions.device) - 1
        starts = offsets_of(self.lengths, before.device)[:-1].long()
        before[starts] = in_front + torch.arange(self.batch, device=before.device)
        return before

    def gather(self, name: str, values: Tensor) -> Tensor:
        """(T,): the entries of a (B, N) tensor at the tokens."""
        shape = self.padded_shape
        if not isinstance(values, Tensor) or tuple(values.shape) != shape:
            raise InvalidArgumentError(name, f"of shape {tuple(getattr(values, 'shape', ()))}", f"{shape}")
        return values.to(self.positions.device).reshape(-1)[self.rows]

    def pad(self, packed: Tensor) -> Tensor:
        """(T, V) -> (B, N, V), zero where there is no token"""
        batch, seqlen = self.padded_shape
        zeros = packed.new_zeros(batch * seqlen, packed.shape[1])
        return zeros.index_copy(0, self.rows, packed).view(batch, seqlen, -1)

    def left_padded(self, pad_id: int) -> tuple[Tensor, Tensor]:
        """(B, N) ids and mask with every query at the right end, N the longest's length."""
        longest = max(self.lengths)
        ids = self.ids.new_full((self.batch, longest), pad_id)
        mask = torch.zeros_like(ids)
        for row, query in enumerate(self.ids.split(self.lengths)):
            ids[row, longest - len(query) :], mask[row, longest - len(query) :] = query, 1
        return ids, mask


def pack(
    queries: Ids | Sequence[Ids] | None, mask: Tensor | None, embeds: Tensor | None, device: torch.device
) -> PackedQueries:
    """From (B, N) ids or (B, N, C) embeddings with a mask, or from a list of B queries of any lengths."""
    if (queries is None) == (embeds is None):
        raise InvalidArgumentError("input_ids", "given with or without both", "it or inputs_embeds")
    if embeds is None and not isinstance(queries, Tensor):
        if mask is not None:
            raise InvalidArgumentError(
                "attention_mask", "given with a list of queries", "None: lists have no padding"
            )
        if len(queries) == 0:
            raise InvalidArgumentError("queries", "empty", "one query or more")
        parts = [as_ids(f"queries[{i}]", query).to(device) for i, query in enumerate(queries)]
        lengths = tuple(map(len, parts))
        mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        return _packed(torch.cat(parts), None, mask, lengths)
    given, dims = (queries, 2) if embeds is None else (embeds, 3)
    if given.dim() != dims or 0 in given.shape[:2]:
        raise InvalidArgumentError(
            "queries", f"of shape {tuple(given.shape)}", "(B, N) ids or (B, N, C) embeddings"
        )
    given = given.to(device)
    shape = given.shape[:2]
    mask = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.to(device) != 0
    if mask.shape != shape:
        raise InvalidArgumentError("attention_mask", f"of shape {tuple(mask.shape)}", f"{tuple(shape)}")
    lengths = tuple(mask.sum(1).tolist())
    if 0 in lengths:
        raise InvalidArgumentError(
            "queries", f"without a token in row {lengths.index(0)}", "one token or more each"
        )
    tokens = given[mask]
    return _packed(*((tokens.long(), None) if embeds is None else (None, tokens)), mask, lengths)


def _packed(
    ids: Tensor | None, embeds: Tensor | None, mask: Tensor, lengths: tuple[int, ...]
) -> PackedQueries:
    positions = (mask.cumsum(1) - 1)[mask]
    return PackedQueries(
        ids, embeds, lengths, positions, mask.flatten().nonzero().squeeze(1), tuple(mask.shape)
    )


def as_ids(name: str, value: Ids) -> Tensor:
    """(N,) int64 from a tensor (N,) or (1, N), or a sequence of ints, of one token or more."""
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or len(ids) == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        said = f"of shape {tuple(ids.shape)}, {ids.dtype}" if isinstance(value, Tensor) else repr(value)
        raise InvalidArgumentError(name, said, "token ids, one or more")
    return ids.long()


def offsets_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int32 (len + 1,)"""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def label_log_likelihoods(queries: PackedQueries, labels: Sequence[Tensor], run: Callable) -> Tensor:
    """(B, L): log p(label | query) from one pass over the queries with every label behind each.

    run(queries, keep, branches) gives the logits (len(keep), V) of these tokens of the row. A label's first
    token is predicted from the query's end; its last is only predicted, so it is not in the row.
    """
    device, batch = queries.positions.device, queries.batch
    inner = [len(label) - 1 for label in labels]  # tokens in the row
    ends = torch.tensor(queries.lengths, device=device).cumsum(0) - 1
    trunk_lengths, trunk_tokens = queries.lengths, queries.total
    branches = None
    keep = ends
    if any(inner):
        tails = torch.cat([label[:-1] for label in labels])
        steps = torch.cat([torch.arange(n, device=device) for n in inner])
        starts = torch.tensor(trunk_lengths, device=device)[:, None]
        branch_tokens = len(tails)
        branches = Branches(
            trunk_tokens,
            offsets_of(trunk_lengths, device),
            max(trunk_lengths),
            offsets_of([branch_tokens] * batch, device),
            branch_tokens,
        )
        queries = PackedQueries(
            torch.cat((queries.ids, tails.repeat(batch))),
            None,
            (*trunk_lengths, *([n for n in inner if n] * batch)),
            torch.cat((queries.positions, (starts + steps).flatten())),
        )
        keep = torch.cat((ends, torch.arange(trunk_tokens, queries.total, device=device)))
    logs = run(queries, keep, branches).float().log_softmax(-1)
    first = logs[:batch, torch.stack([label[0] for label in labels])]  # (B, L)
    if branches is None:
        return first
    targets = torch.cat([label[1:] for label in labels])
    inner_logs = logs[batch:].view(batch, len(targets), -1)
    rest = inner_logs.gather(2, targets.expand(batch, -1)[..., None]).squeeze(2)  # (B, tokens)
    owner = torch.repeat_interleave(
        torch.arange(len(labels), device=device), torch.tensor(inner, device=device)
    )
    return first.index_add(1, owner, rest)
