"""Transformer: a decoder that predicts the next symbol (Vaswani et al. 2017; the pre-norm form of
Radford et al. 2019).

`markov`: sequences of a known source of 8 symbols, where each depends on the two before it; 99,136
parameters. The best possible loss is known exactly, so the metric is the excess over it: nats per
symbol beyond what the source itself gives to the held-out sequences. `comm`, `gpu`, `gpu_medium`
and `cluster` (13 MB, GPT-2 small and medium, a billion) are on random symbols, to load links and
devices rather than to learn. `data = text` reads a file of the user's as bytes, `stdlib` the Python
standard library's own source: real text, which differs from one Python to the next, so no target.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchsuite import workload
from benchsuite.workload import Batch, Infer, Recipe, Target, muon

presets = {
    "markov": {"global_batch": 32, "num_layers": 4, "budget_samples": 7680},
    "smoke": {"global_batch": 32, "num_layers": 4, "budget_samples": 1280},
    "comm": {
        "global_batch": 8,
        "num_layers": 6,
        "budget_samples": 96,
        "data": "random",
        "symbols": 256,
        "width": 256,
        "blocks": 4,
        "context": 256,
        "positions": "learned",
        "lr": 1e-3,
    },
    "gpu": {
        "global_batch": 16,
        "num_layers": 14,
        "budget_samples": 640,
        "data": "random",
        "symbols": 50304,
        "width": 768,
        "blocks": 12,
        "heads": 12,
        "context": 1024,
        "positions": "learned",
        "lr": 6e-4,
    },
    "gpu_medium": {
        "global_batch": 8,
        "num_layers": 26,
        "budget_samples": 320,
        "data": "random",
        "symbols": 50304,
        "width": 1024,
        "blocks": 24,
        "heads": 16,
        "context": 1024,
        "positions": "learned",
        "lr": 3e-4,
    },
    "cluster": {
        "global_batch": 64,
        "num_layers": 20,
        "budget_samples": 2560,
        "data": "random",
        "symbols": 50304,
        "width": 2048,
        "blocks": 18,
        "heads": 16,
        "context": 1024,
        "positions": "learned",
        "lr": 2e-4,
    },
}

BUDGET = 7680  # sequences; a preset or the cell's budget comes first

# The source: its symbols, and how many of them are likely to follow a pair. The share UNIFORM is
# drawn from all symbols alike, so that every symbol can follow and no -ln p is infinite.
SYMBOLS = 8
SUCCESSORS = 3
UNIFORM = 1e-3

# This seed's source has an entropy rate of 0.5360 nats; the best guess from one symbol alone is
# 1.17 above it, so a model has to look at two.
SOURCE_SEED = 1234

# Purposes of random streams: each number begins the seed of its own.
DATA = 2
TEST = 3

BLOCK = 1024  # sequences that are drawn at once
KEPT_BLOCKS = 4  # blocks in memory; workers that run apart are some blocks apart at most
HELD_OUT = 512  # sequences of an evaluation

FIRST_SCORED = 1  # position whose prediction is the first with two symbols before it
FUSED_FROM = 128  # context from which attention is torch's fused kernel

# How the matrices of a block split under tensor parallelism.
PLAN = {
    "norm_attention": "tokens",
    "qkv": "columns",
    "out": "rows",
    "norm_network": "tokens",
    "up": "columns",
    "down": "rows",
}


@dataclass
class Workload(workload.Workload):
    """The model predicts the next symbol; a sample is a sequence of `context` predictions."""

    later = ("optimizer",)
    data: Literal["markov", "random", "text", "stdlib"] = "markov"
    """A known source, random symbols, a file as bytes, or the standard library's source as
    bytes."""

    path: str = ""
    """The file that `data = text` reads, by its whole path."""

    symbols: int = 8
    """Size of the vocabulary: 8 of the source, 256 of bytes."""

    width: int = 64
    """Length of a symbol's vector (d)."""

    blocks: int = 2
    """Number of blocks, each attention and a two-layer network of 4 d."""

    heads: int = 4
    """Attention heads; they divide the width."""

    context: int = 32
    """Symbols of a sequence (T)."""

    positions: Literal["rope", "learned"] = "rope"
    """Rotations of queries and keys (Su et al. 2021), or a learned vector per position."""

    lr: float = 1e-2
    """Peak learning rate."""

    weight_decay: float = 0.1
    """Decoupled weight decay (SGD: L2 penalty)."""

    clip_norm: float = 1.0
    """Largest norm of the mean gradient (0 = not clipped)."""

    global_batch: int = 32
    """Sequences per synchronous step."""

    evaluate_every: int = 320
    """Sequences between two evaluations."""

    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    """AdamW; SGD with Nesterov momentum 0.9 (try lr 1, decay 1e-4); Muon for the blocks' matrices,
    AdamW beside it."""

    tensor_divides = ("heads",)
    tensor_tokens = "context"
    layers_beside = {"blocks": 2}
    refuses = (
        {
            "rule": "symbols",
            "when": 'data == "markov" and symbols != 8',
            "reason": "symbols = {symbols:g} with data = {data}, which has 8",
            "remedy": "set options.{name}.symbols = 8",
        },
        {
            "rule": "symbols",
            "when": 'data in ("text", "stdlib") and symbols != 256',
            "reason": "symbols = {symbols:g} with data = {data}, which has 256",
            "remedy": "set options.{name}.symbols = 256",
        },
    )

    @property
    def target(self) -> Target:
        """The excess nats per symbol over the source, and the values of it that count as reached.

        Data without a known source have no such values, so they are not evaluated on the way.
        """
        metric = "nats"
        every = 0

        if self.data == "markov":
            metric = "excess nats"
            every = self.evaluate_every

        return Target(
            metric, easy=0.10, target=0.06, hard=0.05, direction="min", evaluate_every=every
        )

    def start(self, *, seed: int, dtype: torch.dtype) -> None:
        """Reads the text where there is one, and draws the held-out sequences."""
        known = {"markov": SYMBOLS, "text": 256, "stdlib": 256}.get(self.data, self.symbols)

        # The rules refuse such a cell before it runs, and say which of the two it is.
        if self.width % self.heads or self.symbols != known:
            raise ValueError(
                f"width({self.width}) % heads({self.heads}) or symbols({self.symbols}) != {known}"
            )

        self._seed = seed
        self._blocks: dict[int, Tensor] = {}  # number of a drawn block -> (BLOCK, T + 1)
        self._text = np.zeros(0, dtype=np.uint8)

        if self.data in ("text", "stdlib"):
            self._text = self._read_text()

        self._test, self._floor = self._held_out()

    def layers(self) -> list[nn.Module]:
        """The embedding, the blocks, and the head, which scores by the embedding's own matrix."""
        learned = self.context if self.positions == "learned" else 0
        embedding = Embedding(self.symbols, self.width, learned)

        shape = (self.width, self.heads, self.context)
        rope = self.positions == "rope"
        blocks = [Block(*shape, rope=rope, depth=self.blocks) for _ in range(self.blocks)]

        return [embedding, *blocks, Head(self.width, embedding.symbols.weight)]

    def tensor_plan(self) -> Mapping[str, str]:
        """Every block splits alike: attention by heads, its network by inner width."""
        plan: dict[str, str] = {}

        # Layer 0 of the chain is the embedding.
        for block in range(1, self.blocks + 1):
            for name, how in PLAN.items():
                plan[f"{block}.{name}"] = how

        return plan

    def layer_flops(self) -> list[int]:
        """Counts the forward operations of each layer for one sequence.

        A multiply-add of a matrix product counts as 2. The T x T scores of attention count in full,
        though the mask hides half of them.
        """
        tokens = self.context
        width = self.width

        # The matrices of a block: 3 d^2 of queries, keys and values, d^2 behind them, 8 d^2 of the
        # network. Then the scores, and the mix of the values by them.
        matrices = 2 * tokens * 12 * width**2
        attention = 2 * 2 * tokens * tokens * width
        block = matrices + attention

        return [0, *[block] * self.blocks, 2 * tokens * width * self.symbols]

    def recipe(self) -> Recipe:
        """The optimiser that the cell asks for; Muon wants matrices, not a flat vector."""

        def make_optimizer(params: Iterable[Any]) -> torch.optim.Optimizer:
            """Makes the optimiser; its learning rate is set anew before every step."""
            lr = self.lr
            decay = self.weight_decay

            if self.optimizer == "muon":
                return muon(
                    params, lambda name: name.split(".")[-2] in PLAN, lr=lr, weight_decay=decay
                )

            if self.optimizer == "sgd":
                return torch.optim.SGD(params, lr, momentum=0.9, nesterov=True, weight_decay=decay)

            return torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=decay)

        clip = self.clip_norm or None
        flat = self.optimizer != "muon"

        return Recipe(
            make_optimizer, self._lr, self.global_batch, BUDGET, clip_norm=clip, elementwise=flat
        )

    def _lr(self, progress: float) -> float:
        """The learning rate: it rises over 10 % of the budget, then a cosine takes it to 10 %."""
        if progress < 0.1:
            return self.lr * (progress + 0.004) / 0.104

        return self.lr * (0.55 + 0.45 * math.cos(math.pi * (progress - 0.1) / 0.9))

    def batch(self, index: int, *, shard: int, num_shards: int) -> Batch:
        """Returns sequences [index B + shard B/n, ..) of the endless stream, B/n of them.

        x and y are (B/n, T), y one symbol ahead of x.
        """
        share = self.global_batch // num_shards
        first = index * self.global_batch + shard * share

        # The stream is drawn in blocks, so the shard is cut where one block ends.
        next_block = (first // BLOCK + 1) * BLOCK
        starts = [first, *range(next_block, first + share, BLOCK)]

        # `_rows` stops at the end of its block by itself.
        rows = torch.cat([self._rows(at, min(share, first + share - at)) for at in starts])
        return Batch(rows[:, :-1], rows[:, 1:], share)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The mean cross-entropy over all positions, in nats: output is (B, T, V), y is (B, T)."""
        return nn.functional.cross_entropy(output.flatten(0, 1), batch.y.flatten())

    def evaluate(self, infer: Infer) -> float:
        """Returns the model's nats per symbol on the held-out sequences, minus the source's own.

        The mean goes over the positions with the two symbols before them that the source draws by:
        of the first one a model could not know what the source knows.
        """
        total = 0.0

        # At most 16 M scores at once.
        at_once = max(1, min(64, 2**24 // (self.context * self.symbols)))

        for rows in self._test.split(at_once):
            logits = infer(rows[:, :-1])[:, FIRST_SCORED:].double()  # (rows, T - 1, V)
            answers = rows[:, 1 + FIRST_SCORED :]  # (rows, T - 1)

            nats = nn.functional.cross_entropy(
                logits.flatten(0, 1), answers.flatten(), reduction="sum"
            )
            total += float(nats)

        return total / self._test[:, 1 + FIRST_SCORED :].numel() - self._floor

    def _rows(self, first: int, count: int) -> Tensor:
        """Returns sequences [first, first + count), as far as they stand in the block of `first`.

        They are (count, T + 1): what is predicted from and what is predicted share their memory.
        """
        number, begin = divmod(first, BLOCK)

        if number not in self._blocks:
            stream = np.random.default_rng([DATA, self._seed, number])
            self._blocks[number] = self._draw(stream, BLOCK)

            # A dictionary keeps its order, so the first one is the oldest.
            while len(self._blocks) > KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]

        return self._blocks[number][begin : begin + count]

    def _draw(self, stream: np.random.Generator, count: int) -> Tensor:
        """Draws `count` sequences of T + 1 symbols from the cell's data."""
        length = self.context + 1
        if self.data == "markov":
            return torch.from_numpy(source_sequences(stream, count, length))

        if self.data == "random":
            return torch.from_numpy(stream.integers(self.symbols, size=(count, length)))

        # Pieces of the text that begin anywhere; they may overlap.
        starts = stream.integers(len(self._text) - length, size=(count, 1))
        return torch.from_numpy(self._text[starts + np.arange(length)].astype(np.int64))

    def _held_out(self) -> tuple[Tensor, float]:
        """Returns sequences that no worker trains on, and the best nats per scored symbol there.

        The best is what the source itself gives to these very sequences; 0 where no source is
        known.
        """
        if self.data in ("text", "stdlib"):
            return self._last_tenth(), 0.0

        stream = np.random.default_rng([TEST, SOURCE_SEED])

        if self.data == "markov":
            rows = self._draw(stream, HELD_OUT)
            return rows, realised_nats(rows.numpy())

        return self._draw(stream, 16), 0.0

    def _last_tenth(self) -> Tensor:
        """Takes the sequences of the text's last tenth off it, and returns 64 of them at most.

        Training draws from what is left, so it never sees them.
        """
        length = self.context + 1
        cut = len(self._text) - max(len(self._text) // 10, length)

        if cut <= length:
            least = f"too few for sequences of {length}: at least {2 * length + 1}"
            raise ValueError(f"the text has {len(self._text)} bytes, {least}")

        rows = [
            self._text[at : at + length] for at in range(cut, len(self._text) - length + 1, length)
        ][:64]

        self._text = self._text[:cut]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _read_text(self) -> np.ndarray:
        """Reads the text as bytes, and notes their hash for the run file."""
        if self.data == "stdlib":
            folder = Path(sysconfig.get_paths()["stdlib"])
            content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        else:
            path = Path(self.path).expanduser()

            # A rank runs in a folder of its own, where a path from here leads nowhere.
            if not path.is_absolute():
                raise ValueError(
                    f"path = {self.path!r}, but data = text needs the whole path of a file: set "
                    "path"
                )

            content = path.read_bytes()

        self.data_sha256 = hashlib.sha256(content).hexdigest()
        return np.frombuffer(content, dtype=np.uint8)


# -- the model -------------------------------------------------------------------------------------


class Embedding(nn.Module):
    """Turns symbols into vectors, and adds a learned vector per position where there are some."""

    def __init__(self, symbols: int, width: int, positions: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        nn.init.normal_(self.symbols.weight, std=0.02)
        self.positions: nn.Parameter | None = None

        if positions:
            self.positions = nn.Parameter(torch.empty(positions, width).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T) to (B, T, d)."""
        vectors: Tensor = self.symbols(x)
        return vectors if self.positions is None else vectors + self.positions[: x.shape[1]]


class Block(nn.Module):
    """One block: x + attention(norm(x)), then x + network(norm(x)), without biases.

    One matrix makes queries, keys and values. Its rows are ordered (head, {q, k, v}, head_dim), so
    that tensor parallelism, which cuts rows into equal slices, gives each part whole heads.
    """

    mask: Tensor

    def __init__(self, width: int, heads: int, context: int, *, rope: bool, depth: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_network = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

        # What is added to x is made smaller the more often that happens (Radford et al. 2019,
        # section 2.3): 2 additions a block, so the variance at the end does not grow with depth.
        for linear, scale in (
            (self.qkv, 1.0),
            (self.up, 1.0),
            (self.out, 2 * depth),
            (self.down, 2 * depth),
        ):
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(scale))

        self._head_dim = width // heads
        self._fused = context >= FUSED_FROM
        self.turn = Rotation(context, self._head_dim) if rope else None

        # -inf above the diagonal: a position sees itself and what is before it.      (T, T)
        if not self._fused:
            mask = torch.full((context, context), -math.inf).triu(1)
            self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, d) to (B, T, d)."""
        x = x + self.out(self._attend(self.qkv(self.norm_attention(x))))
        return torch.add(x, self.down(nn.functional.gelu(self.up(self.norm_network(x)))))

    def _attend(self, qkv: Tensor) -> Tensor:
        """Mixes the values of earlier positions: (B, T, 3 h head_dim) to (B, T, h head_dim).

        The number h of heads is read from the input, because under tensor parallelism it is only
        this rank's share of them.
        """
        batch, tokens, _ = qkv.shape
        by_head = qkv.view(batch, tokens, -1, 3, self._head_dim)  # (B, T, h, 3, head_dim)
        query, key, value = (x.transpose(1, 2) for x in by_head.unbind(3))  # (B, h, T, head_dim)

        if self.turn is not None:
            query = self.turn(query)
            key = self.turn(key)

        if self._fused:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            # softmax(Q K^T / sqrt(head_dim)) V, equation 1 of Vaswani et al.       (B, h, T, T)
            scores = query @ key.transpose(-2, -1) / math.sqrt(self._head_dim)
            scores = scores + self.mask[:tokens, :tokens]
            mixed = scores.softmax(-1) @ value

        return mixed.transpose(1, 2).reshape(batch, tokens, -1)


class Rotation(nn.Module):
    """Turns each pair of numbers of a vector by its position (RoPE, Su et al. 2021, equation 34).

    The product of a query and a key then depends on how far apart they are, not on where.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, context: int, head_dim: int) -> None:
        super().__init__()
        rates = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.outer(torch.arange(context, dtype=torch.float64), rates)
        self.register_buffer("cosine", angles.cos().float(), persistent=False)
        self.register_buffer("sine", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Turns x (.., T, head_dim); a pair is element i of both halves of the vector."""
        cosine = self.cosine[: x.shape[-2]]
        sine = self.sine[: x.shape[-2]]
        first, second = x.chunk(2, dim=-1)

        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Head(nn.Module):
    """A norm, then a score for each symbol, by the embedding's own matrix.

    The matrix is tied: one parameter in two layers, counted and sent once.
    """

    def __init__(self, width: int, weight: Tensor) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.weight = weight  # a parameter already

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, d) to (B, T, V)."""
        return nn.functional.linear(self.norm(x), self.weight)


# -- the source ------------------------------------------------------------------------------------


def source() -> np.ndarray:
    """Makes the source: p[a, b, c] = P(next is c | the last two were a, b), (8, 8, 8).

    Every pair has three successors that are likely, with shares drawn from Dirichlet(0.3); all
    symbols share the little that is left.
    """
    stream = np.random.default_rng(SOURCE_SEED)
    table = np.full((SYMBOLS, SYMBOLS, SYMBOLS), UNIFORM / SYMBOLS)

    for first in range(SYMBOLS):
        for second in range(SYMBOLS):
            successors = stream.choice(SYMBOLS, SUCCESSORS, replace=False)
            table[first, second, successors] += (1 - UNIFORM) * stream.dirichlet([0.3] * SUCCESSORS)

    return table


def stationary(table: np.ndarray) -> np.ndarray:
    """Returns P(two symbols in a row are a, b) in the long run, (8, 8), by power iteration."""
    pairs = np.full(table.shape[:2], 1 / table.shape[0] ** 2)

    while True:
        after: np.ndarray = np.einsum("ab,abc->bc", pairs, table)
        if np.abs(after - pairs).max() < 1e-15:
            return after

        pairs = after


def source_sequences(stream: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Draws (count, length) symbols of the source; the first two are as likely as in the long run.

    So every position of a sequence is like every other, and none needs to be thrown away.
    """
    table = source()
    pairs = stationary(table).ravel()  # (64,)
    rows = np.empty((count, length), dtype=np.int64)

    # Pair a SYMBOLS + b is the symbols a, b.
    first_two = stream.choice(len(pairs), size=count, p=pairs / pairs.sum())  # (count,)
    rows[:, 0], rows[:, 1] = np.divmod(first_two, SYMBOLS)

    # A symbol is the number of borders that the draw has passed. The last border is set to 1,
    # which no draw reaches: the sum may end a bit below it, and symbol 8 does not exist.
    borders = table.cumsum(-1)  # (8, 8, 8)
    borders[..., -1] = 1.0
    draws = stream.random((count, length))

    for at in range(2, length):
        passed = draws[:, at, None] >= borders[rows[:, at - 2], rows[:, at - 1]]  # (count, 8)
        rows[:, at] = passed.sum(-1)

    return rows


def realised_nats(rows: np.ndarray) -> float:
    """Returns the mean of -ln p of the symbols from the third on, by the source that drew them."""
    likely = source()[rows[:, :-2], rows[:, 1:-1], rows[:, 2:]]  # (count, length - 2)
    return float(-np.log(likely).mean())
