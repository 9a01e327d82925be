"""Trains the tiny Llama model in `hetis/assets/tiny`, the default of `hetis generate` and `LLM()`.

The text is the documentation that comes with Python 3.11, as reStructuredText, from a Debian package:

    apt-get download python3.11-doc
    dpkg-deb -x python3.11-doc_*.deb /tmp/python-doc
    python bench/train_tiny_model.py --text /tmp/python-doc/usr/share/doc/python3.11/html/_sources

Licence of the text: Python Software Foundation License Version 2 (usr/share/doc/python3.11-doc/copyright in the
package), which permits redistribution and derived works. Only prose is kept: code, tables and markup are dropped. The
model is written in Hugging Face format in bfloat16. Deterministic for one machine, torch version and thread count.
`--continue-from` starts from a saved model, for example to cut a run short: lower `--peak`, fewer `--steps`.

Legend: R rows of a batch, T tokens of a row, N tokens of the whole text.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 1024
VALIDATION_EVERY = 40  # each 40th file of the text is held out
NUMBERED_ROLES = {"pep": "PEP ", "rfc": "RFC ", "issue": "bpo-", "gh": "gh-"}
# Directives whose indented body is prose; the body of any other (code, tables, indices, targets) is dropped.
PROSE_DIRECTIVE = re.compile(
    r"((c|py):)?(function|member|macro|type|var|struct|enum|(static|class|abstract|decorator)?method|data|attribute)|"
    r"(awaitable|coroutine)(function|method)|c(function|member|macro|type|var)|exception|module|describe|decorator|"
    r"opcode|option|envvar|object|pdbcommand|2to3fixer|note|warning|important|tip|hint|seealso|versionadded|"
    r"versionchanged|deprecated(-removed)?|rubric|impl-detail|availability|glossary|only|topic|admonition|class"
)
TITLED_DIRECTIVES = ("note", "warning", "seealso", "impl-detail")  # their first line may be prose too


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def strip_markup(text: str) -> str:
    """Inline reStructuredText to plain words: roles, links, emphasis, literals and footnote marks."""
    text = re.sub(r":([a-zA-Z0-9_+.:-]+):`([^`]*)`", lambda match: role_text(match.group(1), match.group(2)), text)
    text = re.sub(r"``(.+?)``", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^>`]*>`_{0,2}", r"\1", text)
    text = re.sub(r"`([^`]+)`_{0,2}", r"\1", text)
    text = re.sub(r"\s?\[[#\w]+\]_", "", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*])\*(\w[^*]*?)\*(?![\w*])", r"\1", text)
    text = text.replace("\\ ", "").replace("\\", "")
    return re.sub(r"\s+", " ", text).strip()


def role_text(role: str, body: str) -> str:
    """Visible text of a role: the last part of `~os.path.join`, the title of `title <target>`, the number of a PEP."""
    if match := re.fullmatch(r"(.*?)\s*<[^>]*>", body, flags=re.DOTALL):
        return match.group(1)
    if role in NUMBERED_ROLES:
        return NUMBERED_ROLES[role] + body
    return body.rsplit(".", 1)[-1] if body.startswith("~") else body.lstrip("!")


def prose_lines(source: str) -> Iterator[str]:
    """The lines of a reStructuredText file without directives, code and tables; bodies of prose directives stay."""
    source = re.sub(r"\\\n\s*", " ", source.expandtabs(8))  # signatures that go on in the next line
    source = re.sub(r"(?ms)^ *=+(?: +=+)+ *$.*?^ *=+(?: +=+)+ *\n\s*\n", "\n", source)  # simple tables
    skip_deeper_than: int | None = None
    for line in source.splitlines():
        if not line.strip():
            yield ""
            continue
        if skip_deeper_than is not None:
            if indent_of(line) > skip_deeper_than:
                continue
            skip_deeper_than = None
        stripped = line.strip()
        if stripped.startswith(".."):
            match = re.match(r"\.\.\s+([\w:+-]+)::(.*)", stripped)
            yield ""
            if match is None or not PROSE_DIRECTIVE.fullmatch(match.group(1)):
                skip_deeper_than = indent_of(line)
            elif match.group(1) in TITLED_DIRECTIVES and match.group(2).strip():
                yield match.group(2).strip()
            continue
        if stripped.startswith(">>>") or re.match(r"[+|=-]{2,}[+|= -]*$|\|", stripped) or is_field(stripped):
            yield ""
            continue
        if stripped.endswith("::"):  # a literal block follows
            skip_deeper_than = indent_of(line)
        yield "" if stripped == "::" else re.sub(r"::$", ":", line.rstrip())


def is_field(line: str) -> bool:
    """Option lines below a directive, such as `:synopsis: …` or `:noindex:`."""
    return re.match(r":[\w-]+:( |$)", line) is not None


def paragraphs(source: str) -> Iterator[str]:
    """Paragraphs, list items and headings, each joined to one line."""
    block: list[str] = []
    for line in [*prose_lines(source), ""]:
        stripped = line.strip()
        is_item = re.match(r"(\*|-|#\.|\d+\.|\(\d+\)) +\S", stripped) is not None
        is_rule = re.fullmatch(r"([=\-~^\"'*+#.`:])\1{2,}", stripped) is not None
        deeper = bool(block) and indent_of(line) != indent_of(block[-1]) and not is_item
        starts_anew = is_item or (
            deeper and re.match(r"(\*|-|#\.|\d+\.) ", block[-1].strip()) is None and len(block) == 1
        )
        if block and (not stripped or is_rule or starts_anew):
            text = strip_markup(" ".join(part.strip() for part in block))
            if re.search(r"[A-Za-z]{2}", text):
                yield re.sub(r"^(\*|#\.) +", "- ", text)
            block = []
        if stripped and not is_rule:
            block.append(line)


def read_documents(folder: Path) -> list[str]:
    """One plain text per `*.rst.txt` file below `folder`, in the order of the file names."""
    files = sorted(folder.rglob("*.rst.txt"))
    if not files:
        raise ValueError(f"{folder} holds no *.rst.txt file; unpack python3.11-doc and pass its html/_sources folder")
    return ["\n\n".join(paragraphs(file.read_text(encoding="utf-8"))) for file in files]


def train_tokenizer(documents: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Byte-level BPE: every text round-trips, since each of the 256 bytes is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """token_N: the documents one after another, each behind an end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [np.asarray([end, *encoding.ids]) for encoding in tokenizer.encode_batch(documents)]
    return torch.from_numpy(np.concatenate(pieces))


def build_model(vocabulary_size: int, end_of_text: int) -> LlamaForCausalLM:
    """3.9 M parameters; four KV heads, so that a plan of 1+2 has something to spread."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def batches(
    token_N: torch.Tensor, row_tokens: int, batch_tokens: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Endless token_RT of T = `row_tokens` + 1 (inputs and successors); each pass shifts and shuffles the rows."""
    while True:
        phase = int(torch.randint(row_tokens, (1,), generator=generator))
        row_RT = token_N[phase:].unfold(0, row_tokens + 1, row_tokens)
        order_R = torch.randperm(row_RT.shape[0], generator=generator)
        for chosen_R in torch.split(order_R, batch_tokens // row_tokens)[:-1]:
            yield row_RT[chosen_R]


def loss_of(model: LlamaForCausalLM, token_RT: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood, in nats per token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits_RTV = model(input_ids=token_RT[:, :-1].contiguous(), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_RTV.flatten(0, 1).float(), token_RT[:, 1:].flatten())


@torch.no_grad()
def validate(model: LlamaForCausalLM, token_N: torch.Tensor) -> float:
    """Loss over all of the held-out text in rows of 512 tokens."""
    row_RT = token_N.unfold(0, 513, 512)
    losses = [float(loss_of(model, part_RT)) * part_RT.shape[0] for part_RT in torch.split(row_RT, 8)]
    return sum(losses) / row_RT.shape[0]


def build_optimizers(model: LlamaForCausalLM, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    model: LlamaForCausalLM, token_N: torch.Tensor, steps: int, batch_tokens: int, peak: float, seed: int
) -> Iterator[tuple[int, float]]:
    """Yields (step, loss) after each step. Rows of 256 tokens for 85 % of the steps, then rows of the full context.

    Learning rate: 50 steps of warm-up, then half a cosine from `peak` times the usual rates to 3 % of that.
    """
    generator = torch.Generator().manual_seed(seed)
    short_rows = batches(token_N, 256, batch_tokens, generator)
    long_rows = batches(token_N, CONTEXT, batch_tokens, generator)
    optimizers = build_optimizers(model, muon_rate=8e-3 * peak, adam_rate=3e-3 * peak)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    for step in range(1, steps + 1):
        factor = min(1.0, step / 50) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        loss = loss_of(model, next(short_rows if step <= 0.85 * steps else long_rows))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield step, loss.item()


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Hugging Face files; the weights in bfloat16."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(output)
    tokenizer.save(str(output / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for file in output.iterdir():
        file.chmod(0o644)  # weights are written for their owner alone, but an installed package is read by everyone


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of *.rst.txt files")
    parser.add_argument("--output", type=Path, default=Path("hetis/assets/tiny"), help="default: %(default)s")
    parser.add_argument("--vocabulary-size", type=int, default=3072, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4500, help="default: %(default)s")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of one step, default: %(default)s")
    parser.add_argument("--save-every", type=int, default=500, help="steps between saved models, default: %(default)s")
    parser.add_argument("--continue-from", type=Path, help="a saved model to start from, with fresh optimizers")
    parser.add_argument("--peak", type=float, default=1.0, help="factor on the learning rates, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    documents = read_documents(arguments.text)
    held_out = documents[::VALIDATION_EVERY]
    del documents[::VALIDATION_EVERY]
    tokenizer = train_tokenizer(documents, arguments.vocabulary_size)
    training_N, validation_N = encode(tokenizer, documents), encode(tokenizer, held_out)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    assert end_of_text is not None, "it is a special token of the tokenizer"
    model = build_model(tokenizer.get_vocab_size(), end_of_text)
    if arguments.continue_from:
        model = LlamaForCausalLM.from_pretrained(arguments.continue_from, dtype=torch.float32)
    bytes_per_token = sum(len(text.encode()) for text in held_out) / validation_N.numel()
    print(
        f"{model.num_parameters():,} parameters, {training_N.numel():,} training tokens, "
        f"{validation_N.numel():,} validation tokens of {bytes_per_token:.2f} bytes"
    )
    start, recent = time.monotonic(), 0.0
    progress = train(model, training_N, arguments.steps, arguments.batch_tokens, arguments.peak, arguments.seed)
    for step, loss in progress:
        recent = loss if step == 1 else 0.98 * recent + 0.02 * loss
        if step % 50 == 0:
            print(f"step {step} loss {recent:.3f} after {time.monotonic() - start:.0f} s", flush=True)
        if step % arguments.save_every == 0 or step == arguments.steps:
            save(model, tokenizer, arguments.output)
            nats = validate(model, validation_N)
            bits_per_byte = nats / math.log(2) / bytes_per_token
            print(f"step {step} validation {nats:.3f} nats per token, {bits_per_byte:.3f} bits per byte", flush=True)


if __name__ == "__main__":
    main()
