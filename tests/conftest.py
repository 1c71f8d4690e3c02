"""Tiny real models and a tiny trained run for all tests. No network: a connection is an error."""
import json
import random
import socket
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from model import GPT, Attention, GPTConfig, Now, Seq2Seq, Seq2SeqConfig, Tokens, rotations  # noqa: E402
from routing import FAR, causal  # noqa: E402

torch.set_num_threads(1)
V = 23


def _refuse(*_, **__):
    raise OSError("tests must not use the network")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", _refuse)
    monkeypatch.setattr(socket, "create_connection", _refuse)
    monkeypatch.setattr(socket, "getaddrinfo", _refuse)


def tiny(seed=0, vocab=V, **options):
    """A GPT in float64 whose every parameter, norms and biases too, is random and large enough to matter."""
    config = GPTConfig(**{"n_layer": 4, "n_head": 2, "n_embd": 16, "block_size": 24,
                          "routed": "odd", "capacity": 0.25} | options)
    torch.manual_seed(seed)
    return at_random(GPT(config, vocab), None)


def tiny_translator(seed=0, vocab=V, **options):
    """The same for a Seq2Seq, of which encoder and decoder differ in everything."""
    config = Seq2SeqConfig(**{"n_layer": 4, "n_head": 2, "n_embd": 16, "n_inner": 40, "block_size": 24,
                              "enc_layer": 2, "enc_head": 3, "enc_embd": 12, "embeddings": "separate",
                              "routed": "odd", "capacity": 0.25} | options)
    torch.manual_seed(seed)
    model = Seq2Seq(config, vocab)
    return at_random(model, lambda: [Now(model.encode(texts(5, T=7, vocab=vocab)))] * config.n_layer)


def at_random(model, past):
    """Random weights in float64, the predictors centred so that about half of the tokens run."""
    model.double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    for module in model.modules():
        if isinstance(module, Attention):
            module.rope = rotations(len(module.rope), 2 * module.rope.size(-2), torch.float64)
    ids = texts(vocab=model.vocab_size)
    at = Tokens(torch.arange(ids.size(1)).expand_as(ids))
    states = model.trunk(model.embed(ids), at, past and past(), causal)
    for block, (_, visit) in zip(model.blocks, states, strict=True):
        if getattr(block, "predictor", None):
            block.predictor[2].bias.data -= visit.guess.median() + 0.01
    return model.eval()


def held(past):
    """How many tokens every block of a cache holds or will hold when it is needed, each row by itself."""
    all_of_them = (past.pos < FAR).sum(1).tolist()
    return [getattr(kv, "used", all_of_them) for kv in past]


def texts(seed=0, rows=3, T=16, vocab=V):
    """Random token ids (rows,T)."""
    return torch.randint(0, vocab, (rows, T), generator=torch.Generator().manual_seed(seed))


TINY = ["--n_layer", "4", "--n_head", "2", "--n_embd", "16", "--block_size", "32", "--batch", "4",
        "--steps", "8", "--warmup", "2", "--eval_every", "4", "--eval_windows", "4", "--save_every", "4",
        "--log_every", "1", "--tau", "0.05", "--device", "cpu"]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A prepared data set of generated code."""
    from data.text import prepare

    source = tmp_path_factory.mktemp("source")
    for n in range(12):
        body = "".join(f"def f{n}_{i}(x, y):\n    return x * {i} + y - {n}\n\n" for i in range(60))
        (source / f"part{n}.py").write_text(body, encoding="utf-8")
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare.main(["--source", str(source), "--vocab-size", "300", "--out", str(folder)])
    return folder


WORDS = dict(zip("otter heron badger falcon lizard salmon beaver magpie".split(),
                 "uno due tre quattro cinque sei sette otto".split(), strict=True))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A prepared set of sentence pairs: eight words, each with its translation; languages aa and bb."""
    from data.pairs import prepare

    folder, draw = tmp_path_factory.mktemp("pairs"), random.Random(0)
    for split, count in (("train", 400), ("val", 40), ("test", 12)):
        lines = [draw.sample(list(WORDS), k=draw.randint(1, 4)) for _ in range(count)]
        for language, words in (("aa", lambda w: w), ("bb", WORDS.get)):
            text = "".join(" ".join(map(words, line)) + "\n" for line in lines)
            (folder / f"{split}.{language}").write_text(text, encoding="utf-8")
    files = {split: [str(folder / f"{split}.{language}") for language in ("aa", "bb")]
             for split in ("train", "val", "test")}
    prepare.main(["--source", *files["train"], "--val", *files["val"], "--test", *files["test"],
                  "--languages", "aa", "bb", "--vocab-size", "300", "--out", str(folder / "set")])
    return folder / "set"


@pytest.fixture
def train(dataset, tmp_path):
    """train(*words) runs train.main in this process, without sample and figures -> its run folder."""
    import train as script

    def go(*words, out=tmp_path / "runs"):
        script.main(["--data", str(dataset), "--out", str(out), *TINY, *map(str, words)])
        return max(out.iterdir())

    return go


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory):
    """The folder of one finished tiny run (do not change it)."""
    import train as script

    out = tmp_path_factory.mktemp("runs")
    words = ["--steps", "60", "--lr", "0.01", "--eval_every", "20", "--tau", "0.5"]
    script.main(["--data", str(dataset), "--out", str(out), *TINY, *words])
    assert json.loads((out / "001" / "options.json").read_text("utf-8"))["options"]["n_embd"] == 16
    return out / "001"
