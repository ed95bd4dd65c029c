"""Which tiles a kernel runs with: pure functions of the architecture and the shape of a head.

Architectures are CUDA compute capabilities as integers (80, 86, …), AMD names ("gfx942"), or "interpreter".
The reasons beside the entries are counts from compiled code (python -m fastattn.backends.triton.compile, and
the model of docs/performance-gpu.md), not timings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Arch = int | str
INTERPRETER = "interpreter"


def has_tf32(arch: Arch) -> bool:
    """Whether tl.dot takes TF32 there: all of NVIDIA's parts since sm_80, of AMD's gfx942 alone."""
    return isinstance(arch, int) or arch in ("gfx942", INTERPRETER)


@dataclass(frozen=True)
class TileConfig:
    """Query rows and keys of a tile, and how many warps and pipeline stages work on it.

    paired: the forward kernel takes key tiles two at a time where nothing is masked.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    paired: bool = False

    def options(self) -> dict[str, object]:
        """Launch options. Contraction is pinned because its default changes between Triton releases."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def __str__(self) -> str:
        keys = f"2x{self.block_n}" if self.paired else self.block_n
        return f"{self.block_m}x{keys}, {self.num_warps} warps, {self.num_stages} stages"


DELTA_TILES = TileConfig(32, 1, 4, 1)
ONE_WARP = TileConfig(1, 1, 1, 1)  # merging shares and joining diagonals: a program is a row or a block
# Small tiles let small tests meet many of them; one warp's size is the least tl.dot takes.
_INTERPRETED = TileConfig(32, 32, 4, 1)


def padded_dim(head_dim: int) -> int:
    """The power of two that a head dimension is padded to inside a tile; 16 is the least tl.dot takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def forward_config(
    arch: Arch,
    head_dim: int,
    head_dim_v: int,
    itemsize: int,
    shaped: bool = False,
    biased: bool = False,
    lean: bool = True,
    tf32: bool = False,
    dropout: bool = False,
) -> TileConfig:
    """Tiles of the forward kernel.

    shaped: whether anything but a window and a positive scale is done to the scores or weights.
    biased: whether tiles of a bias or relative_bias are loaded, which pass through shared memory too.
    lean: neither packed sequences nor a left edge of a window, whose bookkeeping takes registers.
    dropout: which is of the shaped, and makes Philox's numbers.
    """
    dim = padded_dim(max(head_dim, head_dim_v))
    if arch == INTERPRETER:
        return replace(_INTERPRETED, paired=dim >= 64 and not shaped)
    if isinstance(arch, str):
        return _amd_config(arch, "forward", dim, itemsize)
    if itemsize == 4:
        return _tf32_config("forward", dim) if tf32 else _fp32_config(dim)
    if dim <= 64:
        if dropout and not biased and arch == 90:
            # A draw of Philox serves eight keys of 128: 2.08 for 3.03. Below sm_90 128 keys spill.
            return TileConfig(128, 128, 8, 3)
        if shaped:
            return TileConfig(64, 64, 4, 3)  # what shapes the scores takes the registers of the taller tile
        # 32 query rows a warp share each key fragment: fewer shared-memory loads for each matrix instruction.
        return TileConfig(128, 64, 4, 3) if arch < 90 else TileConfig(128, 128, 8, 3)
    if dim <= 128:
        if arch in (90, 100):
            # 224 of 227 KiB of shared memory; shaped scores would spill 20 to 60 words an iteration. A window
            # spills in its masked loops, 2 words (packed, 28). 64 keys would spill none, and take 718 slots
            # for 537 where nothing is masked, 1344 for 1183 where something is (packed, 1354 for 1828).
            return TileConfig(128, 64, 8, 3) if shaped else TileConfig(128, 128, 8, 3)
        whole = head_dim == head_dim_v == dim
        if arch == 80 and lean and not shaped and whole:
            return TileConfig(128, 64, 8, 3, paired=True)  # 160 of 163 KiB; half the rescaling for each key
        # 96 KiB: what an 86, 89 or 120 has is 99. Tiles of a bias leave room for half the keys, two stages.
        if biased:
            return TileConfig(128, 32, 8, 2)
        # Masks of a padded head's columns take registers: 64 keys would spill up to 14 words an iteration.
        if not whole:
            return TileConfig(128, 32, 8, 3)
        # Philox leaves no registers for a third stage's addresses: 8 words an iteration, 1.01 for 0.95.
        return TileConfig(128, 64, 8, 2 if dropout else 3)
    if arch == 90 and not shaped:
        return TileConfig(128, 64, 8, 2)
    return TileConfig(64, 64, 8, 2) if arch in (80, 90, 100) else TileConfig(64, 32, 8, 2)


def dq_config(
    arch: Arch,
    head_dim: int,
    head_dim_v: int,
    itemsize: int,
    tf32: bool = False,
    bias: bool = False,
) -> TileConfig:
    """Tiles of the dq kernel, which holds a tile of q, dout and dq and streams k and v.

    bias: whether tiles of one are loaded (relative_bias costs less).
    """
    dim = padded_dim(max(head_dim, head_dim_v))
    if arch == INTERPRETER:
        return _INTERPRETED
    if isinstance(arch, str):
        return _amd_config(arch, "dq", dim, itemsize)
    if itemsize == 4:
        return _tf32_config("dq", dim) if tf32 else _fp32_config(dim)
    # Three stages load the next tile while this one is computed with; two would wait for each.
    if dim <= 64:
        if bias and arch not in (90, 100):
            return TileConfig(64, 32, 4, 3)  # 0.93; 64 keys count 0.97 and spill 6 to 15 words an iteration
        # Packed, with dropout, below sm_90, this spills 3 to 11 words an iteration, at 1.20. Kept: 32 keys
        # count 1.54, since a draw of Philox serves eight keys of 128; 32 rows of 128 keys count 1.07, but
        # read k and v twice as often, near to what the L2 cache can give.
        return TileConfig(64, 64, 4, 3)
    if dim <= 128:
        # 160 of 227 KiB; elsewhere 68, which fits the 99 of an 86, 89 or 120 as well.
        return TileConfig(128, 64, 8, 3) if arch in (90, 100) else TileConfig(64, 32, 4, 3)
    if arch in (90, 100):
        return TileConfig(
            128, 32, 8, 2
        )  # 64 rows for each warpgroup: with fewer the products are not wgmma's
    return TileConfig(64, 32, 8, 2) if arch == 80 else TileConfig(32, 32, 4, 2)


def dkdv_config(
    arch: Arch,
    head_dim: int,
    head_dim_v: int,
    itemsize: int,
    tf32: bool = False,
    bias: bool = False,
    dropout: bool = False,
    relative_bias: bool = False,
) -> TileConfig:
    """Tiles of the dk/dv kernel, which holds a tile of k, v, dk and dv and streams q and dout.

    bias, dropout: see dq_config and forward_config.
    """
    dim = padded_dim(max(head_dim, head_dim_v))
    if arch == INTERPRETER:
        return _INTERPRETED
    if isinstance(arch, str):
        return _amd_config(arch, "dkdv", dim, itemsize)
    if itemsize == 4:
        return _tf32_config("dkdv", dim) if tf32 else _fp32_config(dim)
    # Long key tiles, since every query tile streams past them; the widest query tile that spills nothing.
    if dim <= 64:
        if arch in (90, 100):
            # Packed with dropout, a third stage spills up to 3 words an iteration and counts 3.94 for 3.80.
            return TileConfig(64, 128, 8, 2 if dropout else 3)
        # Bias and dropout together: 128 keys count 2.41 for 2.29, and spill 7 words an iteration.
        return TileConfig(32, 64, 4, 3) if bias and dropout else TileConfig(32, 128, 8, 3)
    if dim <= 128:
        if arch in (90, 100):
            # Packed with relative_bias, a third stage spills 15 to 24 words an iteration: 1.23 for 1.09.
            return TileConfig(32, 128, 8, 2 if relative_bias else 3)
        # Eight warps share a tile of scores without computing any twice, as they would of 64x32: 1.5 times
        # the products. 105 KiB; elsewhere 72, which fits the 99 of an 86 or 89. Its causal loop would spill a
        # word on sm_120.
        return TileConfig(64, 64, 8, 3 if arch == 80 else 2) if arch < 120 else TileConfig(32, 64, 4, 3)
    # 66 KiB; 64 keys would take 100, one more than an 86, 89 or 120 has, and spill on the others.
    return TileConfig(16, 64, 8, 2) if arch == 80 else TileConfig(32, 32, 8, 2)


def bias_config(arch: Arch, head_dim: int, head_dim_v: int, itemsize: int) -> TileConfig:
    """Tiles of the bias gradient: square, so that a diagonal of tiles holds whole diagonals of scores."""
    if arch == INTERPRETER:
        return _INTERPRETED
    dim = padded_dim(max(head_dim, head_dim_v))
    if itemsize == 4 and dim > 128:
        return TileConfig(16, 16, 4, 1)  # q, k, v and dout at once: 64 KiB, as for the next line
    if itemsize == 4 or dim > 128:
        return TileConfig(32, 32, 4, 1)
    if isinstance(arch, str) and not arch.startswith("gfx9"):
        return TileConfig(64, 64, 8, 1) if dim <= 64 else TileConfig(32, 32, 8, 1)
    return TileConfig(64, 64, 4 if dim <= 64 else 8, 1)  # four warps would spill at 128


def decode_config(arch: Arch, rows: int, head_dim: int, head_dim_v: int, itemsize: int) -> TileConfig:
    """Tiles of a forward pass over few rows: the query rows of the heads that share a kv head."""
    if arch == INTERPRETER:
        return TileConfig(16, 32, 4, 1)
    dim = padded_dim(max(head_dim, head_dim_v))
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if isinstance(arch, str):
        return TileConfig(block_m, 32, 4, 2)
    # Reading the keys is all the work: stages to keep loads in flight.
    return TileConfig(block_m, 64 if dim * itemsize <= 256 else 32, 4, 3 if dim * itemsize <= 256 else 2)


FOLDED_ROWS = 64  # more rows than this fill a tile of one head well enough


def decode_splits(tiles: int, seqlen_k: int, processors: int) -> int:
    """Shares to split the keys into, so that `tiles` programs become enough for the processors.

    1 is no split.
    """
    wanted = 2 * processors // max(tiles, 1)
    return max(1, min(wanted, seqlen_k // 256, 64))


def _fp32_config(dim: int) -> TileConfig:
    # IEEE float32 has no matrix unit; its products live in registers, which larger tiles would spill.
    if dim <= 64:
        return TileConfig(32, 32, 4, 2)
    return TileConfig(16, 32, 4, 2) if dim <= 128 else TileConfig(16, 16, 4, 2)


def _tf32_config(kernel: str, dim: int) -> TileConfig:
    """Tiles that fit the 99 KiB of an 86, 89 or 120: elements have twice the bytes of float16's."""
    if kernel == "dkdv":  # 64 rows of 64 would spill 168 words an iteration on sm_80
        if dim <= 64:
            return TileConfig(32, 64, 8, 2)
        return TileConfig(32, 32, 4, 2) if dim <= 128 else TileConfig(16, 16, 4, 1)
    if dim <= 64:
        return TileConfig(64, 64 if kernel == "forward" else 32, 4, 2)
    if dim <= 128:
        return TileConfig(64 if kernel == "forward" else 32, 32, 4, 2)
    return TileConfig(32, 16, 4, 2) if kernel == "forward" else TileConfig(16, 32, 4, 1)


def _amd_config(arch: str, kernel: str, dim: int, itemsize: int) -> TileConfig:
    """64 KiB of local memory on all parts; one stage, because operands pass through registers anyway."""
    if itemsize == 4:
        return TileConfig(32, 32, 4, 1)
    if arch.startswith("gfx9"):
        if kernel == "dkdv":
            return TileConfig(32, 64, 4, 1) if dim <= 128 else TileConfig(32, 32, 4, 1)
        return TileConfig(64, 32, 4, 1) if dim <= 128 else TileConfig(32, 32, 4, 1)
    # RDNA holds each operand twice in 256 registers: eight warps, 16 rows to each. What still spills: the
    # backward kernels at 128, where no tile fits.
    if kernel == "dkdv":
        return TileConfig(16, 64, 8, 1) if dim <= 64 else TileConfig(16, 32, 8, 1)
    if dim <= 64:
        return TileConfig(128 if kernel == "forward" else 64, 32, 8, 1)
    return TileConfig(64, 32 if kernel == "forward" and dim <= 128 else 16, 8, 1)
