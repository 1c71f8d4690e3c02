"""Options: names, ranges, what excludes what; command line and presets go through one checker."""
import dataclasses
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from data.common import UserError, reading
from exits import WEIGHTS
from model import Seq2SeqConfig
from routing import ROUTES

CONFIGS = Path(__file__).resolve().parent / "configs"
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass
class Options:
    """Train an adaptive-depth GPT, or with --translate a seq2seq Transformer. The first word may name a
    preset, configs/NAME.toml; options win."""
    model: tyro.conf.OmitArgPrefixes[Seq2SeqConfig] = field(default_factory=Seq2SeqConfig)
    data: str = "pysource"              # a folder under data/, or the path of a prepared folder
    translate: str = ""                 # from which language into which, such as en-de; empty: a GPT
    out: str = "runs"                   # where numbered run folders are made
    init_from: str = ""                 # start from the weights of this run, with its model, data and route
    resume: str = ""                    # continue this run; data, out, device, compile, stop_at may change
    steps: int = 1100
    stop_at: int = 0                    # stop after this step as if interrupted; 0: do not
    batch_size: int = 4                 # GPT: sequences a step
    batch_tokens: int = 2048            # translation: tokens a step, of the longer side, with padding
    grad_accum_steps: int = 1           # pieces that a step's batch is cut into, to save memory
    lr: float = 2e-3                    # peak learning rate
    warmup: int = 50                    # steps of linear warm-up, before a cosine over the rest
    lr_end: float = 0.1                 # end of the cosine, as a share of the peak
    weight_decay: float = 0.1           # on matrices only
    beta2: float = 0.95                 # of AdamW; beta1 is 0.9
    grad_clip: float = 1.0              # gradient norm is clipped to this
    label_smoothing: float = 0.0        # share of every label that is spread over the vocabulary
    objective: Literal["aligned", "mixed", "exit_predictor"] = "aligned"    # the last: it alone learns
    exit_weights: Literal[tuple(WEIGHTS)] = "1"     # w_n of the aligned loss over exits
    gradient_scale: float = 0.0         # gamma: gradients above block n are divided by gamma (N - n); 0: off
    paths: int = 1                      # mixed: exit sequences drawn a step (M)
    oracle: Literal["correctness", "likelihood"] = "correctness"    # of exits to learn
    exit_cost: float = 0.1              # lambda, what the oracle pays for each block
    sigma: float = 0.0                  # width of the oracle's smoothing over tokens; 0: none
    alpha: float = 1.0                  # weight of the exit predictor's loss, per target token
    rule: str = "auto"                  # halting rule after training; auto: learned, confidence:0.3 or full
    route: Literal[tuple(ROUTES)] = "top_k"     # routing rule in training
    predictor_loss: float = 0.01        # weight of the causal predictor's loss
    balance_loss: float = 0.01          # weight of the loss that keeps experts equally busy
    eval_every: int = 200               # steps between evaluations
    eval_windows: int = 32              # fixed validation windows, or batches of sentence pairs
    save_every: int = 200               # steps between checkpoints
    seed: int = 0
    device: Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto: bfloat16 on a GPU that has it
    compile: bool = False               # torch.compile every block


@dataclass
class RunOptions:
    """What the scripts that use a trained run share."""
    run: str = "last"           # its folder or number, or "last"
    out: str = "runs"           # where numbered runs are
    rule: str = "auto"          # the run's own; full, fixed:3, random, confidence:.5, :.5,.6,..., learned:.4
    device: Device = "auto"


MAY_CHANGE = {"data", "device", "compile", "stop_at", "out", "resume"}  # with --resume; data: where it is now

RANGES = {  # smallest and largest value -> options
    (1, 2**31): "steps batch_size batch_tokens grad_accum_steps eval_every eval_windows save_every",
    (1, 2**16): "n_layer n_head n_embd enc_layer enc_head enc_embd",
    (0, 1e6): "weight_decay predictor_loss balance_loss alpha exit_cost sigma gradient_scale",
    (0, 2**31): "seed stop_at warmup d_ff experts noops", (1, 1e3): "paths", (2, 2**20): "block_size",
    (1e-12, 1e6): "lr grad_clip", (0, 1 - 1e-9): "beta2 dropout label_smoothing", (0, 1): "lr_end",
    (1e-9, 1): "capacity", (1e-9, 1e3): "expert_capacity", (1e-12, 16): "predictor_width"}


def exclusions(o):
    """What excludes what: [(does it apply?, why, the options that would then do nothing)]; where no options
    are named, the combination itself is impossible."""
    m, mixed, alone = o.model, o.objective == "mixed", o.objective == "exit_predictor"
    routed, predicts = m.routed_blocks(), m.exit_predictor != "none"
    return (
        (not routed, "no block is routed (--routed none)",
         "capacity router gate causal_logit predictor_width predictor_loss" + " route" * (not m.experts)),
        (m.router == "random", "nothing learns to route (--router random)",
         "causal_logit predictor_width predictor_loss"),
        (m.causal_logit == "router", "no causal predictor (--causal_logit router)", "predictor_width"),
        (not m.experts, "there are no experts (--experts)", "noops expert_capacity balance_loss"),
        (m.exits == "last", "only the last block has a classifier (--exits last)",
         "exit_weights gradient_scale rule"),
        (o.translate, "batches of sentence pairs have --batch_tokens", "batch_size"),
        (not o.translate, "a GPT has no source (--translate makes a translator)",
         "enc_layer enc_head enc_embd embeddings batch_tokens"),
        (not predicts, "nothing learns where to exit (no --exit_predictor)", "oracle exit_cost sigma alpha"),
        (m.exit_predictor == "sequence", "there is one exit for a whole sentence", "sigma"),
        (not mixed, "exits are drawn by --objective mixed", "paths"),
        (mixed or alone, f"it belongs to --objective aligned, not {o.objective}",
         "exit_weights gradient_scale predictor_loss balance_loss"),
        (mixed, "--objective mixed trains no routed blocks", "route"),
        (alone, "the oracle's exits are not smoothed", "label_smoothing"),
        (m.exits == "last" and (predicts or mixed or alone), "learning exits takes --exits all", ""),
        (mixed and (routed or m.experts), "--objective mixed needs --routed none and no --experts", ""),
        (mixed and predicts, "--objective mixed trains no predictor: do so afterwards, --init_from RUN", ""),
        (alone and not predicts, "--objective exit_predictor needs an --exit_predictor", ""),
        (alone and not o.init_from, "--objective exit_predictor needs --init_from, a trained run", ""),
        (predicts and m.n_layer == 1, "a model of one block leaves no choice of exit", ""),
        (m.exit_predictor == "sequence" and not o.translate,
         "--exit_predictor sequence reads a source sentence, and a GPT has none (--translate)", ""),
        (m.gate == "one" and m.router == "learned", "--gate one gives a learned router no gradient", ""),
        (o.route == "causal", "--route causal would teach the causal predictor its own decisions", ""),
        (m.experts == 1 and not m.noops, "--experts 1 leaves no choice: give more, or --noops", ""),
        (o.translate and m.embeddings == "tied" and m.enc_embd != m.n_embd,
         "--enc_embd and --n_embd differ, one table cannot serve both: use --embeddings separate", ""),
        (not o.translate and o.batch_size % o.grad_accum_steps,
         f"--batch_size {o.batch_size} cannot be cut into equal pieces (--grad_accum_steps)", ""),
        (m.n_embd % (2 * m.n_head), f"--n_embd {m.n_embd} is not an even multiple of --n_head", ""),
        (m.enc_embd % (2 * m.enc_head), f"--enc_embd {m.enc_embd} is not an even multiple of --enc_head", ""))


def within(value, ranges):
    """UserError if an option {name: value} is not in its range {(smallest, largest): names}."""
    for (low, high), names in ranges.items():
        for name in names.split():
            if not low <= value[name] <= high:      # nan is in none
                raise UserError(f"--{name} {value[name]} must be from {low:g} to {high:g}")


def check(o):
    """UserError for values that cannot be and for options that would do nothing."""
    value, default = as_dict(o), as_dict(Options())
    within(value, RANGES)
    for applies, why, names in exclusions(o):
        if applies and not names:
            raise UserError(why)
        for name in names.split():
            if applies and value[name] != default[name]:
                raise UserError(f"--{name} {value[name]} would do nothing: {why}")


def refuse(o, names, why):
    """UserError if one of these options of a script is not at its default, since it would do nothing."""
    for name in names:
        if getattr(o, name) != getattr(type(o), name):
            raise UserError(f"--{name} would do nothing: {why}")


def as_dict(o):
    """Options -> one flat dict, the model's fields among the others."""
    table = dataclasses.asdict(o)
    return {**table.pop("model"), **table}


def as_arguments(table):
    """A flat mapping of options -> the command line that says the same."""
    return [f"--{name}={value}" for name, value in table.items()]


def parse(argv, kind=Options):
    """Command line -> an instance of `kind`. The one checker of names, types and choices; exits with 2."""
    flags = tyro.conf.FlagConversionOff if kind is Options else tyro.conf.FlagCreatePairsOff
    return tyro.cli(kind, args=argv, config=(flags,))


def from_file(path, table, more=(), whole=True):
    """The options in a file, then `more` arguments -> Options, checked if these are the whole; a complaint
    has the file's name."""
    try:
        o = parse([*as_arguments(table), *more])
        if whole:
            check(o)
        return o
    except UserError as error:
        raise UserError(f"{error} (with the options in {path})") from None
    except SystemExit:
        print(f"(with the options in {path})", file=sys.stderr)
        raise


def preset(name):
    """NAME -> the content of configs/NAME.toml as arguments, checked. UserError if there is none."""
    paths = {p.stem: p for p in sorted(CONFIGS.glob("*.toml"))}
    if name not in paths:
        raise UserError(f"unknown preset '{name}'; there are: {', '.join(paths)} (configs/*.toml)")
    with reading(paths[name]):
        table = tomllib.loads(paths[name].read_text("utf-8"))
    from_file(paths[name], table, whole=False)
    return as_arguments(table)


def read_options(argv, stored):
    """[preset] --option value ... -> checked Options. stored: run.stored_options (run.py imports this file),
    for --init_from (model, data, translate, route of that run) and --resume (all but out and stop_at)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv = [*preset(argv[0]), *argv[1:]]
    o = parse(argv)
    if o.resume:
        given = {word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
        if given - MAY_CHANGE:
            raise UserError(f"--{min(given - MAY_CHANGE)} cannot be changed by --resume: the run goes on as "
                            f"it began. May be given: {', '.join(sorted(MAY_CHANGE))}")
    if o.resume or o.init_from:
        path, table = stored(o.resume or o.init_from, o.out)
        inherited = {*(f.name for f in dataclasses.fields(Seq2SeqConfig)), "data", "translate", "route"}
        kept = table.keys() - {"out", "stop_at"} if o.resume else table.keys() & inherited
        o = from_file(path, {name: table[name] for name in kept}, argv)
    check(o)
    return o


def rule_name(o, trained):
    """The halting rule that a script's options name, else the run's own, else what the model allows."""
    for rule in (o.rule, trained.rule):
        if rule != "auto":
            return rule
    if trained.model.exit_predictor != "none":
        return "learned"
    return "confidence:0.3" if trained.model.exits == "all" else "full"


def kind_of(rule):
    """The line of a figure for a halting rule: full counts as fixed, several thresholds as searched."""
    kind, _, value = rule.partition(":")
    several = kind == "confidence" and "," in value
    return "searched thresholds" if several else "fixed" if kind == "full" else kind
