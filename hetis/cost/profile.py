"""What was measured of devices and links, as data that is kept in JSON files.

Times are microseconds (`_us`) for one layer. Heads are query heads. Bytes of KV are those of one layer, over all lanes.
Coefficients say how the prediction is made; `accuracy` how good it was on points left out of the fit (1 is perfect).
"""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import msgspec

Kept = TypeVar("Kept", bound=msgspec.Struct)


class ProfileKey(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """What a device's measurements hold for."""

    device: str  # "NVIDIA A100-SXM4-80GB", "AMD EPYC 9555, 16 threads"
    driver: str  # driver and library versions that matter
    dtype: str
    head_dim: int
    queries_per_group: int  # M
    backend: str  # of attention: "triton", "cpu", "reference"

    @property
    def file_name(self) -> str:
        """Readable, and different for every key."""
        digest = sha256(msgspec.json.encode(self)).hexdigest()[:12]
        words = "".join(c if c.isalnum() else "-" for c in f"{self.device}-{self.dtype}-{self.backend}".lower())
        return f"{words}-{digest}.json"


class AttentionProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Decode attention: max(floor_us, a_us_per_head * heads + b_us_per_byte * kv_bytes + c_us); 0 without heads.

    The straight line is equation (3) of the paper. The floor is the one term more: as long as lanes are too few or too
    short to keep a GPU busy they run side by side, below full bandwidth, and the call takes as long as one of them. A
    fit leaves it at 0 where it is not needed, as on CPUs.
    """

    a_us_per_head: float
    b_us_per_byte: float
    c_us: float
    floor_us: float = 0.0
    accuracy: float = 0.0

    def time_us(self, heads: float, kv_bytes: float) -> float:
        line_us = self.a_us_per_head * heads + self.b_us_per_byte * kv_bytes + self.c_us
        return max(self.floor_us, line_us) if heads else 0.0


class DenseProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Everything in a layer but attention: fixed_us + max(time to read the weights, time to compute the tokens)."""

    fixed_us: float
    us_per_weight_byte: float
    us_per_flop: float
    accuracy: float = 0.0

    def time_us(self, weight_bytes: float, flops: float) -> float:
        """`flops`: of all tokens together, 2 per weight and token."""
        return self.fixed_us + max(self.us_per_weight_byte * weight_bytes, self.us_per_flop * flops)


class PrefillProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Attention of prompt chunks: fixed_us + us_per_pair * pairs, a pair being one query head that sees one token."""

    fixed_us: float
    us_per_pair: float
    accuracy: float = 0.0

    def time_us(self, pairs: float) -> float:
        return self.fixed_us + self.us_per_pair * pairs if pairs else 0.0


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One device. An attention worker has neither `dense` nor `prefill`."""

    key: ProfileKey
    attention: AttentionProfile
    read_bytes_per_us: float  # sustained
    usable_bytes: int
    dense: DenseProfile | None = None
    prefill: PrefillProfile | None = None


class TransferProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a link: alpha_us + beta_us_per_byte * bytes, equation (4) of the paper."""

    alpha_us: float
    beta_us_per_byte: float
    accuracy: float = 0.0

    def time_us(self, num_bytes: float) -> float:
        return self.alpha_us + self.beta_us_per_byte * num_bytes


class LinkProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Both directions between a primary and an attention worker."""

    primary: int  # rank
    worker: int
    request: TransferProfile  # primary to worker
    reply: TransferProfile


class FleetProfile(msgspec.Struct, frozen=True, kw_only=True):
    """All that the cost model starts from: what `--profile FILE` reads and writes."""

    devices: Mapping[int, DeviceProfile]  # by rank
    links: tuple[LinkProfile, ...] = ()


def save(profile: msgspec.Struct, path: Path) -> None:
    """Writes a profile as JSON, in one piece: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
    draft.replace(path)


def load(path: Path, kind: type[Kept]) -> Kept:
    """The profile in a JSON file. Raises ValueError, naming the file, when it cannot be read or is not a `kind`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ValueError(
            f"profile {path} cannot be read ({error.strerror}); run `hetis profile` to make one."
        ) from error
    except msgspec.MsgspecError as error:
        raise ValueError(f"profile {path} is not a {kind.__name__}: {error}; run `hetis profile` anew.") from error


def cached(folder: Path, key: ProfileKey) -> DeviceProfile | None:
    """What was measured before for `key`; None if nothing was, or the file is damaged or for something else."""
    try:
        found = load(folder / key.file_name, DeviceProfile)
    except ValueError:
        return None
    return found if found.key == key else None


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where profiles are kept: below XDG_CACHE_HOME, or ~/.cache without it."""
    base = environment.get("XDG_CACHE_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".cache")
    return Path(base) / "hetis" / "profiles"
