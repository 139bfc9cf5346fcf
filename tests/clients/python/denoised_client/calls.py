"""What both clients have: the requests that they make, and when these go on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeVar

import grpc

from denoised.v1 import diffusion_service_pb2

from . import requests
from .events import State
from .requests import Part, Sampler

Stream = TypeVar("Stream")
Request = diffusion_service_pb2.GenerateRequest | diffusion_service_pb2.InfillRequest
Method = Literal["Generate", "Infill"]

# A connection that breaks off in the middle of an answer has no status of its server's.
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)


def is_gone(error: grpc.RpcError) -> bool:
    """Whether the server is away, so that the request can go on elsewhere."""
    return isinstance(error, grpc.Call) and error.code() in _GONE


def words(error: grpc.RpcError) -> str:
    """What a call ended with."""
    return error.details() or "" if isinstance(error, grpc.Call) else str(error)


def pause(attempt: int) -> float:
    """Seconds before a request goes on for the attempt-th time in a row, from 1."""
    return min(0.1 * 2.0 ** (attempt - 1), 5.0)


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """How a client shows itself."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def going_on(request: Request, state: State) -> Request:
    """The request that goes on with another one of the same method."""
    return type(request)(
        resume=state.resume, frames=request.frames, request_id=request.request_id, priority=request.priority
    )


class Calls(ABC, Generic[Stream]):
    """Requests whose answers are streams of events."""

    @abstractmethod
    def _run(self, method: Method, request: Request, state: State | None) -> Stream: ...

    def generate(
        self,
        prompt: str = "",
        *,
        length: int | None = None,
        model: str | None = None,
        **asked: Any,
    ) -> Stream:
        """Continues `prompt`; takes what `infill` takes, and `length`: positions of the whole canvas."""
        request = requests.generate_request(prompt, length, model)
        return self._ask("Generate", request, **asked)

    def infill(self, template: Sequence[Part], *, model: str | None = None, **asked: Any) -> Stream:
        """Fills the gaps of `template`.

        Keywords: sampler, options (of the sampler), steps, seed, temperature, top_k, top_p, num_samples, start_time,
        deadline (seconds), finish_early, frames (False: the result alone), every (so many steps), priority and
        request_id. What is not said is the model's and the server's to say.
        """
        return self._ask("Infill", requests.infill_request(template, model), **asked)

    def resume(self, state: State) -> Stream:
        """Goes on from a state, byte for byte as the request would have; events that have been are not told again."""
        request = diffusion_service_pb2.InfillRequest(
            resume=state.resume, frames=requests.frame_policy(frames=True, every=None)
        )
        return self._run("Infill", request, state)

    def _ask(
        self,
        method: Method,
        request: Request,
        *,
        sampler: Sampler | None = None,
        options: dict[str, Any] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_samples: int | None = None,
        start_time: float | None = None,
        deadline: float | None = None,
        finish_early: bool = False,
        frames: bool = True,
        every: int | None = None,
        priority: int = 0,
        request_id: str = "",
    ) -> Stream:
        how = requests.sampling(
            sampler=sampler,
            options=options,
            steps=steps,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_samples=num_samples,
            start_time=start_time,
        )
        request.sampling.CopyFrom(how)
        request.frames.CopyFrom(requests.frame_policy(frames, every))
        until = requests.deadline(deadline, finish_early)
        if until is not None:
            request.deadline.CopyFrom(until)
        request.priority = priority
        request.request_id = request_id
        return self._run(method, request, None)
