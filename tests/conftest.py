"""Set before anything imports triton: without a GPU its kernels run under the interpreter."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
