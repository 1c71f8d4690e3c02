"""Options, run folders, checkpoints and metrics: what every script needs and no model needs.

    runs/007/options.json     every option and the environment (torch, device, commit)
            tokenizer.json    copied, so that a run can be sampled without its data
            metrics.jsonl     one line per logged step and per evaluation
            ckpt.pt           weights, optimiser, step; replaced atomically
            depth.npz, figures/, sample.txt ...   written by train.py, plot.py, sample.py
"""
import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

import exits
from data.common import UserError
from linear import PROCESSOR
from model import GPT, Seq2Seq, Seq2SeqConfig

HERE = Path(__file__).resolve().parent


@dataclass
class Options:
    """Train an adaptive-depth GPT, or with --translate a seq2seq Transformer. The first word may name a
    preset, configs/NAME.toml; options win."""
    model: tyro.conf.OmitArgPrefixes[Seq2SeqConfig] = field(default_factory=Seq2SeqConfig)
    data: str = "pysource"              # a folder under data/, or the path of a prepared folder
    translate: str = ""                 # from which language into which, such as en-de; empty: a GPT
    out: str = "runs"                   # where numbered run folders are made
    steps: int = 1100
    batch: int = 4                      # GPT: sequences a step
    batch_tokens: int = 2048            # translation: tokens a step, of the longer side, with padding
    accumulate: int = 1                 # pieces that a step's batch is cut into, to save memory
    lr: float = 2e-3                    # peak learning rate
    lr_end: float = 0.1                 # last learning rate as a share of the peak
    warmup: int = 50                    # steps of linear warm-up
    schedule: Literal["cosine", "inverse_sqrt"] = "cosine"  # then down to lr_end, or lr sqrt(warmup / step)
    label_smoothing: float = 0.0        # share of every label that is spread over the vocabulary
    objective: Literal["aligned", "mixed", "halting"] = "aligned"   # halting: the predictor of exits alone
    paths: int = 1                      # mixed: exit paths drawn a step (M)
    gradient_scale: float = 0.0         # gamma, balances each block's loss against those above; 0: off
    oracle: Literal["correctness", "likelihood"] = "correctness"    # which exits the predictor should learn
    exit_cost: float = 0.1              # lambda, what the oracle pays for each block
    sigma: float = 0.0                  # width of the oracle's smoothing over tokens; 0: none
    alpha: float = 1.0                  # weight of the predictor's loss, per target token
    init: str = ""                      # start from the weights of this run (and its model options)
    average: int = 1                    # the final weights are the mean of this many last checkpoints
    weight_decay: float = 0.1           # on matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0                   # gradient norm is clipped to this
    exit_weights: Literal[tuple(exits.WEIGHTS)] = "1"     # w_n of the aligned loss over exits
    imitation: float = 0.01             # weight of the loss that teaches the causal rule top-k's choices
    balance: float = 0.01               # weight of the loss that keeps experts equally busy
    tau: float = 0.3                    # confidence threshold of the adaptive evaluation after training
    eval_every: int = 200               # steps between evaluations
    eval_windows: int = 32              # fixed validation windows, or batches of sentence pairs
    save_every: int = 200               # steps between checkpoints
    log_every: int = 10
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto: bfloat16 on a GPU that has it
    compile: bool = False               # torch.compile every block (the rotation, complex, stays eager)
    stop_at: int = 0                    # stop after this step as if interrupted; 0: do not
    resume: str = ""                    # continue this run exactly; only device, compile, stop_at may change


MAY_CHANGE = {"data", "device", "compile", "stop_at", "out", "resume"}     # for --resume; data: its new place

RANGES = {  # option -> smallest and largest value; nan is in no range
    **dict.fromkeys(("steps", "batch", "accumulate", "eval_every", "eval_windows", "save_every", "log_every",
                     "batch_tokens"), (1, 2**31)),
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "enc_layer", "enc_head", "enc_embd"), (1, 2**16)),
    **dict.fromkeys(("lr", "clip"), (1e-12, 1e6)),
    **dict.fromkeys(("weight_decay", "imitation", "balance", "alpha", "exit_cost", "sigma",
                     "gradient_scale"), (0, 1e6)),
    **dict.fromkeys(("beta1", "beta2", "dropout", "label_smoothing"), (0, 1 - 1e-9)),
    **dict.fromkeys(("seed", "stop_at", "warmup"), (0, 2**31)),
    **dict.fromkeys(("experts", "noops"), (0, 1024)), "n_inner": (0, 2**18), "predictor_width": (1e-12, 16),
    **dict.fromkeys(("tau", "lr_end"), (0, 1)),
    "block_size": (2, 2**20), "capacity": (1e-9, 1), "expert_capacity": (1e-9, 1e3), "average": (1, 100),
    "paths": (1, 1000),
}


def idle(options):
    """Options that would do nothing, by name -> why."""
    m, why = options.model, {}
    if m.routed == "none":
        names = ("capacity", "router", "gate", "causal", "predictor_width", "imitation")
        why |= dict.fromkeys(names, "no block is routed (--routed none)")
    elif m.router == "random":
        names = ("causal", "predictor_width", "imitation")
        why |= dict.fromkeys(names, "nothing learns to route (--router random)")
    elif m.causal == "router":
        why["predictor_width"] = "the router decides, there is no predictor (--causal router)"
    if not m.experts:
        why |= dict.fromkeys(("noops", "expert_capacity", "balance"), "there are no experts (--experts)")
    if m.exits == "last":
        why |= dict.fromkeys(("exit_weights", "tau"), "only the last block has a classifier (--exits last)")
    if options.translate:
        why["batch"] = "batches of sentence pairs have --batch_tokens"
    else:
        names = ("enc_layer", "enc_head", "enc_embd", "embeddings", "batch_tokens")
        why |= dict.fromkeys(names, "a GPT has no source (--translate makes a translator)")
    if m.halting == "none":
        names = ("oracle", "exit_cost", "sigma", "alpha", "share_halting")
        why |= dict.fromkeys(names, "nothing learns where to exit (--halting none)")
    elif m.halting in ("sequence", "token"):
        why["share_halting"] = f"--halting {m.halting} is one layer anyway"
    if m.halting == "sequence":
        why["sigma"] = "there is one exit for a whole sentence"
    if options.objective != "mixed":
        why["paths"] = "exits are drawn by --objective mixed"
    if options.objective != "aligned":
        names = ("exit_weights", "gradient_scale", "imitation", "balance")
        why |= dict.fromkeys(names, f"it belongs to --objective aligned, not {options.objective}")
    if options.schedule == "inverse_sqrt":
        why["lr_end"] = "the inverse square root has no end"
    return why


def refuse(options, names, why):
    """UserError if one of these options of a script was given, since it would do nothing."""
    for name in names:
        if getattr(options, name) != getattr(type(options), name):
            raise UserError(f"--{name} would do nothing: {why}")


def words(table):
    """A flat mapping of options -> the command line words that say the same."""
    return [w for name, value in table.items() for w in (f"--{name}", str(value))]


def flat(options):
    """Options -> one flat dict, the model's fields among the others."""
    table = dataclasses.asdict(options)
    return {**table.pop("model"), **table}


def parse(argv, kind=Options):
    """Command line words -> an instance of `kind`. The one checker of names, types and choices."""
    return tyro.cli(kind, args=argv, config=(tyro.conf.FlagConversionOff,))


def from_file(path, table, more=()):
    """The options in a file, then `more` words -> Options; a complaint is followed by the file's name."""
    try:
        return parse([*words(table), *more])
    except SystemExit:
        print(f"(with the options in {path})", file=sys.stderr)
        raise


def read_options(argv):
    """[preset] --option value ... -> checked Options. A preset file says the same words earlier."""
    argv, path, table = list(sys.argv[1:] if argv is None else argv), None, {}
    if argv and not argv[0].startswith("-"):
        path, table = preset(argv.pop(0))
        from_file(path, table)
    options = parse([*words(table), *argv])
    if options.init:        # the shape of the model, and the data, are those of the run it starts from
        path = find(options.init, options.out) / "options.json"
        stored = read_json(path, "options")
        same = {*(f.name for f in dataclasses.fields(Seq2SeqConfig)), "data", "translate"}
        options = from_file(path, {k: v for k, v in stored.items() if k in same}, [*words(table), *argv])
    if options.resume:
        path = find(options.resume, options.out) / "options.json"
        given = {w[2:].split("=")[0].replace("-", "_") for w in [*words(table), *argv] if w.startswith("--")}
        if given - MAY_CHANGE:
            raise UserError(f"--{min(given - MAY_CHANGE)} cannot be changed by --resume: the run goes on as "
                            f"it began. May be given: {', '.join(sorted(MAY_CHANGE))}")
        stored = read_json(path, "options")
        options = from_file(path, {k: v for k, v in stored.items() if k not in ("out", "stop_at")}, argv)
    check(options)
    return options


def preset(name):
    """NAME -> the path and the content of configs/NAME.toml. UserError if there is none or it is no TOML."""
    known = sorted(p.stem for p in (HERE / "configs").glob("*.toml"))
    if name not in known:
        raise UserError(f"unknown preset '{name}'; there are: {', '.join(known)} (configs/*.toml)")
    path = HERE / "configs" / f"{name}.toml"
    try:
        return path, tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"{path} is not valid TOML: {e}") from None


def check(options):
    """Raise UserError for values that cannot be and for options that would do nothing."""
    value, default, why = flat(options), flat(Options()), idle(options)
    for name, (low, high) in RANGES.items():
        if not low <= value[name] <= high:
            raise UserError(f"--{name} {value[name]} must be from {low:g} to {high:g}")
    for name in why:
        if value[name] != default[name]:
            raise UserError(f"--{name} {value[name]} would do nothing: {why[name]}")
    m = options.model
    for width, heads in (("n_embd", "n_head"), ("enc_embd", "enc_head")):
        if value[width] % (2 * value[heads]):
            raise UserError(f"--{width} {value[width]} is not an even multiple of --{heads} {value[heads]}")
    refuse_combinations(options)
    try:
        m.routed_blocks()
    except ValueError as e:
        raise UserError(f"--routed: {e}; use none, odd, even, all or numbers such as 1,3") from None


def refuse_combinations(options):
    """Methods, or sizes, that exclude each other."""
    m, objective = options.model, options.objective
    for wrong, said in (
        (m.exits == "last" and (m.halting != "none" or objective != "aligned"),
         "learning where to exit, or by mixed exits, needs classifiers: --exits all"),
        (objective == "mixed" and (m.routed != "none" or m.experts),
         "--objective mixed cannot train routed blocks or experts: those would choose among tokens that have "
         "left. Use --routed none, no --experts"),
        (objective == "mixed" and m.halting != "none",
         "the oracle needs all exits of every token, --objective mixed draws one: train the predictor "
         "afterwards, --init THAT_RUN --objective halting"),
        (objective == "halting" and m.halting == "none",
         "--objective halting needs --halting token, geometric, binary or sequence"),
        (objective == "halting" and not options.init,
         "--objective halting trains the predictor alone: give --init, a trained run"),
        (m.halting == "sequence" and not options.translate,
         "--halting sequence reads a source sentence, and a GPT has none (--translate)"),
        (m.gate == "one" and m.router == "learned",
         "--gate one gives the router no gradient: only --router random can do without"),
        (m.share_blocks and m.routed != "none",
         "--share_blocks has one block, and so no other to route: use --routed none"),
        (options.schedule == "inverse_sqrt" and not options.warmup,
         "--schedule inverse_sqrt needs --warmup: the rate falls with sqrt(warmup / step)"),
        (m.experts == 1 and not m.noops, "--experts 1 leaves no choice: give more, or --noops"),
        (options.translate and m.embeddings == "tied" and m.enc_embd != m.n_embd,
         f"--enc_embd {m.enc_embd} and --n_embd {m.n_embd} differ: source and target cannot share one table: "
         "use --embeddings separate"),
        (not options.translate and options.batch % options.accumulate,
         f"--batch {options.batch} cannot be cut into {options.accumulate} equal pieces (--accumulate)"),
    ):
        if wrong:
            raise UserError(said)


# ----------------------------------------------------------------------------- halting rules by name


@dataclass
class Halting:
    """When to exit, and what routes, on the command line."""
    rule: str = "auto"          # full, fixed:3, random, confidence:0.5 or :0.5,0.6,..., learned, learned:0.4
    tau: tuple[float, ...] = ()     # the same as --rule confidence:...
    exit: int = 0               # the same as --rule fixed:...
    causal: Literal["auto", "predictor", "router"] = "auto"     # routed blocks: auto is what was trained

    def named(self, trained):
        """The exit rule's name; auto: learned if something was, else confidence if there are exits."""
        m = trained.model
        own = "nothing" if m.routed == "none" or m.router == "random" else m.causal
        if self.causal not in ("auto", own):
            raise UserError(f"--causal {self.causal} was not trained: in this run {own} learned to route. "
                            f"Train another with --causal {self.causal}")
        given = [f"confidence:{','.join(map(str, self.tau))}"] if self.tau else []
        given += [f"fixed:{self.exit}"] if self.exit else []
        if len(given) + (self.rule != "auto") > 1:
            raise UserError("one rule at a time: --rule, --tau or --exit; the others would do nothing")
        if given or self.rule != "auto":
            return given[0] if given else self.rule
        if m.halting != "none":
            return "learned"
        return f"confidence:{trained.tau:g}" if m.exits == "all" else "full"


def rule_of(name, trained, model):
    """"fixed:3" and so on -> the halting rule. UserError if it is none, or not one for this model."""
    kind, _, value = name.partition(":")
    L, m = trained.model.n_layer, trained.model
    try:
        numbers = [float(v) for v in value.split(",")] if value else []
    except ValueError:
        raise UserError(f"--rule {name}: {value} is not a number, nor numbers with commas between") from None
    if kind == "full" and not numbers:
        return exits.full_depth
    if kind not in ("full", "fixed", "random", "confidence", "learned"):
        raise UserError(f"--rule {name}: there are full, fixed:N, random, confidence:TAU and learned")
    if m.exits != "all":
        raise UserError("this run has a classifier after its last block only, so no token can leave "
                        "early: use --rule full, or train with --exits all")
    if kind == "fixed":
        if len(numbers) != 1 or numbers[0] not in range(1, L + 1):
            raise UserError(f"--rule {name}: an exit is a block from 1 to {L}, such as fixed:{L // 2}")
        return exits.fixed_exit(int(numbers[0]))
    if kind == "confidence":
        tau = numbers or [trained.tau]
        if len(tau) not in (1, L - 1):
            raise UserError(f"--rule {name}: give one threshold or {L - 1}, one for each block but the last, "
                            f"not {len(tau)}")
        return exits.confidence(tau * (L - 1) if len(tau) == 1 else tau)
    if kind == "learned":
        if model.halting is None:
            raise UserError("this run has no predictor of exits: train one, --init THIS_RUN "
                            "--halting geometric --objective halting")
        if numbers and (len(numbers) > 1 or m.halting in ("sequence", "token")):
            raise UserError(f"--rule {name}: one threshold at most, and none for --halting {m.halting}")
        return exits.learned(model.halting, *numbers)
    if numbers:
        raise UserError(f"--rule {name}: {kind} takes no number")
    return exits.random_exit(L)


def kind_of(name):
    """The line of a figure that a rule belongs to; a whole vector of thresholds was searched for."""
    kind, _, value = name.partition(":")
    return "searched thresholds" if "," in value else "fixed" if kind == "full" else kind


def oracle(nats, right, there, options):
    """The exits that the options' oracle wants: nats, right (B,T,N), there (B,T) -> exit_at (B,T) [DAT 3]."""
    score = -nats if options.oracle == "likelihood" else right.to(nats.dtype)
    if options.model.halting == "sequence":
        return exits.sequence_oracle(score, there, options.exit_cost)
    return exits.token_oracle(score, there, options.exit_cost, options.sigma)


# ----------------------------------------------------------------------------- device


def device_of(name):
    """"auto", "cpu", "cuda" or "mps" -> torch.device. Raises UserError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n, ok in there.items() if ok)
    if not there[name]:
        raise UserError(f"no {name} on this machine; use --device auto")
    if name == "cpu":
        keep_memory()
    return torch.device(name)


def keep_memory():
    """Let glibc keep freed memory for the next tensors, as CUDA's allocator does: large ones came from fresh
    pages every time, and touching those takes a tenth to a fifth of a training step. Nothing elsewhere."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**25)              # M_MMAP_THRESHOLD: what is larger still comes and goes
        mallopt(-1, 2**31 - 1)          # M_TRIM_THRESHOLD


def autocast(device, dtype):
    """The context in which the network runs: bfloat16 autocast, or nothing."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def compile_blocks(model):
    """torch.compile every block in place (state_dict keys stay); one line and eager if that cannot work."""
    try:
        if platform.system() == "Windows" and not shutil.which("cl"):
            raise RuntimeError("no C++ compiler found")
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=model.wte.weight.device))
    except Exception as e:     # whatever the compiler stack raises here, eager works
        print(f"compile is not possible here ({type(e).__name__}): going on without it", file=sys.stderr)
        return
    for block in model.blocks:
        block.compile()


# ----------------------------------------------------------------------------- run folders


def new_folder(out):
    """Make and return out/001, out/002, ...: the first number after those that exist."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    taken = [int(p.name) for p in out.iterdir() if re.fullmatch(r"\d+", p.name)]
    for number in itertools.count(max(taken, default=0) + 1):
        with contextlib.suppress(FileExistsError):      # another run began just now
            (out / f"{number:03d}").mkdir()
            return out / f"{number:03d}"


def find(run, out="runs"):
    """A run's folder, its number, or "last" -> Path. Raises UserError naming those that exist."""
    out, run = Path(out), str(run)
    numbered = [p.parent for p in out.glob("*/options.json") if re.fullmatch(r"\d+", p.parent.name)]
    numbered.sort(key=lambda p: int(p.name))
    if run == "last" and numbered:
        return numbered[-1]
    for p in [Path(run), *(p for p in numbered if run.isdigit() and int(p.name) == int(run))]:
        if (p / "options.json").is_file():
            return p
    there = f"{out} has {numbered[0].name} to {numbered[-1].name}" if numbered else f"{out} has none yet"
    raise UserError(f"no run '{run}': {there}. `python train.py` makes one")


def write_atomically(path, write):
    """write(file) into path.tmp, flush to the disk, then rename: `path` is the old file or all of the new."""
    tmp = Path(f"{path}.tmp")
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:        # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write {path} ({e}); is the disk full? What was there is untouched") from e
    finally:
        tmp.unlink(missing_ok=True)


def write_text(path, text):
    write_atomically(path, lambda f: f.write(text.encode("utf-8")))


def environment(device):
    """What a result depends on besides its options."""
    git, commit = ["git", "-C", HERE, "describe", "--always", "--dirty"], ""
    with contextlib.suppress(OSError):      # no git on this machine
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device.type == "cuda" else PROCESSOR
    return {"torch": torch.__version__, "python": platform.python_version(),
            "device": f"{device.type} {name}", "threads": torch.get_num_threads(),
            "commit": commit or "unknown"}


def read_json(path, key=None):
    """The value of `key` in a JSON file; None: all of it. Raises UserError if it is missing or damaged."""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        return found if key is None else found[key]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"cannot read {path}: {e!r}") from None


class Metrics:
    """metrics.jsonl: lines {"kind": "train" | "val", "step": ..., ...}; "step" counts finished steps."""

    def __init__(self, folder, step):
        """Keep what came before `step`; the evaluation at `step` itself will be done, and written, again."""
        self.path = Path(folder) / "metrics.jsonl"
        kept = [m for m in read_metrics(folder) if m["step"] < step + (m["kind"] == "train")]
        write_text(self.path, "".join(json.dumps(m) + "\n" for m in kept))

    def write(self, kind, step, **values):
        with open(self.path, "a", encoding="utf-8", newline="\n") as f:
            f.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")


def read_metrics(folder):
    """The lines of metrics.jsonl as dicts; a line cut short by a crash is dropped."""
    path, found = Path(folder) / "metrics.jsonl", []
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


# ----------------------------------------------------------------------------- checkpoints


def save(folder, step, model, optimizer, last):
    """Write ckpt.pt. last: {step: weights} of the checkpoints that the final weights are the mean of."""
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "last": last}
    write_atomically(Path(folder) / "ckpt.pt", lambda f: torch.save(state, f))


def keep_last(last, step, model, average):
    """{step: weights} with a copy of the model's, the newest `average` of them; nothing for average 1."""
    if average == 1:
        return {}
    last = {**last, step: {name: w.detach().clone() for name, w in model.state_dict().items()}}
    return {n: last[n] for n in sorted(last)[-average:]}


def mean_weights(state):
    """The weights of a checkpoint: the mean of its last ones if it keeps any."""
    last = list(state["last"].values())
    if not last:
        return state["model"]
    return {name: torch.stack([weights[name] for weights in last]).mean(0) for name in last[0]}


def load(folder, device):
    """ckpt.pt -> its dict, every byte checked. Raises UserError if it is missing or damaged."""
    path = Path(folder) / "ckpt.pt"
    if not path.is_file():
        raise UserError(f"{folder} has no ckpt.pt: the run stopped before its first checkpoint")
    try:
        damaged = zipfile.ZipFile(path).testzip()       # torch.load accepts flipped bytes
        if damaged:
            raise RuntimeError(f"checksum of {damaged}")
        state = torch.load(path, map_location=device, weights_only=True)
        return {part: state[part] for part in ("step", "model", "optimizer", "last")}
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError,
            zipfile.BadZipFile) as e:
        raise UserError(f"{path} is damaged ({str(e)[:150]}); start the run again or take another") from None


def build(options, vocab_size):
    """The model that the options describe, with initial weights."""
    return (Seq2Seq if options.translate else GPT)(options.model, vocab_size)


def open_run(run, out="runs", device="auto"):
    """-> (folder, Options, device, model in eval mode with the run's final weights)."""
    folder, device = find(run, out), device_of(device)
    path = folder / "options.json"
    options = from_file(path, read_json(path, "options"))
    model = build(options, read_json(folder / "meta.json", "vocab_size")).to(device)
    fill(model, mean_weights(load(folder, device)), folder)
    return folder, options, device, model.eval()


def fill(model, state, folder):
    """Load weights, or raise UserError if the checkpoint is of another shape."""
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        first = str(e).splitlines()[1].strip()[:150]
        raise UserError(f"{folder}/ckpt.pt does not fit {folder}/options.json: {first}") from None


def start_from(model, folder, device):
    """Give the model the final weights of another run; only a predictor of exits may be new."""
    weights = mean_weights(load(folder, device))
    own = model.state_dict()
    wrong = [n for n in own.keys() ^ weights.keys() if not n.startswith("halting.")]
    wrong += [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
    if wrong:
        raise UserError(f"{folder} has another model: {min(wrong)} differs")
    model.load_state_dict({**own, **{n: w for n, w in weights.items() if n in own}})


@contextlib.contextmanager
def interrupts():
    """A list of the SIGTERM and Ctrl-C that came: finish the step, save, leave. A second one ends at once."""
    came = []

    def note(*_):
        if came:
            raise KeyboardInterrupt
        came.append(True)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
