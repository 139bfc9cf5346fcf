"""Draws how a text comes about: masked share and certainty over the steps.

python plot.py ADDRESS OUT.png ["a prompt"]
"""

import math
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from denoised_client import Client, Frame, Result

# %% A run, of which every state is kept.
address, out, *prompt = sys.argv[1:]
frames: list[Frame] = []
with Client(address) as client:
    for event in client.generate(*prompt or ["In the beginning"], length=96, steps=64, seed=1):
        if isinstance(event, Frame):
            frames.append(event)
        if isinstance(event, Result):
            print(event.text)

# %% What each step drew, and how likely the network found it.
steps = [frame.step for frame in frames]
drawn = [
    [math.exp(p) for p, at in zip(frame.log_probabilities, frame.committed_at) if at == frame.step > 0]
    for frame in frames
]
certainty = [sum(found) / len(found) if found else math.nan for found in drawn]

# %% Both, over the steps.
figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 5), layout="constrained")
above.step(steps, [frame.masked_fraction for frame in frames], where="post")
above.set(ylabel="share that is masked", ylim=(0, 1))
below.plot(steps, certainty, ".")
below.set(xlabel="step", ylabel="mean probability when drawn", ylim=(0, 1))
figure.savefig(out, dpi=120)
