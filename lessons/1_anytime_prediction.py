"""Lesson 1: anytime prediction (Depth-Adaptive Transformer, sections 2.1, 2.2 and 3.2).

At the end you know how every block of a Transformer can emit the token, how the loss falls from
exit to exit, what each exit gets right, and after which block a confidence threshold stops."""
# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from common import exercise, save, trained

from decode import evaluate_loss
from evaluate import exit_scores, under_rule
from plot import BLUE, MARKS, depth_colors

model, o, data, batches = trained("--routed none")
N = model.config.n_layer

# %% [markdown]
# A GPT usually has one output classifier, after its last block.
# Here every block has one: a LayerNorm of its own, then W_n, which is the embedding matrix [2.1].
# All N are trained together, by the mean of their losses: the *aligned* loss [2.2].
# To read the prediction after a block takes the norm, a product, and the log of the softmax.

# %%
@torch.no_grad()
def by_hand(batch):
    """Of the N exits: loss in nats, is it right, p of the most likely token; each (B,T,N)."""
    x, exits = model.wte.weight[batch.ids], []                              # h^0 (B,T,C)
    for block, norm in zip(model.blocks, model.classifiers.norms.values(), strict=True):
        x, _ = block(x, batch.pos)                                          # h^n
        variance, center = torch.var_mean(x, -1, correction=0, keepdim=True)
        unit = (x - center) / (variance + norm.eps).sqrt()
        logits = (unit * norm.weight + norm.bias) @ model.wte.weight.T      # (B,T,V)
        log_p = logits - logits.logsumexp(-1, keepdim=True)
        exits.append((-log_p.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1),
                      log_p.argmax(-1) == batch.targets, log_p.amax(-1).exp()))
    return [torch.stack(part, -1) for part in zip(*exits, strict=True)]

loss, right, confidence = map(torch.cat, zip(*map(by_hand, batches), strict=True))  # held-out text
ever, mean = right.cummax(-1).values, (0, 1)        # right here, or at an exit below
print("loss by exit (nats)", *(f"{value:6.3f}" for value in loss.mean(mean)))
for name, x in ("right              ", right), ("right here or below", ever):
    print(name, *(f"{value:6.1%}" for value in x.float().mean(mean)))

# %% [markdown]
# Exit 1 makes most of the way down from log V, the loss of guessing; later exits add less and less.
# The last row grows faster than the one above it: depth also turns right answers into wrong ones.
# The difference is what a choice of exit for each token could gain, if it knew the right answer.
# The project's classifiers give the same numbers:

# %%
wanted = torch.tensor(evaluate_loss(model, batches, torch.no_grad())["loss"]["top_k"])
torch.testing.assert_close(loss.mean(mean), wanted, rtol=1e-4, atol=1e-4)
with torch.no_grad():
    scores = [*map(torch.cat, zip(*(exit_scores(model, b) for b in batches), strict=True))]
torch.testing.assert_close([loss, confidence], scores[::2], rtol=1e-3, atol=1e-3)
print("by hand equals Classifiers: evaluate_loss and exit_scores")

# %% [markdown]
# A rule that cannot see the right answer can see how sure a classifier is.
# Confidence [3.2]: exit after the first block whose most likely token has p > tau.
# Below, held-out text is read under this rule; the state of a token that exited stays as it is.
# In the figure (colours and dots: full depth), look where one block is sure, and if it is right.

# %%
depth = {}
for tau in (0.1, 0.2, 0.3, 0.5, 0.7):
    d = depth[tau] = under_rule(model, batches, f"confidence:{tau}", o, torch.no_grad(), "copy")
    print(f"tau {tau}: mean exit {d['exit_at'].mean():.2f} of {N}, loss {d['loss'].mean():.3f}")
fig, ax = plt.subplot_mosaic([["loss", "stop"], ["map", "map"]], figsize=(10, 6.6))
n, exit_at = range(1, N + 1), depth[0.2]["exit_at"][:, :32]
ax["loss"].plot(n, loss.mean(mean), color=BLUE)
ax["loss"].set(title="loss by exit", xlabel="exit (block)", ylabel="held-out loss (nats / token)")
for block, color in zip(n, depth_colors(N)[1:], strict=True):
    below, here = ([f(d["exit_at"], block).mean() for d in depth.values()]
                   for f in (np.less, np.equal))
    ax["stop"].barh([*map(str, depth)], here, left=below, color=color, label=block)
ax["stop"].set(title="where confidence stops", xlabel="share of tokens", ylabel="threshold tau")
ax["stop"].legend(title="exit", loc="center left", bbox_to_anchor=(1, 0.5))
w = np.diff(exit_at).astype(bool).sum(1).argmax()   # the window whose exits change most
words = [data.encoding.decode([i]).replace("    ", "⇥").translate(MARKS)[:8]
         for i in depth[0.2]["ids"][w, :32]]
image = ax["map"].pcolormesh(confidence[w, :32].T, cmap="Blues", ec="#B0B0B0", lw=0.5)
ax["map"].plot(*right[w, :32].nonzero().T + 0.5, "o", color="#E69F00", mec="black", label="right")
ax["map"].stairs(exit_at[w], baseline=None, lw=2.5, color="black", label="exit, tau 0.2")
ax["map"].set_xticks(torch.arange(32) + 0.5, words, rotation=90, family="monospace")
ax["map"].set(xlabel="token read", ylabel="exit", yticks=[i - 0.5 for i in n], yticklabels=n)
ax["map"].legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 0.98))
fig.colorbar(image, ax=ax["map"], label="confidence p", pad=0.01)
save(fig, "1_anytime_prediction")

# %% [markdown]
# **Exercise.** The confidence rule where all p are known; each block but the last has a threshold.

# %%
def specification(p, tau):
    """Confidences p (B,T,N), thresholds tau (N-1,) -> exit_at (B,T) in 1..N."""
    exit_at = torch.full(p.shape[:2], p.size(-1))
    for b, t in np.ndindex(*exit_at.shape):
        for n in range(len(tau), 0, -1):
            if p[b, t, n - 1] > tau[n - 1]:
                exit_at[b, t] = n
    return exit_at

def mine(p, tau):
    raise NotImplementedError       # fill in about 2 lines: no loop

def check(candidate):
    """Run both on small inputs and show both -> do they agree?"""
    draw, agree = torch.Generator().manual_seed(0), True
    for _ in range(3):
        p = torch.randint(0, 9, (2, 4, 4), generator=draw) / 8
        tau = torch.randint(3, 8, (3,), generator=draw) / 8
        wanted, found = (f(p, tau).tolist() for f in (specification, candidate))
        print(f"specification {wanted}\nyours         {found}")
        agree &= wanted == found
    return agree

exercise(check, mine)
