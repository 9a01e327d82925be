"""Emulated fleets under load, for benchmarks: real hetis processes, with slow devices and slow links made by pauses.

`fleet.py` says in plain data what a fleet is; `launch.py` starts it; `rank.py` is what its ranks do differently:
`device.py` makes a device of a core, `slow_link.py` a slow link of a fast one; `board.py` is the memory through which
ranks are told how slow to be, and tell how slow they were. `workload.py` are requests over time, `client.py` sends
them, `metrics.py` judges what came back.
"""
