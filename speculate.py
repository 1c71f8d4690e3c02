"""Self-speculative decoding, which neither paper has: an early exit drafts tokens, full depth judges them."""
import numpy as np
import torch

from data.common import UserError
from decode import Cache, Generated, check_prompts, next_token_probs, sample_token, step
from exits import fixed_exit, full_depth
from routing import causal


def accept_or_resample(p, q, drafted, u):
    """Keep a drafted token with probability min(1, p / q), else draw one from the positive part of p - q:
    tokens then come as often as p says. p, q (V,), u two numbers uniform in [0,1) -> (kept?, token)."""
    if u[0] * q[drafted] < p[drafted]:
        return True, drafted
    return False, int(sample_token((p - q).clamp(min=0)[None], torch.tensor(u[1:])))


@torch.inference_mode()
def speculate(model, prompt, max_new_tokens, draft_layers, draft_tokens, route=causal, temperature=1.0,
              top_k=None, seed=0, eos_id=None, memory=None):
    """Continue one prompt as full depth would, in distribution (at temperature 0 token by token), in fewer
    steps -> Generated, tokens drafted, tokens kept. UserError for an exit or a number that cannot draft.
    Tokens are drafted by exits at block draft_layers; then one step at full depth runs the other blocks on
    all of them at once (exited_kv="compute"), and those that agree are kept."""
    early, L, device = model.classifiers.blocks[:-1], len(model.blocks), model.wte.weight.device
    if draft_layers not in early or draft_tokens < 1:
        raise UserError(f"cannot draft {draft_tokens} tokens at exit {draft_layers}: at least one token, at "
                        f"an early exit of this run: {', '.join(map(str, early)) or 'it has none'}")
    end = check_prompts(model, [prompt], max_new_tokens) + max_new_tokens
    rng, cache = np.random.default_rng(seed), Cache(model, 1, end, memory)
    ids, drafted, kept = [*prompt], 0, 0

    def next_probs(rule):
        """Read the tokens that are not in the cache -> probabilities (1,V) of the next one."""
        unread = torch.tensor([ids[cache.end:]], device=device)
        pos = torch.arange(cache.end, len(ids), device=device).unsqueeze(0)
        output = step(model, unread, pos, cache, rule, route, "compute")
        return next_token_probs(output.logits[:, -1], temperature, top_k)

    def sample(probs):
        return int(sample_token(probs, torch.from_numpy(rng.random(1))))

    while len(ids) < end and (len(ids) == len(prompt) or ids[-1] != eos_id):
        first, q = len(ids), []
        for _ in range(min(draft_tokens, end - first - 1)):
            q.append(next_probs(fixed_exit(model, draft_layers)))
            ids.append(sample(q[-1]))
        next_probs(full_depth)              # leaves the last states of all drafts in the cache
        p = next_token_probs(model.classifiers(L, cache.states[0, first - 1:cache.end]), temperature, top_k)
        drafted += len(q)
        for i, u in enumerate(rng.random((len(q), 2))):
            same, token = accept_or_resample(p[i], q[i][0], ids[first + i], u)
            kept += same
            if not same or token == eos_id:
                ids[first + i:] = [token]
                break
        else:
            ids.append(sample(p[-1:]))
        cache.truncate(len(ids) - 1)        # the last token is unread
    read = torch.arange(len(ids) - 1, device=device)
    visited = torch.stack([torch.isin(read, layer.pos) for layer in cache.layers], 1).cpu().numpy()
    return Generated(ids, len(prompt), np.full(len(read), L), visited), drafted, kept
