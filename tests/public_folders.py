"""Folders as the public families publish them: a tiny random model beside tokenizer files in the family's form."""

from __future__ import annotations

import json
from pathlib import Path

from public_configs import public_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LLADA_CHAT = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
LLADA_ADDED = (
    "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
QWEN_ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
ROWS = 300  # of the embedding: more than either tokenizer has


def llada_folder(folder: Path) -> Path:
    """tokenizer.json alone; as published, the tokenizer does not know its mask token."""
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(_bytes())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": list(LLADA_ADDED)})
    tokenizer.chat_template = LLADA_CHAT
    tokenizer.save_pretrained(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in LLADA_ADDED}
    public_model(
        "llada", embedding_size=ROWS, vocab_size=ROWS, mask_token_id=ids["<|mdm_mask|>"],
        eos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def qwen_folder(folder: Path) -> Path:
    """Dream or SDAR, as the folder is called: vocab.json, merges.txt, and a Python class that is missing."""
    folder.mkdir()
    vocab = {c: i for i, c in enumerate(_bytes())}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {
        str(256 + i): {
            "content": token, "special": True, "lstrip": False, "rstrip": False, "single_word": False,
            "normalized": False,
        }
        for i, token in enumerate(QWEN_ADDED)
    }  # fmt: skip
    config = {
        "tokenizer_class": "RemoteTokenizer", "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization.RemoteTokenizer", None]},
        "bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>", "unk_token": None, "model_max_length": 131072,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    public_model(
        folder.name, vocab_size=ROWS, mask_token_id=260, eos_token_id=256, pad_token_id=256
    ).save_pretrained(folder)
    return folder


def ascii_share(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """A reward that random models get different amounts of: the share of characters that are ASCII."""
    return [sum(c.isascii() for c in text) / max(1, len(text)) for text in completions]


def _bytes() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())
