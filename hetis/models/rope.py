"""Translation of the rope settings of config.json, in transformers' old and new form, into a `RopeSpec`.

Defaults for absent keys are those of transformers; the number of positions of a scaled rope is that of vLLM.
"""

import math
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from hetis.core.model_spec import RopeSpec
from hetis.models.config_keys import DecoderKeys
from hetis.models.json_files import (
    Json,
    OptionalCount,
    OptionalFlag,
    OptionalNumber,
    OptionalText,
    decode,
    shown,
)

_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
_DEFAULT_THETA = 10000.0

_Factor = Annotated[float, Meta(ge=1, le=10_000, description="a number from 1 to 10000")]
_OptionalFactor = Annotated[_Factor | None, Meta(description="a number from 1 to 10000, or null")]
_OptionalWeight = Annotated[
    Annotated[float, Meta(ge=0, le=1000)] | None, Meta(description="a number up to 1000, or null")
]


class RopeKeys(msgspec.Struct, frozen=True, kw_only=True):
    """Keys of `rope_parameters`, or of `rope_scaling` before transformers 5. Null means absent."""

    rope_type: OptionalText = None
    type: OptionalText = None  # former name of rope_type
    rope_theta: OptionalNumber = None
    partial_rotary_factor: OptionalNumber = None
    factor: _OptionalFactor = None
    original_max_position_embeddings: OptionalCount = None
    low_freq_factor: OptionalNumber = None  # llama3
    high_freq_factor: OptionalNumber = None  # llama3
    beta_fast: OptionalNumber = None  # yarn
    beta_slow: OptionalNumber = None  # yarn
    truncate: OptionalFlag = None  # yarn
    attention_factor: OptionalNumber = None  # yarn
    attn_factor: OptionalNumber = None  # yarn, first implementation: multiplies the inferred attention factor
    mscale: _OptionalWeight = None  # yarn; 0 means absent
    mscale_all_dim: _OptionalWeight = None  # yarn
    alpha: OptionalNumber = None  # dynamic; not supported


def read_rope(config: DecoderKeys, head_dim: int) -> tuple[RopeSpec, int]:
    """Rope of heads of `head_dim` values, and the number of positions of the longest sequence.

    Positions: for linear, dynamic and yarn, `factor` times those of the unscaled rope (of yarn:
    original_max_position_embeddings); else max_position_embeddings. ValueError, one sentence with key, value and
    remedy, for kinds that are not supported and values that do not fit together.
    """
    name = "rope_scaling" if config.rope_scaling else "rope_parameters"
    written = config.rope_scaling or config.rope_parameters or {}
    kind = _kind(name, written)
    keys = decode(RopeKeys, written, prefix=f"{name}.")
    partial = keys.partial_rotary_factor or config.partial_rotary_factor or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor is {partial}; only rope over the whole head (1.0) is supported.")
    theta = keys.rope_theta or config.rope_theta or _DEFAULT_THETA
    if theta <= 1.0:
        raise ValueError(f"rope_theta is {theta}; it must be more than 1.")
    rope = RopeSpec(theta=theta, rotary_dim=head_dim)
    positions = config.max_position_embeddings
    original = config.original_max_position_embeddings or keys.original_max_position_embeddings or positions
    if kind == "linear":
        factor = _needed(keys, "factor", name)
        return replace(rope, scaling="linear", factor=factor), int(positions * factor)
    if kind == "dynamic":
        factor = _dynamic_factor(keys, name)
        return replace(rope, theta=dynamic_theta(theta, factor, head_dim)), int(positions * factor)
    if kind == "yarn":
        factor = _yarn_factor(keys, name, positions, original)
        return replace(rope, **_yarn(keys, name, factor, original)), int(original * factor)
    if kind == "llama3":
        return replace(rope, **_llama3(keys, name, original)), positions
    return rope, positions


def dynamic_theta(theta: float, factor: float, rotary_dim: int) -> float:
    """Base of dynamic NTK rope for sequences of `factor` times the trained length.

    theta * (factor^2 - factor + 1) ^ (d / (d - 2)), the base of the longest sequence, for all sequences, as in vLLM.
    transformers computes a base for every length, with which cached keys and new queries would disagree.
    """
    return float(theta * (factor**2 - factor + 1.0) ** (rotary_dim / (rotary_dim - 2)))


def _kind(name: str, written: Json) -> str:
    """Value of rope_type or of type. ValueError if it is not supported, and for a rope that differs by layer."""
    if nested := [key for key, value in written.items() if isinstance(value, dict)]:
        raise ValueError(f"{name} differs by layer ({shown(nested)}), which is not supported; use another checkpoint.")
    given = {key: written[key] for key in ("rope_type", "type") if written.get(key) is not None}
    kinds = list(given.values()) or ["default"]
    if kinds[0] != kinds[-1]:
        raise ValueError(f"{name} has rope_type {shown(kinds[0])} and type {shown(kinds[1])}; remove the wrong one.")
    if kinds[0] not in _KINDS:
        raise ValueError(
            f"{name}.{next(iter(given))} is {shown(kinds[0])}, which is not supported (only {', '.join(_KINDS)}); "
            f"remove {name} from the file to run with the positions the model was trained on."
        )
    return str(kinds[0])


def _needed(keys: RopeKeys, field: str, name: str) -> float:
    value = getattr(keys, field)
    if value is None:
        raise ValueError(f"{name}.{field} is missing; this kind of rope requires a number.")
    return float(value)


def _dynamic_factor(keys: RopeKeys, name: str) -> float:
    if keys.alpha is not None:
        raise ValueError(
            f"{name}.alpha is {keys.alpha}: dynamic rope by alpha is not supported, only by factor; use another "
            f"checkpoint."
        )
    return _needed(keys, "factor", name)


def _yarn_factor(keys: RopeKeys, name: str, positions: int, original: int) -> float:
    """Value of `factor`, or the ratio of max_position_embeddings to the original length."""
    if keys.factor is not None:
        return keys.factor
    if original > positions:
        raise ValueError(
            f"{name}.factor is missing and original_max_position_embeddings {original} is more than "
            f"max_position_embeddings {positions}; yarn needs a factor of at least 1."
        )
    return positions / original


def _yarn(keys: RopeKeys, name: str, factor: float, original: int) -> dict[str, Any]:
    beta_fast, beta_slow = keys.beta_fast or 32.0, keys.beta_slow or 1.0
    if beta_fast < beta_slow:
        raise ValueError(
            f"{name}.beta_fast is {beta_fast} and beta_slow {beta_slow}; beta_fast must be the larger one."
        )
    return {
        "scaling": "yarn",
        "factor": factor,
        "original_max_position": original,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "truncate": keys.truncate is not False,
        "attention_factor": keys.attention_factor or _yarn_attention_factor(keys, factor),
    }


def _yarn_attention_factor(keys: RopeKeys, factor: float) -> float:
    """Factor of q and of k: 0.1 ln(factor) + 1 (YaRN, arXiv 2309.00071, section 3.4); the mscale keys are DeepSeek's.

    `attn_factor` multiplies it as in vLLM; transformers ignores that key (in DeepSeek-R1-0528-Qwen3-8B it makes the
    product 1).
    """

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    if keys.mscale and keys.mscale_all_dim:
        inferred = magnitude(keys.mscale) / magnitude(keys.mscale_all_dim)
    else:
        inferred = magnitude(1.0)
    return inferred * (keys.attn_factor or 1.0)


def _llama3(keys: RopeKeys, name: str, original: int) -> dict[str, Any]:
    values = {field: _needed(keys, field, name) for field in ("factor", "low_freq_factor", "high_freq_factor")}
    if values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ValueError(
            f"{name}.high_freq_factor is {values['high_freq_factor']} and low_freq_factor "
            f"{values['low_freq_factor']}; high_freq_factor must be the larger one."
        )
    return {"scaling": "llama3", "original_max_position": original, **values}
