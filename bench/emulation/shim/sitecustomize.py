"""Found by the interpreter of every process of an emulated fleet: makes ranks emulated ones. hetis has no such hook."""

import os
import sys

if "HETIS_EMULATION" in os.environ and "RANK" in os.environ and "hetis.driver.driver" not in sys.orig_argv:
    from emulation import rank

    rank.emulate(int(os.environ["RANK"]))
