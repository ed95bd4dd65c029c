"""A shared prompt gives what plain concatenation gives, and its keys and values exist once."""

import pytest
import torch

pytest.importorskip("transformers")
from zoo import BACKEND, VOCAB, ZOO, batch, decoder, specimen, twin

from fastattn.errors import InvalidArgumentError, UnsupportedError, UnsupportedModelError
from fastattn.hf import SharedPrompt, patch

DECODERS = ("gpt2", "llama")
P = 37
LABELS = ([11], [12, 13], [12, 14, 15, 16], [17, 18])
pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the native CPU library is not built")


def tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(5, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def concatenated(model, prompt: torch.Tensor, query: torch.Tensor, **inputs):
    """Logits of the unpatched model at the query's tokens and, first, at the prompt's last."""
    return model(input_ids=torch.cat((prompt, query))[None], **inputs).logits[0, len(prompt) - 1 :]


def rows(inputs: dict) -> list[torch.Tensor]:
    return [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def close(ours: torch.Tensor, theirs: torch.Tensor, limit: float = 1e-5) -> bool:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max() <= limit * theirs.abs().max()


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_logits(kind, padding):
    model, prompt, inputs = decoder(kind), tokens(P), batch(padding)
    shared = SharedPrompt(patch(twin(model), backend=BACKEND), prompt)
    logits = shared(**inputs).logits
    for row, query in enumerate(rows(inputs)):
        expected = concatenated(model, prompt, query)[1:]
        assert close(logits[row][inputs["attention_mask"][row].bool()], expected)
    assert (logits[inputs["attention_mask"] == 0] == 0).all()


@pytest.mark.parametrize(
    "name", [name for name, kind in ZOO.items() if kind.kind == "decoder" and name not in DECODERS]
)
@torch.no_grad()
def test_other_decoders(name):
    """Logits, labels and greedy tokens; where there is a window, it reaches over prompt and query."""
    wide = {key: 128 for key in ("sliding_window", "window_size") if key in ZOO[name].settings}
    model, prompt, inputs = specimen(name, **wide), tokens(P), batch("left", size=3, length=9)
    shared = SharedPrompt(patch(twin(model), backend=BACKEND), prompt)
    logits = shared(**inputs).logits
    scores = shared.classify(inputs["input_ids"], LABELS, inputs["attention_mask"])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    found = shared.generate(inputs["input_ids"], inputs["attention_mask"], **options)
    for row, query in enumerate(rows(inputs)):
        assert close(logits[row, -len(query) :], concatenated(model, prompt, query)[1:])
        label = torch.tensor(LABELS[2])
        logs = concatenated(model, prompt, torch.cat((query, label))).log_softmax(-1)
        expected = logs[len(query) : -1].gather(1, label[:, None]).sum()
        assert abs(scores[row, 2] - expected) <= 1e-5 * abs(expected)
        whole = model.generate(torch.cat((prompt, query))[None], **options)
        assert torch.equal(found[row, 9:], whole[0, P + len(query) :])


@pytest.mark.parametrize("labels", [LABELS, ([11], [12], [13])], ids=["phrases", "words"])
@pytest.mark.parametrize("kind", DECODERS)
def test_classify(kind, labels):
    model, prompt, inputs = decoder(kind), tokens(P), batch("left")
    shared = SharedPrompt(patch(twin(model), backend=BACKEND), prompt.tolist())
    found = shared.classify(inputs["input_ids"], labels, inputs["attention_mask"])
    assert torch.equal(found, shared.classify([query.tolist() for query in rows(inputs)], labels))
    assert not found.requires_grad
    for row, query in enumerate(rows(inputs)):
        for column, label in enumerate(labels):
            label = torch.tensor(label)
            logs = concatenated(model, prompt, torch.cat((query, label))).log_softmax(-1)
            expected = logs[len(query) : -1].gather(1, label[:, None]).sum()
            assert abs(found[row, column] - expected) <= 1e-5 * abs(expected)


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_classify_passes_each_token_once(kind):
    """T query tokens and m - 1 of every label of m, in one row; logits where one is needed."""
    model = patch(decoder(kind), backend=BACKEND)
    shared = SharedPrompt(model, tokens(P))
    inputs = batch("right")
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    shared.classify(queries=inputs["input_ids"], labels=LABELS, attention_mask=inputs["attention_mask"])
    inner = sum(len(label) - 1 for label in LABELS)
    assert seen == [(1, int(inputs["attention_mask"].sum()) + 5 * inner), 5 + 5 * inner]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
        {"repetition_penalty": 1.5},
        {"output_scores": True, "return_dict_in_generate": True},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", DECODERS)
def test_generate(kind, padding, options):
    prompt, inputs = tokens(P), batch(padding, size=3, length=9)
    model = decoder(kind)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, **options}
    shared = SharedPrompt(patch(twin(model), backend=BACKEND), prompt)
    torch.manual_seed(5)
    found = shared.generate(inputs["input_ids"], inputs["attention_mask"], **options)
    queries = rows(inputs)
    longest = max(map(len, queries))
    ids = torch.stack(
        # Padded with a token of the prompt: some versions' penalties see what is masked.
        [torch.cat((prompt[:1].expand(longest - len(q)), prompt, q)) for q in queries]
    )
    mask = torch.stack(
        [torch.cat((torch.zeros(longest - len(q)), torch.ones(P + len(q)))).long() for q in queries]
    )
    torch.manual_seed(5)
    expected = model.generate(ids, attention_mask=mask, **options)
    if options.get("return_dict_in_generate"):
        for ours, theirs in zip(found.scores, expected.scores, strict=True):
            assert close(ours, theirs, 2e-5)
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found[:, longest:], expected[:, longest + P :])
    assert torch.equal(found[0, longest - len(queries[0]) : longest], queries[0])


def test_generate_behind_a_soft_prompt():
    model, inputs = decoder("llama"), batch("none", size=3, length=9)
    embeds = torch.randn(P, 32, generator=torch.Generator().manual_seed(0))
    shared = SharedPrompt(patch(twin(model), backend=BACKEND), prompt_embeds=embeds)
    options = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    found = shared.generate(inputs["input_ids"], **options)
    whole = torch.cat((embeds.expand(3, -1, -1), model.get_input_embeddings()(inputs["input_ids"])), dim=1)
    expected = model.generate(inputs_embeds=whole, attention_mask=torch.ones(3, P + 9).long(), **options)
    assert torch.equal(found[:, 9:], expected)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", DECODERS)
def test_training(kind, padding):
    """Loss and gradients of all weights, through the queries and through the prompt."""
    prompt, inputs = tokens(P), batch(padding)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model = decoder(kind).train()
    losses = []
    for query in rows(inputs):
        logits = concatenated(model, prompt, query)[:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, query, reduction="sum"))
    expected = sum(losses) / int(inputs["attention_mask"].sum())
    expected.backward()
    changed = patch(decoder(kind).train(), backend=BACKEND)
    out = SharedPrompt(changed, prompt, requires_grad=True)(**inputs, labels=labels)
    out.loss.backward()
    assert abs(out.loss - expected) <= 1e-5 * expected
    scale = max(p.grad.abs().max() for p in model.parameters())
    for ours, theirs in zip(changed.parameters(), model.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("kind", DECODERS)
def test_gradients_of_a_soft_prompt_and_of_queries(kind):
    model = decoder(kind).requires_grad_(False)
    soft = torch.randn(P, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = batch("right")
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone().requires_grad_()
    mask = inputs["attention_mask"]
    real = mask.bool()
    weights = torch.randn(5, 23, VOCAB, generator=torch.Generator().manual_seed(1)) * real[..., None]

    whole = torch.cat((soft.expand(5, -1, -1), embeds), dim=1)
    logits = model(inputs_embeds=whole, attention_mask=torch.cat((mask.new_ones(5, P), mask), 1)).logits[
        :, P:
    ]
    expected = torch.autograd.grad((logits * weights).sum(), (soft, embeds))
    changed = patch(model, backend=BACKEND)
    shared = SharedPrompt(changed, prompt_embeds=soft, requires_grad=True)
    out = shared(inputs_embeds=embeds, attention_mask=mask)
    for ours, theirs in zip(
        torch.autograd.grad((out.logits * weights).sum(), (soft, embeds)), expected, strict=True
    ):
        assert close(ours, theirs)
    # a constant prompt: the queries' own gradient alone
    out = SharedPrompt(changed, prompt_embeds=soft)(inputs_embeds=embeds, attention_mask=mask)
    (ours,) = torch.autograd.grad((out.logits * weights).sum(), embeds)
    assert close(ours, expected[1])


def test_classify_gives_gradients_where_the_prompt_has_a_graph():
    model, inputs = decoder("llama").requires_grad_(False), batch("right")
    soft = torch.randn(P, 32).requires_grad_()
    shared = SharedPrompt(patch(model, backend=BACKEND), prompt_embeds=soft, requires_grad=True)
    shared.classify(inputs["input_ids"], LABELS, inputs["attention_mask"]).sum().backward()
    assert soft.grad.abs().max() > 0


@pytest.mark.parametrize("kind", DECODERS)
def test_lora(kind):
    peft = pytest.importorskip("peft")
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4,
        target_modules=targets,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        fan_in_fan_out=kind == "gpt2",
    )
    prompt, query = tokens(P), tokens(9, seed=8)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(peft.get_peft_model(decoder(kind).train(), config))
    expected = torch.nn.functional.cross_entropy(concatenated(models[0], prompt, query)[:-1], query)
    expected.backward()
    shared = SharedPrompt(patch(models[1], backend=BACKEND), prompt, requires_grad=True)
    loss = shared(query[None], labels=query[None]).loss
    loss.backward()
    assert abs(loss - expected) <= 1e-5 * expected
    trained = [name for name, p in models[0].named_parameters() if p.requires_grad]
    assert trained
    scale = max(models[0].get_parameter(name).grad.abs().max() for name in trained)
    for name in trained:
        ours, theirs = (model.get_parameter(name).grad for model in models[::-1])
        assert (ours - theirs).abs().max() <= 1e-5 * scale
    # switching the adapter off makes another model of it
    models[1].eval()
    constant = SharedPrompt(models[1], prompt)
    with models[1].disable_adapter(), pytest.raises(InvalidArgumentError, match="other weights or adapters"):
        constant.classify([query], LABELS)
    assert constant.classify([query], LABELS).shape == (1, 4)


def test_bfloat16():
    prompt, inputs = tokens(P), batch("none")
    model = decoder("llama")
    reference = torch.stack([concatenated(model, prompt, query)[1:] for query in rows(inputs)])
    model = model.to(torch.bfloat16)
    theirs = torch.stack([concatenated(model, prompt, query)[1:] for query in rows(inputs)]).float()
    with torch.no_grad():
        ours = SharedPrompt(patch(model, backend=BACKEND), prompt)(**inputs).logits.float()
    assert (ours - reference).norm() <= 2 * (theirs - reference).norm()


def test_the_prompt_is_held_once():
    model = patch(decoder("llama"), backend=BACKEND)
    shared = SharedPrompt(model, tokens(P))
    assert shared.nbytes == 2 * 2 * 2 * P * 8 * 4  # layers, keys and values, kv heads, tokens, head_dim, fp32
    largest = []

    def note(tensor):
        largest.append(tensor.untyped_storage().nbytes())
        return tensor

    inputs = tokens(20, 3)
    model.requires_grad_(False)
    embeds = model.get_input_embeddings()(inputs).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        shared(inputs_embeds=embeds)
    # nothing that backward holds is as large as the prompt's keys expanded to the batch
    assert max(largest) < 20 * shared.keys[0].nbytes


def test_a_window_wider_than_everything_changes_nothing_and_a_narrower_one_is_refused():
    prompt, inputs = tokens(P), batch("left", size=3, length=9)
    for width, fits in ((P + 9 + 3, True), (P + 8, False)):
        model = decoder("llama")
        shared = SharedPrompt(patch(twin(model), backend=BACKEND), prompt)
        for layer in shared._base.layers:  # as the attention of mistral and its kin says it
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, width=width: (args, {**kwargs, "sliding_window": width}),
                with_kwargs=True,
            )
        with torch.no_grad():
            if fits:
                plain = SharedPrompt(patch(twin(model), backend=BACKEND), prompt)(**inputs).logits
                assert torch.equal(shared(**inputs).logits, plain)
                shared.generate(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=4)
            else:
                with pytest.raises(UnsupportedError, match="sliding window"):
                    shared(**inputs)
                with pytest.raises(UnsupportedError, match="sliding window"):
                    shared.generate(inputs["input_ids"], max_new_tokens=4)


def test_refusals():
    prompt, inputs = tokens(P), batch("right")
    model = decoder("llama")
    with pytest.raises(InvalidArgumentError, match="unpatched"):
        SharedPrompt(model, prompt)
    patch(model, backend=BACKEND)
    with pytest.raises(InvalidArgumentError, match="prompt_embeds"):
        SharedPrompt(model)
    with pytest.raises(InvalidArgumentError, match="token ids"):
        SharedPrompt(model, [])
    with pytest.raises(InvalidArgumentError, match="128 positions"):
        SharedPrompt(model, tokens(129))
    shared = SharedPrompt(model, prompt)
    with pytest.raises(InvalidArgumentError, match="128 positions"):
        shared.classify([tokens(128 - P + 1)], [[3]])
    with pytest.raises(InvalidArgumentError, match="row 1"):
        shared.classify(
            inputs["input_ids"], [[3]], inputs["attention_mask"] * torch.tensor([[1], [0], [1], [1], [1]])
        )
    with pytest.raises(InvalidArgumentError, match="labels"):
        shared.classify([prompt], [])
    for option in ({"use_cache": False}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(InvalidArgumentError, match=next(iter(option))):
            shared.generate([prompt], **option)
    with pytest.raises(InvalidArgumentError, match="through the prompt would be missing"):
        shared(**inputs)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.01)
    with pytest.raises(InvalidArgumentError, match="other weights"):
        shared.classify([prompt], [[3]])
    model.train()
    with pytest.raises(InvalidArgumentError, match="training mode"):
        SharedPrompt(model, prompt)
    with pytest.raises(InvalidArgumentError, match="training mode"):
        SharedPrompt(model, prompt, requires_grad=True).generate([prompt])
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedError, match="gradient checkpointing"):
        SharedPrompt(model, prompt, requires_grad=True)


def test_models_that_cannot_share_a_prompt():
    from zoo import build

    with pytest.raises(UnsupportedModelError, match="causal decoder"):
        SharedPrompt(patch(build("bert"), backend=BACKEND), [1])
    with pytest.raises(UnsupportedModelError, match="language modelling head"):
        SharedPrompt(patch(decoder("llama", "SequenceClassification"), backend=BACKEND), [1])
    dynamic = decoder("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="length of the whole text"):
        SharedPrompt(patch(dynamic, backend=BACKEND), [1])
