"""A small GPT trained on the source of Python's standard library, for demo and benchmark.

The model follows GPT-NeoX (rotary positions, parallel attention and MLP, untied head). The
vocabulary is all bytes and the most common pieces of the text: as in real language models, some
rows of the embedding are used often and others rarely.
"""

from __future__ import annotations

import math
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

PIECE = re.compile(rb" ?[A-Za-z_]+| ?[0-9]+|\n[ ]*| +|[^\sA-Za-z0-9_]+|\s")


@dataclass(frozen=True)
class TrainSpec:
    """The settings of a run. They determine its checkpoints on a given machine.

    Checkpoints are those of each multiple of `every` and of the steps in `also`.
    """

    steps: int = 1500
    every: int = 50
    also: range = range(0)
    layers: int = 4
    width: int = 192
    heads: int = 6
    vocab: int = 2048
    context: int = 128
    batch: int = 8
    lr: float = 1e-3
    beta2: float = 0.95
    seed: int = 0
    corpus_bytes: int = 8_000_000


def corpus(limit: int) -> bytes:
    """Return the first `limit` bytes of the standard library's files, sorted by name."""
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        text = path.read_bytes()
        parts.append(text)
        size += len(text)
        if size >= limit:
            break
    return b"".join(parts)[:limit]


def vocabulary(text: bytes, vocab: int) -> dict[bytes, int]:
    """Return the most common pieces of `text`, with ids from 256 on."""
    common = Counter(p for p in PIECE.findall(text) if len(p) > 1).most_common(vocab - 256)
    return {piece: 256 + i for i, (piece, _) in enumerate(common)}


def tokenize(text: bytes, vocab: int) -> np.ndarray:
    """Return the token ids of `text`, int64 [n]: bytes below 256, then `vocabulary`."""
    ids = vocabulary(text, vocab)
    out: list[int] = []
    for piece in PIECE.findall(text):
        known = ids.get(piece)
        if known is None:
            out.extend(piece)
        else:
            out.append(known)
    return np.asarray(out, dtype=np.int64)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to `x` [B, heads, T, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """Parallel attention and MLP, as in GPT-NeoX."""

    def __init__(self, spec: TrainSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.ln1 = nn.LayerNorm(spec.width)
        self.ln2 = nn.LayerNorm(spec.width)
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.proj = nn.Linear(spec.width, spec.width)
        self.up = nn.Linear(spec.width, 4 * spec.width)
        self.down = nn.Linear(4 * spec.width, spec.width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.ln1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attention = self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        out: torch.Tensor = x + attention + self.down(F.gelu(self.up(self.ln2(x))))
        return out


class TinyGPT(nn.Module):
    """A model: token ids [B, T] -> logits [B, T, vocab]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, spec: TrainSpec) -> None:
        super().__init__()
        self.embed = nn.Embedding(spec.vocab, spec.width)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width)
        self.head = nn.Linear(spec.width, spec.vocab, bias=False)
        half = spec.width // spec.heads // 2
        angles = torch.outer(
            torch.arange(spec.context).float(), 10_000.0 ** (-torch.arange(half).float() / half)
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        length = ids.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def learning_rate(spec: TrainSpec, step: int) -> float:
    """Return the rate: a linear warm-up over 50 steps, then a cosine down to a tenth."""
    if step < 50:
        return spec.lr * (step + 1) / 50
    progress = (step - 50) / max(1, spec.steps - 50)
    return spec.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(
    spec: TrainSpec,
    on_step: Callable[[int, float], None],
    on_checkpoint: Callable[[int, float, dict[str, Any]], None],
) -> None:
    """Train from scratch, and call `on_checkpoint(step, loss, state)` for each checkpoint.

    The tensors in `state` change when training continues: the callback must save or copy them.
    """
    torch.manual_seed(spec.seed)
    tokens = torch.from_numpy(tokenize(corpus(spec.corpus_bytes), spec.vocab))
    model = TinyGPT(spec)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.lr, betas=(0.9, spec.beta2), weight_decay=0.1
    )
    draw = torch.Generator().manual_seed(spec.seed + 1)
    for step in range(1, spec.steps + 1):
        starts = torch.randint(len(tokens) - spec.context - 1, (spec.batch,), generator=draw)
        window = torch.stack([tokens[s : s + spec.context + 1] for s in starts.tolist()])
        logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step - 1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(step, loss.item())
        if step % spec.every == 0 or step in spec.also:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "rng": torch.get_rng_state(),
            }
            on_checkpoint(step, loss.item(), state)
