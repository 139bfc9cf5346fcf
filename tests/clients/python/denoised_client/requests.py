"""Requests: templates of text, gaps and drafts, and how they are denoised."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from denoised.v1 import deadline_pb2, diffusion_service_pb2, model_reference_pb2, sampling_pb2, template_pb2

Sampler = Literal[
    "tweedie",
    "euler",
    "first_hitting",
    "confidence",
    "entropy_bounded",
    "remask",
    "theta_trapezoidal",
    "probability_margin",
]


@dataclass(frozen=True)
class Gap:
    """Positions to fill, if wanted with one of some texts that are one token each."""

    positions: int
    allowed: tuple[str, ...] | None = None

    def __init__(self, positions: int, allowed: Sequence[str] | None = None) -> None:
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "allowed", None if allowed is None else tuple(allowed))


@dataclass(frozen=True)
class Draft:
    """Text that is there at the start, is noised and denoised again."""

    text: str


Part = str | Gap | Draft | Sequence[int]
"""Text, tokens, positions to fill, or text to edit."""


def model_reference(model: str | None) -> model_reference_pb2.ModelReference | None:
    """A model that is named as NAME or NAME@VERSION."""
    if model is None:
        return None
    named = re.fullmatch(r"(.*)@(\d+)", model)
    if named is None:
        return model_reference_pb2.ModelReference(name=model)
    return model_reference_pb2.ModelReference(name=named[1], version=int(named[2]))


def sampling(
    *,
    sampler: Sampler | None,
    options: dict[str, Any] | None,
    steps: int | None,
    seed: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    num_samples: int | None,
    start_time: float | None,
) -> sampling_pb2.Sampling:
    """How a canvas is denoised; what is None is left to the model and the server."""
    message = sampling_pb2.Sampling(
        steps=steps,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_samples=num_samples,
        start_time=start_time,
    )
    if sampler is not None:
        if sampler not in {field.name for field in message.DESCRIPTOR.oneofs_by_name["sampler"].fields}:
            raise ValueError(f"sampler is {sampler!r}, which is none")
        own = getattr(message, sampler)
        own.SetInParent()
        for name, value in (options or {}).items():
            setattr(own, name, value)
    elif options:
        raise ValueError("options are those of a sampler: name it too")
    return message


def frame_policy(frames: bool, every: int | None) -> sampling_pb2.FramePolicy:
    """Which states are sent: all that change something, every so many steps, or none."""
    policy = sampling_pb2.FramePolicy
    if not frames:
        return policy(when=policy.WHEN_NEVER)
    if every is not None:
        return policy(when=policy.WHEN_EVERY_STEPS, every_steps=every, min_interval_ms=0)
    return policy(when=policy.WHEN_ON_CHANGE, min_interval_ms=0)


def deadline(seconds: float | None, finish_early: bool) -> deadline_pb2.Deadline | None:
    """When the answer must be whole, and whether fewer steps are taken for it."""
    if seconds is None:
        return None
    then = deadline_pb2.ON_DEADLINE_FINISH_EARLY if finish_early else deadline_pb2.ON_DEADLINE_FAIL
    return deadline_pb2.Deadline(ms=max(1, round(seconds * 1000)), on_deadline=then)


def generate_request(prompt: str, length: int | None, model: str | None) -> diffusion_service_pb2.GenerateRequest:
    """A request that continues `prompt`."""
    return diffusion_service_pb2.GenerateRequest(prompt=prompt, length=length, model=model_reference(model))


def infill_request(template: Sequence[Part], model: str | None) -> diffusion_service_pb2.InfillRequest:
    """A request that fills the gaps of `template`."""
    request = diffusion_service_pb2.InfillRequest(model=model_reference(model))
    sets: dict[tuple[str, ...], str] = {}
    for part in template:
        match part:
            case str():
                request.template.add(text=part)
            case Gap():
                gap = template_pb2.Gap(positions=part.positions)
                if part.allowed is not None:
                    gap.allowed = sets.setdefault(part.allowed, str(len(sets) + 1))
                request.template.add(gap=gap)
            case Draft():
                request.template.add(draft=template_pb2.Draft(text=part.text))
            case _:
                request.template.add(tokens=template_pb2.TokenList(ids=part))
    for texts, name in sets.items():
        request.token_sets.add(name=name, texts=texts)
    return request
