"""A launch with everything bound but its addresses and its seed.

Triton's JIT looks at each of some eighty arguments at every launch, which can take the host longer than a
small problem takes the GPU. All but the pointers follow from the problem and from how its tensors lie, so the
first launch goes through the JIT and the next ones go to the compiled kernel that it returned.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...log import log_once


class Launch:
    """`kernel` over `programs` programs. values: every argument but pointers and seed.

    fewer_stages: whether to make do with fewer pipeline stages where shared memory is short, or to raise.
    """

    __slots__ = ("_kernel", "_options", "_prepared", "_values", "fewer_stages", "programs")

    def __init__(self, kernel, programs: int, options: dict[str, object], values: dict[str, object]):
        self._kernel, self.programs, self._options, self._values = kernel, programs, options, values
        self.fewer_stages = True
        self._prepared: dict[tuple, tuple[Callable, tuple, tuple]] = {}

    def __call__(self, pointers: dict[str, Tensor | None], seed: int | None = None) -> None:
        """Launch. pointers: in the order of the kernel's parameters, which begin with them.

        seed: None for a kernel that takes none.
        """
        # What compiled code depends on besides the values: which pointers there are, and 16-byte alignment.
        kind = tuple([None if x is None else x.data_ptr() % 16 == 0 for x in pointers.values()])
        prepared = self._prepared.get(kind)
        if prepared is not None:
            run, before, after = prepared
            if seed is None:
                run(*pointers.values(), *before)
            else:
                run(*pointers.values(), *before, seed, *after)
            return
        seeds = {} if seed is None else {"seed": seed}
        grid = (self.programs, 1, 1)
        compiled = self._first(grid, pointers | seeds)
        if compiled is not None:  # the interpreter compiles nothing
            self._prepared[kind] = compiled[grid], *self._bound(list(pointers))

    def _first(self, grid: tuple[int, int, int], changing: dict[str, object]):
        """Launch through the JIT, with fewer stages where their tiles don't fit into shared memory."""
        from triton.runtime.errors import OutOfResources

        while True:
            try:
                return self._kernel[grid](**changing, **self._values, **self._options)
            except OutOfResources as error:
                stages = self._options["num_stages"]
                if error.name != "shared memory" or stages == 1 or not self.fewer_stages:
                    raise
                self._options = self._options | {"num_stages": stages - 1}
                log_once(
                    f"triton: {self._kernel.__name__} runs with {stages - 1} pipeline stages instead of "
                    f"{stages}, which would take {error.required} of {error.limit} bytes of shared memory"
                )

    def _bound(self, pointers: list[str]) -> tuple[tuple, tuple]:
        """The values before and after the seed, as the kernel's parameters stand."""
        names = self._kernel.arg_names
        assert names[: len(pointers)] == pointers, "pointers come first, in the kernel's order"
        rest = names[len(pointers) :]
        at = rest.index("seed") if "seed" in rest else len(rest)
        return (
            tuple(self._values[name] for name in rest[:at]),
            tuple(self._values[name] for name in rest[at + 1 :]),
        )
