"""Every choice of `--dispatch` is a policy: those without speeds by name, "hetis" by the cost model."""

from typing import get_args, get_type_hints

from hetis.core.config import EngineConfig
from hetis.engine.policies import SIMPLE


def test_every_choice_has_a_policy_and_every_policy_is_a_choice() -> None:
    choices = get_args(get_type_hints(EngineConfig)["dispatch"])
    assert {*choices} == {*SIMPLE, "hetis"}
