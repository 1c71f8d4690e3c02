"""What a training step reads. Batch t is a function of (seed, t), so no position in the data is ever stored.

A data set is offered as windows of a long text (`Windows`) or as buckets of sentence pairs (`Buckets`), both
with two methods: step(seed, t) -> Batch, and fixed(count) -> the same batches for every run.
"""
import importlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.common import UserError, is_prepared, load_set, token_bytes
from data.parallel import direction, load_pairs
from routing import FAR

HERE = Path(__file__).resolve().parent


class Batch(NamedTuple):
    """Token ids and what follows them. source: ids, pos (B,S), or None for text."""
    ids: torch.Tensor           # (B,T)
    targets: torch.Tensor       # (B,T), -1 where there is only padding
    pos: torch.Tensor           # (B,T), FAR at padding
    source: tuple | None = None

    def to(self, device):
        source = self.source and tuple(x.to(device) for x in self.source)
        return Batch(self.ids.to(device), self.targets.to(device), self.pos.to(device), source)

    def cut(self, pieces):
        """At most `pieces` smaller batches, together this one."""
        parts = [x.chunk(pieces) for x in self[:3]]
        source = zip(*(x.chunk(pieces) for x in self.source), strict=True) if self.source else [None] * pieces
        return [Batch(*p) for p in zip(*parts, source, strict=False)]

    @property
    def live(self):
        """(B,T) bool, the tokens that are there; None if there is no padding, as in text."""
        return self.there if self.source else None

    @property
    def there(self):
        """(B,T) bool, the tokens that are there."""
        return self.pos < FAR

    def sources(self):
        """Source tokens of each row, 0 for text."""
        return (self.source[1] < FAR).sum(1).tolist() if self.source else [0] * len(self.ids)

    @property
    def count(self):
        """Target tokens."""
        return int((self.targets >= 0).sum())


class Windows:
    """tokens (T,) of a text, cut into windows of `size`, `rows` of them in a batch."""

    def __init__(self, tokens, size, rows):
        self.tokens, self.size, self.rows = tokens, size, rows

    def at(self, first):
        rows = torch.from_numpy(np.stack([self.tokens[i:i + self.size + 1] for i in first]).astype(np.int64))
        return Batch(rows[:, :-1], rows[:, 1:], torch.arange(self.size).expand(len(rows), -1))

    def step(self, seed, t):
        return self.at(np.random.default_rng([seed, t]).integers(0, len(self.tokens) - self.size, self.rows))

    def fixed(self, count):
        """`count` windows, evenly spaced, in batches of `rows`."""
        count = max(1, min(count, (len(self.tokens) - 1) // self.size))
        first = np.linspace(0, len(self.tokens) - self.size - 1, count).astype(np.int64)
        return [self.at(first[i:i + self.rows]) for i in range(0, count, self.rows)]


class Buckets:
    """Sentence pairs, those of similar length together: as many to a batch as make up `tokens` tokens of the
    longer side, padding included. Every epoch mixes them anew; its batches have the same sizes, so step t is
    batch t % n of epoch t // n.

    source, target: lists of arrays of ids, `end` being the last of each; pairs over `longest` are left out.
    """

    def __init__(self, source, target, end, tokens, longest):
        length = np.array([max(len(s), len(t)) for s, t in zip(source, target, strict=True)])
        self.kept = np.flatnonzero(length <= min(longest, tokens))
        if not len(self.kept):
            raise UserError(f"no sentence pair is at most {longest} tokens long (--block_size)")
        self.left_out = len(length) - len(self.kept)
        self.source, self.target, self.end = source, target, end
        self.length = length[self.kept]
        self.cuts, first = [], 0        # batches are slices of the pairs sorted by length
        ordered = np.sort(self.length)
        for n, size in enumerate(ordered):
            if (n - first + 1) * size > tokens:
                self.cuts.append(slice(first, n))
                first = n
        self.cuts.append(slice(first, len(ordered)))

    def at(self, pairs):
        """Numbers of pairs -> Batch. The decoder begins with `end`."""
        source = [self.source[i] for i in pairs]
        target = [np.concatenate([[self.end], self.target[i].astype(np.int64)]) for i in pairs]
        there = [len(t) - 1 for t in target]
        targets = fill([t[1:] for t in target], there, -1)
        return Batch(fill([t[:-1] for t in target], there, 0), targets, places(there),
                     (fill(source, list(map(len, source)), 0), places(list(map(len, source)))))

    def step(self, seed, t):
        epoch, n = divmod(t, len(self.cuts))
        order = np.random.default_rng([seed, epoch])
        mixed = order.permutation(len(self.length))
        mixed = mixed[np.argsort(self.length[mixed], kind="stable")]        # ties in random order
        return self.at(self.kept[mixed[self.cuts[order.permutation(len(self.cuts))[n]]]])

    def fixed(self, count):
        """`count` batches, evenly spaced by length; all of them if there are no more."""
        ordered = self.kept[np.argsort(self.length, kind="stable")]
        chosen = np.linspace(0, len(self.cuts) - 1, min(count, len(self.cuts))).round().astype(int)
        return [self.at(ordered[self.cuts[n]]) for n in chosen]


def open_data(name, translate):
    """The data set `name`, a folder beside this file (made now if it needs nothing from the user) or a path
    -> (folder, DataSet, or PairSet to `translate`). Raises UserError if it is of the other kind."""
    folder = Path(name) if Path(name).is_dir() else HERE / name
    if name in ("pysource", "shakespeare", "multi30k", "iwslt14") and not is_prepared(folder):
        print(f"preparing data/{name} ...", flush=True)
        importlib.import_module(f"data.{name}.prepare").main([])
    languages = []
    if is_prepared(folder):
        languages = json.loads((folder / "meta.json").read_text("utf-8")).get("languages", [])
    if languages and not translate:
        a, b = languages
        raise UserError(f"{folder} holds sentence pairs: say what to --translate, {a}-{b} or {b}-{a}")
    if translate and is_prepared(folder) and not languages:
        raise UserError(f"{folder} is a text, there is nothing to --translate; use a set of sentence pairs")
    data = load_pairs(folder) if translate else load_set(folder)
    if translate:
        direction(data, translate)
    return folder, data


def batches_of(data, split, options, share=1):
    """Windows or Buckets of a split, in batches of 1 / share of the options' size."""
    T = options.model.block_size
    if options.translate:
        pairs = [data.splits[split][language] for language in direction(data, options.translate)]
        found = Buckets(*pairs, data.encoding.eot_token, options.batch_tokens // share, T)
        if found.left_out:
            print(f"left out of {split}: {found.left_out} pairs over {T} tokens (--block_size)")
        return found
    tokens = getattr(data, split)
    if len(tokens) <= T:
        raise UserError(f"{split}.bin has {len(tokens)} tokens, but one window takes {T + 1}: give more data "
                        f"or a smaller --block_size")
    return Windows(tokens, T, options.batch // share)


def bits_per_byte(batches, encoding):
    """The factor from nats per token to bits per byte on the targets of these batches."""
    targets = torch.cat([b.targets[b.targets >= 0] for b in batches]).numpy()
    return len(targets) / math.log(2) / token_bytes(encoding)[targets].sum()


def fill(rows, lengths, value):
    """Rows of ids -> (B, longest) with `value` on the right."""
    out = torch.full((len(rows), max(lengths)), value, dtype=torch.long)
    for b, row in enumerate(rows):
        out[b, :len(row)] = torch.from_numpy(row.astype(np.int64))
    return out


def places(lengths):
    """Lengths -> pos (B, longest): 0, 1, ... and FAR where a row has ended."""
    at, end = torch.arange(max(lengths)), torch.tensor(lengths).unsqueeze(1)
    return torch.where(at < end, at, FAR)
