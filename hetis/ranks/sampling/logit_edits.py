"""Changes of logits before a token is chosen: biases, bans and penalties.

Letters: R rows, V vocabulary, T tokens of a step, I rows whose logits are changed, H tokens of history, E entries of
the tables (one per sequence with penalties).
"""

import numpy as np
import torch
from torch import Tensor

from hetis.core.sampling_params import SamplingParams

_NO_IDS = np.empty(0, dtype=np.int64)


class LogitEdits:
    """Biases, bans and penalties of the sequences in the slots. Sequences without any cost nothing."""

    def __init__(self, max_num_seqs: int, vocab_size: int, eos_token_ids: list[int], device: torch.device) -> None:
        self._eos_token_ids, self._device = [i for i in eos_token_ids if 0 <= i < vocab_size], device
        self._params: dict[int, SamplingParams] = {}  # only of slots that change logits
        self._banned: dict[int, np.ndarray] = {}  # tokens that are not allowed before min_tokens
        self._edits_slot = np.zeros(max_num_seqs, dtype=bool)
        self._prompt_len = np.zeros(max_num_seqs, dtype=np.int64)
        self._history = _History(max_num_seqs, vocab_size, device)

    def add(self, slot: int, params: SamplingParams, prompt_len: int) -> None:
        self._prompt_len[slot] = prompt_len
        if params.has_penalties:
            self._history.add(slot)
        if params.min_tokens:
            self._banned[slot] = np.array(sorted({*self._eos_token_ids, *params.stop_token_ids}), dtype=np.int64)
        if params.has_penalties or params.min_tokens or params.logit_bias:
            self._params[slot], self._edits_slot[slot] = params, True

    def remove(self, slot: int) -> None:
        self._params.pop(slot, None)
        self._banned.pop(slot, None)
        self._edits_slot[slot] = False
        self._history.remove(slot)

    def observe(self, slot_T: np.ndarray, token_T: np.ndarray, position_T: np.ndarray) -> None:
        """Records tokens of sequences. Every token must be recorded once, before a later one is chosen."""
        self._history.observe(slot_T, token_T, position_T, position_T >= self._prompt_len[slot_T])

    def apply(self, logits_RV: Tensor, slot_R: np.ndarray, position_R: np.ndarray) -> Tensor | None:
        """A copy of the logits with all changes, float32 and contiguous; None: there are no changes."""
        row_I = np.flatnonzero(self._edits_slot[slot_R])
        if len(row_I) == 0:
            return None
        logits_RV = logits_RV.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self._add_biases(logits_RV, row_I, slot_R)
        self._ban(logits_RV, row_I, slot_R, position_R)
        self._penalise(logits_RV, row_I, slot_R, position_R)
        return logits_RV

    def _add_biases(self, logits_RV: Tensor, row_I: np.ndarray, slot_R: np.ndarray) -> None:
        rows, ids, biases = [], [], []
        for row in row_I:
            bias = self._params[int(slot_R[row])].logit_bias
            rows += [int(row)] * len(bias)
            ids += list(bias)
            biases += list(bias.values())
        if rows:
            index = self._to_device(np.array([rows, ids])).unbind()
            logits_RV[index] += torch.tensor(biases, dtype=torch.float32, device=self._device)

    def _ban(self, logits_RV: Tensor, row_I: np.ndarray, slot_R: np.ndarray, position_R: np.ndarray) -> None:
        ids = [self._banned_now(int(slot_R[row]), int(position_R[row])) for row in row_I]
        rows = np.repeat(row_I, [len(banned) for banned in ids])
        if len(rows):
            logits_RV[self._to_device(np.stack([rows, np.concatenate(ids)])).unbind()] = -torch.inf

    def _banned_now(self, slot: int, position: int) -> np.ndarray:
        num_output = position - self._prompt_len[slot]
        return self._banned[slot] if num_output < self._params[slot].min_tokens else _NO_IDS

    def _penalise(self, logits_RV: Tensor, row_I: np.ndarray, slot_R: np.ndarray, position_R: np.ndarray) -> None:
        row_I = row_I[self._history.holds(slot_R[row_I])]
        if len(row_I) == 0:
            return
        params = [self._params[int(slot)] for slot in slot_R[row_I]]
        penalty_I3 = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
        repetition, frequency, presence = torch.tensor(penalty_I3, device=self._device).unsqueeze(-1).unbind(1)
        token_IH, count_IH = self._history.tokens(slot_R[row_I], position_R[row_I])
        index = (self._to_device(row_I).unsqueeze(-1), token_IH)
        logit_IH = logits_RV[index]
        logit_IH = torch.where(logit_IH > 0, logit_IH / repetition, logit_IH * repetition)
        logit_IH = logit_IH - frequency * count_IH - presence * (count_IH > 0)
        logits_RV[index] = logit_IH  # a repeated token gets the same value repeatedly

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


class _History:
    """Tokens of sequences by position, and counts of every token of the vocabulary in their output.

    Tables are on the device and grow as needed. Penalties touch as many logits as a sequence has tokens.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._entry = np.full(max_num_seqs, -1, dtype=np.int64)  # of each slot; -1: none
        self._free: list[int] = []
        self._token_EH = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self._count_EV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)

    def holds(self, slots: np.ndarray) -> np.ndarray:
        held: np.ndarray = self._entry[slots] >= 0
        return held

    def add(self, slot: int) -> None:
        assert self._entry[slot] < 0, f"slot {slot} is in use"
        if not self._free:
            first, added = len(self._count_EV), max(1, min(len(self._count_EV), len(self._entry) - len(self._count_EV)))
            self._free = list(range(first, first + added))
            self._count_EV = torch.nn.functional.pad(self._count_EV, (0, 0, 0, added))
            self._token_EH = torch.nn.functional.pad(self._token_EH, (0, 0, 0, added))
        self._entry[slot] = self._free.pop()
        self._count_EV[self._entry[slot]] = 0

    def remove(self, slot: int) -> None:
        if self._entry[slot] >= 0:
            self._free.append(int(self._entry[slot]))
            self._entry[slot] = -1

    def observe(self, slot_T: np.ndarray, token_T: np.ndarray, position_T: np.ndarray, is_output_T: np.ndarray) -> None:
        held_T = self.holds(slot_T)
        if not held_T.any():
            return
        entry, position, is_output = self._entry[slot_T[held_T]], position_T[held_T], is_output_T[held_T]
        missing = int(position.max()) + 1 - self._token_EH.shape[1]
        if missing > 0:
            self._token_EH = torch.nn.functional.pad(self._token_EH, (0, max(missing, self._token_EH.shape[1])))
        packed = np.stack([entry, token_T[held_T], position, is_output]).astype(np.int64)
        entry_T, token, position_, counted_T = torch.from_numpy(packed).to(self._token_EH.device).unbind()
        self._token_EH[entry_T, position_] = token
        flat_T = entry_T * self._count_EV.shape[1] + token
        self._count_EV.view(-1).index_add_(0, flat_T, counted_T.to(torch.int32))

    def tokens(self, slot_I: np.ndarray, length_I: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens [I, H] of sequences of these lengths, short ones padded with their first token, and counts [I, H]."""
        packed = torch.from_numpy(np.stack([self._entry[slot_I], length_I])).to(self._token_EH.device)
        entry_I1, length_I1 = packed.unsqueeze(-1).unbind()
        longest = int(length_I.max())
        token_IH = self._token_EH[entry_I1.squeeze(-1), :longest]
        known = torch.arange(longest, device=token_IH.device) < length_I1
        token_IH = torch.where(known, token_IH, token_IH[:, :1])
        return token_IH, self._count_EV[entry_I1, token_IH]
