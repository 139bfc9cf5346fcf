"""A client for denoised: texts come out of noise as typed events, and go on when a server goes away."""

from .aio import AsyncClient
from .client import Client
from .events import Accepted, Event, Frame, Resumed, Result, State
from .requests import Draft, Gap, Part
from .scores import Candidate, Score

__all__ = [
    "Accepted",
    "AsyncClient",
    "Candidate",
    "Client",
    "Draft",
    "Event",
    "Frame",
    "Gap",
    "Part",
    "Result",
    "Resumed",
    "Score",
    "State",
]
