"""The client for programs that wait."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType

import grpc

from denoised.v1 import diffusion_service_pb2, diffusion_service_pb2_grpc, model_service_pb2, model_service_pb2_grpc

from . import scores
from .calls import Calls, Method, Request, going_on, is_gone, metadata, pause, words
from .events import Conversation, Event, Resumed, State
from .requests import model_reference
from .scores import Candidate, Score


class Client(Calls[Iterator[Event]]):
    """A client of one server, or of several that serve the same models: the next is asked when one goes away."""

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
            grpc.insecure_channel(server) if credentials is None else grpc.secure_channel(server, credentials)
            for server in servers
        ]
        self._metadata = metadata(token)
        self._retries = retries

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections, with what still runs on them."""
        for channel in self._channels:
            channel.close()

    def _service(self, turn: int = 0) -> diffusion_service_pb2_grpc.DiffusionServiceStub:
        return diffusion_service_pb2_grpc.DiffusionServiceStub(self._channels[turn % len(self._channels)])

    def _run(self, method: Method, request: Request, state: State | None) -> Iterator[Event]:
        conversation = Conversation(state)
        attempt, turn = 0, 0
        while True:
            known = conversation.news
            call = getattr(self._service(turn), method)(request, metadata=self._metadata)
            try:
                for answer in call:
                    yield from conversation.take(answer)
                return
            except grpc.RpcError as error:
                attempt = 1 if conversation.news > known else attempt + 1
                if not is_gone(error) or attempt > self._retries:
                    raise
                yield Resumed(attempt, self._retries, words(error))
            finally:
                # Whoever stops to listen wants no more of the server.
                call.cancel()
            time.sleep(pause(attempt))
            turn += 1
            reached = conversation.state()
            if reached is not None:
                request = going_on(request, reached)

    def score(
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
        return scores.scores(list(self._service().Score(request, metadata=self._metadata)))

    def choose(
        self, before: str, after: str, candidates: Sequence[str], *, model: str | None = None
    ) -> list[Candidate]:
        """How likely each of `candidates` is between two texts, the likeliest first."""
        request = scores.choose_request(before, after, candidates, model)
        return scores.ranked(candidates, self._service().Choose(request, metadata=self._metadata))

    def tokenize(self, text: str, *, model: str | None = None) -> list[int]:
        """The model's tokens of `text`."""
        request = diffusion_service_pb2.TokenizeRequest(text=text, model=model_reference(model))
        return list(self._service().Tokenize(request, metadata=self._metadata).tokens)

    def models(self) -> list[model_service_pb2.Model]:
        """All models that are served."""
        service = model_service_pb2_grpc.ModelServiceStub(self._channels[0])
        answer = service.ListModels(model_service_pb2.ListModelsRequest(), metadata=self._metadata)
        return list(answer.models)
