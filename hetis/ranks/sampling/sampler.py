"""Chooses the next token of every row, on the device that has the logits.

Order, as in vLLM: log-probabilities of the raw logits; biases, bans, penalties; temperature, min_p, top_k, top_p; draw.

Letters: R rows that get a token, V vocabulary, T tokens of a step.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hetis.core.outputs import MODEL_FAILED
from hetis.core.sampling_params import SamplingParams
from hetis.core.token_logprobs import TokenLogprobs
from hetis.ranks.sampling.draw import DrawParams, draw, uniforms
from hetis.ranks.sampling.logit_edits import LogitEdits
from hetis.ranks.sampling.scoring import prompt_logprobs, token_logprobs
from hetis.ranks.sampling.vocabulary import Vocabulary

_log = logging.getLogger(__name__)

_NONE = -2  # no log-probabilities requested
_SLOT = np.dtype(
    [
        ("temperature", np.float64),  # 0: greedy
        ("min_p", np.float64),
        ("top_p", np.float64),
        ("top_k", np.int64),  # 0: off
        ("seed", np.int64),
        ("prompt_len", np.int64),
        ("logprobs", np.int64),  # -1: whole vocabulary; _NONE
        ("prompt_logprobs", np.int64),
    ]
)


_NOT_FINITE, _NOTHING_LEFT, _OVERFLOW = -1, -2, -3  # in place of a token
_REASONS = {
    _NOT_FINITE: MODEL_FAILED,
    _NOTHING_LEFT: "no token is allowed: end-of-sequence and stop tokens are banned before min_tokens, and no other is "
    "left; lower min_tokens or remove stop tokens.",
    _OVERFLOW: "penalties or biases make logits that are not finite; use values closer to their defaults.",
}


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row; rows with an error have token 0."""

    token_R: np.ndarray  # int64
    errors: dict[int, str]  # row -> reason why it has no token, for the user
    logprobs: list[TokenLogprobs | None]  # empty if no row requested any


class Sampler:
    """Sampling parameters and history of the sequences in the slots 0 .. max_num_seqs - 1.

    A row's token depends on its logits, its history, its seed and the number of its output tokens, not on other rows.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        *,
        eos_token_ids: list[int],
        logprobs_mode: str = "raw_logprobs",
        device: torch.device | str = "cpu",
    ) -> None:
        self._vocab_size, self._logprobs_mode, self._device = vocab_size, logprobs_mode, torch.device(device)
        self._slots = np.zeros(max_num_seqs, dtype=_SLOT)
        self._edits = LogitEdits(max_num_seqs, vocab_size, eos_token_ids, self._device)

    def add(self, slot: int, params: SamplingParams, prompt_len: int, seed: int) -> None:
        """Assigns a slot to a sequence, new or recomputed. Its first `prompt_len` tokens are its prompt. `seed`: 64
        bits, signed."""
        # top_k = 1 leaves the best token; of tokens that tie, the first one is chosen, as for temperature 0
        greedy = params.is_greedy or params.top_k == 1
        self._slots[slot] = (
            0.0 if greedy else params.temperature,
            params.min_p,
            params.top_p,
            0 if params.top_k >= self._vocab_size else params.top_k,
            seed,
            prompt_len,
            _NONE if params.logprobs is None else params.logprobs,
            _NONE if params.prompt_logprobs is None else params.prompt_logprobs,
        )
        self._edits.remove(slot)
        self._edits.add(slot, params, prompt_len)

    def remove(self, slot: int) -> None:
        self._edits.remove(slot)

    def observe(self, slot_T: np.ndarray, token_T: np.ndarray, position_T: np.ndarray) -> None:
        """Records the tokens that the model computes in this step. Every token of a sequence must be recorded once,
        before `sample` draws a later one. Positions below prompt_len are prompt, others output."""
        self._edits.observe(slot_T, token_T, position_T)

    def sample(self, logits_RV: Tensor, slot_R: np.ndarray, position_R: np.ndarray) -> Sampled:
        """Tokens at `position_R` of the sequences in `slot_R`. `logits_RV`: any float dtype; not changed.

        Parameters of one row never cost another row its token: if all rows together raise, each is sampled alone.
        """
        assert logits_RV.shape[1] == self._vocab_size, f"{logits_RV.shape[1]} logits for {self._vocab_size} tokens"
        try:
            return self._sample(logits_RV, slot_R, position_R)
        except Exception as error:
            if len(slot_R) == 1:
                reason = f"sampling failed ({type(error).__name__}: {error})."
                return Sampled(np.zeros(1, dtype=np.int64), {0: reason}, [None])
            _log.warning("%d rows cannot be sampled together; each is sampled alone.", len(slot_R), exc_info=True)
        rows = [slice(row, row + 1) for row in range(len(slot_R))]
        return _joined([self.sample(logits_RV[row], slot_R[row], position_R[row]) for row in rows])

    def _sample(self, logits_RV: Tensor, slot_R: np.ndarray, position_R: np.ndarray) -> Sampled:
        slots, raw = self._slots[slot_R], Vocabulary.of(logits_RV.contiguous())
        edited_RV = self._edits.apply(logits_RV, slot_R, position_R)
        vocabulary = raw if edited_RV is None else Vocabulary.of(edited_RV)
        token_R, best_R = self._choose(vocabulary, slots, position_R), vocabulary.best()
        token_R = torch.where(torch.isfinite(best_R), token_R, torch.where(best_R < 0, _NOTHING_LEFT, _OVERFLOW))
        token_R = torch.where(raw.is_finite_R, token_R, _NOT_FINITE)
        logprobs = self._score(logits_RV, token_R.clamp(min=0), slots["logprobs"])
        found_R = token_R.cpu().numpy()
        errors = {int(row): _REASONS[int(found_R[row])] for row in np.flatnonzero(found_R < 0)}
        return Sampled(np.maximum(found_R, 0), errors, logprobs)

    def _choose(self, vocabulary: Vocabulary, slots: np.ndarray, position_R: np.ndarray) -> Tensor:
        random_I = np.flatnonzero(slots["temperature"] > 0)
        if len(random_I) == 0:
            return vocabulary.argmax()
        if len(random_I) == len(slots):
            return self._draw(vocabulary, slots, position_R)
        token_R = vocabulary.argmax()
        row_I = torch.from_numpy(random_I).to(self._device)
        token_R[row_I] = self._draw(vocabulary.rows(row_I), slots[random_I], position_R[random_I])
        return token_R

    def _draw(self, vocabulary: Vocabulary, slots: np.ndarray, position_R: np.ndarray) -> Tensor:
        uniform_R = uniforms(slots["seed"], position_R - slots["prompt_len"])
        params = DrawParams.of(
            uniform_R, slots["temperature"], slots["min_p"], slots["top_p"], slots["top_k"], self._device
        )
        has_top_k_R = slots["top_k"] > 0
        return draw(
            vocabulary, params, np.flatnonzero(has_top_k_R), np.flatnonzero(~has_top_k_R & (slots["top_p"] < 1))
        )

    def _score(self, logits_RV: Tensor, token_R: Tensor, wanted_R: np.ndarray) -> list[TokenLogprobs | None]:
        row_I = np.flatnonzero(wanted_R != _NONE)
        if len(row_I) == 0:
            return []
        if len(row_I) < len(wanted_R):
            index = torch.from_numpy(row_I).to(self._device)
            logits_RV, token_R = logits_RV[index], token_R[index]
        scored = token_logprobs(logits_RV, token_R, wanted_R[row_I].tolist(), self._logprobs_mode)
        found: list[TokenLogprobs | None] = [None] * len(wanted_R)
        for row, logprobs in zip(row_I, scored, strict=True):
            found[row] = logprobs
        return found

    def score_prompt(self, logits_NV: Tensor, token_N: np.ndarray, slot: int) -> list[TokenLogprobs]:
        """Prompt log-probabilities requested by the sequence in `slot`, of the tokens after N of its positions."""
        count = int(self._slots[slot]["prompt_logprobs"])
        assert count != _NONE, f"slot {slot} has not requested prompt log-probabilities"
        return prompt_logprobs(logits_NV, token_N, count, self._logprobs_mode)


def _joined(rows: list[Sampled]) -> Sampled:
    """Result of rows that were sampled one by one."""
    errors = {index: reason for index, row in enumerate(rows) for reason in row.errors.values()}
    logprobs = [row.logprobs[0] if row.logprobs else None for row in rows]
    return Sampled(np.concatenate([row.token_R for row in rows]), errors, logprobs if any(logprobs) else [])
