"""Every feature alone and the usual combinations, in machine code: nothing spills, no product is made twice.

Where something spills all the same, SPILLS says how much and why it may.
"""

import itertools

import loads
import pytest
from ptxsim import why_no_triton

pytestmark = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))

if why_no_triton() is None:
    from test_main_loops import PRODUCTS, needed

    from fastattn.backends.triton import compile as offline
    from fastattn.backends.triton import sass
    from fastattn.backends.triton.compile import Variant

ALONE = (
    "packed", "key_mask", "right", "left right", "bias", "relative_bias", "dropout", "softcap", "alibi",
    "grouped",
)  # fmt: skip
TOGETHER = (
    "right grouped", "right dropout", "key_mask right", "key_mask dropout", "right alibi", "bias dropout",
    "packed right", "packed right grouped", "packed left right", "packed right dropout",
    "packed dropout seed_on_device", "packed relative_bias", "packed relative_bias dropout",
    "key_mask relative_bias dropout", "left right grouped softcap",
)  # fmt: skip
QUICK = (
    ("forward", 80, 128, "dropout"),
    ("dq", 80, 64, "bias"),
    ("dkdv", 80, 64, "bias dropout"),
    ("dkdv", 90, 64, "packed dropout seed_on_device"),
)

_WINDOW = "in masked loops alone; tiles that spill nothing take more issue slots where nothing is masked"
_PHILOX = "tiles that spill nothing count a fifth or a third more, or read k and v twice as often"
_CROWDED = "another stage or tile counts more, or spills elsewhere"
SPILLS = {
    "dq-sm80-fp16-d64-dropout-packed-right": (11, _PHILOX),
    "dq-sm80-fp16-d64-dropout-packed-seed_on_device": (6, _PHILOX),
    "dq-sm90-fp16-d128-dropout-key_mask-relative_bias": (3, _CROWDED),
    "forward-sm90-fp16-d64-dropout-key_mask": (3, _PHILOX),
    "forward-sm90-fp16-d128-bias-dropout": (10, _CROWDED),
    "forward-sm90-fp16-d128-dropout-key_mask-relative_bias": (1, _CROWDED),
    "forward-sm90-fp16-d128-left-packed-right": (28, _WINDOW),
    "forward-sm90-fp16-d128-left-right": (2, _WINDOW),
}
"""By Variant.name: the words that one iteration of the worst loop spills, and the reason (see configs.py)."""


def check(variant):
    compiled = offline.build(variant)
    entry = offline.statistics(variant, compiled)
    loops = sass.matrix_loops(sass.disassemble(compiled.asm["cubin"]), variant.arch)
    allowed, _ = SPILLS.get(variant.name, (0, ""))
    # As many as the table says, so that an entry goes when its spills do.
    assert max(loop.spills for loop in loops) == allowed, entry
    assert entry["shared_bytes"] <= entry["shared_limit"], entry
    cycles = needed(variant, PRODUCTS[variant.kernel])
    alone = cycles / 2 if variant.tiles().paired else cycles  # of a masked tile, which has no partner
    for loop in loops:
        assert loop.tensor_cycles in (cycles, alone), (variant.name, loop)
        if variant.arch == 80:
            assert loop.matrix_kinds == ("HMMA.16816.F32",)
            assert loop.matrix_instructions == loop.tensor_cycles / 8
        else:
            assert all(kind.startswith("HGMMA.64x") for kind in loop.matrix_kinds)
    widths = loads.widths(compiled.asm["ptx"], list(variant.signature()))
    for name in ("p_q", "p_k", "p_v", *(() if variant.kernel == "forward" else ("p_dout",))):
        assert set(widths[name]) == {16}, (variant.name, name, widths)


@pytest.mark.parametrize(("kernel", "arch", "head_dim", "features"), QUICK)
def test_those_that_spilled(kernel, arch, head_dim, features):
    check(Variant(kernel, arch, head_dim, features=frozenset(features.split())))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kernel", "arch", "head_dim"),
    [
        *itertools.product(("forward", "dq", "dkdv"), (80, 90), (64, 128)),
        ("forward", 80, 96),  # masks of padded columns in every load
        ("dq", 80, 96),
    ],
)
def test_every_variant(kernel, arch, head_dim):
    for names in ALONE + TOGETHER:
        features = frozenset(names.split())
        if kernel != "dkdv" and "grouped" in features:  # which this kernel does not tell apart
            continue
        check(Variant(kernel, arch, head_dim, features=features))


@pytest.mark.parametrize("features", ["", "dlse"])
def test_delta(features):
    """rowsum(out ∘ dout), less the gradient of lse."""
    variant = Variant("delta", 80, 64, features=frozenset(features.split()))
    compiled = offline.build(variant)
    entry = offline.statistics(variant, compiled)
    widths = loads.widths(compiled.asm["ptx"], list(variant.signature()))
    assert entry["stack"] == 0
    assert set(widths["p_out"]) == set(widths["p_dout"]) == {16}
    assert ("p_dlse" in widths) == bool(features)


def test_narrow_loads_are_told():
    """Of rows that do not lie on 16 bytes."""
    variant = Variant("delta", 80, 64, align=1)
    widths = loads.widths(offline.build(variant).asm["ptx"], list(variant.signature()))
    assert set(widths["p_out"]) == set(widths["p_dout"]) == {2}
