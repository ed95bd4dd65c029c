"""Opt-in autotuning, with a driver and a clock of our own: what is tried, kept, believed and left alone."""

import importlib
import json
import logging
import pickle
import sys

import fake_cuda
import pytest
import torch

import fastattn
from fastattn import log

pytestmark = pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not()))

FORWARD, DQ, DKDV = "forward_kernel", "dq_kernel", "dkdv_kernel"
SEEN = 'autotune.json written by a "GPU" / that isn\'t one'


@pytest.fixture
def autotune(monkeypatch, tmp_path):
    """The module, turned on, with an empty cache of its own and a GPU of that name."""
    module = importlib.import_module("fastattn.backends.triton.autotune")
    monkeypatch.setenv("FASTATTN_TRITON_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "device_name", lambda: SEEN)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(log, "_said", set())
    every = module.candidates
    monkeypatch.setattr(
        module, "candidates", lambda *args: every(*args)[:3]
    )  # each costs a second to compile
    module.forget()
    yield module
    module.forget()


@pytest.fixture
def clock(autotune, monkeypatch):
    """A clock by which the candidate at index `fastest` is: the number of candidates of each call to it."""

    class Clock:
        fastest = 0
        asked = ()

        def __call__(self, runs):
            self.asked += (len(runs),)
            for run in runs:
                run()
            return [1.0 if i == self.fastest else 2.0 for i in range(len(runs))]

    made = Clock()
    monkeypatch.setattr(autotune, "milliseconds", made)
    return made


def tensors(rows=40, dim=64):
    return [torch.randn(1, 1, rows, dim).half() for _ in range(3)]


def written(folder):
    (path,) = folder.glob("fastattn/triton-tiles/*")
    return path, json.loads(path.read_text())


def restart(autotune):
    """What a new process would know."""
    autotune.forget()
    importlib.import_module("fastattn.backends.triton.launch").forget()


def test_off_unless_asked_for(fake, clock, monkeypatch, tmp_path):
    monkeypatch.delenv("FASTATTN_TRITON_AUTOTUNE")
    monkeypatch.setitem(sys.modules, "fastattn.backends.triton.autotune", None)  # importing it would raise
    fake(80, simulate=False)
    fastattn.attention(*tensors(), backend="triton")
    assert clock.asked == ()
    assert list(tmp_path.iterdir()) == []


def test_every_tiling_tried_computes_right_and_the_fastest_stays(fake, clock, tmp_path):
    """In the simulator, which writes what the last launch leaves: that of the tiles chosen."""
    configs = importlib.import_module("fastattn.backends.triton.configs")
    device = fake(80)
    clock.fastest = 2
    q, k, v = tensors()
    out = fastattn.attention(q, k, v, backend="triton")
    expected = fastattn.attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=1e-2)
    (tried,) = clock.asked
    assert device.kernels == [FORWARD] * tried
    launched = len(device.launches)
    assert launched == 2 * tried + 1
    fastattn.attention(v, q, k, backend="triton")
    assert len(device.launches) == launched + 1
    assert clock.asked == (tried,)
    path, content = written(tmp_path)
    ((key, tiles),) = content.pop("tiles").items()
    assert content == {"format": 1, "gpu": SEEN, "triton": importlib.import_module("triton").__version__}
    default = configs.forward_config(80, 64, 64, 2)
    assert tiles == [default.block_m, default.block_n, default.num_warps, default.num_stages - 1, 0]
    assert key.startswith(FORWARD)
    assert [path] == list(path.parent.iterdir())  # no temporary file stays


def test_backward_tunes_its_kernels(fake, autotune, clock, monkeypatch, tmp_path):
    monkeypatch.setattr(autotune, "candidates", lambda config, fixed_rows: (config,))
    fake(80, simulate=False)
    q, k, v = (x.requires_grad_() for x in tensors())
    fastattn.attention(q, k, v, backend="triton").sum().backward()
    kernels = [key.split("-")[0] for key in written(tmp_path)[1]["tiles"]]
    assert kernels == sorted([FORWARD, DQ, DKDV])


def test_a_new_process_reads_the_choice(fake, autotune, clock, tmp_path):
    device = fake(80, simulate=False)
    clock.fastest = 1
    fastattn.attention(*tensors(rows=33), backend="triton")
    restart(autotune)
    device.kernels.clear()
    fastattn.attention(*tensors(rows=64), backend="triton")  # the same class
    assert len(clock.asked) == 1
    fastattn.attention(*tensors(rows=65), backend="triton")  # another
    assert len(clock.asked) == 2
    _, content = written(tmp_path)
    assert len(content["tiles"]) == 2


def test_processes_that_write_together_keep_each_others_choices(fake, autotune, clock, tmp_path):
    fake(80, simulate=False)
    tile_cache = importlib.import_module("fastattn.backends.triton.tile_cache")
    configs = importlib.import_module("fastattn.backends.triton.configs")
    first, second = (tile_cache.TileCache("gpu", "3") for _ in range(2))
    tiles = configs.TileConfig(64, 64, 4, 2)
    first.put("a", tiles)
    second.put("b", tiles)
    assert sorted(written(tmp_path)[1]["tiles"]) == ["a", "b"]
    third = tile_cache.TileCache("gpu", "3")
    assert (third.get("a"), third.get("b"), third.get("c")) == (tiles, tiles, None)


class Planted:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def _edited(content, **fields):
    return json.dumps(content | fields).encode()


CORRUPT = {
    "half": lambda content: _edited(content)[:-20],
    "empty": lambda content: b"",
    "no object": lambda content: b"[1, 2]",
    "nested": lambda content: b"[" * 100_000,
    "bytes": lambda content: b"\xff\xfe\x00",
    "pickle": lambda content: pickle.dumps(Planted()),
    "another gpu": lambda content: _edited(content, gpu="another"),
    "another triton": lambda content: _edited(content, triton="1.0"),
    "another format": lambda content: _edited(content, format=0),
    "no tiles": lambda content: _edited(content, tiles=None),
    "bad tiles": lambda content: _edited(content, tiles={"a": [64, 64, 4, 2, "0"]}),
    "huge": lambda content: _edited(content, tiles={"a" * (1 << 22): [64, 64, 4, 2, 0]}),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_file_that_is_not_ours_is_ignored_with_one_line(name, fake, autotune, clock, tmp_path, caplog):
    fake(80, simulate=False)
    fastattn.attention(*tensors(), backend="triton")
    path, content = written(tmp_path)
    path.write_bytes(CORRUPT[name](content))
    restart(autotune)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastattn"):
        fastattn.attention(*tensors(), backend="triton")
        fastattn.attention(*tensors(rows=300), backend="triton")
    assert len(clock.asked) == 3  # tuned anew, twice
    (line,) = caplog.messages
    assert line.startswith(f"triton: ignoring the tuned tiles in {path}: ")
    assert len(written(tmp_path)[1]["tiles"]) == 2  # and replaced


def test_tiles_that_would_not_be_tried_are_not_believed(fake, autotune, clock, tmp_path):
    """A file of ours with other numbers in it must not choose what is compiled."""
    fake(80, simulate=False)
    fastattn.attention(*tensors(), backend="triton")
    path, content = written(tmp_path)
    path.write_bytes(_edited(content, tiles={key: [1 << 20, 64, 4, 2, 0] for key in content["tiles"]}))
    restart(autotune)
    fastattn.attention(*tensors(), backend="triton")
    assert len(clock.asked) == 2


def test_a_folder_that_cannot_be_written_costs_a_line(fake, clock, tmp_path, caplog):
    (tmp_path / "fastattn").write_text("a file where the folder should be")
    fake(80, simulate=False)
    fastattn.attention(*tensors(), backend="triton")
    fastattn.attention(*tensors(rows=300), backend="triton")
    assert len(clock.asked) == 2
    assert len([line for line in caplog.messages if "can't be kept in" in line]) == 1


def test_nothing_is_timed_while_a_graph_is_captured(fake, clock, monkeypatch, tmp_path):
    device = fake(80, simulate=False)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    for _ in range(2):
        fastattn.attention(*tensors(), backend="triton")
    assert clock.asked == ()
    assert device.kernels == [FORWARD]  # the choice of configs.py
    assert list(tmp_path.iterdir()) == []
    capturing[0] = False
    fastattn.attention(*tensors(), backend="triton")
    assert len(clock.asked) == 1


def test_candidates_that_do_not_fit_are_dropped_in_silence(fake, clock, caplog):
    fake(89, simulate=False)  # 99 KiB: three stages of 128×64 take 96, a fourth does not fit
    fastattn.attention(*tensors(dim=128), backend="triton")
    assert clock.asked == (2,)
    assert not [line for line in caplog.messages if "pipeline stages" in line]


def test_a_gain_within_noise_changes_nothing(fake, autotune, monkeypatch, tmp_path):
    configs = importlib.import_module("fastattn.backends.triton.configs")
    fake(80, simulate=False)
    monkeypatch.setattr(autotune, "milliseconds", lambda runs: [1.0, *(0.98 for _ in runs[1:])])
    fastattn.attention(*tensors(), backend="triton")
    default = configs.forward_config(80, 64, 64, 2)
    (tiles,) = written(tmp_path)[1]["tiles"].values()
    assert configs.TileConfig(*tiles) == default


def test_rounds_are_interleaved_and_medians_taken(monkeypatch):
    autotune = importlib.import_module("fastattn.backends.triton.autotune")
    now, order = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(name, duration):
        order.append(name)
        now[0] += duration if len(order) > 2 else 100.0  # the first round is slow

    times = autotune.milliseconds([lambda: run("a", 3.0), lambda: run("b", 2.0)])
    assert times == [3.0, 2.0]
    assert order == ["a", "b"] * (len(order) // 2)


@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
def test_candidates_are_tiles_that_kernels_take(arch):
    autotune = importlib.import_module("fastattn.backends.triton.autotune")
    configs = importlib.import_module("fastattn.backends.triton.configs")
    for choose in (configs.forward_config, configs.dq_config, configs.dkdv_config):
        for head_dim in (16, 64, 128, 256):
            config = choose(arch, head_dim, head_dim, 2)
            tried = autotune.candidates(config)
            assert tried[0] == config
            assert len(tried) == len(set(tried)) <= 9
            assert {x.block_m for x in autotune.candidates(config, fixed_rows=True)} == {config.block_m}
            for tiles in tried:
                assert all(size >= 16 and size & (size - 1) == 0 for size in (tiles.block_m, tiles.block_n))
                assert tiles.num_warps in (4, 8)
                assert tiles.num_stages >= 1
