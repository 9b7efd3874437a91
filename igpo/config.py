"""The configuration tree of every program. Leaf names are TRL's where TRL has the notion; leaf names are unique.

Imports nothing of igpo. Defaults are the published IGPO run (arXiv:2509.10396 and its released code) unless a comment
says otherwise. Comments are the help text of `igpo COMMAND --help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class ConfigError(ValueError):
    """Something the user can put right before the program starts; the command line prints it as one line."""


@dataclass(frozen=True)
class ModelConfig:
    model_name_or_path: str | None = (
        None  # a folder or hub id (docs/models.md); None: built from the fields below
    )
    tokenizer_name_or_path: str | None = None  # None: the model's folder
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 344
    dtype: str = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    device: str = "auto"  # auto: cuda when there is one
    attn_implementation: str = "sdpa"  # or flex_attention, flash_attention_2
    freeze_head: bool = False  # the LM head (with tied weights: the embedding) is not trained


@dataclass(frozen=True)
class LoraConfig:
    use_lora: bool = False
    lora_r: int = 128
    lora_alpha: int = 64
    lora_target_modules: tuple[str, ...] = ()  # (): every linear layer of the decoder, not the head


@dataclass(frozen=True)
class DataConfig:
    train_file: str | None = None  # JSONL
    eval_file: str | None = None
    prompt_column: str = "question"
    trace_column: str | None = "answer"  # a worked solution; None: no hints
    answer_column: str | None = None  # None: what follows answer_marker in the trace
    answer_marker: str = "####"
    max_prompt_length: int = 256  # tokens; longer prompts are an error, never cut


@dataclass(frozen=True)
class RolloutConfig:
    max_completion_length: int = 256
    block_length: int = 32
    diffusion_steps: int = 128  # over the whole completion: 2 tokens a step
    temperature: float = 1.2
    remasking: str = "low_confidence"  # or random
    suppress_tokens: tuple[int, ...] = ()
    early_stop: bool = True  # stop a sequence once a block of it is all EOS
    use_cache: bool = True  # block-causal models keep keys and values of finished blocks; exact
    rollout_batch_size: int = 64  # sequences denoised at once; does not change anyone's tokens


@dataclass(frozen=True)
class InpaintConfig:
    """IGPO's explorer. Paper form by default; the released code's variants are the other values."""

    eta_low: float = 0.2
    eta_high: float = 0.6  # eta_low = eta_high = 0 resamples without hints: sample-matched GRPO
    chunk_min: int = 5
    chunk_max: int = 10
    replace_fraction: float = 0.5  # lambda: at most floor(lambda * G) rows of a group are replaced
    entropy_filter: float = (
        0.2  # tau: fraction of hint tokens (highest entropy first) that enter the loss
    )
    layout: str = "original"  # or scaled (released code: hints spread over the canvas)
    trigger: str = "correctness"  # or total_reward: no correct row, and equal rewards
    replace_order: str = "random"  # or first (released code overwrites the first rows)
    exclude_answer: bool = (
        True  # False: hints may come from the whole trace; scaled: always its last chunk
    )


@dataclass(frozen=True)
class AlgorithmConfig:
    algorithm: str = "igpo"  # a key of igpo.rl.algorithms.ALGORITHMS
    num_generations: int = 8  # G
    num_iterations: int = 4  # mu: inner updates per rollout batch
    scale_rewards: str = "none"  # advantage: none (centred), group (z-score), loo (leave one out)
    likelihood: str = "mean_field"  # or random_mask, step_map
    p_mask_prompt: float = 0.0  # prompt tokens masked at random when scoring (diffu-GRPO: 0.15)
    min_mask_ratio: float = (
        0.0  # random_mask: of the first inner update (released code: 30 steps of 128)
    )
    num_slices: int = 4  # step_map: canvases scored per inner update
    # score; condition: hints stay visible and get no gradient; replay (step_map): hinted rows are scored left to right
    hint_mode: str = "score"
    importance_sampling_level: str = "sequence"  # or token
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None: epsilon
    beta: float = 0.01
    kl_estimator: str = "k3"
    loss_type: str = "grpo"  # grpo: sequence-mean; bnpo: token-mean; dr_grpo: constant L; released: the released code
    mask_after_eos: bool = (
        False  # True: score up to and including the first EOS (d1); False: the whole canvas (IGPO)
    )
    inpaint: InpaintConfig = field(default_factory=InpaintConfig)


@dataclass(frozen=True)
class RewardConfig:
    reward_funcs: tuple[str, ...] = ("correctness",)  # names in igpo.rewards, or "module:function"
    reward_weights: tuple[float, ...] = ()  # (): all 1


@dataclass(frozen=True)
class TrainConfig:
    output_dir: str = "runs/igpo"
    seed: int = 3
    max_steps: int = 100  # rollout batches; each gives num_iterations optimizer steps
    prompts_per_step: int = 64  # P
    per_device_train_batch_size: int = (
        8  # sequences per forward of the loss; does not change the gradient
    )
    learning_rate: float = 5e-7
    lr_scheduler_type: str = "constant_with_warmup"  # or constant, linear, cosine
    warmup_steps: int = 50
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 0.2
    gradient_checkpointing: bool = False  # keep the input of each layer alone, compute it again
    logging_steps: int = 1
    save_steps: int = 100
    save_total_limit: int | None = None
    eval_steps: int = 0  # 0: never during training
    resume_from_checkpoint: str | None = None  # a checkpoint folder, or "last"
    report_to: tuple[str, ...] = ("tensorboard",)  # beside JSONL, which is always written
    log_completions: bool = False
    num_threads: int = 0  # torch threads; 0: torch's default


@dataclass(frozen=True)
class SFTConfig:
    """Masked SFT (LLaDA, arXiv:2502.09992): a mask ratio t per example, cross-entropy of the masked tokens."""

    sft_weighting: str = "1/t"  # or L/l (l of L tokens are masked), or none
    sft_epsilon: float = 1e-3  # smallest t
    sft_batch_size: int = 64
    train_on_eos_padding: bool = (
        True  # the answer is EOS-padded to the canvas; that is how LLaDA learns to stop
    )


@dataclass(frozen=True)
class EvalConfig:
    eval_batch_size: int = 64
    eval_limit: int | None = None  # first rows only
    eval_temperature: float = 0.0
    num_eval_generations: int = 1


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rl: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)


# what a command takes beside the tree (docs/architecture.md, "Programs")


@dataclass(frozen=True)
class EvalOptions:
    predictions_file: str | None = None  # JSONL: every completion with its verdict


@dataclass(frozen=True)
class GenerateOptions:
    prompt: str | None = None  # one prompt, as typed
    prompt_file: str | None = None  # JSONL (prompt_column), or one prompt a line
    output_file: str | None = None  # JSONL; None: standard output
    num_samples: int = 1  # completions per prompt
    show_steps: bool = False  # show the canvas after every denoise step


@dataclass(frozen=True)
class TokenizerOptions:
    """`igpo tokenizer` takes these alone."""

    files: tuple[str, ...] = ()  # JSONL, or plain text
    columns: tuple[str, ...] = ("question", "answer")  # of the JSONL files
    vocab_size: int = 2048
    output_dir: str = "tokenizer"


@dataclass(frozen=True)
class DemoOptions:
    """`igpo demo` takes these alone."""

    out: str = "demo-out"  # folder of the figure, the page and the numbers
    from_scratch: bool = False  # True: pretrain the small model instead of loading it
    seed: int = 3
