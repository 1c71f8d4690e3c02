"""Lesson 4: decoding when layers are missing (Depth-Adaptive Transformer, section 2).

At the end you know what a token that exits early leaves for later tokens, that a cache gives what
reading the whole text again gives, what it saves, and what is lost without keys of copies."""
# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import exercise, save, trained

from decode import Cache, step
from exits import confidence, forced_exits, token_losses
from model import position_ids
from plot import BLUE

model, _, _, batches = trained("--routed none")
N = len(model.double().blocks)      # float64: rounding decides no exit

# %% [markdown]
# A token that exits after block n has no h^(n+1), ..., h^N. Later tokens want to attend to them.
# Its state is copied: it stays h^n, and every higher block makes keys and values of it [2].
# Read in one go, this takes a mask of live tokens: the others have keys, but get no update.

# %%
@torch.no_grad()
def read(ids, stops, copies=True):
    """ids (B,T); stops(n, logits (B,T,V)): who exits after block n -> logits (B,T,V), each at its
    token's exit; visited (B,T,N). copies=False: a token has keys only in the blocks that it ran."""
    x, pos, live = model.embed(ids), position_ids(ids), torch.ones_like(ids, dtype=torch.bool)
    emitted, visited = 0.0, []
    for n, block in enumerate(model.blocks, 1):
        keys = (pos[:, None] <= pos[..., None]) & (live | copies)[:, None]  # (B, T queries, T keys)
        x = torch.where(live[..., None], x + block.residual(x, pos, mask=keys[:, None])[0], x)
        logits = model.classifiers(n, x)
        emitted = torch.where(live[..., None], logits, emitted)
        visited.append(live)
        live = live & ~stops(n, logits)
    return emitted, torch.stack(visited, -1)

# %% [markdown]
# Decoding by hand reads the whole text again for each token and keeps the last logits.
# `step` reads each token once; its cache holds keys and values of all earlier ones, block by block.
# A block that runs first projects the copied states that have no keys and values in it yet.

# %%
ids, seconds = batches[0].ids[:1], []
T, pos = ids.size(1), position_ids(ids)
tau = read(ids, lambda n, _: ids < 0)[0].softmax(-1).amax(-1).mean().item()     # mean confidence
cache, rule = Cache(model, 1, T), confidence(model, tau)
for t in range(T):
    began = time.perf_counter()
    logits, visited = read(ids[:, :t + 1], lambda n, logits: logits.softmax(-1).amax(-1) > tau)
    between = time.perf_counter()
    output = step(model, ids[:, t:t + 1], pos[:, t:t + 1], cache, rule)
    seconds.append((between - began, time.perf_counter() - between))
    torch.testing.assert_close(logits[:, -1:], output.logits)
    assert torch.equal(visited[:, -1:], output.visited)
ms = 1000 * np.median(np.reshape(seconds, (8, -1, 2)), 1)       # medians of 8 pieces of the text
print(f"{T} tokens, mean exit {visited.sum(-1).double().mean():.2f}: equal logits, equal visited")
print(f"blocks run: reading again {T * (T + 1) // 2 * N}, with a cache {visited.sum()}")
print("ms for a token at the end: reading again {:.1f}, with a cache {:.1f}".format(*ms[-1]))

# %% [markdown]
# Why keys of copies? With exits drawn at random, exited tokens leave one of three things above:
# no keys, keys of copies, or keys of true states. For the last, decoding would run the missing
# blocks of tokens that are long written, as soon as a later token goes so deep.
# Without keys, a token that goes deep sees few others there. Look at the price of both short cuts.

# %%
ids, targets = (torch.cat([getattr(b, name) for b in batches]) for name in ("ids", "targets"))
exit_at = torch.randint(1, N + 1, ids.shape, generator=torch.Generator().manual_seed(0))
rule = forced_exits(exit_at)
copied, missing = (read(ids, lambda n, _: exit_at == n, keys)[0] for keys in (True, False))
torch.testing.assert_close(copied, step(model, ids, position_ids(ids), None, rule).logits)
true = step(model, ids, position_ids(ids), None, rule, exited_kv="compute").logits
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
left.set_prop_cycle(color=["#D55E00", BLUE], marker=["s", "o"])
left.plot((np.arange(8) + 0.5) * T / 8, ms, label=["read the text again", "cache"])
for kind, logits, color in ("no keys", missing, "#D55E00"), ("keys of copies", copied, BLUE):
    price = token_losses(logits, targets) - token_losses(true, targets)
    prices = [price[exit_at == n].numpy() for n in range(1, N + 1)]
    mean, error = np.transpose([(p.mean(), 2 * p.std() / len(p) ** 0.5) for p in prices])
    print(f"{kind}: loss above that of true states, by exit", *mean.round(4))
    right.errorbar(range(1, N + 1), mean, error, color=color, capsize=4, label=kind)
left.set(xlabel="position in the text (tokens)", ylabel="time for a token (ms)", ylim=(0, None))
right.set(xlabel="exit (bars: 2 standard errors)", ylabel="loss above true states (nats per token)")
left.legend(title="decoding", alignment="left")
right.legend(title="exited tokens leave")
save(fig, "4_missing_layers")

# %% [markdown]
# **Exercise.** A token that does not run a routed block leaves nothing in it [MoD 3.5], in a dense
# block it leaves a copy. Which keys does a token see that runs a block of a model with both?

# %%
def specification(visited, routed):
    """visited (B,T,L), routed (L,) -> (B,L,T,T): does token t see token k in block n?"""
    B, T, L = visited.shape
    sees = torch.zeros(B, L, T, T, dtype=torch.bool)
    for b, n, t, k in np.ndindex(*sees.shape):
        sees[b, n, t, k] = k <= t and visited[b, t, n] and (visited[b, k, n] or not routed[n])
    return sees

def mine(visited, routed):
    raise NotImplementedError       # fill in about 3 lines: no loop

def check(candidate):
    """Run both on small inputs and show both -> do they agree?"""
    draw, agree = torch.Generator().manual_seed(0), True
    for routed in torch.tensor([[False, True], [True, False], [False, False]]):
        visited = torch.rand(2, 4, 2, generator=draw) < 0.6
        wanted, found = (f(visited, routed).int().tolist() for f in (specification, candidate))
        print(f"specification {wanted}\nyours         {found}")
        agree &= wanted == found
    return agree

exercise(check, mine)
