"""What a backend is. Each lives in a folder of its own and gives a module-level object `backend`.

A backend computes; it neither validates nor allocates outputs nor knows of autograd. By the time it is
called, `problem.py` has checked every shape, dtype and device, and `ops.py` has made the last dimension of q,
k, v, out and dout contiguous, converted relative_bias and alibi_slopes to contiguous fp32 and allocated what
is to be written. So a backend is a few methods over tensors, and what it wraps can be a C library or a Triton
kernel alike.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..problem import AttentionInputs, AttentionProblem


class Gradients(NamedTuple):
    """Where backward writes. None means: not wanted, and its work is to be left out.

    All are uninitialised memory (a backend that accumulates zeroes them first) and must be written
    completely, rows of masked or empty sequences included. dq, dk, dv have the shapes and dtype of q, k, v
    and unit last stride; dk and dv are summed over the query heads that share a kv head. dbias is fp32,
    contiguous, of the bias's own shape: summed over the axes it is broadcast on. drelative_bias is fp32,
    contiguous, of relative_bias's shape.
    """

    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dbias: Tensor | None = None
    drelative_bias: Tensor | None = None


@runtime_checkable
class Backend(Protocol):
    """One way to compute attention on one kind of device."""

    name: str
    """What `backend=` calls it: "cpu", "triton", "cuda"."""

    def status(self) -> str | None:
        """None when the backend can run on this machine, else the reason it can't and what to do, in one
        sentence.

        Cheap after the first call, starts no thread, initialises no device before it is asked for the first
        time.
        """
        ...

    def details(self) -> list[str]:
        """Lines for `fastattn doctor`: what this installation has, and which device it serves.

        Asked also where status() has a reason; empty where there is nothing to say.
        """
        ...

    def supports(self, problem: AttentionProblem) -> str | None:
        """None when `problem` can be computed, else the reason it is refused, in one sentence.

        Is asked only of an available backend, once per problem (dispatch remembers). `problem.need_grad` says
        whether backward will follow, so a backend without some backward refuses here and nowhere later.
        """
        ...

    def kernel(self, problem: AttentionProblem) -> str:
        """The kernel that would run, for people reading explain(): instruction set or architecture, tiles."""
        ...

    def forward(
        self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor | None
    ) -> None:
        """Write attention into `out`, and the log-sum-exp of each row into `lse` unless that is None.

        out: like q with head_dim_v instead of head_dim, unit last stride, any other strides.
        lse: fp32 contiguous, natural log; (B, Hq, Nq), or (Hq, total_q) in the packed layout.
        A row that sees no key gives out = 0 and lse = -inf. Rows of the packed layout beyond cu_seqlens_q[-1]
        are set to 0 and -inf too. inputs.seed is on the CPU or on the problem's device; its 64 bits are the
        Philox key.
        """
        ...

    def backward(
        self,
        problem: AttentionProblem,
        inputs: AttentionInputs,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        gradients: Gradients,
    ) -> None:
        """Write the gradients that are not None, given what forward returned and what reached it.

        dout: out's shape and dtype, unit last stride. dlse: fp32 contiguous, lse's shape, or None for zeros.
        """
        ...
