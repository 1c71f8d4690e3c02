"""Depth-Adaptive Transformer [DAT]: every block can emit the token.

    code                paper                                             where
    h       (B,T,C)     h_t^n, the state after block n of N = L           1
    classifiers(n, h)   W_n h_t^n, logits of an anytime classifier        2.1
    exit_weights        w_n of the aligned loss                           2.2
    score   (B,T,N)     LL_t^n or C_t^n, what an oracle maximises         3.1, 3.2
    exit_at (B,T)       a token's exit, in 1..N: taken, drawn, or q*_t    3.1, 3.2
    exit_logit          logit of chi_t^n, "exit after block n"            3.2, geometric-like
    tau                 confidence thresholds, N-1 of them                3.2

A halting rule is a function of tensors: rule(state) -> exits (B,T) bool, "this token exits after block
state.n". Classifiers read the stream and change nothing in it. This file imports no model.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.common import UserError
from linear import in_full_precision, linear

CHUNK = 2**22  # logits alive at a time while training, 16 MB in fp32


class Classifiers(nn.Module):
    """One output classifier after each block in `blocks` (numbers from 1), each with its own LayerNorm.
    embedding: the (V,C) parameter that all of them share (tied), or None for one matrix each [DAT 2.1]."""

    def __init__(self, blocks, C, V, embedding=None):
        super().__init__()
        self.blocks, self.tied = tuple(blocks), embedding is not None
        self.norms = nn.ModuleDict({str(n): nn.LayerNorm(C) for n in self.blocks})
        self.weights = nn.ParameterDict({"tied": embedding} if self.tied else
                                        {str(n): nn.Parameter(torch.empty(V, C)) for n in self.blocks})

    def weight(self, n):        # W_n (V,C)
        return self.weights["tied" if self.tied else str(n)]

    def forward(self, n, h):
        """Logits (...,V) of the classifier after block n, for h (...,C)."""
        return linear(self.norms[str(n)](h), self.weight(n))


WEIGHTS = {"1": 0, "n": 1, "sqrt(n)": 0.5, "1/sqrt(n)": -0.5, "1/n": -1}     # w_n as powers of n


def exit_weights(kind, blocks):
    """{n: w_n / sum_m w_m} for the exits n in `blocks` [DAT 2.2]; `kind` is a key of WEIGHTS."""
    weights = {n: n ** WEIGHTS[kind] for n in blocks}
    return {n: w / sum(weights.values()) for n, w in weights.items()}


def to_float32(logits):
    """In fp32, or as they are in fp64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def token_losses(logits, targets, label_smoothing=0.0):
    """Cross-entropy in nats: logits (...,V), targets (...) -> (...); 0 at padding, target -1."""
    loss = F.cross_entropy(to_float32(logits).flatten(0, -2), targets.flatten(), reduction="none",
                           ignore_index=-1, label_smoothing=label_smoothing)
    return loss.view(targets.shape)


def exit_loss(classifiers, n, h, targets, scale, label_smoothing=0.0):
    """Loss of the classifier after block n: h (...,C), targets (...), -1 at padding -> losses (...) in nats
    without label smoothing; right (...), is the most likely token the target; carrier ().
    Calls backward for each chunk of logits, so that one is alive at a time: adds the gradient of scale * sum
    of smoothed losses to the classifier's parameters. Backward of `carrier`, whose value means nothing, hands
    the same gradient to h and the blocks."""
    size, parts = max(1, CHUNK // len(classifiers.weight(n))), []               # tokens a chunk
    chunks = h.flatten(0, -2).split(size), targets.flatten().split(size)
    for states, wanted in zip(*chunks, strict=True):
        leaf = states.detach().requires_grad_()
        logits = classifiers(n, leaf)
        loss = token_losses(logits, wanted, label_smoothing)
        with torch.autocast(h.device.type, enabled=False):      # backward keeps the types of forward
            (loss.sum() * scale).backward()
        logits, loss = logits.detach(), loss.detach()
        plain = token_losses(logits, wanted) if label_smoothing else loss
        parts.append((plain, logits.argmax(-1) == wanted, leaf.grad))
    losses, right, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
    return losses.view_as(targets), right.view_as(targets), (h * gradient.view_as(h)).sum()


def balance_gradient(x, n, N, gamma):
    """h^n, whose gradient is divided by gamma_n = gamma (N - n) on the way back [DAT appendix], N - n being
    the number of losses above block n. gamma_N = 1: the printed formula would divide by 0. The loss of block
    n + m reaches block n times the product of 1 / gamma_i for i = n .. n + m - 1."""
    factor = 1 / (gamma * (N - n)) if n < N else 1.0
    return factor * x + (1 - factor) * x.detach()


def oracle(score, mask, exit_cost, sigma=0.0, whole_sequence=False):
    """The exits that an oracle would choose [DAT 3.1, 3.2]: score (B,T,N), log-likelihoods, or 1 where an
    exit is right; mask (B,T), False where nothing enters a sum -> exit_at (B,T), on ties the lowest.

    argmax_n sum_t' exp(-(t - t')^2 / sigma) score_t'^n - exit_cost n; sigma 0: of token t alone;
    whole_sequence: of all tokens, one exit for a row. exit_cost: lambda, in units of the sum."""
    score = score.masked_fill(~mask.unsqueeze(-1), 0)
    if whole_sequence:
        score = score.sum(1, keepdim=True).expand_as(score)
    elif sigma > 0:
        t = torch.arange(score.size(1), device=score.device)
        with torch.autocast(score.device.type, enabled=False):
            score = torch.exp(-(t[:, None] - t).square() / sigma).to(score.dtype) @ score
    n = torch.arange(1, score.size(-1) + 1, device=score.device, dtype=score.dtype)
    return (score - exit_cost * n).argmax(-1) + 1


class ExitPredictor(nn.Module):
    """Predicts the exit with one linear layer, or one for each n < N [DAT 3]. Ce: channels of the encoder.

    sequence    softmax over N exits of the mean encoder output, one exit for the whole output [3.1]
    token       softmax over N exits of h^1, decided after block 1 [3.2]
    geometric   chi^n of h^n for n < N: q(n) = chi^n prod_{m<n} (1 - chi^m) [3.2]
    binary      chi^n of h^n for n < N, N - 1 separate targets: is the oracle's exit n or below?"""

    def __init__(self, kind, N, C, Ce=None):
        super().__init__()
        self.kind = kind
        if kind in ("sequence", "token"):
            self.linear = nn.Linear(Ce if kind == "sequence" else C, N)
        else:
            self.linear = nn.ModuleList(nn.Linear(C, 1) for _ in range(N - 1))

    def of_memory(self, memory):
        """Encoder output -> exit logits (B,1,N) of the sequence kind; padding is not in the mean."""
        mask = memory.mask.unsqueeze(-1)
        mean = memory.states.masked_fill(~mask, 0).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return in_full_precision(self.linear, mean)

    def multinomial(self, h, memory):
        """h^1 (B,T,C), Memory or None -> exit logits, (B,T,N) of the token kind, (B,1,N) of sequence."""
        return memory.exit_logits if self.kind == "sequence" else in_full_precision(self.linear, h)

    def exit_logit(self, n, h):
        """h^n (...,C) -> the logit (...) of exiting after block n < N."""
        return in_full_precision(self.linear[n - 1], h).squeeze(-1)

    def loss(self, states, memory, exit_at, mask):
        """h^1..h^N, oracle's exit_at -> H(q*, q) [DAT 3], summed over mask (B,T); sequence: once a row."""
        if self.kind in ("sequence", "token"):
            logits = self.multinomial(states[0], memory)
            mask = mask[:, :logits.size(1)]                     # sequence: the first token stands for its row
            return F.cross_entropy(logits[mask], exit_at[:, :logits.size(1)][mask] - 1, reduction="sum")
        total = 0.0
        for n, h in enumerate(states[:-1], 1):
            logit = self.exit_logit(n, h)
            counts = mask & (exit_at >= n) if self.kind == "geometric" else mask
            total = total + F.binary_cross_entropy_with_logits(logit, (exit_at <= n).to(logit),
                                                               counts.to(logit), reduction="sum")
        return total


class ExitState:
    """What a halting rule can see after block n of one call: B rows, T tokens each.

    n          the block that has just run, from 1
    states     [h^1, ..., h^n], each (B,T,C); an exited token keeps its state (exited_kv="copy")
    logits(m)  (B,T,V) of the classifier after block m <= n, computed at most once
    pos, live  (B,T) positions; which tokens are present and have not exited
    memory     encoder output of a Seq2Seq, or None
    plan       (B,T) exits, for a rule that decides once; None before"""

    def __init__(self, classifiers, pos, live, memory=None):
        self.classifiers, self.memory = classifiers, memory
        self.pos, self.live, self.states, self.plan = pos, live, [], None
        self.computed, self.asked = {}, {}          # block -> its logits; for which tokens (B,T) they count
        self.predicted = torch.zeros_like(pos)      # exit predictions that each token read

    @property
    def n(self):
        return len(self.states)

    @property
    def classified(self):
        """(B,T) classifiers evaluated for each token."""
        return torch.stack([*self.asked.values()]).sum(0)

    def logits(self, m=None, tokens=None):      # tokens (B,T): those that it counts for; None: the live ones
        m = m or self.n
        if m not in self.computed:
            self.computed[m] = self.classifiers(m, self.states[m - 1])
        self.asked[m] = self.asked.get(m, False) | (self.live if tokens is None else tokens)
        return self.computed[m]

    def emitted(self, exit_at):
        """Logits (B,T,V) of every token at its exit; one product if tied and none is computed yet."""
        exits = [n for n in exit_at.unique().tolist() if n <= self.n]           # not the L of padding
        here = {n: exit_at == n for n in exits}
        if self.classifiers.tied and not self.computed:
            self.asked, h = here, torch.zeros_like(self.states[0])
            for n in exits:
                h = torch.where(here[n].unsqueeze(-1), self.classifiers.norms[str(n)](self.states[n - 1]), h)
            return linear(h, self.classifiers.weight(exits[0]))
        emitted = 0
        for n in exits:
            emitted = torch.where(here[n].unsqueeze(-1), self.logits(n, here[n]), emitted)
        return emitted


def require(condition, message):
    """UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def full_depth(state):
    """No token exits early."""
    return torch.zeros_like(state.live)


def forced_exits(exit_at):
    """Tokens exit where exit_at (B,T) says, by row and position: the choice of an oracle, for example."""
    return lambda state: exit_at.gather(1, state.pos.clamp(max=exit_at.size(1) - 1)) <= state.n


def fixed_exit(model, block):
    """Every token exits after this block."""
    N = model.config.n_layer
    require(block in range(1, N + 1), f"an exit is a block from 1 to {N}")
    return lambda state: torch.full_like(state.live, state.n >= block)


def random_exit(model):
    """Each token exits at a block drawn uniformly from 1..N ("uniform" in the paper's table 1)."""
    def rule(state):
        if state.plan is None:
            state.plan = torch.randint_like(state.pos, 1, model.config.n_layer + 1)
        return state.plan <= state.n
    return rule


def confidence(model, *tau):
    """Exit after the first block whose most likely token has p > tau_n [DAT 3.2]; one tau stands for all."""
    N = model.config.n_layer
    require(len(tau) in (1, N - 1) and all(0 <= t <= 1 for t in tau),
            f"give one threshold or {N - 1}, one for each block but the last, from 0 to 1")
    tau = tau * (N - 1) if len(tau) == 1 else tau
    return lambda state: to_float32(state.logits()).softmax(-1).amax(-1) > tau[state.n - 1]


def learned(model, threshold=0.5):
    """Exit where the model's ExitPredictor says [DAT 3]: at the most likely exit (sequence, token), decided
    once, or after the first block with chi > threshold (geometric, binary)."""
    predictor = model.exit_predictor
    require(predictor is not None, "this run has no exit predictor: train one, "
            "--init_from THIS_RUN --exit_predictor geometric --objective exit_predictor")
    require(0 <= threshold <= 1, "a threshold is a probability, from 0 to 1")
    require(threshold == 0.5 or predictor.kind in ("geometric", "binary"), "this predictor has no threshold")

    def rule(state):
        if predictor.kind in ("geometric", "binary"):
            state.predicted = state.predicted + state.live
            return predictor.exit_logit(state.n, state.states[-1]).sigmoid() > threshold
        if state.plan is None:
            state.predicted = state.predicted + state.live
            logits = predictor.multinomial(state.states[0], state.memory)
            state.plan = (logits.argmax(-1) + 1).expand_as(state.live)
        return state.plan <= state.n
    return rule


# name -> function(model, *the numbers after its colon) -> halting rule; another rule is another line
RULES = {
    "full": lambda model: full_depth,
    "fixed": fixed_exit,
    "random": random_exit,
    "confidence": confidence,
    "learned": learned,
}


def parse_rule(name, model):
    """"fixed:3", "confidence:0.5,0.6,..." and so on -> the halting rule. UserError says what is wrong."""
    kind, _, value = name.partition(":")
    try:
        require(kind in RULES, f"rules are {', '.join(RULES)}, with numbers after a colon")
        require(kind == "full" or len(model.classifiers.blocks) == model.config.n_layer,
                "this run has a classifier after its last block only, so no token can exit early: use --rule "
                "full, or train with --exits all")
        return RULES[kind](model, *map(float, value.split(",") if value else []))
    except (TypeError, ValueError) as error:        # UserError is a ValueError
        why = "it takes other numbers after the colon" if isinstance(error, TypeError) else error
        raise UserError(f"--rule {name}: {why}") from None
