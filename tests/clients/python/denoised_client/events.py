"""What comes of a request: typed events, and the states that they leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from denoised.v1 import diffusion_service_pb2, event_pb2, resume_pb2

MASKED = "\u2591"


@dataclass(frozen=True)
class State:
    """All that is known of a request: enough to go on from, on any server of the model's version."""

    accepted: event_pb2.Accepted
    frames: tuple[event_pb2.Frame, ...]
    finished: tuple[int, ...]

    @property
    def resume(self) -> resume_pb2.Resume:
        """What a request has that goes on from here."""
        return resume_pb2.Resume(accepted=self.accepted, frames=self.frames, finished=self.finished)

    def __bytes__(self) -> bytes:
        return self.resume.SerializeToString()

    @staticmethod
    def from_bytes(data: bytes) -> State:
        """A state that was bytes."""
        resume = resume_pb2.Resume.FromString(data)
        return State(resume.accepted, tuple(resume.frames), tuple(resume.finished))


@dataclass(frozen=True)
class Accepted:
    """The request as the server understood it, every default resolved."""

    request_id: str
    model: str
    seed: int
    total: int
    length: int
    message: event_pb2.Accepted = field(repr=False)


@dataclass(frozen=True)
class Frame:
    """An intermediate state of one canvas, whole."""

    canvas: int
    step: int
    total: int
    t: float
    nfe: int
    text: str | None
    tokens: tuple[int, ...] = field(repr=False)
    masked: tuple[bool, ...] = field(repr=False)
    clamped: tuple[bool, ...] = field(repr=False)
    committed_at: tuple[int, ...] = field(repr=False)
    log_probabilities: tuple[float, ...] = field(repr=False)
    state: State = field(repr=False)

    @property
    def masked_fraction(self) -> float:
        """Share of the positions to fill that are masked."""
        open_ = sum(not clamped for clamped in self.clamped)
        return sum(self.masked) / open_ if open_ else 0.0


@dataclass(frozen=True)
class Result:
    """A finished canvas."""

    canvas: int
    text: str | None
    tokens: tuple[int, ...] = field(repr=False)
    committed_at: tuple[int, ...] = field(repr=False)
    log_probabilities: tuple[float, ...] = field(repr=False)
    nfe: int
    seed: int
    ended_early: bool


@dataclass(frozen=True)
class Resumed:
    """The server has gone away, and the request goes on."""

    attempt: int
    of: int
    after: str


Event = Accepted | Frame | Result | Resumed


def _bits(packed: bytes, count: int) -> tuple[bool, ...]:
    return tuple(bool(packed[at // 8] >> (at % 8) & 1) for at in range(count))


def _packed(bits: list[bool]) -> bytes:
    packed = bytearray((len(bits) + 7) // 8)
    for at, bit in enumerate(bits):
        packed[at // 8] |= bit << (at % 8)
    return bytes(packed)


class Conversation:
    """Turns messages into events, and knows how the request goes on."""

    def __init__(self, state: State | None = None) -> None:
        self._accepted: event_pb2.Accepted | None = None
        self._frames: dict[int, event_pb2.Frame] = {}
        self._finished: set[int] = set()
        self._mask: int | None = None
        self.news = 0
        if state is not None:
            self._accepted = state.accepted
            self._frames = {frame.canvas: frame for frame in state.frames}
            self._finished = set(state.finished)

    def state(self) -> State | None:
        """What to go on from, once the request was accepted."""
        if self._accepted is None:
            return None
        # Frames are never changed once they are kept, only replaced.
        frames = tuple(frame for canvas, frame in self._frames.items() if canvas not in self._finished)
        return State(self._accepted, frames, tuple(sorted(self._finished)))

    def take(
        self, answer: diffusion_service_pb2.GenerateResponse | diffusion_service_pb2.InfillResponse
    ) -> Iterator[Event]:
        """The event of a message; nothing for what was known."""
        event = answer.event
        match event.WhichOneof("event"):
            case "accepted":
                is_first = self._accepted is None
                self._accepted = event.accepted
                if is_first:
                    yield self._told(event.accepted)
            case "frame":
                self.news += 1
                yield self._frame(event.frame)
            case "result" if event.result.canvas not in self._finished:
                self.news += 1
                self._finished.add(event.result.canvas)
                yield _result(event.result)

    def _told(self, accepted: event_pb2.Accepted) -> Accepted:
        return Accepted(
            request_id=accepted.request_id,
            model=f"{accepted.model.name}@{accepted.model.version}",
            seed=accepted.sampling.seed,
            total=accepted.total,
            length=accepted.length,
            message=accepted,
        )

    def _frame(self, frame: event_pb2.Frame) -> Frame:
        if frame.WhichOneof("content") == "keyframe":
            key = event_pb2.Keyframe()
            key.CopyFrom(frame.keyframe)
        else:
            key = event_pb2.Keyframe()
            key.CopyFrom(self._frames[frame.canvas].keyframe)
            delta = frame.delta
            for at, position in enumerate(delta.positions):
                key.tokens[position] = delta.tokens[at]
                key.committed_at[position] = delta.committed_at[at]
                key.log_probabilities[position] = delta.log_probabilities[at]
        count = len(key.tokens)
        if frame.WhichOneof("content") == "keyframe":
            masked = _bits(key.masked, count)
            if self._mask is None:
                self._mask = next((key.tokens[at] for at in range(count) if masked[at]), None)
        else:
            masked = tuple(token == self._mask for token in key.tokens)
            key.masked = _packed(list(masked))
        newest = event_pb2.Frame()
        newest.CopyFrom(frame)
        newest.ClearField("text")
        newest.keyframe.CopyFrom(key)
        self._frames[frame.canvas] = newest
        state = self.state()
        if state is None:
            raise ValueError("the server sent a frame of a request that it had not accepted")
        return Frame(
            canvas=frame.canvas,
            step=frame.step,
            total=frame.total,
            t=frame.t,
            nfe=frame.nfe,
            text=frame.text if frame.HasField("text") else None,
            tokens=tuple(key.tokens),
            masked=masked,
            clamped=_bits(key.clamped, count),
            committed_at=tuple(key.committed_at),
            log_probabilities=tuple(key.log_probabilities),
            state=state,
        )


def _result(result: event_pb2.CanvasResult) -> Result:
    return Result(
        canvas=result.canvas,
        text=result.text if result.HasField("text") else None,
        tokens=tuple(result.tokens),
        committed_at=tuple(result.committed_at),
        log_probabilities=tuple(result.log_probabilities),
        nfe=result.nfe,
        seed=result.seed,
        ended_early=result.finish_reason == event_pb2.FINISH_REASON_DEADLINE,
    )
