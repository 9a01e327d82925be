"""Emulated fleets under load, for benchmarks: real hetis processes whose devices and links are slowed by pauses.

`fleet.py` describes a fleet as plain data, and `launch.py` starts it. `rank.py` patches its ranks: `device.py` slows a
core down, `slow_link.py` a link. `board.py` is shared memory: it sets how slow ranks are to be, and ranks report in it
how slow they were. `workload.py` makes requests over time, `client.py` sends them, `metrics.py` evaluates the replies.
"""
