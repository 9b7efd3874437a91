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
    # .jsonl, .csv or .parquet file, folder, hub id[:config][@split], gsm8k[@split] and other names, NAME=FILE
    train_file: str | None = None
    eval_file: str | None = None
    prompt_column: str = "question"
    trace_column: str | None = "answer"  # a worked solution; None: no hints
    answer_column: str | None = None  # None: what follows answer_marker in the trace
    answer_marker: str = "####"
    max_prompt_length: int = 256  # tokens; longer prompts are an error, never cut
    prompt_template: str = (
        "plain"  # the question alone; d1: that protocol's form; or a file with {question}
    )
    response_prefix: str | None = (
        None  # of the completion, already in the prompt; None: the template's
    )
    completion_format: str | None = None  # of traces: marker, tags, tags_raw; None: the template's
    streaming: bool = False  # read hub datasets as they arrive instead of storing them first


@dataclass(frozen=True)
class RolloutConfig:
    max_completion_length: int = 256
    block_length: int = 32
    diffusion_steps: int = 128  # over the whole completion: 2 tokens a step
    temperature: float = 1.2
    # or random; Dream's maskgit_plus, topk_margin, entropy, origin; remdm_conf, rcr (docs/sampling.md)
    remasking: str = "low_confidence"
    unmask_schedule: str = "even"  # or dream: floor(masked * (1 - s/t)) a step, the rest at the end
    alg_temp: float = 0.0  # Dream: positions are drawn, softmax(score / alg_temp); 0: the highest
    # beyond the schedule's number a step commits (one of the three at most) …
    threshold: float | None = None  # … all scores from here on (Fast-dLLM: 0.9)
    factor: float | None = None  # … n while (n + 1)(1 - score) <= factor (Fast-dLLM: 1)
    entropy_bound: float | None = None  # … while entropies sum to at most this, nats (EB-Sampler)
    # with threshold (KLASS: 0.01): only positions whose distribution moved by less, nats, at each of kl_history steps
    kl_threshold: float | None = None
    kl_history: int = 2  # steps (KLASS)
    suppress_tokens: tuple[int, ...] = ()
    # drawn, but committed last (LLaDA's confidence_eos_eot_inf: the ids of EOS and EOT)
    defer_tokens: tuple[int, ...] = ()
    cfg_scale: float = 0.0  # classifier-free guidance, two forwards a step; 0: none
    top_k: int = (
        0  # tokens a draw chooses from; 0: all. top_p, min_p: of softmax(logits / temperature)
    )
    top_p: float = 1.0
    min_p: float = 0.0  # times the largest probability
    record_support: bool = False  # keep these tokens' ids for every commit, to score over them
    early_stop: bool = True  # stop a sequence once a block of it is all EOS
    use_cache: bool = True  # block-causal models keep keys and values of finished blocks; exact
    # full attention: prefix or dual keep those of what is outside the current block (Fast-dLLM); approximate
    approximate_cache: str = "none"
    rollout_batch_size: int = 64  # sequences denoised at once; does not change anyone's tokens
    cuda_graphs: str = "auto"  # forwards replayed from graphs (docs/sampling.md); or on, off


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
class DrawsConfig:
    """How likelihoods choose what to mask. Each option is of the likelihoods its comment names."""

    num_draws: int = 2  # elbo…: Monte Carlo samples of an inner update; step_mc: denoise steps
    elbo_weighting: str = "L/l"  # elbo: or 1/t, of the same mean and diverging variance
    p_mask_clean: float = 0.15  # elbo_blocks: clean tokens hidden at random (SPG)
    num_slices: int = 4  # step_map: canvases scored per inner update
    shrink: int = 8  # slices: denoise steps merged into one canvas (TraceRL on LLaDA)
    step_proposal: str = "uniform"  # step_mc: or entropy
    likelihood_temperature: float = 1.0  # of the softmax that is scored (AGRPO: the rollout's)
    filtered_scoring: str = (
        "support"  # top_k, top_p, min_p: over what they kept; or ignore: over all
    )


@dataclass(frozen=True)
class MethodConfig:
    """Constants of single methods, with their published values where there are any (igpo/rl/presets.py)."""

    psi: float = 1.0  # wd1: weights softmax(psi A)
    alpha: float = 0.04  # DMPO: temperature of the target
    target_baseline: str = "negative"  # DMPO: or group, none
    upper_power: float = 1.5  # SPG: beta of the upper bound
    upper_mixture: float = 0.5  # SPG: share of the upper bound where A < 0
    behaviour_cap: float = 2.0  # DiFFPO: largest correction (ours: the paper's is not known to us)
    num_predictions: int = 8  # wd1++, MDPO: canvases of a rollout whose prediction is taken
    kept_predictions: int = 4  # MDPO: of these, trained on
    num_values: int = 2  # VinePPO, LINVIT: completions behind a value
    value_temperature: float = 0.25  # LINVIT: lambda (ours: rewards are 0 or 1)
    token_budget: int = 16384  # loss_type=budget (C3PO): tokens of an update (ours: 64 x 256)


@dataclass(frozen=True)
class CriticConfig:
    """The second network of tracerl_value, airl_s and diffpo_joint: a copy of the policy with a scalar head."""

    critic_name_or_path: str | None = None  # another model's folder or hub id instead of a copy
    critic_num_layers: int | None = None  # only the first of its layers; None: all
    critic_learning_rate: float = 5e-6  # TraceRL; all else of its optimizer is the policy's
    gamma: float = 1.0  # discount of a step
    gae_lambda: float = 1.0  # tracerl_value
    value_epsilon: float = 0.2  # tracerl_value: how far a value may move before its loss is clipped
    step_reward_weight: float = 1.0  # airl_s: of the steps' rewards, beside the completion's (ours)
    bound_std: float = 0.3  # diffpo_joint: of the log of a rollout's entropy_bound (ours)
    step_cost: float = 0.1  # diffpo_joint: taken from the reward when every step worked (ours)
    num_candidates: int = 1  # airl_s: fills of a block a rollout chooses from; 1: no search


@dataclass(frozen=True)
class AlgorithmConfig:
    algorithm: str = "igpo"  # a key of igpo.rl.algorithms.ALGORITHMS
    num_generations: int = 8  # G
    num_iterations: int = 4  # mu: inner updates per rollout batch
    scale_rewards: str = "none"  # advantage: none (centred), group (z-score), loo (leave one out)
    likelihood: str | None = (
        None  # None: the algorithm's own; or a key of igpo.rl.estimators.LIKELIHOODS
    )
    objective: str | None = None  # None: the algorithm's own; or a key of igpo.rl.parts.OBJECTIVES
    p_mask_prompt: float = 0.0  # prompt tokens masked at random when scoring (diffu-GRPO: 0.15)
    min_mask_ratio: float = (
        0.0  # random_mask: of the first inner update (released code: 30 steps of 128)
    )
    # score; condition: hints stay visible and get no gradient; replay (step_map): hinted rows are scored left to right
    hint_mode: str = "score"
    importance_sampling_level: str = "sequence"  # or token
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None: epsilon
    beta: float = 0.01
    kl_estimator: str = "k3"
    kl_level: str = "token"  # or sequence: of the summed log-probs (ESPO)
    kl_to: str = "reference"  # objective=clip_draws: or old (TraceRL)
    # grpo: sequence-mean; bnpo: token-mean; dr_grpo: constant L; budget: constant (C3PO); released: the released code
    loss_type: str = "grpo"
    approximate_rollouts: bool = False  # whether rollouts of an approximate_cache may be trained on
    mask_after_eos: bool = (
        False  # True: score up to and including the first EOS (d1); False: the whole canvas (IGPO)
    )
    constant_memory: bool = (
        True  # several draws: one graph at a time; False: all at once, faster when they fit
    )
    inpaint: InpaintConfig = field(default_factory=InpaintConfig)
    draws: DrawsConfig = field(default_factory=DrawsConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)


@dataclass(frozen=True)
class RewardConfig:
    reward_funcs: tuple[str, ...] = ("correctness",)  # names in igpo.rewards, or "module:function"
    reward_weights: tuple[float, ...] = ()  # (): all 1
    task: str = (
        "answer"  # what is correct; or gsm8k, math, countdown, sudoku, code, module:function
    )
    compat: str | None = None  # d1: the scorer of the d1 protocol, defects included
    verify_workers: int = 2  # processes that judge completions (every task but answer)
    verify_timeout_s: float = 10.0  # for one completion; then it is wrong, and counted


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
    packing: bool = False  # the sequences of a forward in one row without padding: same gradient
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
    # the canvas ends with the answer (block-causal models: with its block): shorter than that of a rollout
    drop_eos_padding: bool = False
    # block-causal models learn each block behind the finished ones before it (BD3-LM), at twice the tokens
    beside_clean: bool = True
    # packing: tokens of a row, one row a forward; None: what per_device_train_batch_size canvases hold at most
    max_packed_length: int | None = None


@dataclass(frozen=True)
class EvalConfig:
    eval_batch_size: int = 64
    eval_limit: int | None = None  # first rows only
    eval_temperature: float = 0.0
    num_eval_generations: int = 1
    eval_lengths: tuple[int, ...] = ()  # canvases igpo eval measures; (): max_completion_length


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
