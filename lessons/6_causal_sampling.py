"""Lesson 6: causal sampling (Mixture-of-Depths, section 3.5).

At the end you know how well a predictor that sees one token imitates top-k, what that costs, and
how a model with routed blocks writes text with a cache that holds only the tokens that ran."""
# %%
from contextlib import nullcontext

import matplotlib.pyplot as plt
import torch
from common import exercise, save, trained

from decode import Cache, evaluate_loss, generate, step
from exits import full_depth
from plot import BLUE, LINES
from routing import causal, confusion, report, top_k

model, o, data, batches = trained()
model.requires_grad_(False)
routed = sorted(model.config.routed_blocks())

# %% [markdown]
# Top-k compares tokens, so it needs the whole text (lesson 5). Sampling has one token at a time.
# Beside each router a small MLP, the predictor, reads the same state x_i and returns a logit:
# does top-k select this token? Its loss is binary cross-entropy against the selection.
# A stop-gradient lies before it: the language model learns nothing from this loss.
# The rule `causal` runs a token if its logit is above 0, however many tokens that makes.
# "Always no" is right for all tokens that top-k leaves out, so compare accuracy with that rate.
# %%
judged = [[routing for _, routing in model.run_batch(batch, top_k)] for batch in batches]
judged = {n: [routings[n] for routings in judged] for n in routed}
numbers = {n: report(sum(confusion(routing) for routing in judged[n])) for n in routed}
for n, r in numbers.items():
    print(f"block {n + 1}: right {r['accuracy']:.1%}, always no {r['base_rate']:.1%}, "
          f"precision {r['precision']:.0%}, recall {r['recall']:.0%}")
loss = evaluate_loss(model, batches, nullcontext())["loss"]
print("loss at the last exit:", {rule: round(losses[-1], 3) for rule, losses in loss.items()})

# %% [markdown]
# Compare the two losses, and then how often the predictor errs: an error need not cost much,
# since a token near the k-th largest router weight is one that the block could as well leave out.
#
# Now sampling. The naive way reads the whole text again for every token, under the causal rule.
# No state of an earlier token changes, so `decode.step` keeps keys and values in a cache.
# A routed block's cache holds the tokens that ran it, so the caches have different lengths.
# %%
ids = batches[0].ids[:1, :48]
cache = Cache(model, 1, ids.size(1))
for t in range(ids.size(1)):
    naive = model(ids[:, :t + 1], causal)[:, -1]
    now = step(model, ids[:, t:t + 1], torch.tensor([[t]]), cache, full_depth, causal)
    torch.testing.assert_close(naive, now.logits[:, -1], rtol=1e-4, atol=1e-4)
print("the naive loop equals decode.step; tokens kept by block:", [x.used[0] for x in cache.layers])
text = generate(model, [ids[0, :24].tolist()], 48, full_depth, causal, temperature=0.8)[0]
print(f"--- {text.visited.mean():.0%} of the blocks ran:\n{data.encoding.decode(text.ids)}\n---")

# %% [markdown]
# What if top-k were used here all the same? Of one token, the k = 1 largest is that token.
# So it runs every routed block, and nothing is saved. In training few tokens ran each of them.
# %%
cache, pos = Cache(model, 1, ids.size(1)), torch.arange(ids.size(1))[None]
alone = torch.cat([step(model, token, place, cache, full_depth, top_k).visited
                   for token, place in zip(ids.split(1, 1), pos.split(1, 1), strict=True)], 1)
whole = step(model, ids, pos, None, full_depth, top_k).visited
assert alone.all() and not whole[..., routed].all()
print(f"in routed blocks top_k runs {whole[..., routed].float().mean():.1%} of a text's tokens, "
      f"but {alone[..., routed].float().mean():.0%} token by token")

# %% [markdown]
# In the figure look at how far the two histograms overlap: those tokens cannot be told apart.
# Precision is the blue share to the right of 0, recall the share of blue that lies there.
# %%
figure, axes = plt.subplots(1, len(routed), figsize=(10, 4), sharey=True)
orange = LINES.by_key()["color"][1]
for axis, n in zip(axes, routed, strict=True):
    logit, runs = (torch.cat([getattr(r, name) for r in judged[n]]) for name in ("logit", "runs"))
    bins = torch.linspace(logit.min(), logit.max(), 50)
    axis.hist(logit[~runs], bins, color=orange, alpha=0.5, label="top-k leaves it out")
    axis.hist(logit[runs], bins, color=BLUE, alpha=0.7, label="top-k selects it")
    axis.axvline(0, color="black", lw=1, ls="--", label="runs to the right of 0")
    axis.set(xlabel="causal logit (nats)", title=f"Block {n + 1}: right "
             f"{numbers[n]['accuracy']:.1%}\n(always no: {numbers[n]['base_rate']:.1%})")
axes[0].set_ylabel("held-out tokens")
figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
save(figure, "6_causal_sampling")

# %% [markdown]
# Exercise: another threshold than 0 trades precision for recall. Compute both for several.
# %%
def specification(logit, runs, mask, thresholds):
    """logit, runs, mask (B,T), thresholds (K,) -> (K,2): precision and recall of logit > threshold
    over the tokens in mask, 0 where nothing is divided by nothing."""
    result = torch.zeros(len(thresholds), 2)
    for i, threshold in enumerate(thresholds):
        hits = yes = selected = 0
        for x, y in zip(logit[mask], runs[mask], strict=True):
            hits += int(x > threshold and y)
            yes += int(x > threshold)
            selected += int(y)
        result[i] = torch.tensor([hits / yes if yes else 0.0, hits / selected if selected else 0.0])
    return result


def mine(logit, runs, mask, thresholds):
    raise NotImplementedError       # fill in about 4 lines, without a loop


def check(candidate):
    agree = True
    for seed in range(3):
        logit, a, b = torch.randint(-3, 4, (3, 2, 8), generator=torch.Generator().manual_seed(seed))
        inputs = logit, (a > 0) & (seed < 2), b > -2, torch.tensor([-1, 0, 2, 3])   # above 3: none
        wanted, found = (f(*inputs).double().round(decimals=3) for f in (specification, candidate))
        print(f"specification {wanted.tolist()}\nyours         {found.tolist()}")
        agree = agree and wanted.shape == found.shape and torch.allclose(wanted, found)
    return agree


exercise(check, mine)
