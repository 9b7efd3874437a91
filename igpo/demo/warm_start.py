"""The model every arm starts from: masked SFT on 66 thousand chains (1,030 batches of 64).

python -m igpo.demo.warm_start          writes the weights that are shipped beside this file
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from igpo.config import Config
from igpo.logging import progress, say
from igpo.models import MaskedDecoder
from igpo.optim import Updater
from igpo.sft import Examples, noisy_examples, sft_loss
from igpo.types import Prompt, Seed

from .recipe import CHAIN, WARM_SEED, decoder, warm_start_config
from .task import Task

LossOf = Callable[[MaskedDecoder, Examples], Tensor]
SHIPPED = "warm_start.safetensors"


def train(num_steps: int | None = None) -> MaskedDecoder:
    """Trains it: about a minute on one core. The same weights on the same machine, whatever the number of threads
    changes in rounding."""
    cfg, seed = warm_start_config(), Seed(WARM_SEED)
    if num_steps is not None:
        cfg = replace(cfg, train=replace(cfg.train, max_steps=num_steps))
    return fit(decoder(seed), CHAIN, cfg)


def fit(model: MaskedDecoder, task: Task, cfg: Config, loss_of: LossOf = sft_loss) -> MaskedDecoder:
    """max_steps updates of masked SFT on fresh training problems of `task`; the model, in eval mode."""
    steps, seed, tokenizer = cfg.train.max_steps, Seed(cfg.train.seed), task.tokenizer()
    updater = Updater(model, cfg.train, steps)
    with progress(steps, "warm start") as advance:
        for step in range(steps):
            problems = task.problems(cfg.sft.sft_batch_size, seed.at(step), "train")
            examples = noisy_examples(problems, cfg, tokenizer, seed.named("noise").at(step))
            loss = loss_of(model, examples)
            loss.backward()
            updater.step(loss.item(), f"warm start, step {step}", lambda: ["all"])
            if (step + 1) % 10 == 0:
                advance(10, loss=loss.item())
    return model.eval()


@torch.no_grad()
def next_state(model: MaskedDecoder, problems: list[Prompt]) -> tuple[float, float]:
    """How well the model knows one transition: accuracy of the most likely next state, and probability of the right
    one, with the states before it shown and all others masked; mean over the states."""
    prompts = torch.tensor([p.ids for p in problems])
    traces = torch.tensor([p.trace_ids for p in problems])
    mask = model.config.mask_token_id
    right: list[Tensor] = []
    probability: list[Tensor] = []
    for k in range(CHAIN.num_steps):
        canvas = traces.clone()
        canvas[:, k:] = mask
        p = model(torch.cat((prompts, canvas), 1)).logits[:, prompts.shape[1] + k].softmax(-1)
        right.append((p.argmax(-1) == traces[:, k]).float().mean())
        probability.append(p.gather(1, traces[:, k : k + 1]).mean())
    return float(torch.stack(right).mean()), float(torch.stack(probability).mean())


def shipped() -> MaskedDecoder:
    """The weights in the package."""
    model = decoder(Seed(WARM_SEED))
    with resources.as_file(resources.files("igpo.demo") / SHIPPED) as path:
        model.load_state_dict(load_file(path))
    return model.eval()


def main() -> None:
    torch.set_num_threads(1)
    model = train()
    path = Path(__file__).parent / SHIPPED
    save_file({name: x.detach().contiguous() for name, x in model.state_dict().items()}, path)
    accuracy, probability = next_state(model, CHAIN.problems(1024, Seed(2), "held-out"))
    say(
        f"{path.name}: {path.stat().st_size / 1e6:.2f} MB; next state of held-out chains: {accuracy:.1%} right, "
        f"probability {probability:.3f}"
    )


if __name__ == "__main__":
    main()
