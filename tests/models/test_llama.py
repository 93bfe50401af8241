"""The model's promises: names, causality, seeded initialisation, checkpointing to the bit, counted sizes."""

import math
import subprocess
import sys
from itertools import product

import pytest
import torch

from evenstep.errors import EvenstepError
from evenstep.models import SIZES, Llama, LlamaConfig, llama_config, ops
from evenstep.models.ops import _rotate, rms_norm, rotate

SMALL = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=44, num_layers=3, num_heads=4, max_seq_len=16)


def small(seed: int = 0, **changes) -> Llama:
    """A small model whose norm weights are not one, so that a norm that is skipped or misplaced shows."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**{**SMALL.__dict__, "init_std": 0.2, **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
    return model


def batch(vocab: int = 61, shape: tuple[int, int] = (2, 12)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(vocab, (shape[0], shape[1] + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def grads(model: Llama, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_importing_the_models_needs_torch_only():
    code = (
        "import sys, evenstep.models;"
        "print(sorted({'safetensors', 'transformers', 'torch._dynamo', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""


def test_names_and_shapes_are_hugging_faces():
    want = {"model.embed_tokens.weight": (61, 32), "model.norm.weight": (32,), "lm_head.weight": (61, 32)}
    for i in range(3):
        block = f"model.layers.{i}."
        want |= {f"{block}self_attn.{x}_proj.weight": (32, 32) for x in "qkvo"}
        want |= {f"{block}mlp.{x}_proj.weight": (44, 32) for x in ("gate", "up")} | {
            f"{block}mlp.down_proj.weight": (32, 44),
            f"{block}input_layernorm.weight": (32,),
            f"{block}post_attention_layernorm.weight": (32,),
        }
    assert {name: tuple(t.shape) for name, t in Llama(SMALL).state_dict().items()} == want


@pytest.mark.parametrize("norm", ["pre", "post", "mix"])
def test_a_later_token_never_changes_an_earlier_logit(norm):
    model = small(norm=norm, norm_alpha=0.5)
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


def test_initialisation_is_seeded_normal_with_std_0_02():
    torch.manual_seed(3)
    a = Llama(llama_config("tiny", 512))
    torch.manual_seed(3)
    b = Llama(llama_config("tiny", 512))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        if "norm" in name:
            assert (p == 1).all()
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.03), name
            assert abs(p.mean().item()) < 0.001, name
    tokens, targets = batch(512)
    assert a.loss(tokens, targets).item() == pytest.approx(math.log(512), abs=0.1)


def test_built_on_meta_and_initialised_later_it_is_the_same_model():
    torch.manual_seed(1)
    plain = Llama(SMALL)
    with torch.device("meta"):
        model = Llama(SMALL)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(1)
    plain.init_weights()
    torch.manual_seed(1)
    model.init_weights()
    tokens, _ = batch()
    assert torch.equal(model(tokens), plain(tokens))


def test_norm_places_the_norms():
    config = LlamaConfig(**{**SMALL.__dict__, "num_layers": 12, "norm": "mix"})
    assert [b.post_norm for b in Llama(config).model.layers] == [True] * 3 + [False] * 9
    assert LlamaConfig(**{**config.__dict__, "num_layers": 5}).num_post_norm == 1  # floor of 1.25
    assert LlamaConfig(**{**config.__dict__, "num_layers": 100, "norm_alpha": 0.29}).num_post_norm == 29
    assert LlamaConfig(**{**config.__dict__, "norm": "post"}).num_post_norm == 12

    block = small(norm="post").model.layers[0]
    x = torch.randn(2, 5, 32)
    cos, sin = small().model._rotation(torch.arange(5))
    y = block.input_layernorm(x + block.self_attn(x, cos, sin))
    assert torch.equal(block(x, cos, sin), block.post_attention_layernorm(y + block.mlp(y)))


@pytest.mark.parametrize("norm", ["pre", "mix"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_activation_checkpointing_changes_no_bit(norm, chunk):
    model = small(norm=norm)
    plain = grads(model, model.loss(*batch(), chunk=chunk))
    calls = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing = True
    again = grads(model, model.loss(*batch(), chunk=chunk))
    handle.remove()
    assert len(calls) == 2  # once forward, once recomputed
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_fast_forms_equal_the_plain_formulas():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 8, requires_grad=True)
    cos, sin = Llama(SMALL).model._rotation(torch.arange(2, 7))
    weight = torch.rand(8).requires_grad_()
    grad = torch.randn_like(x)

    def plain_norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    for fast, plain, inputs in (
        (lambda x, w: rms_norm(x, w, 1e-3), plain_norm, (x, weight)),
        (lambda x: rotate(x, cos, sin), lambda x: _rotate(x, cos, sin), (x,)),
    ):
        got, want = fast(*inputs), plain(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_second_derivatives_through_the_fast_forms_are_refused_not_wrong():
    x = torch.randn(2, 8, requires_grad=True)
    (first,) = torch.autograd.grad(rms_norm(x, torch.ones(8), 1e-6).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_bf16_and_autocast_follow_fp32():
    tokens, targets = batch()
    want = small().loss(tokens, targets).item()
    for chunk in (None, 5):
        model = small().bfloat16()
        loss = model.loss(tokens, targets, chunk=chunk)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want, rel=0.02)
        assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in grads(model, loss).values())
        model = small()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(tokens).dtype == torch.bfloat16
            loss = model.loss(tokens, targets, chunk=chunk)
            assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want, rel=0.02)
            inside = grads(model, loss)
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in inside.values())


@pytest.mark.parametrize("chunk", [None, 8])
def test_a_block_compiles_into_one_graph(chunk):
    model, compiled = small(norm="mix"), small(norm="mix")
    for block in compiled.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    assert list(compiled.state_dict()) == list(model.state_dict())
    want, got = model.loss(*batch(), chunk=chunk), compiled.loss(*batch(), chunk=chunk)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    other = grads(compiled, got)
    for name, g in grads(model, want).items():
        torch.testing.assert_close(other[name], g, rtol=1e-3, atol=1e-5)


def test_sizes_hold_what_their_names_say():
    for name in SIZES:
        with torch.device("meta"):
            model = Llama(llama_config(name, 32000))
        count = model.num_parameters()
        assert count == sum(p.numel() for p in model.parameters())
        assert model.num_parameters(embeddings=False) == count - 2 * 32000 * model.config.hidden_size
        if name != "tiny":
            number, unit = float(name[:-1]), {"m": 1e6, "b": 1e9}[name[-1]]
            assert count == pytest.approx(number * unit, rel=0.35 if unit == 1e9 else 0.06), name
    assert list(SIZES) == ["tiny", *(f"{m}m" for m in (9, 20, 35, 40, 60, 71, 100, 130, 250, 350)), "1b", "3b", "7b"]
    with torch.device("meta"):
        assert 1e6 < Llama(llama_config("tiny", 2048)).num_parameters() < 2e6


def test_flops_per_token_follow_the_formula():
    model = small()
    matrices = 3 * (4 * 32 * 32 + 3 * 32 * 44) + 61 * 32
    assert model.flops_per_token(16) == 6 * matrices + 12 * 3 * 32 * 16
    assert matrices == sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "mid"}, "norm is 'mid': choose one of pre, post, mix"),
        ({"norm_alpha": 1.5}, "norm_alpha is 1.5: it must be between 0 and 1"),
        ({"num_heads": 5}, "hidden_size 32 does not split into 5 heads of even width: make it a multiple of 10"),
        ({"num_heads": 32}, "make it a multiple of 64"),
        ({"vocab_size": 0}, "vocab_size is 0: it must be a whole number of at least 1"),
        ({"num_layers": 2.0}, "num_layers is 2.0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0: it must be a positive number"),
        ({"qk_norm": 1}, "qk_norm is 1: it must be True or False"),
        ({"tie_embeddings": None}, "tie_embeddings is None: it must be True or False"),
        ({"kv_heads": 3}, "kv_heads 3 does not divide the 4 heads: give a divisor"),
        ({"kv_heads": 0}, "kv_heads is 0: it must be a whole number of at least 1"),
        ({"attention_softcap": 0}, "attention_softcap is 0: it must be a positive number"),
        ({"logit_softcap": -1.0}, "logit_softcap is -1.0: it must be a positive number"),
    ],
)
def test_a_shape_that_does_not_fit_is_one_clear_line(changes, words):
    with pytest.raises(EvenstepError) as caught:
        LlamaConfig(**{**SMALL.__dict__, **changes})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(EvenstepError, match=r"unknown model size '130': .*did you mean '130m'"):
        llama_config("130", 100)
    with pytest.raises(EvenstepError, match=r"unknown model field 'norm_apha': .*did you mean 'norm_alpha'"):
        llama_config("tiny", 100, norm_apha=0.5)


# ---- soft-caps ----


def test_a_large_softcap_changes_nothing_and_a_small_one_bounds_the_logits():
    tokens, targets = batch()
    plain, wide = small(), small(attention_softcap=1e6, logit_softcap=1e6)
    torch.testing.assert_close(wide(tokens), plain(tokens), rtol=0, atol=1e-4)
    narrow = small(logit_softcap=0.5)
    assert narrow(tokens).abs().max() <= 0.5 < plain(tokens).abs().max()
    torch.testing.assert_close(narrow(tokens), 0.5 * torch.tanh(plain(tokens) / 0.5))
    assert not torch.allclose(small(attention_softcap=0.1)(tokens), plain(tokens), atol=1e-2)
    for model in (wide, narrow):  # the chunked loss has the same logits
        torch.testing.assert_close(model.loss(tokens, targets, chunk=5), model.loss(tokens, targets))


def test_softcapped_attention_is_causal_and_keeps_documents_apart():
    model = small(attention_softcap=1.0)
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 8:] = 3
    assert torch.equal(model(tokens)[:, :8], model(changed)[:, :8])
    packed = model(tokens, positions=torch.tensor([[*range(5), *range(7)]] * 2))
    torch.testing.assert_close(packed[:, 5:], model(tokens[:, 5:]), rtol=0, atol=1e-5)


CHOICES = {
    "qk_norm": (False, True), "attention_softcap": (None, 1.0), "logit_softcap": (None, 2.0), "kv_heads": (4, 2),
    "tie_embeddings": (False, True), "norm": ("pre", "post"),
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [dict(zip(CHOICES, one, strict=True)) for one in product(*CHOICES.values())], ids=str
)
def test_every_combination_of_options_has_the_gradients_of_plain_operators(options, monkeypatch):
    tokens, targets = batch()
    model = small(**options)
    found = []
    for eager in (True, False):
        if not eager:
            monkeypatch.setattr(ops, "_eager_cpu", lambda *tensors: False)
        found.append(torch.autograd.grad(model.loss(tokens, targets, z_loss=1e-3).sum(), [*model.parameters()]))
    for name, ours, plain in zip(dict(model.named_parameters()), *found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")


# ---- grouped queries and a tied head ----


def test_grouped_queries_are_those_of_repeated_keys_with_and_without_a_softcap():
    tokens, _ = batch()
    for cap in (None, 1.0):
        grouped, whole = small(kv_heads=2, attention_softcap=cap), small(attention_softcap=cap)
        state = grouped.state_dict()
        for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1)  # [groups, head, hidden]
        whole.load_state_dict(state)
        torch.testing.assert_close(grouped(tokens), whole(tokens), rtol=0, atol=1e-5)


def test_a_tied_model_counts_its_table_once():
    tied, plain = small(tie_embeddings=True), small()
    assert plain.num_parameters() - tied.num_parameters() == 61 * 32
    assert plain.num_parameters(embeddings=False) == tied.num_parameters(embeddings=False)
    matrices = sum(m.weight.numel() for m in small(kv_heads=2).modules() if isinstance(m, torch.nn.Linear))
    assert small(kv_heads=2).flops_per_token(16) == 6 * matrices + 12 * 3 * 32 * 16
