"""The final status that rank 0 writes to the driver, its child: how the job ends. Without one, rank 0 has died."""

SHUT_DOWN = b"shut down\n"  # in order
ASKED_TO_END = b"asked to end\n"  # the launcher of rank 0 asks it to end
