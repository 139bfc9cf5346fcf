"""Clients of OpenAI's API that nobody here wrote: python openai_clients.py ADDRESS. Prints what came as JSON."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # Nothing is fetched.

import litellm
import openai

base_url = f"http://{sys.argv[1]}/v1"
client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
litellm.telemetry = False
asked = {"model": "world-english", "prompt": "In the beginning", "max_tokens": 24, "seed": 7}
ours = {"steps": 12}


def refused(**changes):
    """The type, code and words of the error that a request ends with."""
    try:
        client.completions.create(**{**asked, **changes})
    except openai.APIStatusError as error:
        return f"{type(error).__name__} {error.status_code} {error.param}: {error.message}"
    return "not refused"


whole = client.completions.create(**asked, n=2, logprobs=0, extra_body=ours)
again = client.completions.create(**asked, extra_body=ours)
streamed = list(client.completions.create(**asked, n=2, stream=True, stream_options={"include_usage": True}, extra_body=ours))
frames = list(client.completions.create(**asked, stream=True, extra_body={**ours, "frames": True}))
infilled = client.completions.create(
    **{**asked, "prompt": "The king said to", "max_tokens": 6}, suffix=", and went away.", extra_body=ours
)
echoed = client.completions.create(**asked, echo=True, extra_body=ours)
stopped = client.completions.create(**asked, stop=[again.choices[0].text[5:9], "never"], logprobs=0, extra_body=ours)
several = client.completions.create(**{**asked, "prompt": ["In the beginning", "My son,"]}, extra_body=ours)
early = client.completions.create(
    **{**asked, "max_tokens": 100}, extra_body={"steps": 4096, "deadline_ms": 1500, "finish_early": True}
)
lite = litellm.text_completion(
    model="text-completion-openai/world-english",
    prompt="In the beginning",
    max_tokens=24,
    seed=7,
    api_base=base_url,
    api_key="none",
    extra_body=ours,
)
lite_streamed = litellm.text_completion(
    model="text-completion-openai/world-english",
    prompt="In the beginning",
    max_tokens=24,
    seed=7,
    stream=True,
    api_base=base_url,
    api_key="none",
    extra_body=ours,
)


def joined(chunks, index):
    return "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == index)


def reasons(chunks):
    return [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]


print(
    json.dumps(
        {
            "models": [model.id for model in client.models.list()],
            "model": client.models.retrieve("world-english@1").id,
            "whole": whole.model_dump(),
            "again": again.model_dump(),
            "streamed": [joined(streamed, 0), joined(streamed, 1)],
            "chunks": [[choice.text for choice in chunk.choices] for chunk in streamed],
            "reasons": reasons(streamed),
            "usage": [chunk.usage.model_dump() for chunk in streamed if chunk.usage],
            "frames": [chunk.choices[0].model_dump() for chunk in frames],
            "infilled": infilled.choices[0].text,
            "echoed": echoed.choices[0].text,
            "stopped": stopped.choices[0].model_dump(),
            "several": [choice.model_dump() for choice in several.choices],
            "early": early.choices[0].text,
            "lite": lite.choices[0].text,
            "lite_streamed": "".join(chunk.choices[0].text or "" for chunk in lite_streamed),
            "refused": {
                "model": refused(model="nobody"),
                "temperature": refused(temperature=-1),
                "long": refused(max_tokens=4000),
                "tokens": refused(prompt=[1, 2, 3]),
                "penalty": refused(presence_penalty=0.5),
                "bias": refused(logit_bias={"5": 1}),
                "logprobs": refused(logprobs=3),
                "best_of": refused(best_of=4),
                "n": refused(n=10_000),
                "none": refused(n=0),
                "stops": refused(stop=["a", "b", "c", "d", "e"]),
                "unknown": refused(extra_body={"stepz": 3}),
                "sampler": refused(extra_body={"sampler": "ddim"}),
                "steps": refused(extra_body={"steps": 0}),
                "deadline": refused(extra_body={"steps": 4096, "deadline_ms": 1}),
            },
        }
    )
)
