"""Lesson 9: drafts (self-speculative decoding; in neither paper, but made of parts of both).

At the end you know why text drafted by an early exit is that of full depth, and what it saves."""
# %%
import copy

import matplotlib.pyplot as plt
import torch
from common import exercise, save, trained

from decode import Cache, generate, sample_token, step
from exits import fixed_exit, full_depth
from plot import EDGE
from routing import causal

model, o, data, (batch, *_) = trained()
model.requires_grad_(False).double()        # so that rounding decides no comparison
L, d, new = model.config.n_layer, 4, 24     # blocks, tokens of a draft, tokens to write

# %% [markdown]
# One pass over five tokens takes little more time than over one: it reads the weights once.
# So an early exit drafts d tokens, and full depth reads them in one step, `exited_kv="compute"`:
# the drafted tokens run the blocks above their exit. What full depth would write after each is then
# known. The longest agreeing prefix is kept, and one more token: full depth's own.
# %%
def read(ids, cache, rule):
    """Read those tokens of ids that are not in the cache -> the most likely next token."""
    unread, pos = torch.tensor([ids])[:, cache.end:], torch.arange(cache.end, len(ids))[None]
    return int(step(model, unread, pos, cache, rule, causal, "compute").logits[0, -1].argmax())


def write(prompt, exit):
    """`new` tokens, greedily, drafted at a block -> ids, tokens drafted and kept in each round."""
    ids, rounds, cache = list(prompt), [], Cache(model, 1, end := len(prompt) + new)
    while len(ids) < end:
        read(ids[:-1], cache, full_depth)                   # what is kept, without the last token
        text, trial = list(ids), copy.deepcopy(cache)       # a cache to throw away
        while len(text) < min(len(ids) + d, end - 1):
            text.append(read(text, trial, fixed_exit(model, exit)))
        read(text, trial, full_depth)
        last = trial.states[0, len(ids) - 1:len(text)]      # now states after the last block
        wanted, drafted = model.classifiers(L, last).argmax(-1).tolist(), text[len(ids):]
        kept = next(i for i, token in enumerate(wanted) if drafted[i:i + 1] != [token])
        ids += wanted[:kept + 1]
        rounds.append((len(drafted), kept))
    return ids, rounds


prompts, results = batch.ids[::2, :16].tolist(), []
plain = [generate(model, [p], new, full_depth, temperature=0)[0].ids for p in prompts]
for exit in range(1, L):
    texts, rounds = zip(*(write(prompt, exit) for prompt in prompts), strict=True)
    assert list(texts) == plain
    drafted, kept = torch.tensor(sum(rounds, [])).T.double()
    counts = (kept, drafted), (drafted + 1, kept + 1), (drafted * exit / L + 1, kept + 1)
    results.append([float(x.sum() / y.sum()) for x, y in counts])
    print(f"exit {exit}: the texts of full depth, {results[-1][0]:.0%} of the drafts kept")

# %% [markdown]
# A round runs every drafted token through all blocks, for nothing if it is not kept: no FLOPs are
# saved, but blocks *in sequence*: a round has d times the exit, then one full pass. Look for the
# exit that needs fewest. (Not counted: skips of routed blocks; kept tokens, read again here.)
# When sampling, the exit draws x from its q, and full depth has p. To compare samples would change
# the distribution. Keep x with probability min(1, p(x) / q(x)), else draw from the positive part
# of p - q: it has what q lacks. A draft is kept as often as p and q overlap.
# %%
p, q = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).double().softmax(-1)
comes, rest = torch.zeros_like(p), (p - q).clamp(min=0)
for x in range(5):                                          # whatever is drafted
    comes[x] += q[x] * min(1, p[x] / q[x])
    comes += q[x] * (1 - min(1, p[x] / q[x])) * rest / rest.sum()
torch.testing.assert_close(comes, p)
states = enumerate(model.run_batch(batch, causal), 1)       # of held-out text
*early, p = [model.classifiers(n, h).softmax(-1) for n, (h, _) in states]
overlap = [float(torch.minimum(p, q).sum(-1).mean()) for q in early]
print("tokens come as often as p says; overlap by exit:", [round(x, 2) for x in overlap])
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
share, computed, sequence = zip(*results, strict=True)
for panel, values, label in ((left, share, "greedy: kept"), (left, overlap, "overlap of p and q"),
                             (right, computed, "computed"), (right, sequence, "in sequence")):
    panel.plot(range(1, L), values, label=label)
    panel.axhline(1, color=EDGE, ls="--", zorder=0)
    panel.set(xlabel="exit that drafts (block)", xticks=range(1, L), ylim=(0, 1.05 * max(computed)))
    panel.legend()
left.set(ylabel="share of drafted tokens", title=f"Drafts of {d} tokens: what is kept")
right.set(ylabel="share of full depth", title="Blocks for each written token")
save(figure, "9_drafts")

# %% [markdown]
# Exercise: judge whole drafts by that rule. The last of the numbers u draws the next token.
# %%
def specification(p, q, drafted, u):
    """p (B,d+1,V), q (B,d,V), drafted (B,d), u (B,d+1) -> (B,2): tokens kept, the next token."""
    result = []
    for b, x in enumerate(drafted):
        kept = 0
        while kept < len(x) and u[b, kept] * q[b, kept, x[kept]] < p[b, kept, x[kept]]:
            kept += 1
        rest = (p[b, kept] - q[b, kept]).clamp(min=0) if kept < len(x) else p[b, kept]
        result.append([kept, int(sample_token(rest[None], u[b, -1:]))])
    return torch.tensor(result)


def mine(p, q, drafted, u):
    raise NotImplementedError       # fill in about 5 lines, without a loop, with sample_token


def check(candidate):
    agree = True
    for seed in range(3):
        p, q = torch.randn(2, 8, 4, 5, generator=torch.manual_seed(seed)).softmax(-1)
        inputs = p, q[:, 1:], torch.randint(5, (8, 3)), torch.rand(8, 4)
        wanted, found = specification(*inputs), candidate(*inputs)
        print(f"specification {wanted.tolist()}\nyours         {found.tolist()}")
        agree = agree and torch.equal(wanted, found)
    return agree


exercise(check, mine)
