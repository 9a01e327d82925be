"""What the path of a request tells those who count, and the parts that count nothing."""

from collections.abc import Mapping
from typing import Protocol

from hetis.core.sampling_params import SamplingParams
from hetis.frontend.requests import Piece, Request


class RequestMeter(Protocol):
    """The measurements of one prompt."""

    def on_piece(self, piece: Piece) -> None: ...

    def finish(self, reason: str) -> None: ...


class Metrics(Protocol):
    def begin(self, request: Request, endpoint: str) -> RequestMeter: ...


class Span(Protocol):
    """The trace of one prompt."""

    def finish(self, meter: RequestMeter) -> None: ...


class Tracing(Protocol):
    def begin(self, headers: Mapping[str, str], name: str, request: Request, params: SamplingParams) -> Span: ...


class NoMeter:
    def on_piece(self, piece: Piece) -> None:
        pass

    def finish(self, reason: str) -> None:
        pass


class NoMetrics:
    def begin(self, request: Request, endpoint: str) -> NoMeter:
        return NoMeter()


class NoSpan:
    def finish(self, meter: RequestMeter) -> None:
        pass


class NoTracing:
    def begin(self, headers: Mapping[str, str], name: str, request: Request, params: SamplingParams) -> NoSpan:
        return NoSpan()
