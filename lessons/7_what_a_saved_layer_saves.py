"""Lesson 7: what a saved layer saves (DAT, appendix B; Mixture-of-Depths, 3.2 and 3.5).

At the end you know why half of the layers is neither half of the FLOPs nor half of the seconds."""
# %%
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import exercise, save, trained

import cost
from decode import generate
from exits import confidence, fixed_exit, full_depth
from model import GPT
from plot import LINES

dense, o, data, (batch, *_) = trained("--routed none")
config, V = dense.config, dense.vocab_size
prompts, new = batch.ids[:, :2].tolist(), 12            # of 8 texts

# %% [markdown]
# A multiply-add is two FLOPs; only matrix products count. DAT's appendix B charges a token for its
# blocks, its classifiers and its copies: keys and values of its last state in the blocks above.
# %%
def naive_flops(exit_at, classified):
    """A text without routed blocks: exit_at and classifiers evaluated for each token -> FLOPs."""
    C, flops = config.n_embd, 0
    for t, (exit, classifiers) in enumerate(zip(exit_at, classified, strict=True)):
        for n in range(1, config.n_layer + 1):
            if n <= exit:
                flops += 8 * C * C                      # query, key, value, output projection
                flops += 4 * C * (t + 1)                # scores and sums over the tokens so far
                flops += 4 * C * config.mlp_units       # MLP
            else:
                flops += 4 * C * C                      # key and value of the copied state
        flops += 2 * V * C * classifiers
    return int(flops)


# What a block costs does not depend on its weights: the model with routed blocks is untrained,
# its predictors shifted to run the share `capacity` of the tokens, as trained ones would.
mod = GPT(replace(config, routed="odd"), V).eval().requires_grad_(False)
for block, (_, routing) in zip(mod.blocks[1::2], [*mod.run_batch(batch)][1::2], strict=True):
    block.predictor[2].bias -= routing.logit.quantile(1 - mod.config.capacity)
methods = [("full depth", dense, full_depth), ("exit after block 4", dense, fixed_exit(dense, 4)),
           ("exit after block 2", dense, fixed_exit(dense, 2)),
           ("confidence > 0.1", dense, confidence(dense, 0.1)), ("routed blocks", mod, full_depth)]
layers, flops, parts = [], [], ("blocks", "classifiers", "copies", "router")
for _, model, rule in methods:
    texts = generate(model, prompts, new, rule, temperature=0)
    counts = [cost.decoding(model.config, V, x.visited, x.exit_at, x.classified) for x in texts]
    if model is dense:
        assert [naive_flops(x.exit_at, x.classified) for x in texts] == [x["flops"] for x in counts]
    layers.append(np.mean([x.visited for x in texts]))
    flops.append([sum(x[part] for x in counts) for part in parts])
flops = np.array(flops) / sum(flops[0])
seconds = np.zeros((2, len(methods), 2))    # methods in turns, one text at a time and a batch
for turn, i, j in np.ndindex(seconds.shape):
    (_, model, rule), began = methods[i], time.perf_counter()
    for some in [prompts] if j else [[prompt] for prompt in prompts]:
        generate(model, some, new, rule, temperature=0)
    seconds[turn, i, j] = time.perf_counter() - began
seconds = seconds.min(0) / seconds.min(0)[0]        # the fastest turn is the least disturbed
print("naive FLOPs equal cost.decoding\nlayers, FLOPs, seconds of one text at a time, of a batch:")
for (name, *_), *row in zip(methods, layers, flops.sum(1), *seconds.T, strict=True):
    print(f"{name:18s}", *(f"{value:8.2f}" for value in row))

# %% [markdown]
# *Classifiers*: a token reads at least one, here larger than a block; under confidence one after
# every block until its exit. Compare FLOPs with layers there.
# *Copies*: a block that a token did not run still projects its keys and values.
# *Small matrices*: a narrow block takes the time of many small operations, not that of its FLOPs.
# A skipped routed block has such operations too: router, predictor, rule.
# *Batches*: a block runs if one row needs it. Compare the two times where rows decide differently.
# %%
figure, panels = plt.subplots(1, 3, figsize=(10, 4), sharex=True, sharey=True)
colors, y = LINES.by_key()["color"], np.arange(len(methods), 0, -1)
panels[0].barh(y, layers, color=colors[0], label="blocks run", tick_label=[m[0] for m in methods])
for i, part in enumerate(parts):
    panels[1].barh(y, flops[:, i], left=flops[:, :i].sum(1), color=colors[i], label=part)
panels[2].barh(y + 0.2, seconds[:, 0], 0.4, color="#777777", label="one text")
panels[2].barh(y - 0.2, seconds[:, 1], 0.4, color=colors[5], label=f"batch of {len(prompts)}")
for panel, title in zip(panels, ("Layers", "FLOPs", "Seconds"), strict=True):
    panel.axvline(1, color="black", lw=1, ls="--")
    panel.set(title=title, xlabel="share of full depth")
    panel.grid(visible=False)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handlelength=1)
save(figure, "7_what_a_saved_layer_saves")

# %% [markdown]
# Exercise: the paper counts all copies. Which ones are needed: does a later token run the block?
# %%
def specification(exit_at, L):
    """exit_at (B,T) in 1..L -> needed (B,T,L) bool, the copies that a later token attends to."""
    needed = torch.zeros(*exit_at.shape, L, dtype=torch.bool)
    for b, row in enumerate(exit_at.tolist()):
        for t, exit in enumerate(row):
            for n in range(1, L + 1):
                needed[b, t, n - 1] = exit < n and any(later >= n for later in row[t + 1:])
    return needed


def mine(exit_at, L):
    raise NotImplementedError       # fill in about 3 lines, without a loop


def check(candidate):
    agree = True
    for seed in range(3):
        exit_at = torch.randint(1, 5, (2, 6), generator=torch.manual_seed(seed))
        wanted, found = (f(exit_at, 4).int() for f in (specification, candidate))
        print(f"specification {wanted.tolist()}\nyours         {found.tolist()}")
        agree = agree and torch.equal(wanted, found)
    return agree


exercise(check, mine)
