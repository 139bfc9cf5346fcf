"""The reference sampler (analytic, absorbing graph, log-linear noise) in PyTorch.

Usage: reference.py CHECKPOINT THREADS DEVICE MODE, with `config.json` and `model.safetensors` in CHECKPOINT; the mode
is float32, bfloat16 (autocast) or compiled (bfloat16, `torch.compile`). Every line `LENGTH STEPS CANVASES` on the
standard input asks for one generation of that many canvases and is answered by its seconds. As the reference
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

checkpoint, threads, device, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(threads)
config = json.loads((checkpoint / "config.json").read_text())
shape, mask = config["model"], config["tokens"]
model = Ddit(mask + 1, shape["length"], shape["hidden_size"], shape["cond_dim"], shape["n_blocks"], shape["n_heads"])
model.load_state_dict(load_file(checkpoint / "model.safetensors"))
model.eval().to(device)
torch.set_default_device(device)
network = torch.compile(model) if mode == "compiled" else model


def total_noise(t):
    return -torch.log1p(-(1 - 1e-3) * t)


def scores(x, sigma):
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=mode != "float32"):
        log_score = network(x, sigma).float()
    offset = torch.log(torch.expm1(sigma)) + torch.log(torch.tensor(float(mask)))
    log_score = log_score - offset[:, None, None]
    return torch.scatter(log_score, -1, x[..., None], torch.zeros_like(log_score[..., :1])).exp()


def step(x, sigma, dsigma):
    score = scores(x, sigma)
    dsigma = dsigma[:, None]
    extra = (1 - dsigma.exp()) * score.sum(-1)
    score = score * dsigma.exp()[..., None]
    score[..., -1] += extra
    edge = torch.exp(-dsigma)[..., None] * F.one_hot(x, num_classes=mask + 1)
    edge += torch.where(x == mask, 1 - torch.exp(-dsigma), 0)[..., None]
    return score * edge


def draw(probabilities):
    gumbel = 1e-10 - (torch.rand_like(probabilities) + 1e-10).log()
    return (probabilities / gumbel).argmax(-1)


@torch.inference_mode()
def generate(length, steps, canvases):
    x = torch.full((canvases, length), mask)
    times = torch.linspace(1, 1e-5, steps + 1)
    dt = (1 - 1e-5) / steps
    for t in times[:-1]:
        sigma = total_noise(t).expand(canvases)
        x = draw(step(x, sigma, sigma - total_noise(t - dt)))
    sigma = total_noise(times[-1]).expand(canvases)
    return draw(step(x, sigma, sigma)[..., :-1])


for line in sys.stdin:
    length, steps, canvases = map(int, line.split())
    started = time.perf_counter()
    generate(length, steps, canvases)
    if device != "cpu":
        torch.cuda.synchronize()
    print(time.perf_counter() - started, flush=True)
