"""Run folders, checkpoints, metrics and devices: what every script needs and no model needs.

    runs/007/options.json     every option and the environment (torch, device, commit)
            tokenizer.json    copied, so that a run can be sampled without its data; meta.json likewise
            metrics.jsonl     one line per logged step and per evaluation
            ckpt.pt           weights, optimiser, step; replaced atomically
            depth.npz, figures/, sample.txt ...   written by evaluate.py, plot.py, sample.py
"""
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

import options
from data.common import UserError
from linear import PROCESSOR
from model import GPT, Seq2Seq

HERE = Path(__file__).resolve().parent


def device_of(name):
    """"auto", "cpu", "cuda" or "mps" -> torch.device. UserError if this machine has none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n, ok in available.items() if ok) if name == "auto" else name
    if not available[name]:
        raise UserError(f"no {name} on this machine; use --device auto")
    return torch.device(name)


def autocast(device, dtype):
    """The context in which the network runs: bfloat16 autocast, or nothing."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def compile_blocks(model):
    """torch.compile every block in place (state_dict keys stay); one line and eager if that cannot work."""
    try:
        if platform.system() == "Windows" and not shutil.which("cl"):
            raise RuntimeError("no C++ compiler")
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=model.wte.weight.device))
    except Exception as e:     # whatever the compiler stack raises here, eager works
        print(f"compile is not possible here ({type(e).__name__}): going on without it", file=sys.stderr)
    else:
        for block in model.blocks:
            block.compile()


def environment(device):
    """What a result depends on besides its options."""
    git, commit = ["git", "-C", HERE, "describe", "--always", "--dirty"], ""
    with contextlib.suppress(OSError):      # no git on this machine
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device.type == "cuda" else PROCESSOR
    return {"torch": torch.__version__, "python": platform.python_version(), "commit": commit or "unknown",
            "device": f"{device.type} {name}", "threads": torch.get_num_threads()}


@contextlib.contextmanager
def interrupts():
    """A list of the SIGTERM and Ctrl-C received: finish the step, save, stop. A second one stops at once."""
    received = []

    def note(*_):
        if received:
            raise KeyboardInterrupt
        received.append(True)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# ----------------------------------------------------------------------------- files


def write_atomically(path, content):
    """Write a string, or what content(file) writes, beside `path`, flush to the disk, rename: `path` is the
    old file or all of the new."""
    tmp = Path(f"{path}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(content.encode("utf-8")) if isinstance(content, str) else content(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:        # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write {path} ({e}); is the disk full? What was there is untouched") from e
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path):
    """Whatever the content makes go wrong in here means: this file is damaged. UserError with its name."""
    try:
        yield
    except Exception as e:
        raise UserError(f"cannot read {path}, it is missing or damaged: {e!r:.200}") from None


def read_json(path, key=None):
    """The value of `key` in a JSON file; None: all of it. UserError if it is missing or damaged."""
    with reading(path):
        content = json.loads(Path(path).read_text("utf-8"))
        return content if key is None else content[key]


def read_metrics(folder):
    """The lines of metrics.jsonl as dicts; a line cut short by a crash is dropped."""
    path, metrics = Path(folder) / "metrics.jsonl", []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            metrics.append(json.loads(line))
    return metrics


def start_metrics(folder, step):
    """Cut metrics.jsonl back to what came before `step`; the evaluation at `step` itself is done again."""
    kept = [m for m in read_metrics(folder) if m["step"] < step + (m["kind"] == "train")]
    write_atomically(Path(folder) / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in kept))


def log_metrics(folder, kind, step, **values):
    """Append {"kind": "train" | "val", "step": finished steps, ...} to metrics.jsonl."""
    with open(Path(folder) / "metrics.jsonl", "a", encoding="utf-8", newline="\n") as f:
        f.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")


# ----------------------------------------------------------------------------- runs


def numbered(out):
    """{number: folder} of the runs out/001, out/002, ... in order."""
    folders = sorted(int(p.name) for p in Path(out).glob("*") if re.fullmatch(r"\d+", p.name))
    return {number: Path(out) / f"{number:03d}" for number in folders}


def new_folder(out):
    """Make and return the folder after the last number; another one if another run begins just now."""
    while True:
        folder = Path(out) / f"{max(numbered(out), default=0) + 1:03d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def find(run, out="runs"):
    """A run's folder, its number, or "last" -> Path. UserError naming those that exist."""
    known = {n: p for n, p in numbered(out).items() if (p / "options.json").is_file()}
    number = max(known, default=0) if run == "last" else int(run) if str(run).isdigit() else -1
    folder = Path(run) if (Path(run) / "options.json").is_file() else known.get(number)
    if folder is None:
        names = [p.name for p in known.values()]
        has = f"{out} has {names[0]} to {names[-1]}" if names else f"{out} has none yet"
        raise UserError(f"no run '{run}': {has}. `python train.py` makes one")
    return folder


def stored_options(run, out="runs"):
    """-> path of a run's options.json, its options as a flat dict."""
    path = find(run, out) / "options.json"
    return path, read_json(path, "options")


def open_run(run, out="runs", device="auto"):
    """-> (folder, Options, device, model in eval mode with the run's final weights)."""
    device, (path, table) = device_of(device), stored_options(run, out)
    folder, trained = path.parent, options.from_file(path, table)
    model = build(trained, read_json(folder / "meta.json", "vocab_size")).to(device)
    fill(model, mean_weights(load(folder, device)), folder)
    return folder, trained, device, model.eval()


def build(o, vocab_size):
    """The model that the options describe, with initial weights."""
    return (Seq2Seq if o.translate else GPT)(o.model, vocab_size)


def save(folder, step, model, optimizer, last):
    """Write ckpt.pt. last: {step: weights} of the checkpoints that the final weights are the mean of."""
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "last": last}
    write_atomically(Path(folder) / "ckpt.pt", lambda f: torch.save(state, f))


def keep_last(last, step, model, average):
    """{step: weights} with a copy of the model's, the newest `average` of them; nothing for average 1."""
    last = {**last, step: {name: w.detach().clone() for name, w in model.state_dict().items()}}
    return {n: last[n] for n in sorted(last)[-average:]} if average > 1 else {}


def mean_weights(state):
    """The weights of a checkpoint: the mean of its last ones if it keeps any."""
    last = list(state["last"].values()) or [state["model"]]
    return {name: torch.stack([weights[name] for weights in last]).mean(0) for name in last[0]}


def load(folder, device):
    """ckpt.pt -> its dict, every byte checked. UserError if it is missing or damaged."""
    path = Path(folder) / "ckpt.pt"
    if not path.is_file():
        raise UserError(f"{folder} has no ckpt.pt: the run stopped before its first checkpoint")
    with reading(path):
        if damaged := zipfile.ZipFile(path).testzip():          # torch.load accepts flipped bytes
            raise RuntimeError(f"checksum of {damaged}")
        state = torch.load(path, map_location=device, weights_only=True)
        return {part: state[part] for part in ("step", "model", "optimizer", "last")}


def fill(model, weights, folder):
    """Load weights. UserError if they are those of another model."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        first = str(e).splitlines()[1].strip()[:150]
        raise UserError(f"{folder}/ckpt.pt does not fit, it has another model: {first}") from None


def start_from(model, folder, device):
    """Give the model the final weights of another run; only a predictor of exits may be new."""
    ours, weights = model.state_dict(), mean_weights(load(folder, device))
    predictor = {name for name in (*ours, *weights) if name.startswith("exit_predictor.")}
    shared = {name: w for name, w in weights.items() if name not in predictor - ours.keys()}
    fill(model, {**{name: ours[name] for name in predictor & ours.keys()}, **shared}, folder)
