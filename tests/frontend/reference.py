"""Expected outputs for the packaged model, computed with transformers in float32."""

from functools import cache
from typing import Any

import torch
import transformers

from hetis import RequestOutput, SamplingParams
from hetis.models.hub import PACKAGED

GREEDY = SamplingParams(max_tokens=12, temperature=0)
PROMPTS = ["The function returns", "It was", "In the beginning of the"]


@cache
def reference() -> Any:
    """The model, as transformers runs it."""
    return transformers.AutoModelForCausalLM.from_pretrained(PACKAGED, dtype=torch.float32).eval()


@cache
def tokenizer() -> Any:
    """The tokenizer, as transformers loads it."""
    return transformers.AutoTokenizer.from_pretrained(PACKAGED)


@torch.inference_mode()
def logprobs_of(ids: list[int]) -> torch.Tensor:
    """float32 [T, V]: log-probabilities of the token after each token."""
    logits: torch.Tensor = reference()(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


@torch.inference_mode()
def greedy(prompt: str, count: int) -> list[int]:
    """The `count` greedy tokens after the prompt."""
    ids = tokenizer().encode(prompt)
    out = reference().generate(
        torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in out[0, len(ids) :]]


def one(outputs: list[RequestOutput]) -> Any:
    """The completion of a request with one prompt and n = 1."""
    assert len(outputs) == 1
    assert len(outputs[0].outputs) == 1
    return outputs[0].outputs[0]
