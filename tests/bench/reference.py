"""The reference sampler (analytic, absorbing graph, log-linear noise) in PyTorch eager, f32 on the CPU.

Usage: reference.py CHECKPOINT THREADS, with `config.json` and `model.safetensors` in CHECKPOINT. Every line
`LENGTH STEPS` on the standard input asks for one generation and is answered by its seconds. As the reference
implementation does: the network at every position, and all probabilities of all positions, in every step.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "training" / "benches"))
from ddit import Ddit  # noqa: E402

checkpoint, threads = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
config = json.loads((checkpoint / "config.json").read_text())
shape, mask = config["model"], config["tokens"]
model = Ddit(mask + 1, shape["length"], shape["hidden_size"], shape["cond_dim"], shape["n_blocks"], shape["n_heads"])
model.load_state_dict(load_file(checkpoint / "model.safetensors"))
model.eval()


def total_noise(t):
    return -torch.log1p(-(1 - 1e-3) * t)


def scores(x, sigma):
    log_score = model(x, sigma)
    offset = torch.log(torch.expm1(sigma)) + torch.log(torch.tensor(float(mask)))
    log_score = log_score - offset[:, None, None]
    return torch.scatter(log_score, -1, x[..., None], torch.zeros_like(log_score[..., :1])).exp()


def step(x, sigma, dsigma):
    score = scores(x, sigma)
    extra = (1 - dsigma.exp()) * score.sum(-1)
    score = score * dsigma.exp()[:, None]
    score[..., -1] += extra
    edge = torch.exp(-dsigma)[:, None] * F.one_hot(x, num_classes=mask + 1)
    edge += torch.where(x == mask, 1 - torch.exp(-dsigma), 0)[..., None]
    return score * edge


def draw(probabilities):
    gumbel = 1e-10 - (torch.rand_like(probabilities) + 1e-10).log()
    return (probabilities / gumbel).argmax(-1)


@torch.inference_mode()
def generate(length, steps):
    x = torch.full((1, length), mask)
    times = torch.linspace(1, 1e-5, steps + 1)
    dt = (1 - 1e-5) / steps
    for t in times[:-1]:
        sigma = total_noise(t)[None]
        x = draw(step(x, sigma, sigma - total_noise(t - dt)[None]))
    sigma = total_noise(times[-1])[None]
    return draw(step(x, sigma, sigma)[..., :-1])


for line in sys.stdin:
    length, steps = map(int, line.split())
    started = time.perf_counter()
    generate(length, steps)
    print(time.perf_counter() - started, flush=True)
