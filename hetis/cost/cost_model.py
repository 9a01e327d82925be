"""Time of attention: predicted from profiles, corrected by measurements of the ranks while they serve.

Times are microseconds for one layer. Heads are query heads, bytes of KV those of one layer, as in `profile.py`.
"""

from collections.abc import Iterable, Sequence

from hetis.core.attention_rates import AttentionRates
from hetis.core.model_spec import DTYPE_BYTES, ModelSpec
from hetis.core.profile import LEAST_US, AttentionProfile, DeviceProfile, FleetProfile, LinkProfile

PRIOR_SPREAD = 1.0  # standard deviation of a factor: how wrong a profile may be
PRIOR_CORRELATION = 0.98  # between the factors of a device, which is throttled as a whole
NOISE = 0.2  # standard deviation of one measurement, relative
FORGETTING = 5e-3  # share of the way back to the prior covariance, per measurement
LARGEST_STEP = 1.0  # to which the error of a measurement is clipped, relative to the prediction
SMALLEST_FACTOR, LARGEST_FACTOR = 1 / 16, 64.0
RELAXING = 0.01  # share of the way back to the profile, per step without work
DENSE_WEIGHT = 0.1  # of one measurement of non-attention time in its moving average


class Follower:
    """Factors on the terms of a prediction, estimated from measurements: recursive least squares with forgetting.

    measured = sum_k factor_k * term_k + noise. All factors start at 1 with a joint prior, so that any one mix of work
    shows that a device has slowed down as a whole. Forgetting pulls the covariance towards that prior, which bounds it:
    factors of terms that are not excited for long do not drift. Errors are clipped and factors stay in bounds.
    """

    def __init__(self, num_terms: int) -> None:
        self._prior = [
            [PRIOR_SPREAD**2 * (1.0 if i == k else PRIOR_CORRELATION) for k in range(num_terms)]
            for i in range(num_terms)
        ]
        self._covariance = [list(line) for line in self._prior]
        self.factors = [1.0] * num_terms

    def observe(self, terms: Sequence[float], measured: float) -> None:
        """`terms`: the contribution of each according to the profile, not all 0. `measured`: their sum, measured."""
        predicted = _dot(self.factors, terms)
        shares = [term / predicted for term in terms]
        error = min(max(measured / predicted - 1, -LARGEST_STEP), LARGEST_STEP)
        for line, prior in zip(self._covariance, self._prior, strict=True):
            line[:] = [value + FORGETTING * (limit - value) for value, limit in zip(line, prior, strict=True)]
        spread = [_dot(line, shares) for line in self._covariance]
        total = NOISE**2 + _dot(shares, spread)
        for k, line in enumerate(self._covariance):
            line[:] = [value - spread[k] * other / total for value, other in zip(line, spread, strict=True)]
            moved = self.factors[k] + spread[k] / total * error
            self.factors[k] = min(max(moved, SMALLEST_FACTOR), LARGEST_FACTOR)

    def relax(self) -> None:
        """A step without work moves the factors a little towards 1, so that the device is used again at some time."""
        self.factors = [factor + RELAXING * (1 - factor) for factor in self.factors]


class CostModel:
    """Predictions for the ranks of a fleet that serves one model. Ranks may join and leave."""

    def __init__(self, profile: FleetProfile, spec: ModelSpec, dtype: str) -> None:
        """`dtype`: of activations and KV, as resolved by `core.model_spec.resolve_dtype`."""
        width = spec.head_dim * DTYPE_BYTES[dtype]
        self.queries_per_group = spec.queries_per_group
        self.kv_bytes_per_token = spec.kv_bytes_per_token(1, dtype)  # of one lane in one layer
        self._windows = [window for window in spec.windows if window]
        self._num_layers = spec.num_layers
        # per query head: its q, and its share of the group's k and v; its output
        self.request_bytes_per_head = width * (spec.queries_per_group + 2) / spec.queries_per_group
        self.reply_bytes_per_head = width
        self._devices: dict[int, AttentionProfile] = {}
        self._links: dict[int, list[LinkProfile]] = {}  # by worker
        self._attention: dict[int, Follower] = {}
        self._link: dict[int, Follower] = {}
        self._dense_us: dict[int, tuple[float, float]] = {}  # layers, and the rest of a step
        for rank, device in profile.devices.items():
            self.add(rank, device, [link for link in profile.links if link.worker == rank])

    # --- ranks --------------------------------------------------------------------------------------------------------

    def add(self, rank: int, device: DeviceProfile, links: Sequence[LinkProfile] = ()) -> None:
        """Adds a rank, or its new profile. `links`: of a worker, to its primaries."""
        self._devices[rank], self._attention[rank] = device.attention, Follower(3)
        self._links[rank], self._link[rank] = list(links), Follower(2)

    def remove(self, rank: int) -> None:
        for known in (self._devices, self._attention, self._links, self._link, self._dense_us):
            known.pop(rank, None)

    @property
    def ranks(self) -> list[int]:
        return sorted(self._devices)

    def kv_bytes(self, num_tokens: float) -> float:
        """KV bytes of one lane that attention reads in a layer, on average: no more tokens than the window of each."""
        seen = sum(min(num_tokens, window) for window in self._windows)
        seen += num_tokens * (self._num_layers - len(self._windows))
        return self.kv_bytes_per_token * seen / self._num_layers

    # --- predictions --------------------------------------------------------------------------------------------------

    def attention_us(self, rank: int, heads: float, kv_bytes: float) -> float:
        """Decode attention without the link, as the rank measures it. 0 without heads."""
        return self.rates(rank, is_worker=False).time_us(heads, kv_bytes)

    def link_us(self, worker: int, heads: float) -> float:
        """Request and reply between a worker and its primaries, as if all heads went over the slowest of its links."""
        if not heads:
            return 0.0
        return sum(
            f * term for f, term in zip(self._link[worker].factors, self._link_terms(worker, heads), strict=True)
        )

    def rates(self, rank: int, *, is_worker: bool) -> AttentionRates:
        """Attention, and for a worker its link. ValueError for a rank without a profile."""
        rates = self._profile(rank).scaled(self._attention[rank].factors)
        if not is_worker:
            return rates
        alpha_us, beta_us = (f * t for f, t in zip(self._link[rank].factors, self._link_terms(rank, 1), strict=True))
        return rates.over_link(beta_us, alpha_us)

    def prompt_us_per_byte(self, worker: int) -> float:
        """Time to send one byte of a prompt's KV to a worker; such messages are large."""
        ways = [link.request for link in self._links[worker]]
        beta = max((way.beta_us_per_byte + way.more_us_per_byte for way in ways), default=0.0)
        return beta * self._link[worker].factors[1]

    def dense_us(self, ranks: Iterable[int]) -> float:
        """Non-attention time of a decode step per layer, for primaries that share the layer; 0 if unknown.

        In sums over ranks all wait for the one whose attention takes longest: the least time is that of the work.
        """
        known = [self._dense_us[rank] for rank in ranks if rank in self._dense_us]
        if not known:
            return 0.0
        return min(layer_us for layer_us, _ in known) + max(other_us for _, other_us in known)

    def factors(self, rank: int) -> list[float]:
        """Current factors on the profile's terms (per head, per byte, constant), to be shown."""
        return list(self._attention[rank].factors)

    # --- measurements -------------------------------------------------------------------------------------------------

    def observe(self, rank: int, heads: int, kv_bytes: float, measured_us: float) -> None:
        """Decode attention of a layer, measured by a rank, on average over a step. Ignored without heads."""
        if not heads or rank not in self._devices:
            return
        terms = self._devices[rank].terms_us(heads, kv_bytes)  # of the profile: the estimate must not choose its input
        if sum(terms) > LEAST_US:
            self._attention[rank].observe(terms, measured_us)

    def observe_link(self, worker: int, heads: int, measured_us: float) -> None:
        """Round trip of a layer's message, less the worker's attention."""
        terms = self._link_terms(worker, heads) if worker in self._devices else []
        if heads and sum(terms) > LEAST_US:
            self._link[worker].observe(terms, measured_us)

    def observe_dense(self, rank: int, layer_us: float, other_us: float = 0.0) -> None:
        """Non-attention time of a step without prompts on a primary, per layer; the first value is from its profile.

        `other_us`: LM head, sampling and the rest, which all sequences of a step share as well.
        """
        known_us = self._dense_us.get(rank, (layer_us, other_us))
        moved_us = [old + DENSE_WEIGHT * (new - old) for old, new in zip(known_us, (layer_us, other_us), strict=True)]
        self._dense_us[rank] = moved_us[0], moved_us[1]

    def relax(self, idle: Iterable[int]) -> None:
        """Called once per step with the ranks that had no heads in it."""
        for rank in idle:
            if rank in self._devices:
                self._attention[rank].relax()
                self._link[rank].relax()

    def _profile(self, rank: int) -> AttentionProfile:
        if rank not in self._devices:
            raise ValueError(
                f"rank {rank} has no profile; the profile has ranks {self.ranks}: run `hetis profile` again."
            )
        return self._devices[rank]

    def _link_terms(self, worker: int, heads: float) -> list[float]:
        """(latency, transfer) of both ways, each of the slowest link."""
        links = self._links[worker]
        return [
            max((link.request.alpha_us + link.reply.alpha_us for link in links), default=0.0),
            heads * max((self._transfer_us(link) for link in links), default=0.0),
        ]

    def _transfer_us(self, link: LinkProfile) -> float:
        """Time of one head in request and reply, without the latency."""
        request_us = link.request.beta_us_per_byte * self.request_bytes_per_head
        return request_us + link.reply.beta_us_per_byte * self.reply_bytes_per_head


def _dot(factors: Sequence[float], terms: Sequence[float]) -> float:
    return sum(factor * term for factor, term in zip(factors, terms, strict=True))
