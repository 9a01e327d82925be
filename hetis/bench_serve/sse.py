"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html, the field `data` only."""


class EventParser:
    """Splits a stream of bytes, cut at any positions, into the data of its events."""

    def __init__(self) -> None:
        self._rest = b""  # an incomplete line
        self._data: list[bytes] = []  # lines of the incomplete event

    def feed(self, read: bytes) -> list[bytes]:
        """The data of each event that `read` completes. Lines end in LF, CRLF or CR; comments are skipped.

        A CR at the end of `read` may be half of a CRLF, so that its line counts with the next read.
        """
        text = self._rest + read
        held = b""
        if b"\r" in text:
            if text.endswith(b"\r"):
                text, held = text[:-1], b"\r"
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = text.split(b"\n")
        self._rest += held
        events = []
        for line in lines:
            if line:
                name, _, value = line.partition(b":")
                if name == b"data":
                    self._data.append(value.removeprefix(b" "))
            elif self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
