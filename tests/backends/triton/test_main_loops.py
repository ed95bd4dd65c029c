"""The innermost unmasked loops of the plain and causal kernels, counted in their machine code.

main_loops.json has the counts: a feature that does not vanish when it is off shows there as a difference.
If a change is meant, `PYTHONPATH=.:tests python tests/backends/triton/test_main_loops.py` writes it anew, and
docs/performance-gpu.md wants the new figures.
"""

import json
import re
from pathlib import Path

import loads
import pytest
from ptxsim import why_no_triton

pytestmark = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))

if why_no_triton() is None:
    from fastattn.backends.triton import compile as offline
    from fastattn.backends.triton import configs, sass
    from fastattn.backends.triton.compile import Variant

TABLE = Path(__file__).with_name("main_loops.json")
PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4}
QUICK = {("forward", 80, 64), ("forward", 80, 128), ("forward", 90, 128), ("dq", 80, 64), ("dkdv", 90, 128)}
MOST = {("forward", 80, 64): 0.65, ("forward", 80, 128): 0.47, ("forward", 90, 128): 0.53}
"""Issue slots for each tensor cycle: what docs/performance-gpu.md says was reached."""


def case(kernel, arch, head_dim, causal):
    quick = not causal and (kernel, arch, head_dim) in QUICK
    return pytest.param(kernel, arch, head_dim, causal, marks=[] if quick else pytest.mark.slow)


CASES = [
    case(kernel, arch, head_dim, causal)
    for kernel in PRODUCTS
    for arch in (80, 90)
    for head_dim in (64, 128)
    for causal in (False, True)
]


def built(kernel, arch, head_dim, causal):
    variant = Variant(kernel, arch, head_dim, features=frozenset({"right"} if causal else ()))
    compiled = offline.build(variant)
    return variant, compiled, offline.statistics(variant, compiled)


def needed(variant, products):
    """Tensor cycles of a warp and iteration if its tile's products are computed once each."""
    tiles = variant.tiles()
    keys = tiles.block_n * (2 if tiles.paired else 1)
    rate = 512 if variant.arch == 90 else 256  # multiply-adds a cycle
    head_dim = configs.padded_dim(variant.head_dim)
    return products * tiles.block_m * keys * head_dim / tiles.num_warps / rate


@pytest.mark.parametrize(("kernel", "arch", "head_dim", "causal"), CASES)
def test_main_loop(kernel, arch, head_dim, causal):
    variant, compiled, entry = built(kernel, arch, head_dim, causal)
    loop, ptx = entry["main_loop"], compiled.asm["ptx"]
    assert loop["tensor_cycles"] == needed(variant, PRODUCTS[kernel]), loop
    assert json.loads(json.dumps(loop)) == json.loads(TABLE.read_text())[variant.name]
    assert loop["issue_per_tensor"] <= MOST.get((kernel, arch, head_dim), 1.0) + 0.01 * causal
    loops = sass.matrix_loops(sass.disassemble(compiled.asm["cubin"]), arch)
    assert [x.spills for x in loops] == [0] * len(loops), entry
    assert entry["shared_bytes"] <= entry["shared_limit"], entry
    assert entry["stack"] <= (32 if "2x" in entry["tiles"] else 16 if causal else 0), entry
    widths = loads.widths(ptx, list(variant.signature()))
    for name in ("p_q", "p_k", "p_v", *(() if kernel == "forward" else ("p_dout",))):
        assert set(widths.pop(name)) == {16}, name
    assert widths.keys() == (set() if kernel == "forward" else {"p_lse", "p_delta"})
    assert ("wgmma" in ptx, "mma.sync" in ptx) == (arch == 90, arch == 80)
    assert not re.search(r"\b(?:atom|red)\.", ptx)


@pytest.mark.parametrize(
    ("wanted", "products"), [({"want_dk": False}, 2), ({"want_dv": False}, 3)], ids=["dv", "dk"]
)
@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_a_gradient_not_wanted_costs_no_product(arch, wanted, products):
    variant = Variant("dkdv", arch, 64, **wanted)
    compiled = offline.build(variant)
    loop = offline.statistics(variant, compiled)["main_loop"]
    assert loop["tensor_cycles"] == needed(variant, products)
    assert loop["spills"] == 0
    assert loop["issue_per_tensor"] < 1.5  # less to hide the rest behind, no more


if __name__ == "__main__":
    loops = {}
    for parameters in CASES:
        variant, _, entry = built(*parameters.values)
        loops[variant.name] = entry["main_loop"]
    TABLE.write_text(json.dumps(loops, indent=1) + "\n")
