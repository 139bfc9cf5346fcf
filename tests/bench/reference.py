"""The reference sampler (analytic, absorbing graph, log-linear noise) and MDLM's `ddpm_cache` in PyTorch.

Usage: reference.py CHECKPOINT THREADS DEVICE MODE, with `config.json` and `model.safetensors` in CHECKPOINT; the mode
is float32, bfloat16 (autocast), compiled (bfloat16, `torch.compile`) or int8 (`quantize_dynamic` of all linear layers).
Every line `LENGTH STEPS CANVASES SAMPLER` on the standard input asks for one generation of that many canvases and is
answered by its seconds and its evaluations of the network. As the reference implementations do: the network at every
position, and all probabilities of all positions, in every step; but `ddpm_cache` keeps what the network said for as long
as no token changes.
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
if mode == "int8":
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
network = torch.compile(model) if mode == "compiled" else model


def total_noise(t):
    return -torch.log1p(-(1 - 1e-3) * t)


def outputs(x, sigma):
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=mode in ("bfloat16", "compiled")):
        return network(x, sigma).float()


def scores(x, sigma):
    log_score = outputs(x, sigma)
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


@torch.inference_mode()
def ddpm_cache(length, steps, canvases):
    """MDLM's `_ddpm_caching_update` with its loop around it, for a network that does not see the time."""
    x = torch.full((canvases, length), mask)
    sigma = torch.zeros(canvases)
    times = torch.linspace(1, 1e-5, steps + 1)
    dt = (1 - 1e-5) / steps
    evaluations, clean = 0, None
    for t in times[:-1]:
        if clean is None:
            logits = outputs(x, sigma)
            logits[..., mask] = -torch.inf
            clean = logits.log_softmax(-1).exp()
            evaluations += 1
        weights = clean * dt
        weights[..., mask] = t - dt
        following = torch.where(x == mask, draw(weights), x)
        if not torch.equal(following, x):
            clean = None
        x = following
    return evaluations


for line in sys.stdin:
    *numbers, sampler = line.split()
    length, steps, canvases = map(int, numbers)
    started = time.perf_counter()
    if sampler == "ddpm_cache":
        evaluations = ddpm_cache(length, steps, canvases)
    else:
        generate(length, steps, canvases)
        evaluations = steps + 1
    if device != "cpu":
        torch.cuda.synchronize()
    print(time.perf_counter() - started, evaluations, flush=True)
