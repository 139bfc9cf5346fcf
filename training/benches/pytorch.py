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
from ddit import Ddit
from safetensors.torch import load_file


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
