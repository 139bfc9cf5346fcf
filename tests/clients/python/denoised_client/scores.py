"""How likely texts are, and candidates at one place of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from denoised.v1 import diffusion_service_pb2, scoring_pb2

from .requests import model_reference


@dataclass(frozen=True)
class Score:
    """Minus the log-likelihood of a text, or the bound on it, in nats."""

    nats: float
    standard_error: float
    tokens: int
    log_probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Candidate:
    """A candidate, as likely as the model finds it."""

    text: str
    log_probability: float
    probability: float


def likelihood(exact: bool, draws: int | None) -> scoring_pb2.Likelihood:
    """What is asked about a text: exactly, from left to right, or the bound by so many draws."""
    if exact:
        return scoring_pb2.Likelihood(exact=scoring_pb2.Exact())
    return scoring_pb2.Likelihood(bound=scoring_pb2.Bound(draws=draws))


def score_request(
    texts: Sequence[str], exact: bool, draws: int | None, seed: int | None, model: str | None
) -> diffusion_service_pb2.ScoreRequest:
    """A request for the scores of `texts`."""
    request = diffusion_service_pb2.ScoreRequest(
        model=model_reference(model), likelihood=likelihood(exact, draws), seed=seed
    )
    for text in texts:
        request.texts.add().parts.add(content=scoring_pb2.TextOrTokens(text=text))
    return request


def scores(answers: Sequence[diffusion_service_pb2.ScoreResponse]) -> list[Score]:
    """The scores in the order of the texts."""
    told = [answer.score for answer in answers if answer.WhichOneof("event") == "score"]
    return [
        Score(score.nats, score.standard_error, score.tokens, tuple(score.log_probabilities))
        for score in sorted(told, key=lambda score: score.text)
    ]


def choose_request(
    before: str, after: str, candidates: Sequence[str], model: str | None
) -> diffusion_service_pb2.ChooseRequest:
    """A request for the probabilities of `candidates` between two texts."""
    text = scoring_pb2.TextOrTokens
    return diffusion_service_pb2.ChooseRequest(
        model=model_reference(model),
        before=text(text=before),
        after=text(text=after),
        candidates=[text(text=candidate) for candidate in candidates],
    )


def ranked(candidates: Sequence[str], answer: diffusion_service_pb2.ChooseResponse) -> list[Candidate]:
    """The candidates, the likeliest first."""
    told = zip(candidates, answer.candidates, strict=True)
    weighed = [Candidate(text, score.log_probability, score.probability) for text, score in told]
    return sorted(weighed, key=lambda candidate: -candidate.log_probability)
