"""Batches for training and evaluation. Batch t is a function of (seed, t): no position in data is stored.

A split is read as windows of a long text (`Windows`) or as buckets of sentence pairs (`Buckets`), with two
methods: step(seed, t) -> Batch, and fixed(count, pieces) -> list of Batch, the same for equal batch sizes.
"""
import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.common import HERE, UserError, is_prepared, load_set, token_bytes
from data.parallel import direction, load_pairs
from routing import NO_POSITION


class Batch(NamedTuple):
    ids: torch.Tensor               # (B,T)
    targets: torch.Tensor           # (B,T) the next tokens, -1 where nothing is asked, as at padding
    pos: torch.Tensor               # (B,T) positions, NO_POSITION at padding
    source: tuple | None = None     # ids and positions (B,S) of the source, for translation

    def to(self, device):
        source = self.source and tuple(x.to(device) for x in self.source)
        return Batch(*(x.to(device) for x in self[:3]), source)

    def cut(self, pieces):
        """At most `pieces` smaller batches that together are this one."""
        parts = zip(*(x.chunk(pieces) for x in (*self[:3], *(self.source or ()))), strict=True)
        return [Batch(*part[:3], part[3:] or None) for part in parts]

    @property
    def mask(self):
        """(B,T) bool, False at padding."""
        return self.pos < NO_POSITION

    @property
    def live(self):
        """The mask; None for text, which has no padding."""
        return self.mask if self.source else None

    @property
    def count(self):
        """Number of target tokens."""
        return int((self.targets >= 0).sum())

    def sources(self):
        """Number of source tokens of each row, 0 for text."""
        return (self.source[1] < NO_POSITION).sum(1).tolist() if self.source else [0] * len(self.ids)


@dataclass
class Windows:
    """Windows of `size` tokens of a text (T,), `rows` to a batch."""
    tokens: np.ndarray
    size: int
    rows: int

    def at(self, first):
        """Indices of first tokens (B,) -> Batch."""
        rows = torch.from_numpy(self.tokens[first[:, None] + np.arange(self.size + 1)].astype(np.int64))
        return Batch(rows[:, :-1], rows[:, 1:], torch.arange(self.size).expand(len(rows), -1))

    def step(self, seed, t):
        return self.at(np.random.default_rng([seed, t]).integers(0, len(self.tokens) - self.size, self.rows))

    def fixed(self, count, pieces=1):
        """`count` windows, evenly spaced, in batches of `rows`, each in pieces."""
        count = max(1, min(count, (len(self.tokens) - 1) // self.size))
        first = np.linspace(0, len(self.tokens) - self.size - 1, count).astype(np.int64)
        return [p for i in range(0, count, self.rows) for p in self.at(first[i:i + self.rows]).cut(pieces)]


@dataclass
class Questions(Windows):
    """Documents of data/hops, `size` tokens each: `listing` pairs, questions k, start, answer, then an end.
    An answer is the target of its start and is never read; no other token has a target."""
    listing: int

    def at(self, first):
        """Indices of tokens (B,) -> Batch of their documents."""
        ids, listing = super().at(first - first % self.size).ids, self.listing
        asked = ids[:, listing:-1].unflatten(1, (-1, 3))
        ids = torch.cat((ids[:, :listing], asked[..., :2].flatten(1)), 1)
        targets = torch.full_like(ids, -1)
        targets[:, listing + 1::2] = asked[..., 2]
        return Batch(ids, targets, torch.arange(ids.size(1)).expand(len(ids), -1))


class Buckets:
    """Batches of sentence pairs of similar length, at most `tokens` tokens of the longer side with padding.
    source, target: lists of arrays of ids that end with `end`; pairs over `longest` tokens are left out.
    Every epoch shuffles the pairs into n batches of the same sizes: step t is batch t % n of epoch t // n."""

    def __init__(self, source, target, end, tokens, longest):
        length = np.maximum(list(map(len, source)), list(map(len, target)))
        self.kept = np.flatnonzero(length <= min(longest, tokens))
        if not len(self.kept):
            raise UserError(f"no sentence pair is at most {longest} tokens long (--block_size)")
        self.source, self.target, self.end = source, target, end
        self.length, self.left_out = length[self.kept], len(length) - len(self.kept)
        starts = [0]                    # batches are slices of the pairs sorted by length
        for n, size in enumerate(np.sort(self.length)):
            if (n + 1 - starts[-1]) * size > tokens:
                starts.append(n)
        self.cuts = list(map(slice, starts, [*starts[1:], len(self.length)]))

    def at(self, pairs):
        """Indices of pairs -> Batch. The decoder's input begins with `end`."""
        source, target = [self.source[i] for i in pairs], [self.target[i] for i in pairs]
        S, T = list(map(len, source)), list(map(len, target))
        shifted = [np.append(self.end, ids[:-1]) for ids in target]
        return Batch(pad_rows(shifted, T, 0), pad_rows(target, T, -1), positions_of(T),
                     (pad_rows(source, S, 0), positions_of(S)))

    def step(self, seed, t):
        epoch, n = divmod(t, len(self.cuts))
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self.length))
        order = order[np.argsort(self.length[order], kind="stable")]    # equal lengths in random order
        return self.at(self.kept[order[self.cuts[rng.permutation(len(self.cuts))[n]]]])

    def fixed(self, count, pieces=1):
        """`count` batches, evenly spaced by length, each in pieces; all of them if there are no more."""
        order = np.argsort(self.length, kind="stable")
        chosen = np.linspace(0, len(self.cuts) - 1, min(count, len(self.cuts))).round().astype(int)
        return [p for n in chosen for p in self.at(self.kept[order[self.cuts[n]]]).cut(pieces)]


def positions_of(lengths):
    """Lengths -> (B, longest): 0, 1, ... and NO_POSITION at padding."""
    pos = torch.arange(max(lengths))
    return torch.where(pos < torch.tensor(lengths).unsqueeze(1), pos, NO_POSITION)


def pad_rows(rows, lengths, value):
    """Arrays of ids and their lengths -> (B, longest), `value` at padding."""
    out = torch.full((len(rows), max(lengths)), value)
    out[positions_of(lengths) < NO_POSITION] = torch.from_numpy(np.concatenate(rows).astype(np.int64))
    return out


def open_data(name, translate):
    """A name under data/ or the path of a prepared folder -> (folder, DataSet), of pairs to `translate`.
    A set under data/ that needs no --source is prepared first. UserError as in load_set."""
    folder = Path(name) if Path(name).is_dir() else HERE / name
    if folder.resolve().parent == HERE and (folder / "prepare.py").is_file() and not is_prepared(folder):
        prepare = importlib.import_module(f"data.{folder.name}.prepare").main
        if prepare.automatic:
            print(f"preparing data/{folder.name} ...", flush=True)
            prepare([])
    return folder, (load_pairs(folder) if translate else load_set(folder))


def batches_of(data, split, options):
    """Windows or Buckets of a split, in batches of the options' size."""
    T = options.model.block_size
    if options.translate:
        sides = [data.splits[split][language] for language in direction(data, options.translate)]
        buckets = Buckets(*sides, data.encoding.eot_token, options.batch_tokens, T)
        if buckets.left_out:
            print(f"left out of {split}: {buckets.left_out} pairs too long (--block_size, --batch_tokens)")
        return buckets
    tokens, listing = data.splits[split], data.meta.get("listing")
    if listing:
        if (length := listing + (data.meta["size"] - listing) // 3 * 2) > T:
            raise UserError(f"the questions of a document take {length} tokens: give a larger --block_size")
        return Questions(tokens, data.meta["size"], options.batch_size, listing)
    if len(tokens) <= T:
        raise UserError(f"{split}.bin has {len(tokens)} tokens, but one window takes {T + 1}: give more "
                        f"data or a smaller --block_size")
    return Windows(tokens, T, options.batch_size)


def bits_per_byte(batches, encoding):
    """The factor from nats per token to bits per byte on the targets of these batches."""
    targets = torch.cat([b.targets[b.targets >= 0] for b in batches]).numpy()
    return len(targets) / math.log(2) / token_bytes(encoding)[targets].sum()
