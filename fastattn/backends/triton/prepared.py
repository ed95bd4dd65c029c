"""A launch with everything bound but its addresses and its seed.

Triton's JIT looks at each of some eighty arguments at every launch, which can take the host longer than a
small problem takes the GPU. All but the pointers follow from the problem and from how its tensors lie, so the
first launch goes through the JIT and the next ones go to the compiled kernel that it returned. Other lengths
(a sequence that grows while it is decoded) bring other numbers to the same code, past the JIT too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ...log import log_once

_compiled: dict[tuple, object] = {}  # what the JIT returned, by all that its code depends on


class Launch:
    """`kernel` over `programs` programs, along one axis or three.

    values: every argument but pointers and seed.
    fewer_stages: whether to make do with fewer pipeline stages where shared memory is short, or to raise.
    """

    __slots__ = ("_code", "_grid", "_kernel", "_options", "_prepared", "_values", "fewer_stages", "programs")

    def __init__(
        self,
        kernel,
        programs: int | tuple[int, int, int],
        options: dict[str, object],
        values: dict[str, object],
    ):
        self._kernel, self._options, self._values = kernel, options, values
        self._grid = (programs, 1, 1) if isinstance(programs, int) else programs
        self.programs = math.prod(self._grid)
        self.fewer_stages = True
        self._prepared: dict[tuple, tuple[Callable, tuple, tuple]] = {}
        switches = tuple([item for item in values.items() if item[0].isupper()])
        wide = tuple([name for name, x in values.items() if isinstance(x, int) and x.bit_length() > 31])
        self._code = id(kernel), tuple(options.items()), switches, wide  # kernels live as long as the process

    def __call__(self, pointers: dict[str, Tensor | None], seed: int | None = None) -> None:
        """Launch. pointers: in the order of the kernel's parameters, which begin with them.

        seed: None for a kernel that takes none.
        """
        # What compiled code depends on besides the values: which pointers there are, and 16-byte alignment.
        kind = tuple([None if x is None else x.data_ptr() % 16 == 0 for x in pointers.values()])
        prepared = self._prepared.get(kind)
        if prepared is None:
            code = (self._code, kind, *map(_kind_of_memory, pointers.values()))
            compiled = _compiled.get(code)
            if compiled is None:
                compiled = self._first(pointers if seed is None else pointers | {"seed": seed})
                if compiled is not None:  # the interpreter compiles nothing
                    _compiled[code] = compiled
                    self._prepare(kind, compiled, list(pointers))
                return
            prepared = self._prepare(kind, compiled, list(pointers))
        run, before, after = prepared
        if seed is None:
            run(*pointers.values(), *before)
        else:
            run(*pointers.values(), *before, seed, *after)

    def _first(self, changing: dict[str, object]):
        """Launch through the JIT, with fewer stages where their tiles don't fit into shared memory."""
        from triton.runtime.errors import OutOfResources

        while True:
            try:
                return self._kernel[self._grid](**changing, **self._values, **self._options)
            except OutOfResources as error:
                stages = self._options["num_stages"]
                if error.name != "shared memory" or stages == 1 or not self.fewer_stages:
                    raise
                self._options = self._options | {"num_stages": stages - 1}
                log_once(
                    f"triton: {self._kernel.__name__} runs with {stages - 1} pipeline stages instead of "
                    f"{stages}, which would take {error.required} of {error.limit} bytes of shared memory"
                )

    def _prepare(self, kind: tuple, compiled, pointers: list[str]) -> tuple[Callable, tuple, tuple]:
        """Keep for `kind`: the compiled kernel over these programs, the values before and after the seed."""
        names = self._kernel.arg_names
        assert names[: len(pointers)] == pointers, "pointers come first, in the kernel's order"
        rest = names[len(pointers) :]
        at = rest.index("seed") if "seed" in rest else len(rest)
        before = tuple(self._values[name] for name in rest[:at])
        after = tuple(self._values[name] for name in rest[at + 1 :])
        self._prepared[kind] = compiled[self._grid], before, after
        return self._prepared[kind]


def _kind_of_memory(x: Tensor | None) -> tuple | None:
    """What else compiled code depends on; for AMD also whether 32 bits reach everywhere in it."""
    return None if x is None else (x.dtype, x.device, x.untyped_storage().nbytes() < 2**31)


def forget() -> None:
    """Compile anew: for tests that put something in a driver's place."""
    _compiled.clear()
