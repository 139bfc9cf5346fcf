"""The reference network in PyTorch, f32, for benchmarks."""

import torch
import torch.nn.functional as F
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
            x = block(x, condition, self.cos[: x.shape[1]], self.sin[: x.shape[1]])
        return self.output_layer(x, condition, rows)
