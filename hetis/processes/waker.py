"""Wakes a thread that polls, from any thread and by signals."""

import signal
import socket
from contextlib import suppress


class Waker:
    """Makes `fileno()` readable: by `wake`, and by signals, whatever the main thread does.

    Python runs signal handlers only between two instructions of the main thread, which may be in C++ for long; the byte
    in this pipe comes at once. Its descriptors are closed with the last reference, so `wake` never fails.
    """

    def __init__(self) -> None:
        self._out, self._in = socket.socketpair()
        self._out.setblocking(False)
        self._in.setblocking(False)

    def fileno(self) -> int:
        return self._out.fileno()

    def wake(self) -> None:
        with suppress(BlockingIOError):  # full: the thread has not read earlier calls yet
            self._in.send(b"\0")

    def __del__(self) -> None:
        self._out.close()
        self._in.close()

    def wake_on(self, *signals: signal.Signals) -> None:
        """From now on these signals do nothing but wake, as long as the process lives. Main thread only."""
        for each in signals:
            signal.signal(each, lambda *_: None)
        signal.set_wakeup_fd(self._in.fileno(), warn_on_full_buffer=False)

    def drain(self) -> set[int]:
        """Numbers of the signals since the last call, and 0 for `wake`."""
        try:
            return set(self._out.recv(4096))
        except BlockingIOError:
            return set()
