"""Sampling defaults of a model's generation_config.json."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from hetis.core.config import EngineConfig
from hetis.frontend.generation_config import sampling_defaults
from hetis.models.hub import PACKAGED


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a model's config."""
    shutil.copy(PACKAGED / "config.json", tmp_path)
    return tmp_path


def defaults(model: Path, content: Any) -> dict[str, float]:
    (model / "generation_config.json").write_text(json.dumps(content))
    return sampling_defaults(EngineConfig(model=str(model)))


def test_known_fields_become_sampling_parameters(model: Path) -> None:
    content = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05}
    assert defaults(model, content | {"do_sample": True, "eos_token_id": 0, "top_h": 1}) == content
    assert defaults(model, {"max_new_tokens": 512, "temperature": None}) == {"max_tokens": 512}


def test_values_out_of_range_are_left_out_with_a_warning(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("hetis").propagate = True
    content = {"temperature": 9.0, "top_p": "0.9", "top_k": True, "min_p": 0.5}
    assert defaults(model, content) == {"min_p": 0.5}
    warnings = [record.getMessage() for record in caplog.records]
    assert [any(f": {name} is ignored: {name} " in text for text in warnings) for name in content] == [True] * 3 + [
        False
    ]


def test_a_model_without_the_file_sets_nothing_and_one_that_is_no_object_is_refused(model: Path) -> None:
    assert sampling_defaults(EngineConfig(model=str(model))) == {}
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        defaults(model, [1])
