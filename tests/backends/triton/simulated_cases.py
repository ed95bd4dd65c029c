"""The problems whose PTX the simulator runs, by the name of their test; proof_matrix.py reads them too."""

import torch
from oracle import Case

BIASES = ("q", "k", "v", "bias", "relative_bias")
DROPOUT = {"dropout_p": 0.3, "seed": 12345678912345}


def case(dtype=torch.float16, lengths=((70, 83),), head_dim=64, **fields):
    return Case(dtype=dtype, lengths=lengths, kv_heads=1, head_dim=head_dim, head_dim_v=head_dim, **fields)


SEED_ON_DEVICE = torch.tensor([12345678912345])
"""By its shape: see doubles.py."""


# Long enough that every kernel's unmasked loop turns five times and more, with its ring of stages full: the
# tiles are up to 128 keys (forward, dq) or 64 queries (dk/dv). test_simulated.py holds that they do.
DEEP = {
    f"deep-{name}{head_dim}": case(lengths=((330, keys),), head_dim=head_dim, options=options)
    for head_dim in (64, 128)
    for name, keys, options in (("", 700, {}), ("causal-", 1000, {"causal": True}))
}
QUICK = {
    "fp16-plain": case(),
    "bf16-causal-gqa": case(torch.bfloat16, options={"causal": True}, group=2),
    "deep-causal-64": DEEP["deep-causal-64"],
}
_IN_BOTH = {
    "key_mask": dict(mask=0.3),
    "bias": dict(bias=(True, True, True, True), wanted=BIASES[:4]),
    "relative_bias": dict(relative_bias=True, wanted=(*BIASES[:3], "relative_bias")),
    "dropout": dict(lengths=((40, 150),), options=DROPOUT),
    "packed": dict(lengths=((70, 83), (0, 3), (5, 0), (33, 20)), packed=True, options={"causal": True}),
    "decode": dict(lengths=((1, 1100),), group=4, wanted=()),
    "wide-long": dict(lengths=((70, 300),), head_dim=128, wanted=()),
    "wide": dict(head_dim=128, options={"causal": True}),
}
_IN_FP16 = {
    "causal-gqa": dict(options={"causal": True}, group=2),
    "window": dict(lengths=((90, 150),), options={"window": (33, 5)}),
    "alibi-softcap": dict(alibi="heads", options={"softcap": 5.0}),
    "dlse": dict(use_lse=True),
    "padded-dim": dict(lengths=((70, 180),), head_dim=80, options={"causal": True}),
    "wide-dropout": dict(lengths=((40, 150),), head_dim=128, options=DROPOUT),
    "wide-relative_bias": dict(head_dim=128, relative_bias=True, wanted=(*BIASES[:3], "relative_bias")),
    "widest": dict(lengths=((35, 40),), head_dim=256, options={"causal": True}),
    "seed-on-device": dict(lengths=((40, 150),), options={"dropout_p": 0.3, "seed": SEED_ON_DEVICE}),
    "misaligned": dict(lengths=((35, 40),), layout="sliced"),
    "packed-everything": dict(
        lengths=((37, 40), (20, 9)), packed=True, group=2, bias=(True, True, True, True), relative_bias=True,
        alibi="heads", wanted=BIASES, use_lse=True,
        options={"causal": True, "window": (30, None), "softcap": 5.0, **DROPOUT},
    ),
}  # fmt: skip
SLOW = {
    **{name: deep for name, deep in DEEP.items() if name not in QUICK},
    "fp16-causal-dk": case(options={"causal": True}, group=2, wanted=("k",)),
    "fp16-causal-dv": case(options={"causal": True}, group=2, wanted=("v",)),
    "fp16-causal-dq": case(options={"causal": True}, group=2, wanted=("q",)),
    "bf16-packed-dk": case(torch.bfloat16, ((70, 83), (33, 20)), packed=True, wanted=("k",)),
    "fp16-biases-alone": case(
        bias=(False, True, True, False), relative_bias=True, wanted=("bias", "relative_bias")
    ),
    "fp16-bias-of-keys": case(lengths=((70, 83),) * 2, bias=(True, False, False, True), wanted=BIASES[:4]),
    "bf16-plain": case(torch.bfloat16),
    **{f"fp16-{name}": case(**fields) for name, fields in (_IN_BOTH | _IN_FP16).items()},
    **{f"bf16-{name}": case(torch.bfloat16, **fields) for name, fields in _IN_BOTH.items()},
    "fp16-odd-dims": Case(torch.float16, ((35, 40),), kv_heads=1, head_dim=40, head_dim_v=96),
    "fp32-plain": case(torch.float32, lengths=((35, 40),)),
    "fp32-dropout": case(torch.float32, lengths=((20, 150),), options=DROPOUT),
    "fp32-relative_bias": case(
        torch.float32, lengths=((35, 40),), relative_bias=True, wanted=(*BIASES[:3], "relative_bias")
    ),
    "fp32-decode": case(torch.float32, lengths=((1, 1100),), group=4, wanted=()),
}

# In float32 where torch allows TF32, which has float16's bits: drawn and judged as float16.
TF32 = {
    "plain": case(lengths=((35, 40),)),
    "causal-gqa": case(lengths=((70, 83),), options={"causal": True}, group=2),
    "wide": case(lengths=((35, 70),), head_dim=128),
    "decode": case(lengths=((1, 1100),), group=4, wanted=()),
}
