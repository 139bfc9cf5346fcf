"""Exports a PyTorch network that predicts the clean token (MDLM, RADD) as a bundle that the server serves.

Usage: export_pytorch.py BUNDLE. Needs torch, onnx and onnxscript. The network here is a small untrained one; put yours in its
place: anything that takes tokens `[batch, length]` and gives logits `[batch, length, vocab]`, the mask being the
last of the vocabulary.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn


class StandIn(nn.Module):
    def __init__(self, vocab, length, width=32):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2))
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = x + block(x, x, x, need_weights=False)[0]
        return self.head(x)


torch.manual_seed(1)
vocab, length = 257, 64  # 256 bytes and the mask
network = StandIn(vocab, length).eval()

# --- What a network of one's own needs begins here ---


class Export(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, tokens, positions):
        logits = self.network(tokens).flatten(0, 1)[positions]  # [rows, vocab]
        return torch.cat((logits[:, :-1].log_softmax(-1), torch.full_like(logits[:, -1:], -1e6)), -1)


bundle = Path(sys.argv[1])
bundle.mkdir(parents=True)
example = (torch.zeros(2, 8, dtype=torch.long), torch.tensor([0, 9, 15]))
batch, longest, rows = (torch.export.Dim(name, min=1) for name in ("batch", "length", "rows"))
torch.onnx.export(Export(network), example, bundle / "model.onnx", dynamo=True, external_data=False,
                  input_names=["tokens", "positions"], output_names=["log_score"],
                  dynamic_shapes={"tokens": {0: batch, 1: longest}, "positions": {0: rows}})
manifest = {
    "format": 1, "name": "stand-in", "graph": "absorbing", "schedule": {"type": "loglinear", "eps": 1e-3},
    "parameterization": "mean", "time_conditioned": False, "vocab_size": vocab, "mask_token": vocab - 1,
    "max_length": length, "sha256": {"model.onnx": hashlib.sha256((bundle / "model.onnx").read_bytes()).hexdigest()},
}
(bundle / "manifest.json").write_text(json.dumps(manifest, indent=1))
