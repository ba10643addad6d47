"""Make a golden repository of the current format: `python -m scripts.make_golden NAME`.

It contains frames of all codecs, exact patches, a pin, dropped and archived commits, merged deltas
and notes.
The tests decode every golden repository in every later version. Existing ones are never changed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

import torch
from blake3 import blake3

from ckptvcs.gc.retention import Policy
from ckptvcs.history.format_file import FORMAT
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import set_ref
from ckptvcs.repo import Repo
from ckptvcs.text import from_number
from tests.helpers.training import save_run, train

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
CODECS = (
    "near", "near", "near", "near", "near", "near", "near",
    "near", "near", "near:step=4,gamma=0.5", "near:step=0.05", "lossless", "near:gamma=0",
    "near:rank=0,step=40",
    "near:momentum_rank=2,momentum_nmse=1", "near:momentum_rank=2,momentum_nmse=1", "near", "near",
    "near", "near", "lossless", "lossless", "lossless", "near",
)  # fmt: skip
"""The codec of each commit. By index, the states have

    0 to 3    bfloat16 weights and their float32 masters, to be archived
    4 to 6    float64 tensors and complex weights, to be archived
    -10, -9   momenta instead of Adam's moments
    -8, -7    bfloat16 weights and their float32 masters
    -6, -5    float64 tensors and complex weights
    -4        weights with the bytes of state -5 as integers
    -3 to -1  bfloat16 weights of which 1 % change
"""


def _wider(tensor: torch.Tensor) -> torch.Tensor:
    """Return float64; a matrix becomes complex: the first half of its rows is the real part."""
    wide = tensor.to(torch.float64)
    if tensor.dim() == 2 and tensor.shape[0] % 2 == 0 and (tensor < 0).any():
        half = tensor.shape[0] // 2
        return torch.complex(tensor[:half].float(), tensor[half:].float())
    return wide


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same bytes as integers of another word size."""
    words = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return words.contiguous().view(torch.int16) if words.dim() else words


def _touched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a bfloat16 tensor in which every 100th word is the next one."""
    words = tensor.clone().view(torch.int16).flatten()
    words[::100] += 1
    return words.view(torch.bfloat16).reshape(tensor.shape)


def main() -> None:
    """Make one golden repository."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="name of the repository, such as v1-first")
    target = GOLDEN / parser.parse_args().name
    if target.exists():
        raise SystemExit(f"{target} exists; golden repositories are never rewritten")
    expected, notes = {}, {}
    # Keep the names of the machine and the user, and the clone, out of the repository.
    socket.gethostname = lambda: "golden"
    os.environ["LOGNAME"] = "golden"
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        repo = Repo.init(target)
        repo.configure("provenance", "off")
        states = train(len(CODECS))
        for state in states[-10:-8]:
            moments = state["optimizer"]["state"]
            for key, each in moments.items():
                moments[key] = {"momentum_buffer": each["exp_avg"]}
        for state in states[:4] + states[-8:-6]:
            state["master"] = {k: v for k, v in state["model"].items() if v.dtype == torch.float32}
            state["model"] = {k: v.to(torch.bfloat16) for k, v in state["master"].items()}
        for state in states[4:7] + states[-6:-3]:
            state["model"] = {k: _wider(v) for k, v in state["model"].items()}
            for each in state["optimizer"]["state"].values():
                each |= {k: _wider(v) for k, v in each.items() if k != "step"}
        states[-4]["model"] = {k: _as_integers(v) for k, v in states[-5]["model"].items()}
        states[-3]["model"] = {k: v.to(torch.bfloat16) for k, v in states[-3]["model"].items()}
        for before, after in itertools.pairwise(states[-3:]):
            after["model"] = {k: _touched(v) for k, v in before["model"].items()}
            after["optimizer"] = before["optimizer"]
        for path, codec in zip(save_run(Path(scratch), states), CODECS, strict=True):
            made = repo.commit_path(path, message=f"by {codec}", codec=codec)
            if made.commit.step == 10:
                repo.pin(made.id, pinned=True)
        set_ref(handle(repo), "tags", "first", repo.resolve(1), "tag")
        repo.note(2, message="evaluated", metrics={"eval": 0.5, "bad": float("nan")})
        repo.note(2, metrics={"eval": 0.25, "bad": None}, fields={"data": "wikitext"})
        repo.note("HEAD", metrics={"eval": float("inf")}, fields={"data": "a", "gone": "b"})
        repo.note("HEAD", fields={"data": "c", "gone": None})
        repo.configure("archive-every", "2")
        repo.gc(archive=True, now=True)
        repo.gc(Policy(every=2, last=3), rekey=True, now=True)
        for entry in repo.log():
            out = Path(scratch) / "out.pt"
            repo.checkout_files(entry.id, out, force=True)
            expected[entry.id] = blake3(out.read_bytes()).hexdigest()
            metrics = {name: from_number(value) for name, value in entry.metrics.items()}
            notes[entry.id] = {"message": entry.message, "metrics": metrics, "fields": entry.fields}
    for folder in ("cache", "tmp", "leases", "marks"):
        shutil.rmtree(target / ".ckpt" / folder)
    (target / ".ckpt").rename(target / "store")
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    (target / "notes.json").write_text(json.dumps(notes, indent=1) + "\n")
    note = f"Format {FORMAT}, made with torch {torch.__version__}: {', '.join(CODECS)}.\n"
    (target / "README.md").write_text(note)


if __name__ == "__main__":
    main()
