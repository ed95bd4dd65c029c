"""MultiHeadAttention: torch.nn.MultiheadAttention with the attention in between computed by fastattn."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import attention
from ..errors import InvalidArgumentError


class MultiHeadAttention(nn.MultiheadAttention):
    """Multi-head attention (Vaswani et al., arXiv:1706.03762), parameter for parameter nn.MultiheadAttention.

    It is one: same constructor, same parameters and names, so state_dicts pass in both directions. What
    differs is `forward` with need_weights=False, which never stores the weights. A query whose keys are all
    masked gives the output projection's bias, where torch may give NaN.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype: as for nn.MultiheadAttention. embed_dim / num_heads is at most 256.
        backend: as for fastattn.attention.
    """

    def __init__(self, embed_dim: int, num_heads: int, *args, backend: str = "auto", **kwargs):
        super().__init__(embed_dim, num_heads, *args, **kwargs)
        self.backend = backend

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, *, backend: str = "auto") -> MultiHeadAttention:
        """This module in place of torch's, with the very same parameters."""
        return _with_parameters_of(module, cls, backend=backend)

    def to_torch(self) -> nn.MultiheadAttention:
        """Torch's module in place of this one, with the very same parameters."""
        return _with_parameters_of(self, nn.MultiheadAttention)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention between projections, as nn.MultiheadAttention documents it.

        Args:
            query: (L, N, E); (N, L, E) with batch_first; (L, E) unbatched.
            key: (S, N, kdim), laid out as query is.
            value: (S, N, vdim), laid out as query is.
            key_padding_mask: (N, S) or, unbatched, (S,). Bool, True = ignore the key; or float, added to its
                scores.
            need_weights: True returns the attention weights as well, which takes torch's own path and its O(L
                S) memory, with one warning. False is the fused one.
            attn_mask: (L, S) or (N * num_heads, L, S). Bool, True = may not attend; or float, added to the
                scores.
            average_attn_weights: whether weights are averaged over heads.
            is_causal: a promise that attn_mask is the causal mask, which then need not be read. Without
                attn_mask, the causal mask itself, where L = S.

        Returns:
            (output, weights): output like query; weights None unless need_weights.

        Raises:
            InvalidArgumentError: masks of a wrong shape or dtype.
            As fastattn.attention.
        """
        if need_weights:
            warnings.warn(
                "need_weights=True stores all attention weights and is not fused; pass need_weights=False",
                stacklevel=2,
            )
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = _transpose_together(query, key, value)
        output = self._attend(query, key, value, key_padding_mask, attn_mask, is_causal)
        if not batched:
            return output[0], None
        return output if self.batch_first else output.transpose(0, 1), None

    def _attend(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> Tensor:
        """forward of (N, L, E) tensors."""
        batch, length, _ = query.shape
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        extra = k.shape[2] - key.shape[1]
        causal = is_causal and extra == 0 and length == key.shape[1]
        if is_causal and attn_mask is None and not causal:
            allowed = "with attn_mask, unless L = S and there are neither add_bias_kv nor add_zero_attn"
            raise InvalidArgumentError("is_causal", True, allowed)
        bias = None if causal else self._bias_of_mask(attn_mask, batch, length, key.shape[1], q.dtype)
        key_mask, padding_bias = _padding(key_padding_mask, batch, key.shape[1], q.dtype)
        if padding_bias is not None:
            bias = padding_bias if bias is None else bias + padding_bias
        if extra:
            key_mask = None if key_mask is None else F.pad(key_mask, (0, extra), value=True)
            bias = None if bias is None else F.pad(bias, (0, extra), value=0.0)
        out = attention(
            q,
            k,
            v,
            causal=causal,
            key_mask=key_mask,
            bias=bias,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, self.embed_dim))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._qkv_same_embed_dim and query is key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, E) as (N, H, L, D)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _extended(self, x: Tensor, learned: Tensor | None) -> Tensor:
        """Keys or values (N, H, S, D) with those of add_bias_kv and add_zero_attn behind them."""
        if learned is not None:
            learned = self._heads(learned).to(x.dtype).expand(x.shape[0], -1, -1, -1)
            x = torch.cat([x, learned], dim=2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _bias_of_mask(
        self, attn_mask: Tensor | None, batch: int, length: int, source: int, dtype: torch.dtype
    ) -> Tensor | None:
        """attn_mask as a bias of four dimensions."""
        if attn_mask is None:
            return None
        per_head = (batch * self.num_heads, length, source)
        if tuple(attn_mask.shape) not in ((length, source), per_head):
            value, allowed = f"of shape {tuple(attn_mask.shape)}", f"{per_head[1:]} or {per_head}"
            raise InvalidArgumentError("attn_mask", value, allowed)
        bias = _as_bias("attn_mask", attn_mask, dtype)
        if bias.dim() == 2:
            return bias[None, None]
        return bias.view(batch, self.num_heads, length, source)


def _transpose_together(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first two dimensions swapped; what was one tensor stays one."""
    swapped = {id(x): x.transpose(0, 1) for x in (query, key, value)}
    return swapped[id(query)], swapped[id(key)], swapped[id(value)]


def _padding(
    mask: Tensor | None, batch: int, source: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """key_padding_mask as (key_mask, bias), of which at most one is there."""
    if mask is None:
        return None, None
    if tuple(mask.shape) != (batch, source):
        value = f"of shape {tuple(mask.shape)}"
        raise InvalidArgumentError("key_padding_mask", value, f"(N, S) = {(batch, source)}")
    if mask.dtype == torch.bool:
        return ~mask, None
    return None, _as_bias("key_padding_mask", mask, dtype)[:, None, None, :]


def _as_bias(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of torch's two kinds as what is added to the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise InvalidArgumentError(name, f"of {mask.dtype}", "bool (True = masked) or floating point (added)")
    return mask


def _with_parameters_of(module: nn.MultiheadAttention, kind: type, **more) -> nn.MultiheadAttention:
    built = kind(
        module.embed_dim,
        module.num_heads,
        dropout=module.dropout,
        bias=module.in_proj_bias is not None,
        add_bias_kv=module.bias_k is not None,
        add_zero_attn=module.add_zero_attn,
        kdim=module.kdim,
        vdim=module.vdim,
        batch_first=module.batch_first,
        device="meta",
        **more,
    )
    built.load_state_dict(module.state_dict(keep_vars=True), assign=True)
    return built.train(module.training)
