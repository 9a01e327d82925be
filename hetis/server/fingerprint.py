"""`system_fingerprint`: what an answer depends on besides the request."""

import hashlib
from pathlib import Path

import msgspec

from hetis import __version__
from hetis.core.config import EngineConfig


def system_fingerprint(config: EngineConfig) -> str:
    """Version, and a hash of it and of model, number format and plan. A plan file counts by its content."""
    plan = config.plan
    content = Path(plan).read_text() if isinstance(plan, str) and Path(plan).is_file() else plan
    parts = [__version__, config.model, config.revision, config.dtype, content]
    return f"hetis-{__version__}-{hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:12]}"
