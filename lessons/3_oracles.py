"""Lesson 3: oracles and exit predictors (Depth-Adaptive Transformer, sections 3.1 and 3.2).

At the end you know which exits an oracle picks that sees the right answer, by correctness and by
likelihood, what its price of a block (lambda) changes, and how much a linear layer learns of it."""
# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from common import exercise, save, trained

from data.batches import batches_of
from evaluate import exit_scores
from exits import ExitPredictor, oracle
from plot import BLUE

model, o, data, held_out = trained("--routed none")
N, C = model.config.n_layer, model.config.n_embd

@torch.no_grad()
def read(batches):
    """-> h^1 (B,T,C), scores (B,T,N) of all exits: log-likelihood, or 1 if right; mask (B,T)."""
    h = torch.cat([model.blocks[0](model.embed(b.ids), b.pos)[0] for b in batches])
    losses, said, *_ = map(torch.cat, zip(*(exit_scores(model, b) for b in batches), strict=True))
    scores = {"likelihood": -losses.double(),
              "correctness": (said == torch.cat([b.targets for b in batches]).unsqueeze(-1)).double()}
    return h, scores, torch.ones(h.shape[:2], dtype=torch.bool)     # text has no padding

def summary(exit_at):
    """Exits (B,T) -> their mean, and the held-out loss at them (read after true states)."""
    log_p = scores["likelihood"].gather(-1, exit_at.unsqueeze(-1) - 1)
    return exit_at.double().mean().item(), -log_p.mean().item()

# %% [markdown]
# An oracle knows the next token. It picks the exit of the best score, paying lambda for each block.
# It cannot write text; it labels training tokens, and bounds what a choice of exits could gain.

# %%
def by_hand(score, exit_cost):
    """Scores (B,T,N), lambda -> exits (B,T) in 1..N, on ties the lowest."""
    exit_at = torch.ones(score.shape[:2], dtype=torch.long)
    for b, t in np.ndindex(*exit_at.shape):
        paid = [value - exit_cost * n for n, value in enumerate(score[b, t].tolist(), 1)]
        exit_at[b, t] = 1 + paid.index(max(paid))
    return exit_at

(h, scores, mask), costs = read(held_out), (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.1)
chosen = {(kind, cost): by_hand(scores[kind], cost) for kind in scores for cost in costs}
for (kind, cost), exit_at in chosen.items():
    assert torch.equal(exit_at, oracle(scores[kind], mask, cost))
    print("{} {:5}: mean exit {:.2f}, loss {:.3f}".format(kind, cost, *summary(exit_at)))
print("the loop equals exits.oracle")

# %% [markdown]
# Correctness: a right answer is worth 1, and exit n costs lambda (n - 1) more than exit 1.
# So for lambda below 1 / (N - 1) the oracle takes the lowest right exit, and above 1 always exit 1.
# It also takes exit 1 where no exit is right, which is true of most tokens here.
# Likelihood: every small gain counts, so that exits spread and lambda moves them gradually.
# At small lambda it takes the best of N noisy numbers. Part of its gain is luck, never foreseen.
# How much can be foreseen? The token predictor is one linear layer on h^1 [3.2]; the model is
# frozen. It learns the oracle's exits of training tokens, for each oracle and lambda anew.

# %%
h_train, scores_train, every = read([batches_of(data, "train", o).step(1, t) for t in range(16)])
predicted = {}
for kind, cost in *(("likelihood", cost) for cost in costs[:5]), ("correctness", 0.1):
    torch.manual_seed(0)
    predictor, target = ExitPredictor("token", N, C), oracle(scores_train[kind], every, cost)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=0.02)
    for _ in range(50):
        optimizer.zero_grad()
        (predictor.loss([h_train], None, target, every) / every.sum()).backward()
        optimizer.step()
    found = predicted[kind, cost] = predictor.multinomial(h, None).argmax(-1) + 1
    hits, counts = found == chosen[kind, cost], chosen[kind, cost].flatten().bincount()
    print(f"{kind} {cost:5}: predicts {hits.double().mean():.1%} of the oracle's exits; "
          f"the commonest one, {counts.argmax()}, makes {counts.max() / counts.sum():.1%}")

# %% [markdown]
# How much more does the layer know than the commonest exit? It gains only below the black line.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
right.plot(*zip(*(summary(torch.full_like(found, n)) for n in range(1, N + 1)), strict=True), "k^-",
           label="all tokens at one exit")
for kind, color in ("likelihood", BLUE), ("correctness", "#D55E00"):
    for exits, style, name in (chosen, "o-", "oracle"), (predicted, "s:", "predicted"):
        points = np.array([(x, *summary(e)) for (k, x), e in exits.items() if k == kind])
        left.plot(points[:, 0], points[:, 1], style, color=color)
        right.plot(points[:, 1], points[:, 2], style, color=color, label=f"{name}, {kind}")
left.set(xscale="log", xlabel="lambda (score paid for each block)", ylabel="mean exit (block)")
right.set(xlabel="mean exit (block)", ylabel="held-out loss (nats per token)")
fig.legend(ncols=3, loc="outside upper center")
save(fig, "3_oracles")

# %% [markdown]
# **Exercise.** The smoothed oracle [3.2]: token t' counts exp(-(t - t')^2 / sigma) for token t.
# %%
def specification(score, mask, exit_cost, sigma):
    """Scores (B,T,N), mask (B,T), False at padding -> exits (B,T) in 1..N, on ties the lowest."""
    smooth = torch.zeros_like(score)
    for b, t, other in np.ndindex(*mask.shape, mask.size(1)):
        smooth[b, t] += score[b, other] * mask[b, other] * np.exp(-(t - other) ** 2 / sigma)
    return by_hand(smooth, exit_cost)

def mine(score, mask, exit_cost, sigma):
    raise NotImplementedError       # fill in about 4 lines: no loop

def check(candidate):
    """Run both on small inputs and show both -> do they agree?"""
    draw, agree = torch.Generator().manual_seed(0), True
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    for cost in (0, 0.05, 0.1):
        score = torch.rand(2, 6, 4, generator=draw, dtype=torch.float64)
        wanted, found = (f(score, mask, cost, 2.0).tolist() for f in (specification, candidate))
        print(f"specification {wanted}\nyours         {found}")
        agree &= wanted == found
    return agree

exercise(check, mine)
