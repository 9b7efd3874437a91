"""`igpo tokenizer`: trains a byte-level BPE tokenizer with the special tokens a masked-diffusion model needs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .config import ConfigError
from .logging import progress, say
from .options import TokenizerOptions

SPECIAL_TOKENS = {
    "pad_token": "<|pad|>",
    "bos_token": "<|bos|>",
    "eos_token": "<|eos|>",
    "mask_token": "<|mask|>",
}
SMALLEST = 256 + len(SPECIAL_TOKENS)  # every byte, so that any text can be written


def run(options: TokenizerOptions) -> Path:
    """`igpo tokenizer`: trains on files, writes a folder that `tokenizer_name_or_path` can name.

    Raises ConfigError: no files, an unreadable one, a line without the columns, or a vocabulary that is too small.
    """
    if not options.files:
        raise ConfigError("files must name at least one JSONL or text file, got none.")
    texts = [text for file in options.files for text in read_texts(file, options.columns)]
    if not texts:
        raise ConfigError(f"files: no text in {', '.join(options.files)}.")
    with progress(len(texts), "tokenizer") as advance:
        tokenizer = train_tokenizer(_counted(texts, advance), options.vocab_size)
    tokenizer.save_pretrained(options.output_dir)
    count = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    size = sum(len(text.encode()) for text in texts)
    say(
        f"{len(tokenizer)} tokens from {len(texts)} texts, {size / max(1, count):.2f} bytes per token, "
        f"in {options.output_dir}"
    )
    return Path(options.output_dir)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of vocab_size tokens (fewer when the texts hold no more pairs), special tokens first.

    Digits are tokens of their own, so that numbers of any length are made of ten symbols and a place in a number is a
    place on the canvas. Any text survives encoding and decoding. The same texts give the same tokenizer.

    Raises:
        ConfigError: vocab_size < 260, the bytes and the special tokens.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(
            f"vocab_size must be at least {SMALLEST} (bytes and special tokens), got {vocab_size}."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )


def read_texts(file: str, columns: Sequence[str]) -> Iterator[str]:
    """The columns of every line of a .jsonl file, or every line of any other. Raises ConfigError."""
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: must be UTF-8 text, byte {error.start} is not.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.endswith(".jsonl"):
            yield from _columns_of(line, columns, f"{file}:{number}")
        else:
            yield line


def _columns_of(line: str, columns: Sequence[str], where: str) -> Iterator[str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: must be JSON: {error.msg}, column {error.colno}.") from error
    for column in columns:
        if not isinstance(record, dict) or not isinstance(record.get(column), str):
            raise ConfigError(
                f"{where}: must have text in column {column!r}. Set columns to those to learn from."
            )
        yield record[column]


def _counted(texts: Sequence[str], advance) -> Iterator[str]:
    for text in texts:
        yield text
        advance()
