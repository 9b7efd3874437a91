from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import padded
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from igpo.models import MaskedDecoder, MaskedDecoderConfig, load_model
from igpo.ops._head import head_logits
from igpo.types import Seed

VOCAB, MASK, EOS, PAD = 50, 49, 48, 47
KINDS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "one-key-head-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide-heads": {"head_dim": 20},
}


def config(**changes) -> MaskedDecoderConfig:
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
        "num_attention_heads": 4, "mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip
    return MaskedDecoderConfig(**(sizes | changes))


def decoder(**changes) -> MaskedDecoder:
    """Weights large enough (std 0.2) that positions and context matter, norms away from one."""
    model = MaskedDecoder.from_seed(config(**({"initializer_range": 0.2} | changes)), 5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.linspace(0.7, 1.3, len(parameter)))
    return model.eval()


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest) -> MaskedDecoder:
    return decoder(**KINDS[request.param])


def by_hand(model: MaskedDecoder, tokens: Tensor) -> Tensor:
    """Logits of one sequence from the parameters: heads in a loop, softmax written out, rotation by complex numbers."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    c = model.config

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weights[name]

    def turn(x: Tensor) -> Tensor:  # (T, d): channel i and i + d/2 are one complex number
        half = c.head_dim // 2
        speed = torch.tensor(
            [c.rope_theta ** (-2 * i / c.head_dim) for i in range(half)], dtype=torch.float64
        )
        angle = torch.arange(len(x))[:, None] * speed
        z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), dim=-1)

    x = weights["embed_tokens.weight"][tokens]
    for layer in range(c.num_hidden_layers):
        at = f"layers.{layer}."
        n = norm(x, at + "input_layernorm.weight")
        q, k, v = (n @ weights[f"{at}self_attn.{p}_proj.weight"].T for p in "qkv")
        heads = []
        for head in range(c.num_attention_heads):
            shared = head // (c.num_attention_heads // c.num_key_value_heads)
            mine = slice(head * c.head_dim, (head + 1) * c.head_dim)
            theirs = slice(shared * c.head_dim, (shared + 1) * c.head_dim)
            scores = turn(q[:, mine]) @ turn(k[:, theirs]).T / c.head_dim**0.5
            heads.append(scores.softmax(-1) @ v[:, theirs])
        x = x + torch.cat(heads, -1) @ weights[at + "self_attn.o_proj.weight"].T
        n = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (n @ weights[f"{at}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ weights[at + "mlp.down_proj.weight"].T
    head = weights.get("lm_head.weight", weights["embed_tokens.weight"])
    return norm(x, "norm.weight") @ head.T


def test_matches_the_equations(model: MaskedDecoder) -> None:
    tokens = torch.randint(0, VOCAB, (2, 11))
    truth = torch.stack([by_hand(model, row) for row in tokens])
    logits = model(tokens).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), truth, rtol=0, atol=2e-5)
    torch.testing.assert_close(model.double()(tokens).logits, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_leaks(model: MaskedDecoder, side: str) -> None:
    rows = [torch.randint(0, VOCAB, (n,)) for n in (9, 4, 1, 7)]
    tokens, mask = padded(rows, side, width=12, pad=PAD)
    hidden = model.hidden(tokens, mask)
    other = tokens.masked_fill(~mask, 3)
    assert torch.equal(model.hidden(other, mask)[mask], hidden[mask])
    for b, row in enumerate(rows):
        alone = model.hidden(row[None])[0]
        torch.testing.assert_close(hidden[b][mask[b]], alone, rtol=5e-6, atol=5e-6)
    exact = model.double().hidden(tokens, mask)
    for b, row in enumerate(rows):  # what is left in float32 is rounding
        alone = model.hidden(row[None])[0]
        torch.testing.assert_close(exact[b][mask[b]], alone, rtol=0, atol=1e-13)


def test_attends_to_both_sides() -> None:
    model, tokens = decoder(), torch.randint(0, VOCAB, (1, 8))
    before = model.hidden(tokens)
    for changed in (0, 7):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCAB
        assert (model.hidden(other) - before).abs().amax(-1).min() > 1e-4


def test_positions_count_columns_and_only_distances_matter() -> None:
    model, tokens = decoder(), torch.randint(0, VOCAB, (2, 8))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :3] = False
    positions = torch.arange(8).expand(2, 8)
    assert torch.equal(model.hidden(tokens, mask), model.hidden(tokens, mask, positions))
    shifted = model.hidden(tokens, mask, positions + 1000)
    torch.testing.assert_close(shifted[mask], model.hidden(tokens, mask)[mask], rtol=0, atol=1e-3)
    swapped = model.hidden(tokens, mask, positions.flip(-1))
    assert (swapped[mask] - model.hidden(tokens, mask)[mask]).abs().max() > 1e-2


def test_rows_of_padding_only_are_finite_and_so_are_gradients() -> None:
    model, tokens = decoder(), torch.randint(0, VOCAB, (3, 6))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1] = False
    output = model(tokens, mask)
    assert output.logits.isfinite().all()
    output.logits[mask].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_integer_attention_mask_means_the_same() -> None:
    model = decoder()
    tokens, mask = padded([torch.arange(5), torch.arange(3)], "left", 6, PAD)
    assert torch.equal(model.hidden(tokens, mask.long()), model.hidden(tokens, mask))


def test_logits_to_keep(model: MaskedDecoder) -> None:
    tokens = torch.randint(0, VOCAB, (3, 10))
    full = model(tokens)
    keep = torch.rand(3, 10) < 0.4
    some = model(tokens, logits_to_keep=keep)
    assert some.logits.shape == (int(keep.sum()), VOCAB)
    torch.testing.assert_close(some.logits, full.logits[keep], rtol=0, atol=1e-5)
    assert torch.equal(some.last_hidden_state, full.last_hidden_state)
    assert model(tokens, logits_to_keep=torch.zeros_like(keep)).logits.shape == (0, VOCAB)
    none = model(tokens, logits_to_keep=False)
    assert none.logits is None
    assert torch.equal(none.last_hidden_state, full.last_hidden_state)
    assert torch.equal(full.logits, head_logits(full.last_hidden_state, model.head_weight))


def test_logits_are_float32_of_bfloat16_weights() -> None:
    model, tokens = decoder().to(torch.bfloat16), torch.randint(0, VOCAB, (2, 7))
    output = model(tokens)
    assert output.last_hidden_state.dtype == torch.bfloat16
    assert output.logits.dtype == torch.float32
    exact = output.last_hidden_state.double() @ model.head_weight.double().T
    torch.testing.assert_close(output.logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_head_logits_add_the_bias() -> None:
    hidden, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    torch.testing.assert_close(head_logits(hidden, weight, bias), hidden @ weight.T + bias)


def test_weights_depend_on_config_and_seed_only() -> None:
    state = torch.get_rng_state()
    first = MaskedDecoder.from_seed(config(), 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = MaskedDecoder.from_seed(config(), Seed(5)), MaskedDecoder.from_seed(config(), 6)
    for (name, a), b, c in zip(
        first.state_dict().items(),
        again.state_dict().values(),
        other.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b), name
        assert "norm" in name or not torch.equal(a, c), name
    weight = MaskedDecoder.from_seed(config(hidden_size=256), 0).layers[0].self_attn
    assert weight.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert weight.o_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.02)


def test_saved_model_comes_back(model: MaskedDecoder, tmp_path: Path) -> None:
    tokens = torch.randint(0, VOCAB, (2, 9))
    model.save_pretrained(tmp_path)
    for loaded in (
        load_model(tmp_path),
        MaskedDecoder.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path),
        AutoModelForMaskedLM.from_pretrained(tmp_path),
    ):
        assert type(loaded) is MaskedDecoder
        assert not loaded.training
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        assert {**loaded.config.to_dict(), "architectures": 0, "dtype": 0, "_name_or_path": 0} == {
            **model.config.to_dict(), "architectures": 0, "dtype": 0, "_name_or_path": 0,
        }  # fmt: skip
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(model.state_dict())
    assert ("lm_head.weight" in stored) != model.config.tie_word_embeddings
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MaskedDecoderConfig)


def test_load_model_keeps_or_changes_the_dtype(tmp_path: Path) -> None:
    decoder().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path).head_weight.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).head_weight.dtype == torch.float32


def test_load_model_refuses_what_is_not_the_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"got '.*nowhere': there is no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        load_model(tmp_path)
    decoder().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")

    def save(change: dict) -> None:
        merged = {k: v for k, v in (weights | change).items() if v is not None}
        save_file(merged, tmp_path / "model.safetensors", {"format": "pt"})

    for change, message in (
        ({"norm.weight": None}, r"missing: norm\.weight"),
        ({"extra.weight": torch.ones(2)}, r"unknown: extra\.weight"),
        ({"norm.weight": torch.ones(33)}, r"of another shape: .*norm\.weight"),
    ):
        save(change)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"model_type": "llada"}))
    with pytest.raises(
        ValueError, match=r"must be one of igpo_decoder, .*; got llada/MaskedDecoder"
    ):
        load_model(tmp_path)


def test_lora_trains_adapters_only() -> None:
    peft = pytest.importorskip("peft")
    base, tokens = decoder(), torch.randint(0, VOCAB, (2, 6))
    before = base.hidden(tokens)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=names, lora_dropout=0.0))
    assert torch.equal(model.hidden(tokens), before)
    logits = head_logits(model.hidden(tokens), model.head_weight, model.head_bias)
    logits.square().mean().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 7 * 2
    assert all("lora_" in name for name in trained)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(trained)
    assert all(g.abs().sum() > 0 for n, g in grads.items() if "lora_B" in n)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(model.hidden(tokens), before)
    with model.disable_adapter():
        assert torch.equal(model.hidden(tokens), before)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    tokens, mask = padded([torch.arange(9), torch.arange(4)], "left", 10, PAD)

    def gradients(model: MaskedDecoder) -> list[Tensor]:
        model.train()(tokens, mask, logits_to_keep=mask).logits.square().mean().backward()
        return [p.grad for p in model.parameters()]

    plain, recomputed = decoder(), decoder()
    enable = getattr(recomputed, "activation_checkpointing_enable", None)
    (enable or recomputed.gradient_checkpointing_enable)({"use_reentrant": False})
    calls = []
    recomputed.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert all(map(torch.equal, gradients(recomputed), gradients(plain)))
    assert len(calls) == 2  # the forward ran again in the backward pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 30}, "num_attention_heads must divide hidden_size=30, got 4"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads must divide num_attention_heads=4, got 3",
        ),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"mask_token_id": VOCAB}, r"mask_token_id must be in \[0, 50\), got 50"),
        (
            {"eos_token_id": MASK},
            "mask_token_id must differ from eos_token_id and pad_token_id, got 49",
        ),
    ],
)
def test_config_rejects_what_does_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_decoder_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match=r"config\.mask_token_id must be set, got None"):
        MaskedDecoder(config(mask_token_id=None))
    model, tokens = decoder(), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"tokens must have shape \(B, T\), got shape \(3,\)"):
        model.hidden(tokens[0])
    with pytest.raises(
        ValueError,
        match=r"attention_mask must have the shape of tokens, \(2, 3\), got shape \(2, 2\)",
    ):
        model.hidden(tokens, torch.ones(2, 2))
    with pytest.raises(
        ValueError, match=r"logits_to_keep must be .* got shape \(2, 3\), torch.int64"
    ):
        model(tokens, logits_to_keep=tokens)
