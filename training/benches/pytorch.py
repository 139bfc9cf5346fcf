"""The same training steps in PyTorch eager, f32 on the CPU: what `cargo bench -p training` compares with.

Usage: pytorch.py FOLDER THREADS, with `config.json`, `weights.safetensors` and `batches.safetensors` in FOLDER.
Every line `LANE COUNT` on the standard input asks for the next COUNT steps of a lane and is answered by a line
of JSON: seconds, and the losses in nats per token. Lanes: `reference` computes the head for every position, as
the reference implementation does, `rows` for the masked positions only.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class Block(nn.Module):
    def __init__(self, width, condition, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(condition, 6 * width)

    def forward(self, x, condition, cos, sin):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        y = self.attn_qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = y.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v)
        x = x + gate1 * self.attn_out(y.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def rotated(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Output(nn.Module):
    def __init__(self, width, condition, states):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, bias=False)
        self.linear = nn.Linear(width, states)
        self.adaLN_modulation = nn.Linear(condition, 2 * width)

    def forward(self, x, condition, rows):
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, -1)
        x = self.norm_final(x) * (1 + scale) + shift
        return self.linear(x if rows is None else x[rows])


class Ddit(nn.Module):
    def __init__(self, states, length, hidden_size, cond_dim, blocks, heads):
        super().__init__()
        self.states = states
        self.vocab_embed = nn.Module()
        self.vocab_embed.embedding = nn.Parameter(torch.empty(states, hidden_size))
        self.sigma_map = nn.Module()
        self.sigma_map.mlp = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))
        self.blocks = nn.ModuleList(Block(hidden_size, cond_dim, heads) for _ in range(blocks))
        self.output_layer = Output(hidden_size, cond_dim, states)
        width = hidden_size // heads
        angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, tokens, sigma, rows=None):
        frequencies = 10000.0 ** (-torch.arange(128) / 128)
        angles = sigma[:, None] * frequencies
        condition = F.silu(self.sigma_map.mlp(torch.cat((angles.cos(), angles.sin()), -1)))
        x = self.vocab_embed.embedding[tokens]
        for block in self.blocks:
            x = block(x, condition, self.cos, self.sin)
        return self.output_layer(x, condition, rows)


def score_entropy(model, clean, tokens, sigma, rate, rows_only):
    """Rate-weighted denoising score entropy of an absorbing graph, with `scale_by_sigma`; per token."""
    masked = tokens == model.states - 1
    if rows_only:
        scores = model(tokens, sigma, masked)
    else:
        scores = model(tokens, sigma)
    offset = (torch.log(torch.expm1(sigma)) + torch.log(torch.tensor(model.states - 1.0)))[:, None].expand_as(tokens)
    if rows_only:
        scores = scores - offset[masked][:, None]
    else:
        scores = (scores - offset[:, :, None]).scatter(-1, tokens[:, :, None], 0.0)[masked]
    ratio = (1 / torch.expm1(sigma))[:, None].expand_as(tokens)[masked]
    entropy = scores[:, :-1].exp().sum(-1) - ratio * scores.gather(-1, clean[masked][:, None])[:, 0]
    entropy = entropy + ratio * (ratio.log() - 1)
    return (entropy * rate[:, None].expand_as(tokens)[masked]).sum() / tokens.numel()


class Lane:
    def __init__(self, folder, config, rows_only):
        self.batches = load_file(folder / "batches.safetensors")
        self.model = Ddit(**config["network"])
        self.model.load_state_dict(load_file(folder / "weights.safetensors"))
        self.average = [p.detach().clone() for p in self.model.parameters()]
        optimizer = config["optimizer"]
        self.clip, self.decay, self.warmup = (optimizer[k] for k in ("clip", "ema_decay", "warmup_steps"))
        self.lr, self.rows_only, self.done = optimizer["lr"], rows_only, 0
        self.adamw = torch.optim.AdamW(
            self.model.parameters(), betas=optimizer["betas"], eps=optimizer["eps"], weight_decay=optimizer["weight_decay"]
        )

    def step(self):
        batch = {name: tensor[self.done] for name, tensor in self.batches.items()}
        loss = score_entropy(self.model, **batch, rows_only=self.rows_only)
        self.adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.done += 1
        self.adamw.param_groups[0]["lr"] = self.lr * min(self.done / self.warmup, 1.0)
        self.adamw.step()
        decay = min(self.decay, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)
        return loss.item()


folder = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
config = json.loads((folder / "config.json").read_text())
lanes = {"reference": Lane(folder, config, False), "rows": Lane(folder, config, True)}
print(json.dumps({"version": torch.__version__}), flush=True)
for line in sys.stdin:
    lane, count = line.split()
    start = time.perf_counter()
    losses = [lanes[lane].step() for _ in range(int(count))]
    print(json.dumps({"seconds": time.perf_counter() - start, "losses": losses}), flush=True)
