"""The checkpoint every row of a task starts from: masked SFT from a seed, kept in a folder."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from igpo.demo.recipe import decoder
from igpo.demo.warm_start import fit
from igpo.models import MaskedDecoder
from igpo.sft import sft_loss
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
    fit(model, problems, cfg, partial(sft_loss, beside_clean=block_causal))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: x.detach().contiguous() for key, x in model.state_dict().items()}, path)
    return model


def fingerprint(model: MaskedDecoder) -> str:
    """Of the weights, in 12 letters."""
    digest = hashlib.blake2b(digest_size=6)
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode() + x.numpy().tobytes())
    return digest.hexdigest()
