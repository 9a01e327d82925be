"""Coefficients of profiles from measurements: least squares of the relative error, without negative coefficients.

Relative, because decisions compare ratios and the points span four orders of magnitude; not negative, because more work
never takes less time, and an extrapolation must not say so. Accuracy is cross-validated: every point is left out of the
fit once, in one of a few folds.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from hetis.core.measurements import AttentionSample, DenseSample, PrefillSample, TransferSample
from hetis.core.profile import AttentionProfile, DenseProfile, PrefillProfile, TransferProfile

Floats = NDArray[np.float64]
Sample = TypeVar("Sample", bound=tuple[float, ...])  # the last field is the measured time
Fitted = TypeVar("Fitted", bound=msgspec.Struct)

FOLDS = 4
CLEAR_GAIN = 0.8  # one term more must reduce the squared error to this fraction, or it is taken for noise


class _LayerSample(NamedTuple):
    weight_bytes: int
    flops: float
    time_us: float


def fit_attention(samples: Sequence[AttentionSample]) -> AttentionProfile:
    """The line, and a floor where there clearly is one. The samples must vary heads and bytes independently."""
    return _fitted(samples, _fit_attention, lambda fitted, p: fitted.time_us(p.heads, p.kv_bytes))


def fit_transfer(samples: Sequence[TransferSample]) -> TransferProfile:
    """alpha and beta of one direction of a link, and a steeper slope for large messages where there clearly is one."""
    return _fitted(samples, _fit_transfer, lambda fitted, p: fitted.time_us(p.num_bytes))


def fit_prefill(samples: Sequence[PrefillSample]) -> PrefillProfile:
    return _fitted(samples, _fit_prefill, lambda fitted, p: fitted.time_us(p.pairs))


def fit_dense(samples: Sequence[DenseSample], num_weights: int, weight_bytes: int) -> DenseProfile:
    """Two pieces: few tokens are bound by reading the weights, many by computing. All borders between are tried.

    `num_weights`: values in this rank's share of the layer, which take `weight_bytes`.
    """
    layers = [_LayerSample(weight_bytes, 2.0 * num_weights * p.num_tokens, p.time_us) for p in samples]
    return _fitted(layers, _fit_dense, lambda fitted, p: fitted.time_us(p.weight_bytes, p.flops))


def accuracy(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """1 - mean of |predicted - measured| / measured."""
    errors = [abs(p - m) / m for p, m in zip(predicted, measured, strict=True)]
    return 1 - sum(errors) / len(errors)


def _fitted(
    samples: Sequence[Sample],
    fit: Callable[[Sequence[Sample]], Fitted],
    predict: Callable[[Fitted, Sample], float],
) -> Fitted:
    """The fit to all samples, with the cross-validated accuracy.

    Raises ValueError if there are too few samples to leave some out.
    """
    if len(samples) < 2 * FOLDS:
        raise ValueError(f"{len(samples)} measurements are too few for a fit; measure at least {2 * FOLDS} points.")
    fold_of = np.random.default_rng(0).permutation(len(samples)) % FOLDS
    predicted, measured = [], []
    for fold in range(FOLDS):
        fitted = fit([sample for sample, its in zip(samples, fold_of, strict=True) if its != fold])
        left_out = [sample for sample, its in zip(samples, fold_of, strict=True) if its == fold]
        predicted += [predict(fitted, sample) for sample in left_out]
        measured += [sample[-1] for sample in left_out]
    return msgspec.structs.replace(fit(samples), accuracy=accuracy(predicted, measured))


def _fit_transfer(samples: Sequence[TransferSample]) -> TransferProfile:
    """A line, or one whose slope grows from some size to twice that size, if that is clearly better."""
    times, sizes = _times(samples), np.array([float(p.num_bytes) for p in samples])
    line = np.stack([np.ones_like(sizes), sizes], axis=1)
    alpha, beta = non_negative(line, times)
    best = TransferProfile(alpha_us=alpha, beta_us_per_byte=beta)
    best_error = _squared_error(line @ [alpha, beta], times) * CLEAR_GAIN
    for border in np.unique(sizes)[1:-1]:
        two = np.column_stack([line, sizes * np.clip(sizes / border - 1, 0.0, 1.0)])
        alpha, beta, more = non_negative(two, times)
        if (error := _squared_error(two @ [alpha, beta, more], times)) < best_error:
            best_error = error
            best = TransferProfile(
                alpha_us=alpha, beta_us_per_byte=beta, large_bytes=float(border), more_us_per_byte=more
            )
    return best


def _fit_prefill(samples: Sequence[PrefillSample]) -> PrefillProfile:
    fixed, slope = non_negative(np.array([[1.0, p.pairs] for p in samples]), _times(samples))
    return PrefillProfile(fixed_us=fixed, us_per_pair=slope)


def _fit_dense(samples: Sequence[_LayerSample]) -> DenseProfile:
    times = _times(samples)
    intensity = [p.flops / p.weight_bytes for p in samples]
    best, best_error = DenseProfile(fixed_us=0.0, us_per_weight_byte=0.0, us_per_flop=0.0), float("inf")
    for border in sorted(set(intensity)):
        features = [
            [1.0, p.weight_bytes, 0.0] if at <= border else [1.0, 0.0, p.flops]
            for p, at in zip(samples, intensity, strict=True)
        ]
        fixed, weight, flop = non_negative(np.array(features), times)
        fitted = DenseProfile(fixed_us=fixed, us_per_weight_byte=weight, us_per_flop=flop)
        error = _squared_error(np.array([fitted.time_us(p.weight_bytes, p.flops) for p in samples]), times)
        if error < best_error:
            best, best_error = fitted, error
    return best


def _fit_attention(samples: Sequence[AttentionSample]) -> AttentionProfile:
    """Points up to some time count as the floor, the others as the line; all borders between are tried."""
    features, times = np.array([[p.heads, p.kv_bytes, 1.0] for p in samples]), _times(samples)
    line, floor = non_negative(features, times), 0.0
    best_error = _squared_error(features @ line, times) * CLEAR_GAIN
    for highest in np.unique(times)[: -features.shape[1]]:
        low = times <= highest
        level = float((1 / times[low]).sum() / (1 / times[low] ** 2).sum())
        above = non_negative(features[~low], times[~low])
        error = _squared_error(np.maximum(level, features @ above), times)
        if error < best_error:
            line, floor, best_error = above, level, error
    per_head, per_byte, constant = line
    return AttentionProfile(us_per_head=per_head, us_per_byte=per_byte, constant_us=constant, floor_us=floor)


def non_negative(features_NK: Floats, times_N: Floats) -> list[float]:
    """[K] coefficients >= 0 that minimise the sum over N of ((prediction - time) / time)^2.

    Every subset of the few features is solved without bounds; the best solution without a negative coefficient is the
    optimum, since at the optimum the positive coefficients solve their own subset.
    """
    relative_NK = features_NK / times_N[:, None]
    scale_K = relative_NK.max(axis=0)
    scale_K[scale_K == 0] = 1.0
    relative_NK = relative_NK / scale_K
    num_features = features_NK.shape[1]
    best_K, best_error = np.zeros(num_features), float("inf")
    for count in range(1, num_features + 1):
        for chosen in combinations(range(num_features), count):
            columns = list(chosen)
            solution = np.linalg.lstsq(relative_NK[:, columns], np.ones(len(times_N)), rcond=None)[0]
            error = float(((relative_NK[:, columns] @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < best_error:
                best_K, best_error = np.zeros(num_features), error
                best_K[columns] = solution
    return [float(value) for value in best_K / scale_K]


def _times(samples: Sequence[Sample]) -> Floats:
    return np.array([sample[-1] for sample in samples])


def _squared_error(predicted_N: Floats, times_N: Floats) -> float:
    return float((((predicted_N - times_N) / times_N) ** 2).sum())
