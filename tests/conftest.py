"""Set before anything imports triton: without a GPU its kernels run under the interpreter.

What devices were measured to do is kept for the tests of one run, and never in the user's own cache.
"""

import os
import tempfile

os.environ.setdefault("TRITON_INTERPRET", "1")
_cache = tempfile.TemporaryDirectory(prefix="hetis-tests-")  # removed when this process ends
os.environ["XDG_CACHE_HOME"] = _cache.name
