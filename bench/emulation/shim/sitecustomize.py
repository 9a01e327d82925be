"""Applies the emulation to the ranks of an emulated fleet.

Python imports this module at start, because its folder is on PYTHONPATH; hetis itself has no hook for it.
"""

import os
import sys

if "HETIS_EMULATION" in os.environ and "hetis.driver.driver" in sys.orig_argv:
    from emulation import rank

    rank.use_core(is_worker=False)
elif "HETIS_EMULATION" in os.environ and "RANK" in os.environ:
    from emulation import rank

    rank.emulate(int(os.environ["RANK"]))
