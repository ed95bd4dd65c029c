"""A tiny random BERT and a tiny table whose label is one of its words: enough to learn from in seconds."""

import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import small_models
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

WORDS = [f"w{i}" for i in range(40)]
POSITIONS = 32


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A saved BertModel of two layers with a word tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    directory = tmp_path_factory.mktemp("tiny") / "model"
    directory.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "yes", "no"]
    (directory / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(directory / "vocab.txt"), model_max_length=POSITIONS).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    BertModel(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory) -> str:
    """A seeded llama of two layers with a tokenizer of single bytes. It has learned nothing."""
    directory = tmp_path_factory.mktemp("lm") / "model"
    small_models.save_language_model(directory)
    return str(directory)


@pytest.fixture(scope="session")
def seq2seq_model(tmp_path_factory) -> str:
    """A seeded T5 of two layers and two, likewise."""
    from transformers import T5Config, T5ForConditionalGeneration

    directory = tmp_path_factory.mktemp("seq2seq") / "model"
    config = T5Config(
        vocab_size=small_models.save_byte_tokenizer(directory, ended=True),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=2,
        pad_token_id=2,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def rows() -> list[tuple[str, str]]:
    chance = random.Random(0)
    found = []
    for i in range(60):
        label = ("yes", "no")[i % 2]
        others = chance.choices(WORDS, k=chance.randint(1, 12 if i % 10 else 45))
        found.append((" ".join([label, *others]), label))
    return found


@pytest.fixture(scope="session")
def table(tmp_path_factory, rows) -> str:
    path = tmp_path_factory.mktemp("data") / "letters.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Here and in processes started from here: two threads on tensors this small only wait for each other."""
    threads, before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="session")
def native() -> None:
    """Skips where the native CPU library is not built."""
    import fastattn

    status = {backend.name: backend for backend in fastattn.backends()}["cpu"]
    if not status.available:
        pytest.skip(str(status))


@pytest.fixture(params=["fastattn", "sdpa"])
def attention(request) -> str:
    if request.param == "fastattn":
        request.getfixturevalue("native")
    return request.param
