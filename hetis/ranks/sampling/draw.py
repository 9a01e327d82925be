"""Draws tokens: temperature, min_p, top_k, top_p, then the inverse of the cumulative distribution.

Probabilities are integers: the weight of a token is floor(2^40 * exp((logit - best logit) / temperature)). Integer sums
do not depend on the order of summation, so a row's token depends on that row alone, however the work is divided: over
threads, over blocks of the vocabulary, or without the tokens that a filter drops. Tokens below 2^-40 of the best have
weight 0 and are never drawn.

Filters keep all tokens at or above a logit, the floor. Tokens that tie with the last one kept are kept too.

Letters as in `vocabulary`; I: chosen rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hetis.ranks.sampling.vocabulary import Blocks, Vocabulary, sorted_descending
from hetis_kernels.logit_peaks import BLOCK
from hetis_kernels.weight_mass import weight_mass

WEIGHT_BITS = 40  # 2^23 tokens can be summed in int64
# A weight has 8 bytes: on a CPU small parts stay in cache and in reused memory; a GPU is faster with large parts.
WEIGHTS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}
TOP_K_SPARE_BLOCKS = 32  # beyond k, for tokens that tie with the k-th
TOP_P_BLOCKS = 64  # searched for top_p at first
MORE_BLOCKS = 8  # times as many are searched for rows that keep tokens outside of these
LOG_WEIGHT_ZERO = -28.0  # e^-28 < 2^-40: a token so far below the best one has weight 0
LOG_MARGIN = 1e-3  # more than the error of an exponential in float32
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class DrawParams:
    """Parameters of draws, per row, on the device of the logits."""

    uniform_R: Tensor  # float64 in [0, 1)
    scale_R: Tensor  # float32: 1 / temperature
    min_p_R: Tensor | None  # float32; None: no row uses it
    top_p_R: Tensor  # float64
    top_k_R: Tensor  # int64, at most V; 0: off
    largest_top_k: int

    @classmethod
    def of(
        cls,
        uniform_R: np.ndarray,
        temperature_R: np.ndarray,
        min_p_R: np.ndarray,
        top_p_R: np.ndarray,
        top_k_R: np.ndarray,
        device: torch.device,
    ) -> "DrawParams":
        """Parameters from host arrays, in one copy to the device."""
        packed_5R = torch.from_numpy(np.stack([uniform_R, 1 / temperature_R, min_p_R, top_p_R, top_k_R])).to(device)
        uniform, scale, min_p, top_p, top_k = packed_5R.unbind()
        some_min_p = min_p.float() if min_p_R.any() else None
        return cls(uniform, scale.float(), some_min_p, top_p, top_k.long(), int(top_k_R.max()))

    def rows(self, row_I: Tensor) -> "DrawParams":
        min_p_I = None if self.min_p_R is None else self.min_p_R[row_I]
        uniform_I, scale_I = self.uniform_R[row_I], self.scale_R[row_I]
        return DrawParams(uniform_I, scale_I, min_p_I, self.top_p_R[row_I], self.top_k_R[row_I], self.largest_top_k)


def uniforms(seed_R: np.ndarray, index_R: np.ndarray) -> np.ndarray:
    """Uniform number in [0, 1), float64, of the `index`-th output token of a request with this seed.

    A function of these two only: two rounds of the finaliser of splitmix64 (Steele, Lea, Flood 2014).
    """
    bits_R = _mixed(_mixed(seed_R.astype(np.int64).view(np.uint64)) + index_R.astype(np.uint64) * _GOLDEN)
    return (bits_R >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(bits_R: np.ndarray) -> np.ndarray:
    bits_R = bits_R + _GOLDEN
    bits_R = (bits_R ^ (bits_R >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits_R = (bits_R ^ (bits_R >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = bits_R ^ (bits_R >> np.uint64(31))
    return mixed


def draw(vocabulary: Vocabulary, params: DrawParams, top_k_I: np.ndarray, top_p_I: np.ndarray) -> Tensor:
    """Draws tokens [R], int64. `top_k_I`: rows with top_k; `top_p_I`: rows with top_p and without top_k.

    The best logit of a row must be finite; otherwise its token is undefined and may be beyond the vocabulary.
    """
    num_rows = len(params.uniform_R)
    token_R = torch.empty(num_rows, dtype=torch.int64, device=params.uniform_R.device)
    plain_I = np.delete(np.arange(num_rows), np.concatenate([top_k_I, top_p_I]))
    few = min((params.largest_top_k + TOP_K_SPARE_BLOCKS) * BLOCK, vocabulary.size)  # tokens weighed for top_k
    everything = vocabulary.size
    for row_I, method, width in (
        (plain_I, _draw_plain, everything),
        (top_k_I, _draw_top_k, few),
        (top_p_I, _draw_top_p, everything),
    ):
        at_once = max(1, WEIGHTS_AT_ONCE[token_R.device.type] // width)
        if len(row_I) == num_rows <= at_once:
            return method(vocabulary, params)
        for start in range(0, len(row_I), at_once):
            part_I = torch.from_numpy(row_I[start : start + at_once]).to(token_R.device)
            token_R[part_I] = method(vocabulary.rows(part_I), params.rows(part_I))
    return token_R


def _drawable_blocks(vocabulary: Vocabulary, params: DrawParams) -> Blocks:
    """Blocks outside of which every token has weight 0, by its distance from the best one or by min_p."""
    distance_RN = (vocabulary.peak_RN - vocabulary.best().unsqueeze(-1)) * params.scale_R.unsqueeze(-1)
    if params.min_p_R is None:
        can_RN = distance_RN >= LOG_WEIGHT_ZERO
    else:
        can_RN = distance_RN >= (params.min_p_R.log() - LOG_MARGIN).clamp(min=LOG_WEIGHT_ZERO).unsqueeze(-1)
    most = max(1, int(can_RN.sum(-1).amax()))  # none where the best logit is not finite
    # to gather most of the vocabulary costs more than to weigh all of it
    return vocabulary.best_blocks(most) if 2 * most < can_RN.shape[1] else vocabulary.all_blocks()


def _draw_plain(vocabulary: Vocabulary, params: DrawParams) -> Tensor:
    blocks = _drawable_blocks(vocabulary, params)
    return _pick(_weights(blocks.logits_RKB, vocabulary.best(), params), blocks.first_RK, params.uniform_R)


def _draw_top_k(vocabulary: Vocabulary, params: DrawParams) -> Tensor:
    return _draw_filtered(vocabulary, params, params.largest_top_k + TOP_K_SPARE_BLOCKS, total_R=None)


def _draw_top_p(vocabulary: Vocabulary, params: DrawParams) -> Tensor:
    blocks = _drawable_blocks(vocabulary, params)
    total_R = weight_mass(_weights(blocks.logits_RKB, vocabulary.best(), params)).sum(-1)
    return _draw_filtered(vocabulary, params, min(TOP_P_BLOCKS, blocks.first_RK.shape[1]), total_R)


def _draw_filtered(vocabulary: Vocabulary, params: DrawParams, num_blocks: int, total_R: Tensor | None) -> Tensor:
    """Draws from the best blocks, and again from more of them for rows that keep tokens outside of these.

    `total_R`: weight of the vocabulary; None: all rows have a top_k, and top_p is a share of what that keeps.
    """
    blocks, best_R = vocabulary.best_blocks(num_blocks), vocabulary.best()
    floor_R, lowest_R = _floors(blocks, best_R, params, total_R)
    weight_RKB = _weights(blocks.logits_RKB, best_R, params, floor_R)
    token_R = _pick(weight_RKB, blocks.first_RK, params.uniform_R)
    missed_I = (~(lowest_R > blocks.left_R)).nonzero().squeeze(-1)
    if len(missed_I) and num_blocks < vocabulary.peak_RN.shape[1]:
        totals = None if total_R is None else total_R[missed_I]
        more = MORE_BLOCKS * num_blocks
        token_R[missed_I] = _draw_filtered(vocabulary.rows(missed_I), params.rows(missed_I), more, totals)
    return token_R


def _floors(blocks: Blocks, best_R: Tensor, params: DrawParams, total_R: Tensor | None) -> tuple[Tensor, Tensor]:
    """Smallest logit kept, and smallest logit that determines it, both [R].

    top_k: the k-th largest logit. top_p: the largest logit such that the tokens from there up weigh at least top_p of
    the total. If the given blocks do not reach that, the second result is -inf.
    """
    sorted_RN = sorted_descending(blocks.logits_RKB.flatten(1))
    kth_R = sorted_RN.gather(-1, (params.top_k_R - 1).unsqueeze(-1)).squeeze(-1) if total_R is None else None
    sum_RN = _weights(sorted_RN, best_R, params, kth_R).long().cumsum(-1)
    total_R = sum_RN[:, -1] if total_R is None else total_R
    wanted_R = torch.minimum((params.top_p_R * total_R).ceil().long(), total_R)
    last_R1 = torch.searchsorted(sum_RN, wanted_R.unsqueeze(-1))
    floor_R = sorted_RN.gather(-1, last_R1.clamp(max=sum_RN.shape[1] - 1)).squeeze(-1)
    if kth_R is not None:
        return floor_R, kth_R
    return floor_R, torch.where(last_R1.squeeze(-1) < sum_RN.shape[1], floor_R, -torch.inf)


def _weights(logits: Tensor, best_R: Tensor, params: DrawParams, floor_R: Tensor | None = None) -> Tensor:
    """Weights of logits [R, ...], float32, not yet cut to integers; 0 below the floor and below min_p of the best."""
    shape = (-1, *[1] * (logits.dim() - 1))
    share = (logits - best_R.view(shape)).mul_(params.scale_R.view(shape)).exp_()
    if params.min_p_R is not None:
        share *= _at_least(share, params.min_p_R.view(shape))
    if floor_R is not None:
        share *= _at_least(logits, floor_R.view(shape))
    return share.mul_(2.0**WEIGHT_BITS)


def _at_least(value: Tensor, bound: Tensor) -> Tensor:
    """1.0 where value >= bound, else 0.0 (on a CPU several times faster than a mask of bools)."""
    return torch.ge(value, bound, out=torch.empty_like(value))


def _pick(weight_RKB: Tensor, first_RK: Tensor, uniform_R: Tensor) -> Tensor:
    """Token at which the cumulative weight exceeds `uniform` of the total: first its block, then its place there."""
    mass_RK = weight_mass(weight_RKB)
    sum_RK = mass_RK.cumsum(-1)
    total_R1 = sum_RK[:, -1:]
    # the product of a double below 1 and a total of up to 58 bits may round up to the total
    mark_R1 = torch.minimum((uniform_R.unsqueeze(-1) * total_R1).long(), total_R1 - 1)
    block_R1 = torch.searchsorted(sum_RK, mark_R1, right=True).clamp(max=sum_RK.shape[1] - 1)
    mark_R1 = mark_R1 - (sum_RK - mass_RK).gather(-1, block_R1)
    row_R = torch.arange(len(uniform_R), device=uniform_R.device)
    sum_RB = weight_RKB[row_R, block_R1.squeeze(-1)].long().cumsum(-1)
    token_R1 = torch.searchsorted(sum_RB, mark_R1, right=True).clamp(max=sum_RB.shape[1] - 1)
    return (first_RK.gather(-1, block_R1) + token_R1).squeeze(-1)
