"""An autoregressive transformer of the demo model's size and text, for comparison: what the order of words is worth.

Usage: autoregressive.py TRAIN.tokens VALIDATION.tokens FOLDER [--steps N] [--dropout P] [--samples N --temperature T]
(needs PyTorch and NumPy)

Both files are those of `training prepare`. The network is the demo model's with a causal mask and without modulations:
rotary positions, tied embeddings, 5 blocks of width 256. It reads the same sequences of 128 tokens, each predicted from
those before it in its sequence, the first from the end of a document. Held-out text is cut as `training export
--measure` cuts it, and what is printed is an exact likelihood where a diffusion model has a bound.

A line of JSON per evaluation goes to FOLDER/metrics.jsonl; interrupted and run again, it goes on from its checkpoint.
`--samples` then draws sequences into FOLDER/written.jsonl, for `training evaluate --written`.
"""

import argparse
import json
import math
import struct
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LENGTH, WIDTH, BLOCKS, HEADS, BATCH = 128, 256, 5, 4, 32
PEAK, WARMUP, DECAY_FROM, EMA, EVERY = 1.2e-3, 100, 0.5, 0.998, 200


def read(path):
    """Tokens, size of the vocabulary, end of document and bytes of text of a token file (training/src/data/token_file.rs)."""
    content = path.read_bytes()
    magic, vocab_size, end, tokens, _, size = struct.unpack("<8sIIQQQ", content[:40])
    assert magic == b"dnstok03" and vocab_size <= 1 << 16, f"{path} is not a token file that this script reads"
    return np.frombuffer(content, np.uint16, tokens, 144).astype(np.int64), vocab_size, end, size


def rotated(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    def __init__(self, vocab_size, dropout):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(BLOCKS))
        self.norm, self.bias = nn.LayerNorm(WIDTH, bias=False), nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.embedding.weight, std=0.02)
        width = WIDTH // HEADS
        angles = torch.outer(torch.arange(LENGTH), 10000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def states(self, before):
        """What is known of the token behind each of `before` (batch, at most 128)."""
        x, length = self.embedding(before), before.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return self.norm(x)

    def logits(self, states):
        return F.linear(states, self.embedding.weight, self.bias)

    def forward(self, tokens, end):
        """Nats of every token of `tokens` (batch, length) given those before it."""
        logits = self.logits(self.states(F.pad(tokens[:, :-1], (1, 0), value=end)))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def rate(step, steps):
    """Warm-up, the peak, and a straight line to nothing over the last part."""
    return PEAK * min((step + 1) / WARMUP, 1.0, (steps - step) / ((1 - DECAY_FROM) * steps))


@torch.no_grad()
def held_out(model, tokens, end, bytes_per_token):
    """Bits per byte with the ends of documents, which cost nats but are no bytes, and of the text alone."""
    model.eval()
    sequences = torch.from_numpy(tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH))
    nats = torch.cat([model(batch, end) for batch in sequences.split(64)]).double()
    model.train()
    bits = nats.mean() / math.log(2) / bytes_per_token
    return bits.item(), (bits * nats[sequences != end].sum() / nats.sum()).item()


@torch.no_grad()
def draw(model, end, count, temperature, top_p):
    """`count` sequences, chosen as the server chooses: temperature first, then the likeliest that hold `top_p`."""
    model.eval()
    torch.manual_seed(1)
    tokens = torch.full((count, 1), end)
    for _ in range(LENGTH):
        chances = (model.logits(model.states(tokens)[:, -1]) / temperature).softmax(-1)
        sorted_chances, order = chances.sort(-1, descending=True)
        sorted_chances[sorted_chances.cumsum(-1) - sorted_chances >= top_p] = 0
        tokens = torch.cat((tokens, order.gather(-1, torch.multinomial(sorted_chances, 1))), -1)
    return tokens[:, 1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.98)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(1)
    train, vocab_size, end, _ = read(arguments.train)
    validation, _, _, size = read(arguments.validation)
    model = Transformer(vocab_size, arguments.dropout)
    average = Transformer(vocab_size, 0.0)
    average.load_state_dict(model.state_dict())
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not (name.startswith("blocks") and p.ndim == 2)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    checkpoint, step, seconds = arguments.folder / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    while step < arguments.steps:
        start = time.perf_counter()
        # Of the step's own: a run that goes on draws what it would have drawn.
        draws = np.random.default_rng((1, step))
        torch.manual_seed(int(draws.integers(1 << 62)))
        starts = draws.integers(0, len(train) - LENGTH, BATCH)
        tokens = torch.from_numpy(np.stack([train[at : at + LENGTH] for at in starts]))
        for group in optimizer.param_groups:
            group["lr"] = rate(step, arguments.steps)
        loss = model(tokens, end).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            kept = min(EMA, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - kept)
        seconds += time.perf_counter() - start
        if step % EVERY == 0 or step == arguments.steps:
            bits, text = held_out(average, validation, end, size / len(validation))
            row = {"step": step, "seconds": round(seconds), "loss": round(loss.item(), 4)}
            row |= {"bits_per_byte": round(bits, 4), "of_text_alone": round(text, 4)}
            with (arguments.folder / "metrics.jsonl").open("a") as file:
                print(json.dumps(row), file=file)
            print(json.dumps(row), flush=True)
            state = {"model": model.state_dict(), "average": average.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    print(f"{sum(p.numel() for p in model.parameters())} weights, {step * BATCH * LENGTH / len(train):.0f} times the text")
    if arguments.samples:
        drawn = draw(average, end, arguments.samples, arguments.temperature, arguments.top_p)
        with (arguments.folder / "written.jsonl").open("w") as file:
            for canvas, tokens in enumerate(drawn.tolist()):
                print(json.dumps({"result": {"canvas": canvas, "tokens": tokens, "nfe": LENGTH}}), file=file)


if __name__ == "__main__":
    main()
