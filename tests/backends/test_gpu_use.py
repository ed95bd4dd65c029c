"""What people do with the kernels, on a real GPU by each of its backends: what `make gpu-check` runs too.

The sizes are small: test_gpu.py has the kernels at full tiles. Here is what lies around them on a GPU alone:
decoding, prompts, garbage, compilers, graphs, autotuning, patched models.
"""

import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from oracle import Case

import fastattn

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
    pytest.mark.usefixtures("on_the_gpu"),
]
on_cuda_only = pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA device")
HALVES = [torch.float16, torch.bfloat16]


CASES = {
    "decode": {"lengths": ((1, 3001),) * 3, "group": 4, "mask": 0.3},
    "decode-packed": {"lengths": ((1, 900), (1, 0), (1, 17), (1, 2100)), "group": 4, "packed": True},
    "grouped": {"lengths": ((300, 420),) * 2, "group": 4, "options": {"causal": True}},
    "packed": {"lengths": ((257, 400), (0, 30), (31, 0), (512, 512)), "group": 2, "packed": True},
    "window": {"lengths": ((700, 700),), "options": {"window": (100, 3)}},
    "dropout": {"lengths": ((300, 300),), "options": {"dropout_p": 0.2, "seed": 2**40 + 1}},
    "biases": {
        "lengths": ((200, 260),) * 2,
        "bias": (False, True, True, True),
        "relative_bias": True,
        "wanted": ("q", "k", "v", "bias", "relative_bias"),
    },
    "lse": {"lengths": ((130, 200),) * 2, "use_lse": True, "options": {"softcap": 3.0}},
    "keys-alone": {"lengths": ((300, 300),), "wanted": ("k", "v")},
    "queries-alone": {"lengths": ((300, 300),), "wanted": ("q",)},
    "strided": {"lengths": ((300, 300),), "layout": "transposed"},
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_features(name, dtype, backend):
    oracle.check(Case(dtype, head_dim=64, head_dim_v=64, **CASES[name]), backend)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_shared_prompt(dtype, backend):
    """Queries behind one prompt are attention over the prompt repeated in front of each query's own keys."""
    q, k, v = (torch.randn(5, heads, 33, 64) for heads in (8, 2, 2))
    prefix_k, prefix_v = (torch.randn(1, 2, 700, 64) for _ in range(2))
    rounded = [x.to(dtype) for x in (q, k, v, prefix_k, prefix_v)]
    exact = [x.double() for x in rounded]

    def over_both(q, k, v, prefix_k, prefix_v):
        keys, values = (torch.cat([p.expand(5, -1, -1, -1), x], 2) for p, x in ((prefix_k, k), (prefix_v, v)))
        return fastattn.attention(q, keys, values, causal=True, backend="reference")

    ours, theirs, wanted = (
        with_gradients(function, inputs)
        for function, inputs in (
            (lambda *x: fastattn.prefix_attention(*x, causal=True, backend=backend), rounded),
            (over_both, rounded),
            (over_both, exact),
        )
    )
    for found, torchs, right in zip(ours, theirs, wanted, strict=True):
        floor = torch.finfo(dtype).eps * right.square().mean().sqrt()
        error, allowed = (x.double().sub(right).square().mean().sqrt() for x in (found, torchs))
        assert error <= 2 * allowed + floor


def with_gradients(function, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.double().square().sum(), leaves)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_under_a_mask_reaches_nothing(garbage, backend):
    q, k, v = (torch.randn(2, 4, 300, 64, dtype=torch.float16) for _ in range(3))
    key_mask = torch.rand(2, 300) > 0.4
    key_mask[0, 128:256] = False  # a whole tile
    hidden = ~key_mask[:, None, :, None]
    runs = [
        with_gradients(
            lambda *x: fastattn.attention(*x, key_mask=key_mask, backend=backend),
            [q, *(x.masked_fill(hidden, value) for x in (k, v))],
        )
        for value in (0.0, garbage)
    ]
    assert all(torch.equal(clean, spoilt) for clean, spoilt in zip(*runs, strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compiled_whole(packed, backend):
    q, k, v = (torch.randn(*((300, 4, 64) if packed else (2, 4, 150, 64))).half() for _ in range(3))

    def model(q, k, v):
        if packed:
            starts = torch.tensor([0, 100, 300], dtype=torch.int32)
            limits = {"max_seqlen_q": 200, "max_seqlen_k": 200}
            return fastattn.varlen_attention(q * 2, k, v, starts, causal=True, backend=backend, **limits) + 1
        return fastattn.attention(q * 2, k, v, causal=True, backend=backend) + 1

    compiled = torch.compile(model, fullgraph=True)
    for ours, plain in zip(*(with_gradients(f, (q, k, v)) for f in (compiled, model)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-3, atol=2e-3)


@on_cuda_only
def test_forward_and_backward_in_a_graph(backend):
    """Replayed on other numbers than it was captured with."""
    static = [torch.randn(2, 4, 256, 64, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(2, 4, 256, 64, dtype=torch.float16)

    def step():
        out = fastattn.attention(*static, causal=True, backend=backend)
        return out, *torch.autograd.grad(out, static, upstream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in static:
            x.normal_()
    graph.replay()
    assert all(torch.equal(found, right) for found, right in zip(captured, step(), strict=True))


AUTOTUNED = """
import torch, fastattn
torch.set_default_device("cuda")
torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 500, 64, dtype=torch.float16, requires_grad=True) for _ in range(3))
out = fastattn.attention(q, k, v, causal=True, backend="{backend}")
torch.save([x.cpu() for x in (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))], "{file}")
"""


def test_autotuned(backend, tmp_path):
    """Other tiles may round otherwise, no more."""
    if backend == "cuda":
        pytest.skip("cuda has no autotuning")
    results = []
    for turn in ("0", "1"):
        file = tmp_path / f"{turn}.pt"
        script = AUTOTUNED.format(backend=backend, file=file)
        env = os.environ | {"FASTATTN_TRITON_AUTOTUNE": turn, "XDG_CACHE_HOME": str(tmp_path)}
        path = os.pathsep.join([str(Path(fastattn.__file__).parents[1]), env.get("PYTHONPATH", "")])
        subprocess.run([sys.executable, "-c", script], check=True, env=env | {"PYTHONPATH": path})
        results.append(torch.load(file, weights_only=True))
    for plain, tuned in zip(*results, strict=True):
        torch.testing.assert_close(tuned, plain, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("kind", ["Bert", "Llama", "T5"])
def test_patched_models(kind, backend):
    """Logits and gradients of a patched model in fp32 are those of the unpatched one."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 99, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    settings, head = {
        "Bert": (sizes | {"num_attention_heads": 4}, "ForSequenceClassification"),
        "Llama": (sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}, "ForCausalLM"),
        "T5": (
            {
                "vocab_size": 99,
                "d_model": 128,
                "d_kv": 32,
                "num_heads": 4,
                "num_layers": 2,
                "d_ff": 256,
                "decoder_start_token_id": 0,
            },
            "ForConditionalGeneration",
        ),
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, kind + head)(config).to("cuda").eval()
    ids = torch.randint(3, 99, (3, 70))
    attention_mask = torch.ones(3, 70, dtype=torch.long)
    attention_mask[1, 40:] = 0
    labels = {"labels": torch.tensor([0, 1, 0]) if kind == "Bert" else ids.where(attention_mask > 0, -100)}

    def step():
        model.zero_grad()
        result = model(input_ids=ids, attention_mask=attention_mask, **labels)
        result.loss.backward()
        return result.loss.detach(), {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    loss, gradients = step()
    fastattn.patch(model, backend=backend)
    found, ours = step()
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max()
        assert (ours[name] - gradient).abs().max() <= 1e-4 * scale + 1e-7, name
