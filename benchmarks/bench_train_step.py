"""train_step: what follows a rollout batch in IGPO: old and reference log-probs and the inner updates, with LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import research
import torch
from decoders import canvases, decoder, words
from harness import near
from programs import GPU_ROUNDS, Program, Provider, held_mib, measure
from shapes import DEVICE, TOY, Batch
from timing import Run
from torch import Tensor

from igpo.config import AlgorithmConfig, Config, LoraConfig, RolloutConfig, TrainConfig
from igpo.models.adapters import add_adapters
from igpo.optim import Updater
from igpo.rl.algorithms import Algorithm, build_algorithm
from igpo.rl.gradient import accumulate
from igpo.types import Graded, PolicyBatch, Rollouts, Seed
from igpo.work_plan import Passes, layers_of

SEED = Seed(0).at(1)
EPSILON, BETA = 0.2, 0.01
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj")  # configs/llada-8b-igpo.yaml
VARIANTS = {"one mask": 0.0, "prompt masks": 0.15}  # IGPO; diffu-GRPO, other masks in each update


@dataclass
class Training:
    """A policy with adapters, its optimizer, and a graded batch of random completions."""

    at: Batch
    p_mask_prompt: float

    def __post_init__(self) -> None:
        at, shape = self.at, self.at.model
        base = decoder(shape)
        lora = LoraConfig(True, lora_r=at.lora, lora_target_modules=TARGETS)
        self.layers = layers_of(base.config, Config(lora=lora))
        self.policy = add_adapters(base, lora, Seed(0)).eval()
        generator = torch.Generator(DEVICE).manual_seed(2)
        with torch.no_grad():
            for name, weight in self.policy.named_parameters():
                if "lora_B" in name:  # zeros as made: policy and reference would be the same
                    weight.normal_(0, 0.02, generator=generator)
        self.updater = Updater(
            self.policy, TrainConfig(learning_rate=1e-3, lr_scheduler_type="constant"), at.inner
        )
        self.saved = [w.detach().clone() for w in self.updater.weights]
        self.advantages = torch.linspace(-1, 1, at.sequences, device=DEVICE)
        self.graded = graded(at)
        self.algorithm = igpo(at, self.p_mask_prompt)

    def reset(self) -> None:
        """Weights and optimizer as they were."""
        updater = self.updater
        with torch.no_grad():
            for weight, master, saved in zip(
                updater.weights, updater.masters, self.saved, strict=True
            ):
                weight.copy_(saved)
                master.copy_(saved)
        updater.optimizer.state.clear()
        updater.zero_grad()
        updater.done = 0

    @contextmanager
    def reference(self) -> Iterator:
        with self.policy.disable_adapter():
            yield self.policy

    def prepare(self) -> PolicyBatch:
        return self.algorithm.likelihood.prepare(self.policy, self.graded, SEED, self.reference)

    def step(self, loss: float) -> Tensor:
        self.updater.step(loss, "benchmark", list)
        return torch.tensor(loss)

    def ours(self) -> list[Tensor]:
        """The loss of every inner update, then the first adapter."""
        batch, rows = self.prepare(), torch.arange(self.at.sequences, device=DEVICE)
        losses = []
        for inner in range(self.at.inner):
            parts = accumulate(
                self.algorithm, self.policy, batch, self.advantages, inner, rows, self.at.micro
            )
            losses.append(self.step(sum(loss for loss, _ in parts)))
        return [torch.stack(losses), self.updater.weights[0].detach().clone()]

    def research(self, masks: list[Tensor]) -> list[Tensor]:
        rollouts = self.graded.rollouts
        losses = research.train(
            self.policy, self.reference, rollouts.canvas, rollouts.tokens, self.advantages, masks, self.at.micro,
            epsilon=EPSILON, beta=BETA,
        )  # fmt: skip
        stepped = torch.stack([self.step(loss) for loss in losses])
        return [stepped, self.updater.weights[0].detach().clone()]

    def trunk(self, scored: int) -> None:
        """The same passes through the layers: `scored` canvases without gradients, then the updates."""
        canvas = self.graded.rollouts.canvas
        parts = [
            (canvas.tokens[p], canvas.attention_mask[p], canvas.position_ids[p])
            for p in torch.arange(self.at.sequences, device=DEVICE).split(self.at.micro)
        ]
        for inputs in parts * scored:
            with torch.no_grad():
                self.policy.hidden(*inputs)
        for inputs in parts * self.at.inner:
            hidden = self.policy.hidden(*inputs)
            hidden.backward(torch.ones_like(hidden))
        self.updater.zero_grad()


def igpo(at: Batch, p_mask_prompt: float) -> Algorithm:
    cfg = AlgorithmConfig(
        algorithm="igpo", num_iterations=at.inner, p_mask_prompt=p_mask_prompt, epsilon=EPSILON, beta=BETA
    )  # fmt: skip
    rollout = RolloutConfig(max_completion_length=at.completion, rollout_batch_size=at.micro)
    nothing: Callable = lambda rollouts, prompts: None  # noqa: E731
    return build_algorithm(cfg, rollout, nothing, pad_id=at.model.vocabulary - 3)


def graded(at: Batch) -> Graded:
    canvas = canvases(at.model, at.sequences, at.prompt, at.completion)
    made = words(at.sequences, at.completion, at.model.vocabulary).to(DEVICE)
    tokens = torch.cat([canvas.tokens[:, : at.prompt], made], 1)
    zeros, rows = torch.zeros(made.shape, device=DEVICE), torch.zeros(len(made), device=DEVICE)
    rollouts = Rollouts(canvas, tokens, zeros.long(), zeros, zeros, rows.long() + 1, 0)
    return Graded(rollouts, rows, rows > 0, rows > 0, ("",) * len(made))


def providers(made: Training) -> dict[str, Provider]:
    """Every call begins with the adapters and the optimizer as they were made."""
    masks = [draws[0].masked for draws in made.prepare().draws]
    distinct = 1 if made.p_mask_prompt == 0 else made.at.inner
    rows = made.at.sequences
    said = f"{rows} of 64 sequences"

    def timed(call: Callable[[], object], name: str, checked: bool) -> Provider:
        def run(_: None) -> object:
            return call()

        return Provider(Run(run, made.reset), rows, name, gated=checked)

    return {
        "igpo": timed(made.ours, said, True),
        "research": timed(lambda: made.research(masks), said, True),
        "stage-trunk": timed(
            lambda: made.trunk(2 * distinct), "the same passes without head, loss and optimizer", False
        ),
    }  # fmt: skip


def agree(at: Batch, p_mask_prompt: float) -> None:
    """In float32 both forms have the same losses and end at the same weights."""
    made = Training(at, p_mask_prompt)
    runs = providers(made)
    truth = runs["igpo"].run()
    near(runs["research"].run(), truth, error=1e-3)


def bench_train_step(benchmark, request, training: Batch, variant: str) -> None:
    at = training
    share = VARIANTS[variant]
    agree(replace(at, model=TOY, sequences=3, micro=2, prompt=20, completion=16, lora=4), share)
    made = Training(at, share)
    runs = providers(made)
    first: list = []

    def gate(result: list[Tensor]) -> None:
        first.append(result[0])
        assert result[0].isfinite().all()
        if at.model.dtype == torch.float32:
            near([result[0]], [first[0]], error=1e-3)

    scored = 2 if share == 0 else 2 * at.inner
    length = at.prompt + at.completion
    passes = [
        Passes(count, length, length, at.completion, trained)
        for count, trained in ((scored, False), (at.inner, True))
    ]
    measure(
        benchmark,
        Program(
            op="train_step",
            axes={"problem": str(at), "variant": f"inner={at.inner} {variant}", "rows": at.sequences,
                  "vocabulary": at.model.vocabulary},
            providers=runs,
            gate=gate,
            unit="sequence",
            tokens=at.prompt + at.completion,
            flops=int(sum(map(made.layers.flops, passes))),
            counted=f"{scored} forwards, {at.inner} trained to inputs and adapters; head of the completion",
            dtype=at.model.dtype,
            held_mib=held_mib(made.policy),
            rounds=GPU_ROUNDS if DEVICE == "cuda" else 1,
        ),
    )  # fmt: skip
