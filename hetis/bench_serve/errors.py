"""Why a measured request failed."""

CONNECT = "connection failed"
DISCONNECT = "connection closed early"
TIMEOUT = "timed out"
MALFORMED = "malformed response"
IN_STREAM = "error in the stream"
EMPTY = "no output"


class RequestError(Exception):
    """A failed request. `kind`: one of the constants above or "HTTP <status>", by which failures are counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message
