"""One module per group of instructions; importing this package registers all of them."""

from . import (  # noqa: F401
    async_copy,
    barrier,
    bulk,
    compare,
    control,
    convert,
    floating,
    half,
    integer,
    matrix,
    mbarrier,
    memory_ops,
    setmaxnreg,
    warp,
    wgmma,
)
