"""What the compiler makes of the kernels, for GPUs that are not here: no spills, tensor cores, wide loads."""

import json

import pytest
from ptxsim import why_no_triton

pytestmark = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))

if why_no_triton() is None:
    from fastattn.backends.triton import compile as offline
    from fastattn.backends.triton import configs, sass
    from fastattn.backends.triton.compile import ARCHITECTURES, Variant

CAUSAL = frozenset({"right"})


def compiled(variant):
    result = offline.build(variant)
    return result, offline.statistics(variant, result)


def hold(variant, result, entry):
    """The gate of every NVIDIA variant."""
    assert entry["shared_bytes"] <= entry["shared_limit"], entry
    assert entry["matrix_instructions"], entry
    assert entry["global_loads_16"] > 0, entry
    loops = sass.matrix_loops(sass.disassemble(result.asm["cubin"]), variant.arch)
    assert loops
    assert [loop.spills for loop in loops] == [0] * len(loops), entry


@pytest.mark.parametrize(
    ("kernel", "arch", "head_dim", "dtype", "features"),
    [
        ("forward", 80, 64, "fp16", ()),
        ("forward", 80, 128, "bf16", ()),
        ("forward", 90, 128, "fp16", ("right",)),
        ("dq", 80, 64, "fp16", ("right",)),
        ("dkdv", 80, 64, "fp16", ("right",)),
        ("dkdv", 90, 128, "fp16", ()),
    ],
)
def test_main_kernels(kernel, arch, head_dim, dtype, features):
    variant = Variant(kernel, arch, head_dim, dtype, frozenset(features))
    result, entry = compiled(variant)
    hold(variant, result, entry)
    assert entry["stack"] <= (32 if "2x" in entry["tiles"] else 0), entry
    if kernel == "forward":
        # Nothing but q, k and v is read, all of it in 16-byte pieces.
        assert entry["global_loads_narrower"] == 0, entry
    matrix = "wgmma" if arch == 90 else "mma.sync"
    assert result.asm["ptx"].count(f"{matrix}") > 0


def test_features_that_are_off_leave_nothing_behind():
    tiles = configs.TileConfig(64, 64, 4, 3)
    _, plain = compiled(Variant("forward", 80, 64, config=tiles))
    assert not {"p_bias", "p_key_mask", "p_cu_q"} & {name for name, _ in plain["signature"]}
    _, capped = compiled(Variant("forward", 80, 64, features=frozenset({"softcap"}), config=tiles))
    assert plain["instructions"] < capped["instructions"]
    assert plain["main_loop"]["exponentials"] < capped["main_loop"]["exponentials"]


def test_command_writes_code_and_index(tmp_path):
    offline.write([Variant("delta", 80, 64)], tmp_path)
    (entry,) = json.loads((tmp_path / "index.json").read_text())
    assert (tmp_path / entry["files"]["ptx"]).read_text().count(".entry") == 1
    assert (tmp_path / entry["files"]["cubin"]).stat().st_size > 1000
    parameters = (
        (tmp_path / entry["files"]["ptx"]).read_text().split(".entry")[1].split(")")[0].count(".param")
    )
    assert parameters == len(entry["signature"]) + 2  # and Triton's two scratch pointers


def test_an_unknown_architecture_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        offline.main(["--arch", "77", "--out", str(tmp_path)])
    assert "'77' is not one of" in capsys.readouterr().err


KINDS = [(kernel, features) for kernel in ("forward", "dq", "dkdv") for features in (frozenset(), CAUSAL)]
KINDS += [
    ("decode", frozenset()),
    ("dbias", frozenset({"bias"})),
    ("drelative_bias", frozenset({"relative_bias"})),
]
FEATURES = [
    frozenset(names)
    for names in (
        ["packed"], ["key_mask"], ["bias"], ["relative_bias"], ["dropout"], ["packed", "dropout", "right"],
    )
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_every_nvidia_generation(arch, head_dim):
    for kernel, features in KINDS:
        variant = Variant(kernel, arch, head_dim, "fp16", features)
        result, entry = compiled(variant)
        assert entry["shared_bytes"] <= entry["shared_limit"], entry
        assert entry["matrix_instructions"], entry
        assert entry["global_loads_16"] > 0, entry
        spills = [x.spills for x in sass.matrix_loops(sass.disassemble(result.asm["cubin"]), arch)]
        # On sm_100 what looks like a loop is partly a wait for the tensor cores.
        allowed = 0 if head_dim <= 128 and arch != 100 else 8
        assert max(spills) <= allowed, entry


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_features_fit_into_shared_memory(arch, head_dim):
    """One that does not fit is launched with fewer stages, which is slower."""
    for kernel in ("forward", "dq", "dkdv"):
        for features in FEATURES:
            _, entry = compiled(Variant(kernel, arch, head_dim, "fp16", features))
            assert entry["shared_bytes"] <= entry["shared_limit"], entry
            assert entry["matrix_instructions"], entry


def test_biases_fit_into_the_smallest_shared_memory():
    """The tightest of those: relative_bias at head_dim 128 once took 160 of the 99 KiB that an sm_89 has."""
    _, entry = compiled(Variant("forward", 89, 128, "fp16", frozenset({"relative_bias"})))
    assert entry["shared_bytes"] <= entry["shared_limit"], entry


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx1100"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_amd_generation(arch, head_dim):
    assert arch in ARCHITECTURES
    for kernel, features in KINDS:
        _, entry = compiled(Variant(kernel, arch, head_dim, "fp16", features))
        assert entry["shared_bytes"] <= entry["shared_limit"], entry
        assert any("wmma" in kind or "mfma" in kind for kind in entry["matrix_instructions"]), entry
        if arch != "gfx1100":  # whose registers hold every operand twice: docs/performance-gpu.md
            assert entry["stack"] == 0, entry


@pytest.mark.parametrize(("arch", "head_dim", "most"), [(80, 64, 0.65), (80, 128, 0.47), (90, 128, 0.53)])
def test_issue_slots_of_the_forward(arch, head_dim, most):
    """What docs/performance-gpu.md says of the main loops, by the model of sass.py."""
    _, entry = compiled(Variant("forward", arch, head_dim))
    assert entry["main_loop"]["issue_per_tensor"] <= most, entry
    assert entry["main_loop"]["spills"] == 0, entry
