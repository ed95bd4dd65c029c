"""Every family x everything that is promised of it. What this run found is the table in docs/families.md.

A column is a test that runs once for every family of zoo.ZOO. It returns nothing for "yes", or a word that
says why the question does not arise (an encoder does not generate). `make families-table` writes the table;
the last test here fails when the committed one says something else.
"""

import functools
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from measures import rows_in_layers
from zoo import (
    BACKEND,
    FRAMES,
    VOCAB,
    ZOO,
    batch,
    deviation,
    recordings,
    run,
    specimen,
    training_inputs,
    twin,
)

from fastattn.hf import families, patch, unpatch
from fastattn.hf.families import supported

pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the native CPU library is not built")

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
MARKS = ("<!-- found by tests/hf/test_hf_families.py -->\n", "<!-- end -->\n")
FOUND: dict[str, dict[str, str]] = {}

# What generate is called with beside the prompt, by name.
GENERATE = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beam search": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": True},
}
# No token ends it: old versions of transformers stumble over eos_token_id=None in prompt lookup.
PLAIN = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": VOCAB, "disable_compile": True}


def column(title: str):
    """A test that fills a column of the table."""
    FOUND[title] = {}

    def wrap(test):
        @pytest.mark.parametrize("name", ZOO)
        @functools.wraps(test)
        def check(name, **fixtures):
            FOUND[title][name] = "**no**"
            FOUND[title][name] = test(name, **fixtures) or "yes"

        return check

    return wrap


def compare(name: str, padding: str, what: tuple[str, ...], **changes) -> None:
    """Patched against unpatched, for every head: fp32, relative to the largest value of each kind."""
    for head in ZOO[name].heads:
        inputs = training_inputs(name, head, padding)
        model = specimen(name, head, **changes)
        expected = run(model, inputs)
        found = deviation(run(patch(model, backend=BACKEND), inputs), expected)
        assert max(found[kind] for kind in what) <= 1e-5, (head, padding, found)


@column("by name")
def test_loaded_with_attn_implementation(name, tmp_path):
    model = specimen(name)
    inputs = training_inputs(name, padding="right")
    model.save_pretrained(tmp_path)
    expected = run(type(model).from_pretrained(tmp_path, attn_implementation="eager"), inputs)
    ours = type(model).from_pretrained(tmp_path, attn_implementation="fastattn")
    assert ours.config._attn_implementation == "fastattn"
    assert max(deviation(run(ours, inputs), expected).values()) <= 1e-5


@column("forward")
def test_forward(name):
    compare(name, "none", ("logits", "loss"))


def _gradient(result: dict) -> torch.Tensor:
    """All of it, as one vector."""
    return torch.cat([x.float().flatten() for name, x in sorted(result.items()) if name.startswith("grad")])


@column("bf16")
def test_bfloat16(name):
    """Rounding may differ; it must not be more than transformers' own, in root mean square."""
    inputs = training_inputs(name, padding="right")
    model = specimen(name)
    exact = run(model, inputs)
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    theirs = run(model.bfloat16(), inputs)
    ours = run(patch(model, backend=BACKEND), inputs)
    assert ours.keys() == theirs.keys()
    for what in (lambda result: result["logits"].float(), _gradient):
        errors = [(what(result) - what(exact)).norm() for result in (ours, theirs)]
        assert errors[0] <= 2 * errors[1]


@column("padded right")
def test_padded_right(name):
    if ZOO[name].kind == "vision":
        return "no padding"
    return compare(name, "right", ("logits", "loss"))


@column("padded left")
def test_padded_left(name):
    if ZOO[name].kind == "vision":
        return "no padding"
    return compare(name, "left", ("logits", "loss"))


@column("gradients")
def test_gradients_of_every_parameter(name):
    for padding in ("none",) if ZOO[name].kind == "vision" else ("right", "left", "holes"):
        compare(name, padding, ("grad",))


def _lora(name: str) -> torch.nn.Module:
    """The same adapters every time, of peft."""
    peft = pytest.importorskip("peft")
    model = specimen(name)
    config = peft.LoraConfig(
        r=2,
        target_modules=list(ZOO[name].lora),
        fan_in_fan_out=any(isinstance(m, transformers.pytorch_utils.Conv1D) for m in model.modules()),
    )
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).train()


@column("LoRA")
def test_lora_trains_alike(name):
    """Two steps: the same losses, the same adapters, and lora_B is no longer the zero it began as."""
    inputs = training_inputs(name, padding="right")
    results = []
    for change in (lambda model: model, lambda model: patch(model, backend=BACKEND)):
        model = change(_lora(name))
        # A larger step saturates T5, whose scores are not scaled, and makes much of every rounding.
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        steps = []
        for _ in range(2):
            steps.append(run(model, inputs))
            optimizer.step()
        trained = {f"grad {name}": p.detach() for name, p in model.named_parameters() if "lora_" in name}
        results.append([*steps, {**steps[-1], **trained}])
        moved = [value for name, value in trained.items() if "lora_B" in name]
        assert moved
        assert all(value.any() for value in moved)
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert max(deviation(ours, theirs).values()) <= 1e-5


@column("checkpointed")
def test_lora_with_gradient_checkpointing(name):
    """Against the unpatched model without checkpointing: memory is all that checkpointing may change."""
    if not specimen(name).supports_gradient_checkpointing:
        return "not in transformers"
    inputs = training_inputs(name, padding="right")
    for _, parameter in (plain := _lora(name)).named_parameters():
        if parameter.requires_grad:  # lora_B too, or half of the gradients would be zero
            torch.nn.init.normal_(parameter, std=0.1)
    expected = run(plain, inputs)
    for reentrant in (True, False):
        model = patch(twin(plain), backend=BACKEND)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert max(deviation(run(model, inputs), expected).values()) <= 1e-5, reentrant
    return None


@column("head only")
def test_only_the_head_is_trained(name):
    head = ZOO[name].heads[-1]
    inputs = training_inputs(name, head, "right" if ZOO[name].kind != "vision" else "none")
    model = specimen(name, head)
    trained = dict(model.named_parameters()).keys() - {
        f"{model.base_model_prefix}.{key}" for key, _ in model.base_model.named_parameters()
    }
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in trained)
    expected = run(model, inputs)
    assert {f"grad {key}" for key in trained} == {key for key in expected if key.startswith("grad")}
    assert trained
    assert max(deviation(run(patch(model, backend=BACKEND), inputs), expected).values()) <= 1e-5


@column("padding-free")
def test_layers_see_tokens_only(name):
    if ZOO[name].kind == "vision":
        return "no padding"
    for head in ZOO[name].heads:
        inputs = training_inputs(name, head, "right")
        model = specimen(name, head).train()
        mask, labels = inputs.get("attention_mask"), inputs["labels"]
        recorded = len(labels) * FRAMES
        source = (recorded, recorded) if mask is None else (mask.numel(), int(mask.sum()))
        target = (labels.numel(), int((labels != -100).sum())) if labels.dim() == 2 else source
        for all_or_real, change in enumerate((lambda model: model, _padding_free)):
            stack, *decoder = rows_in_layers(change(model), inputs).values()
            first = {len(labels)} if all_or_real and len(stack) > 1 else set()  # one position of each sample
            assert stack == {source[all_or_real], *first}, head
            for rows in decoder:  # and the keys of cross-attention
                assert rows == {target[all_or_real], source[all_or_real]}, head
            assert len(decoder) == (ZOO[name].kind in ("encoder-decoder", "speech"))
    return None


def _padding_free(model: torch.nn.Module) -> torch.nn.Module:
    return patch(model, backend=BACKEND, padding_free=True)


@column("generate")
def test_generate(name):
    """The same tokens, and the same logits at every step, as unpatched."""
    kind = ZOO[name]
    if not hasattr(specimen(name), "prepare_inputs_for_generation") or not specimen(name).can_generate():
        return "no decoder"
    model = specimen(name)
    ours = patch(twin(model), backend=BACKEND)
    for mode, options in GENERATE.items():
        assisted = mode in ("prompt lookup", "assistant")
        inputs = batch("left", size=3, length=9)
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)
        if assisted:  # transformers assists batches of one
            inputs = {key: torch.cat([value[:1]] * 2, 1) for key, value in inputs.items()}
        if kind.kind == "speech":
            inputs = recordings(1 if assisted else 3)
        results = []
        for generator in (model, ours):
            options = {**PLAIN, **options, "return_dict_in_generate": True, "output_logits": True}
            if mode == "assistant":
                assistant = specimen(name, seed=1)
                options["assistant_model"] = assistant if generator is model else patch(assistant)
            results.append(generator.generate(**inputs, **options))
        theirs, found = results
        assert torch.equal(found.sequences, theirs.sequences), mode
        logits = torch.stack(theirs.logits)
        worst = (torch.stack(found.logits) - logits).abs().max() / logits.abs().max()
        assert worst <= 1e-5, (mode, worst)
    return None


def _state(model: torch.nn.Module) -> tuple:
    """Everything that patch may touch: classes, instance attributes, hooks, config, names of the weights."""
    modules = [
        (path, type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    ]
    return modules, model.config.to_dict(), model.config._attn_implementation, list(model.state_dict())


@column("unpatch")
def test_unpatch_leaves_nothing(name):
    for head in ZOO[name].heads:
        inputs = training_inputs(name, head, "right" if ZOO[name].kind != "vision" else "none")
        model = specimen(name, head)
        expected, before = run(model, inputs), _state(model)
        patch(model, backend=BACKEND)
        assert _state(model) != before
        run(model, inputs)
        unpatch(model)
        assert _state(model) == before
        assert max(deviation(run(model, inputs), expected).values()) == 0


def test_the_zoo_is_complete():
    assert set(ZOO) == set(supported())


def test_what_is_known_of_a_family_is_little():
    for file in Path(families.__file__).parent.glob("*.py"):
        assert file.name == "__init__.py" or len(file.read_text().splitlines()) <= 150, file.name


def _table() -> str:
    titles = list(FOUND)
    lines = [["family", "", *titles], ["---"] * (len(titles) + 2)]
    lines += [
        [f"`{name}`", kind.kind, *(FOUND[title][name] for title in titles)] for name, kind in ZOO.items()
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_committed_table_is_what_was_found():
    if any(name not in cells for cells in FOUND.values() for name in ZOO):
        pytest.skip("only a part of the matrix has run")
    text = DOCUMENT.read_text()
    (before, rest), end = text.split(MARKS[0]), MARKS[1]
    found = before + MARKS[0] + _table() + end + rest.split(end)[1]
    if os.environ.get("FASTATTN_WRITE_TABLES") == "1":
        DOCUMENT.write_text(found)
    assert DOCUMENT.read_text() == found, "run `make families-table`"
