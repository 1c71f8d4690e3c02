"""Lesson 2: aligned against mixed training (Depth-Adaptive Transformer, section 2.2).

At the end you know the two losses of a model that can exit after every block, what each trains that
the other does not, and how the exits of both do: after true states, and after copied ones."""
# %%
import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from common import exercise, save, trained

import train
from evaluate import exit_scores, under_rule
from plot import BLUE

words = "--objective {} --routed none --lr 0.01"     # a high rate, as the steps are few
models = {name: trained(words.format(name), steps=100) for name in ("aligned", "mixed")}
aligned, o, data, batches = models["aligned"]
N = aligned.config.n_layer

# %% [markdown]
# Aligned: every token passes all blocks, and all N classifiers predict from it.
# The loss is the mean over the exits (the paper also tries other weights w_n).
# Mixed: each token draws an exit, uniformly, and only that classifier predicts from it.
# Above the exit its state stays as it is: later tokens attend to a copy, as they will in decoding.

# %%
def aligned_by_hand(model, batch):
    x, total = model.embed(batch.ids), 0.0
    for n, block in enumerate(model.blocks, 1):
        x, _ = block(x, batch.pos)
        logits = model.classifiers(n, x)                                    # (B,T,V)
        total = total + F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()) / N
    return total

def mixed_by_hand(model, batch):
    x, total = model.embed(batch.ids), 0.0
    exit_at = torch.randint(1, N + 1, batch.ids.shape)
    for n, block in enumerate(model.blocks, 1):
        x = torch.where((exit_at >= n)[..., None], block(x, batch.pos)[0], x)   # or a copy
        here = exit_at == n
        loss = F.cross_entropy(model.classifiers(n, x[here]), batch.targets[here], reduction="sum")
        total = total + loss / batch.count
    return total

# %% [markdown]
# The first loop keeps the logits of all exits until backward, N times those of a usual model.
# The project calls backward exit by exit. The gradients of all parameters agree, in float64:

# %%
exact, few = copy.deepcopy(aligned).double(), batches[0].cut(4)[0]
for by_hand, objective in (aligned_by_hand, train.aligned), (mixed_by_hand, train.mixed):
    torch.manual_seed(0)                            # the same exits are drawn
    wanted = torch.autograd.grad(by_hand(exact, few), [*exact.parameters()])
    torch.manual_seed(0)
    exact.zero_grad()
    objective(exact, few, 1 / few.count, o)[0].backward()
    torch.testing.assert_close([p.grad for p in exact.parameters()], list(wanted))
print("gradients by hand equal those of train.aligned (exits.exit_loss) and train.mixed")

# %% [markdown]
# Both models have now seen the same batches for as many steps. Two questions on held-out text.
# 1. The loss of every exit when all tokens stay together, so that the states below are true ones.
# Aligned training learns N predictions from every token, mixed training one. Which line is lower?
# 2. The price of copies. Exits are drawn at random, once for both models, and every token is read
# twice at its exit: after copied states and after true ones. Only mixed training has seen copies.
# At exit 1 the price is 0: block 1 reads embeddings, which no exit changes.
# The panels have one scale. Does mixed training save as much by copies as it loses on the left?
# (After so few steps higher blocks add little. docs/results.md has copies in a trained translator.)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
numbers = np.arange(1, N + 1)
for (name, (model, *_)), mark, color in zip(models.items(), "os", (BLUE, "#D55E00"), strict=True):
    with torch.no_grad():
        true = torch.cat([exit_scores(model, batch)[0] for batch in batches]).numpy()   # (W,T,N)
    read = under_rule(model, batches, "random", o, torch.no_grad(), "copy")
    price = read["loss"] - np.take_along_axis(true, read["exit_at"][..., None] - 1, -1)[..., 0]
    prices = [price[read["exit_at"] == n] for n in numbers]
    means, error = [p.mean() for p in prices], [2 * p.std() / len(p) ** 0.5 for p in prices]
    print(name, "| loss by exit", *true.mean((0, 1)).round(3), "| price", *np.round(means, 3))
    left.plot(numbers, true.mean((0, 1)), color=color, marker=mark, label=name)
    right.errorbar(numbers, means, error, color=color, marker=mark, capsize=4, label=name)
left.set(title="loss by exit", xlabel="exit (block)", ylabel="held-out loss (nats per token)")
right.set(title="price of copied states (bars: 2 standard errors)",
          ylim=np.array([-0.5, 0.5]) * np.ptp(left.get_ylim()),     # as many nats as on the left
          xlabel="exit (block), drawn for every token", ylabel="increase of loss (nats per token)")
left.legend()
save(fig, "2_aligned_or_mixed")

# %% [markdown]
# **Exercise.** What is copied, where all states are known: h[n - 1] is what block n would make.

# %%
def specification(h, exit_at):
    """h (N,B,T,C), exit_at (B,T) in 1..N -> (N,B,T,C): states after every block, with copies."""
    seen = h.clone()
    for b, t in np.ndindex(*exit_at.shape):
        for n in range(exit_at[b, t], len(h)):
            seen[n, b, t] = h[exit_at[b, t] - 1, b, t]
    return seen

def mine(h, exit_at):
    raise NotImplementedError       # fill in about 3 lines: no loop

def check(candidate):
    """Run both on small inputs and show both -> do they agree?"""
    draw, agree = torch.Generator().manual_seed(0), True
    for _ in range(3):
        h = torch.randint(10, 99, (3, 2, 4, 1), generator=draw)
        exit_at = torch.randint(1, 4, (2, 4), generator=draw)
        wanted, found = (f(h, exit_at).tolist() for f in (specification, candidate))
        print(f"specification {wanted}\nyours         {found}")
        agree &= wanted == found
    return agree

exercise(check, mine)
