"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

import grpc

from denoised.v1 import diffusion_service_pb2, diffusion_service_pb2_grpc, model_service_pb2, model_service_pb2_grpc

from . import scores
from .calls import Calls, Method, Request, going_on, is_gone, metadata, pause, words
from .events import Conversation, Event, Resumed, State
from .requests import model_reference
from .scores import Candidate, Score


class AsyncClient(Calls[AsyncIterator[Event]]):
    """As `Client`, for `async for` and `await`."""

    def __init__(
        self,
        *servers: str,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        retries: int = 5,
    ) -> None:
        """Connects to servers, as HOST:PORT, when they are needed; with TLS where there are credentials."""
        if not servers:
            raise ValueError("which server?")
        self._channels = [
            grpc.aio.insecure_channel(server)
            if credentials is None
            else grpc.aio.secure_channel(server, credentials)
            for server in servers
        ]
        self._metadata = metadata(token)
        self._retries = retries

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connections, with what still runs on them."""
        for channel in self._channels:
            await channel.close()

    def _service(self, turn: int = 0) -> diffusion_service_pb2_grpc.DiffusionServiceStub:
        return diffusion_service_pb2_grpc.DiffusionServiceStub(self._channels[turn % len(self._channels)])

    async def _run(self, method: Method, request: Request, state: State | None) -> AsyncIterator[Event]:
        conversation = Conversation(state)
        attempt, turn = 0, 0
        while True:
            known = conversation.news
            call = getattr(self._service(turn), method)(request, metadata=self._metadata)
            try:
                async for answer in call:
                    for event in conversation.take(answer):
                        yield event
                return
            except grpc.RpcError as error:
                attempt = 1 if conversation.news > known else attempt + 1
                if not is_gone(error) or attempt > self._retries:
                    raise
                yield Resumed(attempt, self._retries, words(error))
            finally:
                # Whoever stops to listen wants no more of the server.
                call.cancel()
            await asyncio.sleep(pause(attempt))
            turn += 1
            reached = conversation.state()
            if reached is not None:
                request = going_on(request, reached)

    async def score(
        self,
        texts: Sequence[str],
        *,
        exact: bool = True,
        draws: int | None = None,
        seed: int | None = None,
        model: str | None = None,
    ) -> list[Score]:
        """How likely each of `texts` is: exactly, or with `exact=False` by the diffusion bound."""
        request = scores.score_request(texts, exact, draws, seed, model)
        call = self._service().Score(request, metadata=self._metadata)
        return scores.scores([answer async for answer in call])

    async def choose(
        self, before: str, after: str, candidates: Sequence[str], *, model: str | None = None
    ) -> list[Candidate]:
        """How likely each of `candidates` is between two texts, the likeliest first."""
        request = scores.choose_request(before, after, candidates, model)
        return scores.ranked(candidates, await self._service().Choose(request, metadata=self._metadata))

    async def tokenize(self, text: str, *, model: str | None = None) -> list[int]:
        """The model's tokens of `text`."""
        request = diffusion_service_pb2.TokenizeRequest(text=text, model=model_reference(model))
        return list((await self._service().Tokenize(request, metadata=self._metadata)).tokens)

    async def models(self) -> list[model_service_pb2.Model]:
        """All models that are served."""
        service = model_service_pb2_grpc.ModelServiceStub(self._channels[0])
        answer = await service.ListModels(model_service_pb2.ListModelsRequest(), metadata=self._metadata)
        return list(answer.models)
