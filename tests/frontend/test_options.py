"""Options of `LLM`: documented, and the same as the fields of `EngineConfig`."""

import inspect
import re
from pathlib import Path

from hetis import LLM
from hetis.core.config import EngineConfig
from hetis.frontend.options import make_config


def test_help_describes_every_option() -> None:
    described = re.findall(r"^- (\w+): ", inspect.getdoc(LLM) or "", re.MULTILINE)
    assert described == list(EngineConfig.__struct_fields__)


def test_paths_and_sizes_are_normalised(tmp_path: Path) -> None:
    config = make_config(model=tmp_path, kv_cache_memory={0: "1GiB", 1: 512})
    assert (config.model, config.kv_cache_memory) == (str(tmp_path), {0: 1 << 30, 1: 512})
    assert make_config(kv_cache_memory="2MiB").kv_cache_memory == 2 << 20
    assert make_config() == EngineConfig()
