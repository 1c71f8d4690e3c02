"""Run folders, checkpoints, metrics and devices: what every script needs and no model needs.

    runs/007/options.json     every option and the environment (torch, device, commit)
            tokenizer.json    copied, so that a run can be sampled without its data; meta.json likewise
            metrics.jsonl     one line per logged step and per evaluation
            ckpt.pt           weights, optimiser, step, digests of the JSON files; replaced atomically
            lock              the process that trains the run, while it does
            depth.npz, figures/, sample.txt ...   written by evaluate.py, plot.py, sample.py
"""
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import zipfile
from pathlib import Path

import filelock
import torch

import options
from data.common import UserError, digests, reading, unchanged, write_file
from linear import PROCESSOR
from model import GPT, Seq2Seq

HERE = Path(__file__).resolve().parent
FILES = "options.json", "meta.json", "tokenizer.json"       # what a run begins with, never written again


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
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


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


def read_json(path, key=None):
    """The value of `key` in a JSON file; None: all of it. UserError if it is missing or damaged."""
    with reading(path):
        content = json.loads(Path(path).read_text("utf-8"))
        return content if key is None else content[key]


def read_metrics(folder):
    """The lines of metrics.jsonl as dicts; a last line cut short by a crash is dropped. UserError if it is
    damaged."""
    path = Path(folder) / "metrics.jsonl"
    with reading(path):
        *lines, _ = path.read_text("utf-8").split("\n")
        metrics = [json.loads(line) for line in lines]
        if not all(m["kind"] in ("train", "val") and m["step"] >= 0 and m["loss"] for m in metrics):
            raise ValueError("other JSON")
        return metrics


def start_metrics(folder, step):
    """Cut metrics.jsonl back to what came before `step`; the evaluation at `step` itself is done again."""
    path = Path(folder) / "metrics.jsonl"
    kept = [m for m in read_metrics(folder) if m["step"] < step + (m["kind"] == "train")] if step else []
    if step and load(folder, "cpu")["step"] != step:        # read before the lock was taken
        raise UserError(f"{folder} was trained by another process meanwhile: give the command again")
    with reading(path):
        if [m["step"] for m in kept if m["kind"] == "train"] != list(range(1, step + 1)):
            raise ValueError(f"steps up to {step} are missing")
    write_file(path, "".join(json.dumps(m) + "\n" for m in kept))


def log_metrics(folder, kind, step, **values):
    """Append {"kind": "train" | "val", "step": finished steps, ...} to metrics.jsonl."""
    with open(Path(folder) / "metrics.jsonl", "a", encoding="utf-8", newline="\n") as f:
        f.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")


def numbered(out):
    """{number: folder} of the runs out/001, out/002, ... in order."""
    return {int(p.name): p for p in sorted(Path(out).glob("*")) if re.fullmatch(r"\d{3,}", p.name)}


def new_folder(out):
    """Make and return the folder after the last number; another one if another run begins just now."""
    Path(out).mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(out) / f"{max(numbered(out), default=0) + 1:03d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def find(run, out="runs"):
    """A run's folder, its number, or "last" -> Path. UserError naming those that exist."""
    known = {n: p for n, p in numbered(out).items() if (p / "options.json").is_file()}
    if (Path(run) / "options.json").is_file():
        return Path(run)
    number = max(known, default=0) if run == "last" else int(run) if str(run).isdecimal() else -1
    if number in known:
        return known[number]
    has = f"has {min(known)} to {max(known)}" if known else "has none yet"
    raise UserError(f"no run '{run}' (a folder with options.json): {out} {has}. `python train.py` makes one")


@contextlib.contextmanager
def locked(folder):
    """Train this run in here. UserError while another process does; its lock ends when it ends."""
    path = Path(folder) / "lock"
    try:
        with filelock.FileLock(path, timeout=0):
            path.write_text(f"{os.getpid()}\n", "utf-8")
            yield
    except filelock.Timeout:
        holder = path.read_text("utf-8").strip()
        raise UserError(f"{folder} is being trained by process {holder} ({path})") from None


def stored_options(run, out="runs"):
    """-> path of a run's options.json, its options as a flat dict."""
    path = find(run, out) / "options.json"
    with reading(path):
        return path, dict(read_json(path, "options"))


def same_data(run, data, names):
    """UserError unless the files of these names are the same in the folders of a run and of a data set."""
    for name in names:
        with reading(run / name):
            if (run / name).read_bytes() != (data / name).read_bytes():
                raise UserError(f"{data} is not the data of {run}: {name} differs")


def build(o, vocab_size):
    """The model that the options describe, with initial weights."""
    return (Seq2Seq if o.translate else GPT)(o.model, vocab_size)


def open_run(run, out="runs", device="auto"):
    """-> (folder, Options, device, model in eval mode with the run's weights, the step they are of)."""
    device, (path, table) = device_of(device), stored_options(run, out)
    folder, trained = path.parent, options.from_file(path, table)
    state = load(folder, device)
    model = build(trained, read_json(folder / "meta.json", "vocab_size")).to(device)
    fill(model, state, folder)
    return folder, trained, device, model.eval(), state["step"]


def save(folder, step, model, optimizer):
    """Write ckpt.pt, after the metrics up to here have reached the disk."""
    with open(Path(folder) / "metrics.jsonl", "ab") as metrics:
        os.fsync(metrics.fileno())
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()["state"],
             "files": digests(folder, FILES)}
    write_file(Path(folder) / "ckpt.pt", lambda f: torch.save(state, f))


def load(folder, device):
    """ckpt.pt -> its dict, every byte checked. UserError if it, or a file of the run's beginning, is missing,
    damaged or edited."""
    path = Path(folder) / "ckpt.pt"
    with reading(path):
        if damaged := zipfile.ZipFile(path).testzip():          # torch.load accepts flipped bytes
            raise RuntimeError(f"checksum of {damaged}")
        state = torch.load(path, map_location=device, weights_only=True)
        unchanged(folder, {name: state["files"][name] for name in FILES})
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError("no step")
        return {part: state[part] for part in ("step", "model", "optimizer")}


def fill(model, state, folder, optimizer=None, new="-"):
    """Load what `load` returned: weights, and AdamW's moments. Parameters whose names start with `new` may be
    in one of the two alone. UserError if it is the checkpoint of another model."""
    with reading(Path(folder) / "ckpt.pt"):
        names = model.load_state_dict(state["model"], strict=False)
        other = [n for n in (*names.missing_keys, *names.unexpected_keys) if not n.startswith(new)]
        if other:
            raise ValueError(f"another model, {other[0]}")
        if optimizer:           # which does not compare shapes; its rates are those of the options
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]})
            for p, moments in optimizer.state.items():
                like = {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}
                if any(moments[k].shape != t.shape or moments[k].dtype != t.dtype for k, t in like.items()):
                    raise ValueError("moments of another model")
