"""Prints the pip option for torch's CPU index if that index answers, else nothing (pip then uses its default)."""

import urllib.error
import urllib.request

INDEX = "https://download.pytorch.org/whl/cpu"

try:
    urllib.request.urlopen(f"{INDEX}/torch/", timeout=5).close()
    print(f"--extra-index-url {INDEX}")
except (urllib.error.URLError, TimeoutError, OSError):
    pass
