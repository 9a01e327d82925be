"""From a prompt to a `Request`: read, tokenised, checked, and numbered."""

from itertools import count
from typing import Any

from hetis.core.config import EngineConfig
from hetis.core.messages import EngineReady
from hetis.core.request import check_token_ids
from hetis.core.sampling_params import SamplingParams
from hetis.frontend.prompts import Prompt, ReadPrompt, check_text, read_prompt
from hetis.frontend.requests import Request, resolve_seeds
from hetis.frontend.tokenizer import encode, load_tokenizer


class Intake:
    """Makes requests for one fleet. Any thread may use it."""

    def __init__(self, config: EngineConfig, tokenizer: Any, ready: EngineReady) -> None:
        self._config, self._tokenizer, self._ready = config, tokenizer, ready
        self._request_numbers, self._sequence_numbers = count(1), count(0)

    def make(
        self,
        prompt: Prompt | ReadPrompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        prompt_index: int = 0,
        name: str = "prompt",
        params_name: str = "",
        add_special_tokens: bool = True,
    ) -> Request:
        """Raises ValueError that begins with `name` for a wrong prompt, or with `params_name` and the name of a field.

        `request_id`: None: the number of the request.
        """
        params = params or SamplingParams()
        self._check_params(params, params_name)
        read = prompt if isinstance(prompt, ReadPrompt) else read_prompt(name, prompt)
        ids = read.token_ids
        if ids is None:
            assert read.text is not None
            ids = encode(require_tokenizer(self._tokenizer), read.text, add_special_tokens)
        self._check_ids(name, ids)
        key = number = str(next(self._request_numbers))
        if request_id is not None:
            key = f"{check_text('request_id', request_id)}#{number}"
        seeds = resolve_seeds(params, self._config.seed, self._sequence_numbers)
        own_id = number if request_id is None else request_id
        return Request(own_id, key, prompt_index, read.text, ids, params, seeds, self._tokenizer)

    def _check_params(self, params: SamplingParams, name: str) -> None:
        try:
            params.validate_for(self._ready.vocab_size, self._config.max_logprobs)
        except ValueError as error:
            raise ValueError(f"{name}{error}") from None
        if params.stop and self._tokenizer is None:
            raise ValueError(f"{name}stop needs a tokenizer; give stop_token_ids, or a tokenizer.")

    def _check_ids(self, name: str, ids: list[int]) -> None:
        check_token_ids(name, ids, self._ready.vocab_size)
        if len(ids) >= self._ready.max_model_len:
            raise ValueError(
                f"{name} has {len(ids)} tokens, but max_model_len is {self._ready.max_model_len}, output included; "
                f"shorten the prompt."
            )


def require_tokenizer(tokenizer: Any) -> Any:
    """Raises ValueError if there is none."""
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; give prompts as token ids, or a tokenizer (tokenizer=).")
    return tokenizer


def tokenizer_of(config: EngineConfig) -> Any:
    """The tokenizer of a fleet; None if the model has none. Raises ValueError if it cannot be loaded."""
    if config.tokenizer is None:
        return load_tokenizer(config.model, config.revision)
    return load_tokenizer(config.tokenizer, None, what="tokenizer")
