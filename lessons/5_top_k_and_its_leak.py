"""Lesson 5: top-k routing and its leak (Mixture-of-Depths, sections 3.2 to 3.5, equation 1).

At the end you know what a routed block computes, token by token, and why the rule that trains it
lets a later token change what is predicted for an earlier one."""
# %%
import matplotlib.pyplot as plt
import torch
from common import exercise, save, trained

from plot import BLUE, LINES
from routing import capacity_in_tokens, causal, top_k

model, o, data, (batch, *_) = trained()
model.requires_grad_(False)

# %% [markdown]
# Every other block of this model is routed. A routed block runs k tokens of a sequence [3.2].
# A router gives every token a weight r_i = w . x_i; the tokens with the k largest run [3.3].
# They run as if the others did not exist: those are neither queries nor keys.
# Equation 1: a selected token becomes x_i + r_i f(x)_i, any other token stays x_i.
# The factor r_i puts the router on the path of the gradient: the choice alone has none.
# %%
def naive_routed(routed, x):
    """One sequence x (T,C) -> x after a routed block (T,C), places of the k selected tokens."""
    r, selected = [float(routed.router.weight[0] @ x_i) for x_i in x], []
    for _ in range(capacity_in_tokens(routed.capacity, len(x))):    # of equal ones, the earlier
        selected.append(max((t for t in range(len(x)) if t not in selected), key=lambda t: r[t]))
    selected.sort()                                 # in order of time, with the positions they had
    f, *_ = routed.block.residual(x[selected][None], torch.tensor([selected]))
    out = x.clone()
    for i, t in enumerate(selected):
        out[t] = x[t] + r[t] * f[0, i]
    return out, selected


before = model.embed(batch.ids)
for n, (after, routing) in enumerate(model.run_batch(batch, top_k)):
    if n in model.config.routed_blocks():
        out, selected = naive_routed(model.blocks[n], before[0])
        assert selected == routing.runs[0].nonzero().flatten().tolist()
        torch.testing.assert_close(out, after[0], rtol=1e-4, atol=1e-4)
        print(f"block {n + 1}: {len(selected)} of {len(out)} tokens ran, loop and Routed agree")
    before = after

# %% [markdown]
# "Among the k largest" compares a token with all others, also with later ones.
# To see it, change nothing but the last token of a text, and look at the predictions before it.
# Under top-k they change, if the new token is selected: it displaces another, whose prediction
# changes, and so do those of later tokens that attend to it.
# While sampling there are no later tokens to compare with, so top-k cannot be used there.
# The rule `causal` reads a logit of the token itself, which learns to imitate top-k (lesson 6).
# %%
tokens = torch.arange(model.vocab_size)[::model.vocab_size // 48]   # other last tokens (K,)
texts = batch.ids[0].repeat(len(tokens) + 1, 1)                     # the first stays as it was
texts[1:, -1] = tokens
change = {}         # half the sum of absolute differences of probabilities, from 0 to 1: (K,T-1)
for name, route in (("top_k", top_k), ("causal", causal)):
    p = torch.cat([model(part, route)[:, :-1].softmax(-1) for part in texts.split(8)])
    change[name] = (p[1:] - p[:1]).abs().sum(-1) / 2
    print(f"{name}: largest change of an earlier prediction {change[name].max():.5f}")
assert change["top_k"].max() > 1e-4 and change["causal"].max() < 1e-5

# %% [markdown]
# The figure has the replacement that changes most; a cross marks a token that ran before and not
# after, or the reverse. No prediction before the first cross changes, and none under `causal`.
# %%
most = int(change["top_k"].amax(1).argmax())
routings = [r for _, r in model.run_layers(model.embed(texts[[0, most + 1]]), batch.pos[:2])]
crosses = {n: places for n, routing in enumerate(routings, 1)
           if len(places := (routing.runs[0] ^ routing.runs[1])[:-1].nonzero().flatten())}
n, place, orange = min(crosses), torch.arange(batch.ids.size(1)), LINES.by_key()["color"][1]
(r, new), (ran, _) = routings[n - 1].weight, routings[n - 1].runs
figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 6), sharex=True)
top.plot(place[~ran], r[~ran], ".", color="#999999", label="skips")
top.plot(place[ran], r[ran], "o", color=BLUE, label="runs")
top.plot(place[-1], new[-1], "*", color=orange, ms=14, label="the new last token")
top.plot(crosses[n], r[crosses[n]], "X", color=orange, ms=11, label="selection changes")
for name, style, color in (("top_k", "-", orange), ("causal", "--", BLUE)):
    bottom.semilogy(place[:-1], change[name][most].clamp(min=1e-8), style, color=color, label=name,
                    marker="")                      # clamped, since a logarithm has no 0
for (block, places), marker in zip(crosses.items(), "X^s", strict=False):
    bottom.plot(places, change["top_k"][most, places], marker, color=orange, ms=10,
                label=f"changes in block {block}")
top.set(ylabel="router weight r", title=f"Block {n}: a new last token, another selection before it")
bottom.set(xlabel="place in the text (tokens)", ylabel="change of predictions\n(0 to 1)")
for axes in (top, bottom):
    axes.margins(y=0.3)
    axes.legend(ncols=5, loc="upper center")
save(figure, "5_top_k_and_its_leak")

# %% [markdown]
# Exercise: top-k among live tokens (not padding); a token runs if fewer than k live ones go before.
# %%
def specification(weight, live, k):
    """weight, live (B,T) -> runs (B,T) bool."""
    runs = torch.zeros_like(live)
    for b, w in enumerate(weight):
        for t in range(len(w)):
            before = [s for s in range(len(w)) if w[s] > w[t] or w[s] == w[t] and s < t]
            runs[b, t] = live[b, t] and sum(live[b, s] for s in before) < k
    return runs


def mine(weight, live, k):
    raise NotImplementedError       # fill in about 4 lines, without a loop over b, t or s


def check(candidate):
    agree = True
    for k in range(2, 5):
        weight, u = torch.randint(0, 4, (2, 2, 9), generator=torch.Generator().manual_seed(18 + k))
        inputs = weight, u > torch.tensor([[0], [2]]), k        # the second row has few live ones
        wanted, found = specification(*inputs).int(), candidate(*inputs).int()
        print(f"specification {wanted.tolist()}\nyours         {found.tolist()}")
        agree = agree and torch.equal(wanted, found)
    return agree


exercise(check, mine)
