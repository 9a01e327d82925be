"""Training of small byte-level BPE tokenizers for tests."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_byte_level(
    corpus: Iterable[str], vocab_size: int, special_tokens: Sequence[str], pre_tokenizer: Any = None
) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` tokens, of which `special_tokens` have the first ids; encodes any text.

    `pre_tokenizer`: splits text into words and maps bytes to characters; None: as in GPT-2, without a prefix space.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer
