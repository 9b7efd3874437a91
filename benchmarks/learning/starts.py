"""The checkpoint every row of a task starts from: masked SFT from a seed, kept in a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from igpo.demo.recipe import decoder
from igpo.demo.warm_start import fit
from igpo.models import MaskedDecoder
from igpo.ops import linear_masked_cross_entropy
from igpo.sft import Examples, sft_loss
from igpo.types import Seed

from .recipe import SHAPES, changed, short, warm_config
from .tasks import TASKS, Pool


def start(task: str, block_causal: bool, folder: Path) -> MaskedDecoder:
    """Trained where the folder does not have it yet: about a minute on one core."""
    cfg, blocks = (
        warm_config(task, block_causal),
        SHAPES[task].block_length if block_causal else None,
    )
    model = decoder(Seed(cfg.train.seed), TASKS[task].words, blocks)
    name = short([task, block_causal, SHAPES[task].warm_pool, changed(cfg)])
    path = folder / f"{task}-{'blocks' if block_causal else 'full'}-{name}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    pool = SHAPES[task].warm_pool
    problems = Pool(TASKS[task], pool) if pool else TASKS[task]
    fit(model, problems, cfg, block_loss if block_causal else sft_loss)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: x.detach().contiguous() for key, x in model.state_dict().items()}, path)
    return model


def block_loss(model: MaskedDecoder, examples: Examples) -> Tensor:
    """As sft_loss, each block behind the clean blocks before it, as in a rollout (arXiv:2503.09573)."""
    canvas, masked = examples.canvas, examples.masked
    prompt = canvas.tokens[:, : canvas.prompt_length]
    clean = torch.cat((prompt, examples.targets), 1)
    hidden = model.hidden_of_blocks(
        canvas.tokens, clean, canvas.attention_mask, canvas.position_ids
    )
    return linear_masked_cross_entropy(
        hidden[:, canvas.prompt_length :][masked], model.head_weight, examples.targets[masked],
        weights=examples.weight[:, None].expand_as(masked)[masked],
    )  # fmt: skip


def fingerprint(model: MaskedDecoder) -> str:
    """Of the weights, in 12 letters."""
    digest = hashlib.blake2b(digest_size=6)
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode() + x.numpy().tobytes())
    return digest.hexdigest()
