"""Compiles the kernels without a GPU: `python -m fastattn.backends.triton.compile --help`.

For every kernel, architecture and head dimension it writes the code (PTX and cubin, or AMD's assembly and
hsaco) and an index.json with registers, spills, shared memory, matrix instructions, the widths of global
loads, the cost model of sass.py for the main loop, and the parameters in the order of the launch.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from . import configs, sass
from .backward import delta_kernel
from .bias_backward import dbias_kernel, join_diagonals_kernel
from .configs import Arch, TileConfig
from .decode import merge_kernel
from .forward import forward_kernel
from .key_gradient import dkdv_kernel
from .query_gradient import dq_kernel

KERNELS = {
    "forward": forward_kernel,
    "decode": forward_kernel,
    "merge": merge_kernel,
    "delta": delta_kernel,
    "dq": dq_kernel,
    "dkdv": dkdv_kernel,
    "dbias": dbias_kernel,
    "drelative_bias": dbias_kernel,
    "join_diagonals": join_diagonals_kernel,
}
FEATURES = ("left", "right", "key_mask", "bias", "relative_bias", "alibi", "softcap", "dropout", "packed")
ARCHITECTURES: tuple[Arch, ...] = (80, 86, 89, 90, 100, 120, "gfx90a", "gfx942", "gfx1100")

# KiB of shared memory a block may have, KiB a multiprocessor has, and the warps and blocks it holds.
_SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
_SHARED_OF_SM = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
_WARPS_OF_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
_BLOCKS_OF_SM = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
_AMD_SHARED_LIMIT = 64

_ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}
_POINTER_TYPES = {
    "p_lse": "*fp32",
    "p_delta": "*fp32",
    "p_dlse": "*fp32",
    "p_parts": "*fp32",
    "p_parts_lse": "*fp32",
    "p_dbias": "*fp32",
    "p_drelative": "*fp32",
    "p_key_mask": "*i32",
    "p_relative_bias": "*fp32",
    "p_alibi": "*fp32",
    "p_cu_q": "*i32",
    "p_cu_k": "*i32",
    "p_seed": "*i64",
}
_OPTIONAL_POINTERS = {
    "p_key_mask": "key_mask",
    "p_bias": "bias",
    "p_relative_bias": "relative_bias",
    "p_alibi": "alibi",
    "p_cu_q": "packed",
    "p_cu_k": "packed",
    "p_seed": "seed_on_device",
    "p_dlse": "dlse",
}
_SCALAR_TYPES = {"scale": "fp32", "softcap": "fp32", "keep_scale": "fp32", "seed": "u64"}


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel. features: of FEATURES, or "grouped", "dlse", "seed_on_device"."""

    kernel: str
    arch: Arch
    head_dim: int
    dtype: str = "fp16"
    features: frozenset[str] = frozenset()
    head_dim_v: int | None = None
    align: int | None = None  # elements; None: 16 bytes
    precision: str = "ieee"
    want_dk: bool = True
    want_dv: bool = True
    config: TileConfig | None = None  # None: what configs.py says

    @property
    def name(self) -> str:
        arch = self.arch if isinstance(self.arch, str) else f"sm{self.arch}"
        dims = f"d{self.head_dim}" + (f"v{self.head_dim_v}" if self.head_dim_v else "")
        parts = [self.kernel, arch, self.dtype, dims, *sorted(self.features)]
        if self.kernel == "dkdv" and not (self.want_dk and self.want_dv):
            parts.append("dk" if self.want_dk else "dv")
        return "-".join(parts)

    def tiles(self) -> TileConfig:
        if self.config is not None:
            return self.config
        shape = (self.head_dim, self.head_dim_v or self.head_dim, _ITEMSIZE[self.dtype])
        tf32 = self.precision == "tf32"
        if self.kernel == "decode":
            return configs.decode_config(self.arch, 8, *shape)
        bias, relative, dropout = (x in self.features for x in ("bias", "relative_bias", "dropout"))
        if self.kernel == "forward":
            shaped = bool(self.features - {"left", "right", "packed", "grouped"})
            biased = bias or relative
            lean = not self.features & {"left", "packed"}
            return configs.forward_config(self.arch, *shape, shaped, biased, lean, tf32, dropout)
        if self.kernel == "dq":
            return configs.dq_config(self.arch, *shape, tf32, bias)
        if self.kernel == "dkdv":
            return configs.dkdv_config(self.arch, *shape, tf32, bias, dropout, relative)
        if self.kernel in ("dbias", "drelative_bias"):
            return configs.bias_config(self.arch, *shape)
        return configs.DELTA_TILES if self.kernel == "delta" else configs.ONE_WARP

    def constants(self) -> dict[str, object]:
        """The constexpr arguments, and the optional pointers that are absent."""
        tiles = self.tiles()
        head_dim_v = self.head_dim_v or self.head_dim
        features = self.features
        values = {
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": head_dim_v,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK": configs.bias_config(self.arch, self.head_dim, head_dim_v, _ITEMSIZE[self.dtype]).block_m,
            "BLOCK_D": configs.padded_dim(self.head_dim),
            "BLOCK_DV": configs.padded_dim(head_dim_v),
            "ALIGN": self.align or 16 // _ITEMSIZE[self.dtype],
            "FAR": False,
            "PRECISION": self.precision,
            "FOLD_HEADS": self.kernel == "decode",
            "SPLIT": self.kernel == "decode",
            "POSITIVE_SCALE": True,
            "PAIRED": tiles.paired,
            "WANT_DK": self.want_dk,
            "WANT_DV": self.want_dv,
            "GROUPED": "grouped" in features,
            "BIAS_ALIGN": 16 // _ITEMSIZE[self.dtype],
            "DIAGONAL": self.kernel == "drelative_bias",
            "REDUCE_Q": False,
            "REDUCE_K": False,
            "PACKED": "packed" in features,
        } | {f"HAS_{name.upper()}": name in features for name in FEATURES if name != "packed"}
        names = KERNELS[self.kernel].arg_names
        absent = {name for name, feature in _OPTIONAL_POINTERS.items() if feature not in features}
        if self.kernel == "dkdv":
            absent |= {"p_dk"} if not self.want_dk else set()
            absent |= {"p_dv"} if not self.want_dv else set()
        return {n: values[n] for n in names if n.isupper()} | {n: None for n in names if n in absent}

    def signature(self) -> dict[str, str]:
        """Name and type of each parameter that is passed at a launch, in order."""
        constants = self.constants()
        types = {}
        for name in KERNELS[self.kernel].arg_names:
            if name in constants:
                continue
            if name.startswith("p_"):
                partial_out = self.kernel == "decode" and name == "p_out"
                types[name] = "*fp32" if partial_out else _POINTER_TYPES.get(name, f"*{self.dtype}")
            else:
                types[name] = _SCALAR_TYPES.get(name, "i32")
        return types


def build(variant: Variant) -> CompiledKernel:
    """Compile for a device that need not be there. Pointers are taken to be 16-byte aligned."""
    kernel = KERNELS[variant.kernel]
    types, constants = variant.signature(), variant.constants()
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attrs = {(i,): aligned for i, name in enumerate(kernel.arg_names) if types.get(name, "").startswith("*")}
    if isinstance(variant.arch, int):
        target = GPUTarget("cuda", variant.arch, 32)
    else:
        target = GPUTarget("hip", variant.arch, 32 if variant.arch.startswith("gfx1") else 64)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=target, options=variant.tiles().options())


def statistics(variant: Variant, compiled: CompiledKernel) -> dict[str, object]:
    """What index.json says of a kernel."""
    tiles = variant.tiles()
    entry = {
        "name": variant.name,
        "kernel": variant.kernel,
        "arch": variant.arch,
        "dtype": variant.dtype,
        "head_dim": variant.head_dim,
        "head_dim_v": variant.head_dim_v or variant.head_dim,
        "features": sorted(variant.features),
        "tiles": str(tiles),
        "num_warps": tiles.num_warps,
        "shared_bytes": compiled.metadata.shared,
        "signature": [list(item) for item in variant.signature().items()],
    }
    return entry | (_nvidia(variant, compiled) if isinstance(variant.arch, int) else _amd(variant, compiled))


def _nvidia(variant: Variant, compiled: CompiledKernel) -> dict[str, object]:
    cubin, arch = compiled.asm["cubin"], variant.arch
    text = sass.disassemble(cubin)
    used = sass.resources(cubin)
    loop = sass.main_loop(text, arch)
    loads = re.findall(r"\bLDG(?:STS)?\.[\w.]+", text)
    warps = variant.tiles().num_warps
    registers = -(-used["registers"] // 8) * 8
    shared = compiled.metadata.shared
    blocks = min(
        65536 // (registers * 32 * warps),
        _SHARED_OF_SM[arch] * 1024 // (shared + 1024),
        _WARPS_OF_SM[arch] // warps,
        _BLOCKS_OF_SM[arch],
    )
    return used | {
        "shared_limit": _SHARED_LIMIT[arch] * 1024,
        "occupancy": round(blocks * warps / _WARPS_OF_SM[arch], 3),
        "instructions": len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s", text, re.M)),
        "matrix_instructions": sass.matrix_count(text),
        "global_loads_16": sum(".128" in load for load in loads),
        "global_loads_narrower": sum(".128" not in load for load in loads),
        # tcgen05's products name no shape, and their loops poll: the model has nothing to say of sm_100.
        "main_loop": None
        if loop is None or any("UTC" in kind for kind in loop.matrix_kinds)
        else loop.as_dict(),
    }


def _amd(variant: Variant, compiled: CompiledKernel) -> dict[str, object]:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    loads = re.findall(r"\b(?:global|buffer)_load_\w+", text)
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spilled_registers": number("vgpr_spill_count"),  # scalar ones go to vector registers
        "shared_limit": _AMD_SHARED_LIMIT * 1024,
        "instructions": len(re.findall(r"^\t[a-z]_|^\t(?:ds|global|buffer)_", text, re.M)),
        "matrix_instructions": dict(Counter(re.findall(r"\bv_(?:mfma|wmma)_\w+", text))),
        "global_loads_16": sum(load.endswith(("dwordx4", "b128")) for load in loads),
        "global_loads_narrower": sum(not load.endswith(("dwordx4", "b128")) for load in loads),
        "main_loop": None,
    }


def shipped(architectures: Iterable[Arch], head_dims: Iterable[int], dtypes: Iterable[str]) -> list[Variant]:
    """The variants that training and inference without special features use: plain and causal."""
    variants = []
    for arch in architectures:
        for dtype in dtypes:
            for head_dim in head_dims:
                for kernel in ("forward", "dq", "dkdv"):
                    for features in (frozenset(), frozenset({"right"})):
                        variants.append(Variant(kernel, arch, head_dim, dtype, features))
                variants.append(Variant("decode", arch, head_dim, dtype))
                variants.append(Variant("dbias", arch, head_dim, dtype, frozenset({"bias"})))
                relative = frozenset({"relative_bias"})
                variants.append(Variant("drelative_bias", arch, head_dim, dtype, relative))
                variants.append(Variant("delta", arch, head_dim, dtype))
                variants.append(Variant("merge", arch, head_dim, dtype))
                variants.append(Variant("join_diagonals", arch, head_dim, dtype))
    return variants


def write(variants: Iterable[Variant], folder: Path) -> list[dict[str, object]]:
    """Compile into `folder`; returns and writes the index."""
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for variant in variants:
        compiled = build(variant)
        entry = statistics(variant, compiled)
        code = ("ptx", "cubin") if isinstance(variant.arch, int) else ("amdgcn", "hsaco")
        entry["files"] = {}
        for kind in code:
            path = folder / f"{variant.name}.{kind}"
            content = compiled.asm[kind]
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            entry["files"][kind] = path.name
        index.append(entry)
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    return index


def _architecture(text: str) -> Arch:
    arch: Arch = int(text) if text.isdigit() else text
    if arch not in ARCHITECTURES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, ARCHITECTURES))}")
    return arch


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastattn.backends.triton.compile", description=__doc__)
    parser.add_argument(
        "--arch", type=lambda text: [_architecture(a) for a in text.split(",")], default=list(ARCHITECTURES),
        help="comma-separated: " + ",".join(map(str, ARCHITECTURES)),
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for the code and index.json")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128], metavar="D")
    parser.add_argument("--dtype", choices=sorted(_ITEMSIZE), nargs="+", default=["fp16"])
    options = parser.parse_args(arguments)
    index = write(shipped(options.arch, options.head_dim, options.dtype), options.out)
    for entry in index:
        loop = entry["main_loop"]
        ratio = f"issue/tensor {loop['issue_per_tensor']:.2f}" if loop else ""
        print(
            f"{entry['name']:42} {entry['tiles']:28} {entry['registers']:3} registers, "
            f"stack {entry['stack']:4}, shared {entry['shared_bytes']:6} {ratio}"
        )


if __name__ == "__main__":
    main()
