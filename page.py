"""The page of a run, a file to open in any browser: page.html with the tokens of a text in it as JSON."""
import json
from pathlib import Path

import numpy as np

import cost

TEMPLATE = Path(__file__).resolve().parent / "page.html"
NAMES = {       # array of depth.npz -> what the page calls it
    "ids": "text", "targets": "next", "exit_at": "exit", "cells": "did", "runs": "runs", "weight": "weight",
    "said": "said", "confidence": "confidence"}
COUNTED = "visited", "exit_at", "worked", "classified", "predicted"


def flops_of(piece, config, vocab_size):
    """FLOPs of the text as the run read it, at full depth with one classifier, and with all tokens at each
    exit after a look at all exits up to there -> 2 + N numbers."""
    (T, N), L = piece["said"].shape, config.n_layer
    texts = [{name: piece[name] for name in COUNTED}]
    for exit_at, classified in (L, 1), *zip(range(L - N + 1, L + 1), range(1, N + 1), strict=True):
        visited = piece["runs"] & (np.arange(L) < exit_at)
        texts.append({"visited": visited, "exit_at": np.full(T, exit_at), "classified": classified * T})
    S = int(piece["source"])
    return [float(cost.decoding(config, vocab_size, **text, S=S)["flops"]) for text in texts]


def page_of(piece, config, encoding, title, colors, words):
    """A piece of text -> the page. piece: arrays of its tokens (T,...) of depth.npz, "cells" as in plot.py;
    colors: of 0 to L blocks, "#rrggbb"; words: what the codes in "cells" mean."""
    columns = [np.nan_to_num(piece[name].astype(float), nan=-1e9).round(3).tolist() for name in NAMES]
    tokens = [dict(zip(NAMES.values(), token, strict=True)) for token in zip(*columns, strict=True)]
    ids = np.unique(np.concatenate([piece[name].ravel() for name in ("ids", "targets", "said")])).tolist()
    as_run, full, *flops = flops_of(piece, config, encoding.n_vocab)
    L = config.n_layer
    data = {"about": title, "colors": colors, "words": words, "exits": [*range(L - len(flops) + 1, L + 1)],
            "as_run": as_run, "full": full, "flops": flops, "tokens": tokens,
            "vocabulary": {i: encoding.decode([i]) for i in ids if i >= 0}}
    text = json.dumps(data).replace("<", "\\u003c")         # no token ends the script element
    return TEMPLATE.read_text("utf-8").replace(">DATA<", f">{text}<")
