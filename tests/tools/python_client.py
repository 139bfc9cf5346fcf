"""Uses the Python client as its README does, and more: python python_client.py ADDRESS. Prints what came as JSON."""

import asyncio
import json
import sys

import grpc
from denoised_client import Accepted, AsyncClient, Client, Draft, Frame, Gap, Result, State

address = sys.argv[1]
told = {}
template = ["And the king said", Gap(6), " to the", Gap(1, [" people", " priest"]), "."]
asked = {"steps": 24, "seed": 7, "num_samples": 2}

with Client(address) as client:
    events = list(client.infill(template, **asked))
    told["kinds"] = [type(event).__name__ for event in events]
    accepted = next(event for event in events if isinstance(event, Accepted))
    told["model"], told["seed"] = accepted.model, accepted.seed
    frames = [event for event in events if isinstance(event, Frame)]
    told["masked"] = [frame.masked_fraction for frame in frames if frame.canvas == 0]
    results = {event.canvas: event.text for event in events if isinstance(event, Result)}
    told["texts"] = [results[0], results[1]]
    # Every token of the last frame is the result's, and was put together from deltas.
    last = {frame.canvas: frame.tokens for frame in frames}
    told["whole"] = all(last[event.canvas] == event.tokens for event in events if isinstance(event, Result))

    # From a state in the middle, as bytes, what comes is what would have come.
    middle = State.from_bytes(bytes(frames[len(frames) // 2].state))
    resumed = {event.canvas: event.text for event in client.resume(middle) if isinstance(event, Result)}
    told["resumed"] = all(results[canvas] == text for canvas, text in resumed.items()) and len(resumed) > 0

    quiet = list(client.generate("In the beginning", length=24, steps=8, seed=1, frames=False, sampler="euler"))
    told["quiet"] = [type(event).__name__ for event in quiet]
    told["generated"] = quiet[-1].text
    edited = client.infill(["He went", Draft(" up to the house of"), " the king."], start_time=0.4, seed=1, frames=False)
    told["edited"] = list(edited)[-1].text
    likely, unlikely = client.score(["He went up to the house.", "He house to up went the."])
    told["likelier"] = likely.nats < unlikely.nats and likely.standard_error == 0
    told["chosen"] = [c.text for c in client.choose("And the king ", " to the people.", ["elephant", "said"])]
    told["tokens"] = client.tokenize("In the beginning")
    told["models"] = [model.name for model in client.models()]
    try:
        list(client.generate("In", steps=0))
    except grpc.RpcError as error:
        told["refused"] = [error.code().name, error.details()]


async def also() -> None:
    async with AsyncClient(address) as client:
        texts = [event.text async for event in client.infill(template, **asked) if isinstance(event, Result)]
        told["async"] = sorted(texts)
        many = (client.choose("And the king ", " to the people.", ["said", "ran"]) for _ in range(8))
        told["at_once"] = len(await asyncio.gather(*many))


asyncio.run(also())
print(json.dumps(told))
