"""Two processes over gloo: training steps of a patched model are those of the unpatched one.

The two processes are started once and train everything in turn; each test looks at one result.
"""

import contextlib
import functools
import multiprocessing
import os
import socket

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
from zoo import BACKEND, specimen, training_inputs

from fastattn.hf import patch, unpatch

# Two interpreters import transformers for it.
pytestmark = pytest.mark.slow

STEPS = 3
MODELS = ("bert", "bert head", "llama LoRA")
ACCELERATE = ("accelerate", "accelerate's FSDP")
WRAPPERS = (*ACCELERATE, "DDP", "FSDP", "FSDP of checkpointed layers", "FSDP of the whole", "FSDP1")


# FSDP1 wraps layers in modules of its own, which patch does not look into: it says so.
CASES = [
    (model, wrapper, order)
    for model in MODELS
    for wrapper in (ACCELERATE if model == "bert head" else WRAPPERS)
    for order in ("before", "after")
    if (wrapper, order) != ("FSDP1", "after")
]


def _build(model: str) -> tuple[torch.nn.Module, str, str]:
    name, head = {
        "bert": ("bert", "BertForSequenceClassification"),
        "llama": ("llama", "LlamaForCausalLM"),
    }[model.split()[0]]
    built = specimen(name, head).train()
    if model.endswith("head"):
        built.base_model.requires_grad_(False)
    if model.endswith("LoRA"):
        import peft

        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        built = peft.get_peft_model(built, config)
    return built, name, head


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer for m in model.modules() if isinstance(m, torch.nn.ModuleList) for layer in m]


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


@contextlib.contextmanager
def _accelerator(wrapper: str, layers: list[torch.nn.Module]):
    import accelerate

    plugin = None
    if wrapper.endswith("FSDP"):
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[type(layer).__name__ for layer in layers[:1]],
            cpu_ram_efficient_loading=False,
        )
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    if plugin is not None:
        # On CPUs accelerate leaves a plugin out; told that it is there, it prepares the model as on GPUs.
        accelerator.state.distributed_type = accelerate.DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    try:
        yield accelerator
    finally:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        accelerator.state._reset_state()


def _wrap(model: torch.nn.Module, wrapper: str) -> torch.nn.Module:
    if wrapper == "DDP":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    if wrapper == "FSDP1":
        kinds = {type(layer) for layer in _layers(model)}
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    if wrapper.endswith("checkpointed layers"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in () if wrapper.endswith("whole") else _layers(model):
        fully_shard(layer)
    return fully_shard(model)


def _train(model_name: str, wrapper: str, patched: str, rank: int) -> dict[str, torch.Tensor]:
    """Losses of this rank and every parameter after the last step."""
    model, _, _ = _build(model_name)
    if patched == "before":
        patch(model, backend=BACKEND)
    if wrapper in ACCELERATE:
        with _accelerator(wrapper, _layers(model)) as accelerator:
            model, optimizer = accelerator.prepare(model, _optimizer(model))
            return _steps(model, optimizer, accelerator.backward, model_name, wrapper, patched, rank)
    model = _wrap(model, wrapper)
    return _steps(model, _optimizer(model), torch.Tensor.backward, model_name, wrapper, patched, rank)


def _steps(model, optimizer, backward, model_name: str, wrapper: str, patched: str, rank: int) -> dict:
    if wrapper.endswith("FSDP"):  # not the whole model on each process
        assert any(hasattr(p, "full_tensor") for p in model.parameters())
    if patched == "after":
        patch(model, backend=BACKEND)
    _, name, head = _build(model_name)
    result = {}
    for step in range(STEPS):
        # Each rank has its own texts, with its own padding.
        inputs = training_inputs(
            name, head, "right", size=3 + rank, length=11 + 6 * rank, seed=10 * step + rank
        )
        loss = model(**inputs).loss
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        result[f"loss {step}"] = loss.detach()
    if wrapper == "DDP" and patched != "no":
        unpatch(model)
    whole = contextlib.nullcontext()
    if wrapper == "FSDP1":
        whole = model.summon_full_params(model)
    with whole:
        for key, parameter in model.named_parameters():
            value = parameter.detach()
            key = key.removeprefix("module.").replace("_fsdp_wrapped_module.", "")
            result[key] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    return result


def _worker(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.distributed.init_process_group("gloo")
    expected = {}
    for model, wrapper, order in CASES:
        try:
            if (model, wrapper) not in expected:
                expected[model, wrapper] = _train(model, wrapper, "no", rank)
            theirs, ours = expected[model, wrapper], _train(model, wrapper, order, rank)
            assert ours.keys() == theirs.keys()
            worst = max(
                float((ours[key] - value).abs().max() / value.abs().max())
                for key, value in theirs.items()
                if value.any()
            )
            start = dict(_build(model)[0].named_parameters())
            moved = sum(key in start and not torch.equal(theirs[key], start[key]) for key in theirs)
        except Exception as error:  # the test shall name it, and the other cases go on
            worst, moved = repr(error), 0
        results.put(((rank, model, wrapper, order), worst, moved))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_worker, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        rows = [results.get(timeout=200) for _ in range(2 * len(CASES))]
    finally:
        for process in processes:
            process.join(timeout=30)
            process.kill()
    return {case: (worst, moved) for case, worst, moved in rows}


@pytest.mark.parametrize(("model", "wrapper", "order"), CASES)
def test_training_steps(found, model, wrapper, order):
    for rank in range(2):
        worst, moved = found[rank, model, wrapper, order]
        assert isinstance(worst, float), worst
        assert worst <= 1e-4
        assert moved >= {"bert": 30, "bert head": 2, "llama LoRA": 8}[model]
