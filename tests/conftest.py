"""Tiny real models and a tiny trained run for all tests. No network: a connection is an error."""
import importlib
import json
import os
import random
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["OMP_NUM_THREADS"] = "1"      # before torch: the tests run on all cores already
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import decode  # noqa: E402
import train as script  # noqa: E402
from data.common import digests  # noqa: E402
from data.pairs import prepare as prepare_pairs  # noqa: E402
from data.text import prepare as prepare_text  # noqa: E402
from exits import full_depth  # noqa: E402
from model import GPT, Attention, GPTConfig, Seq2Seq, Seq2SeqConfig, position_ids  # noqa: E402
from routing import NO_POSITION, causal  # noqa: E402

V = 23
FOUR = SimpleNamespace(config=GPTConfig(n_layer=4))     # all that most halting rules want to know of a model


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("tests must not use the network")
    for owner, name in ((socket.socket, "connect"), (socket, "create_connection"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)


SHAPE = {"n_layer": 4, "n_head": 2, "n_embd": 16, "block_size": 24, "routed": "odd", "capacity": 0.25}
SOURCE = {"d_ff": 40, "enc_layer": 2, "enc_head": 3, "enc_embd": 12, "embeddings": "separate"}


def tiny(seed=0, vocab=V, **options):
    """A GPT in float64 whose every parameter, norms and biases too, is random and large enough to matter."""
    torch.manual_seed(seed)
    return at_random(GPT(GPTConfig(**SHAPE | options), vocab))


def tiny_translator(seed=0, vocab=V, **options):
    """The same for a Seq2Seq, of which encoder and decoder differ in everything."""
    torch.manual_seed(seed)
    return at_random(Seq2Seq(Seq2SeqConfig(**SHAPE | SOURCE | options), vocab))


def at_random(model):
    """Random weights in float64, the predictors centred so that about half of the tokens run."""
    model.double().eval()
    for p in model.parameters():
        p.data.copy_(torch.nn.init.normal_(torch.empty(p.shape, dtype=p.dtype), std=0.4))  # in order of rows
    for module in model.modules():
        if isinstance(module, Attention):       # the table is made in float32
            size, _, half = module.rope.shape
            angle = torch.arange(size).double().outer(10000.0 ** (-torch.arange(half).double() / half))
            exact = torch.stack([angle.cos(), angle.sin()], 1)
            assert torch.equal(module.rope, exact.float().double())
            module.rope = exact
    ids, vocab = texts(vocab=model.vocab_size), model.vocab_size
    memory = model.encode(texts(5, T=7, vocab=vocab)) if isinstance(model, Seq2Seq) else None
    layers = model.run_layers(model.embed(ids), position_ids(ids), None, memory, causal)
    for block, (_, routing) in zip(model.blocks, layers, strict=True):
        if getattr(block, "predictor", None):
            block.predictor[2].bias.data -= routing.logit.median() + 0.01
    return model


def one_pass(model, ids, rule=full_depth, route=causal, cache=None, exited_kv="copy"):
    """ids (B,T) without padding in one call -> StepOutput."""
    return decode.step(model, ids, position_ids(ids), cache, rule, route, exited_kv)


def held(cache):
    """Tokens that every block of a cache holds, or will hold as soon as it runs again, for each row."""
    present = (cache.pos < NO_POSITION).sum(1).tolist()
    return [layer.used if layer.routed else present for layer in cache.layers]


def texts(seed=0, rows=3, T=16, vocab=V):
    """Random token ids (rows,T)."""
    return torch.randint(0, vocab, (rows, T), generator=torch.Generator().manual_seed(seed))


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Two FLOPs for every multiply-add of the matrix products that really run; of attention, those of the
    pairs of query and key that its mask lets through."""
    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__.split(".")[0], kwargs or {}
        if name in ("linear", "matmul", "scaled_dot_product_attention"):    # inference mode shows them whole
            with self:
                return func.decompose(*args, **kwargs)
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        elif name.startswith("_scaled_dot_product") and "backward" in name:
            self.flops += 8 * args[1].numel() * args[2].shape[-2]
        elif name.startswith("_scaled_dot_product"):
            q, k, mask = *args[:2], kwargs.get("attn_mask")
            seen = 1.0 if mask is None else float((mask == 0).double().mean())
            self.flops += round(4 * q.numel() * k.shape[-2] * seen)
        return func(*args, **kwargs)


TINY = ("--n_layer 4 --n_head 2 --n_embd 16 --block_size 32 --batch_size 4 --steps 8 --warmup 2"
        " --eval_every 4 --eval_windows 4 --save_every 4 --rule confidence:0.05 --device cpu").split()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A prepared data set of generated code."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data") / "tiny"
    for n in range(12):
        body = "".join(f"def f{n}_{i}(x, y):\n    return x * {i} + y - {n}\n\n" for i in range(60))
        (source / f"part{n}.py").write_text(body, encoding="utf-8")
    prepare_text.main(["--source", str(source), "--vocab-size", "300", "--out", str(folder)])
    return folder


def with_other_words(dataset, folder):
    """A copy of a prepared set in which two tokens have changed places."""
    shutil.copytree(dataset, folder)
    words, meta = (json.loads((folder / name).read_text("utf-8")) for name in ("tokenizer.json", "meta.json"))
    words["tokens"][-2:] = words["tokens"][:-3:-1]
    (folder / "tokenizer.json").write_text(json.dumps(words), "utf-8")
    meta["sha256"] |= digests(folder, ["tokenizer.json"])
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    return folder


WORDS = dict(zip("otter heron badger falcon lizard salmon beaver magpie".split(),
                 "uno due tre quattro cinque sei sette otto".split(), strict=True))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A prepared set of sentence pairs: eight words, each with its translation; languages aa and bb."""
    folder, draw, files = tmp_path_factory.mktemp("pairs"), random.Random(0), {}
    for split, count, least in (("train", 1200, 1), ("val", 40, 3), ("test", 12, 3)):      # words of a line
        lines = [draw.sample(list(WORDS), k=draw.randint(least, 4)) for _ in range(count)]
        files[split] = [str(folder / f"{split}.{language}") for language in ("aa", "bb")]
        for name, word in zip(files[split], (str, WORDS.get), strict=True):
            Path(name).write_text("".join(" ".join(map(word, line)) + "\n" for line in lines), "utf-8")
    prepare_pairs.main(["--source", *files["train"], "--val", *files["val"], "--test", *files["test"],
                        "--languages", "aa", "bb", "--vocab-size", "300", "--out", str(folder / "set")])
    return folder / "set"


@pytest.fixture
def train(dataset, tmp_path):
    """train(*words) runs train.main in this process, without sample and figures -> its run folder."""
    def go(*words, out=tmp_path / "runs"):
        script.main(["--data", str(dataset), "--out", str(out), *TINY, *map(str, words)])
        return max(out.iterdir())
    return go


def finished_run(data, out, words):
    """Train, evaluate, sample and draw as train.py does, but all in this process -> the folder."""
    mains = [importlib.import_module(name).main for name in ("evaluate", "sample", "plot")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "finish", lambda folder, o: [main(["--run", str(folder)]) for main in mains])
        script.main(["--data", str(data), "--out", str(out), *TINY, *words.split()])
    return out / "001"


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory):
    """The folder of one finished tiny run (do not change it)."""
    words = "--steps 60 --lr 0.01 --eval_every 20 --rule confidence:0.5"
    return finished_run(dataset, tmp_path_factory.mktemp("runs"), words)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "copy")
