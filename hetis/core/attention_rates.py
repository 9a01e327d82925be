"""How long decode attention takes for how much work: the one formula of profiles, cost model and dispatcher."""

from collections.abc import Sequence

import msgspec


class AttentionRates(msgspec.Struct, frozen=True, kw_only=True):
    """max(floor_us, constant_us + us_per_head * heads + us_per_byte * kv_bytes): microseconds for one layer.

    Heads are query heads, bytes those of KV in one layer, over all lanes. The straight line is equation (3) of the
    paper. The floor is the one term more: as long as lanes are too few or too short to keep a GPU busy they run side by
    side, below full bandwidth, and the call takes as long as one of them; on CPUs it is 0.
    """

    us_per_head: float
    us_per_byte: float
    constant_us: float
    floor_us: float = 0.0

    def time_us(self, heads: float, kv_bytes: float) -> float:
        """Without heads nothing is launched: 0."""
        return max(self.floor_us, self.line_us(heads, kv_bytes)) if heads else 0.0

    def line_us(self, heads: float, kv_bytes: float) -> float:
        """Time above the floor, to which more work adds in proportion. The constant counts without heads, too."""
        return self.constant_us + (self.us_per_head * heads + self.us_per_byte * kv_bytes)

    def terms_us(self, heads: float, kv_bytes: float) -> list[float]:
        """What heads, bytes and the constant contribute to `time_us`; where the floor decides, it is the constant's."""
        terms = [self.us_per_head * heads, self.us_per_byte * kv_bytes, self.constant_us]
        return terms if sum(terms) >= self.floor_us else [0.0, 0.0, self.floor_us]

    def scaled(self, factors: Sequence[float]) -> "AttentionRates":
        """Rates times a factor each for heads, bytes and the constant; the floor takes the last."""
        per_head, per_byte, constant = factors
        return AttentionRates(
            us_per_head=self.us_per_head * per_head,
            us_per_byte=self.us_per_byte * per_byte,
            constant_us=self.constant_us * constant,
            floor_us=self.floor_us * constant,
        )

    def over_link(self, us_per_head: float, constant_us: float) -> "AttentionRates":
        """Rates of the device behind a link that takes so long for each head, and for a message without any."""
        return AttentionRates(
            us_per_head=self.us_per_head + us_per_head,
            us_per_byte=self.us_per_byte,
            constant_us=self.constant_us + constant_us,
            floor_us=self.floor_us + constant_us,
        )
