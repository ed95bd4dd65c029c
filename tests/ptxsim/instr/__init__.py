"""One module per group of instructions; importing this package registers all of them."""

from . import (  # noqa: F401
    async_copy,
    barrier,
    compare,
    control,
    convert,
    floating,
    half,
    integer,
    matrix,
    memory_ops,
    warp,
    wgmma,
)
