"""Emulated fleets for benchmarks: real hetis processes, with slow devices and slow links made by pauses.

`fleet.py` says in plain data what a fleet is; `launch.py` starts it; `rank.py` is what its ranks do differently:
`device_clock.py` makes a device slow, `slow_link.py` a link; `board.py` is the memory through which they are told how
slow to be, and tell how slow they were.
"""
