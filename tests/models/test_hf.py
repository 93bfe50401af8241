"""Weights go to Hugging Face's layout and back, and mean the same model there: equal logits, equal gradients."""

import json
import sys

import pytest
import torch

from evenstep.errors import EvenstepError
from evenstep.models import Llama, LlamaConfig, load_pretrained, save_pretrained
from evenstep.models.hf import read_shape
from tests.models.test_llama import batch, grads, small

pytest.importorskip("safetensors")

# Values other than every default, so that one left out of config.json shows.
SHAPE = {"norm_eps": 1e-3, "rope_theta": 100.0, "max_seq_len": 24}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def their_model(transformers, **changes):
    torch.manual_seed(5)
    config = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "rms_norm_eps": 1e-3,
        "initializer_range": 0.2,
        **changes,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
    return model


def saved(tmp_path, **changes):
    save_pretrained(small(**changes), tmp_path)
    return tmp_path


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_transformers_computes_our_logits_from_our_files(transformers, tmp_path):
    model = small(**SHAPE)
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.config.eos_token_id is None
    assert list(theirs.state_dict()) == list(model.state_dict())
    tokens, _ = batch()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-5)


def test_we_compute_their_logits_and_gradients_from_their_files(transformers, tmp_path):
    theirs = their_model(transformers)
    theirs.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    assert model.config.norm_eps == 1e-3 and model.config.max_seq_len == 24
    tokens, targets = batch()
    logits = theirs(tokens).logits
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    want = {name: p.grad for name, p in theirs.named_parameters()}
    for chunk in (None, 5):
        for name, g in grads(model, model.loss(tokens, targets, chunk=chunk)).items():
            torch.testing.assert_close(g, want[name], rtol=1e-3, atol=1e-5)


def test_qk_norm_is_that_of_qwen3_in_both_directions(transformers, tmp_path):
    model = small(qk_norm=True, **SHAPE)
    tokens, targets = batch()
    save_pretrained(model, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    assert model.config.qk_norm and model.config.rope_theta == 100.0
    logits = theirs(tokens).logits
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    want = {name: p.grad for name, p in theirs.named_parameters()}
    for name, g in grads(model, model.loss(tokens, targets)).items():
        torch.testing.assert_close(g, want[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_grouped_queries_and_a_tied_head_are_those_of_transformers(transformers, qk_norm, tmp_path):
    model = small(qk_norm=qk_norm, kv_heads=2, tie_embeddings=True, **SHAPE)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    tokens, targets = batch()
    logits = theirs(tokens).logits
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    want = {name: p.grad for name, p in theirs.named_parameters()}
    got = grads(model, model.loss(tokens, targets))
    assert got.keys() == want.keys() and "lm_head.weight" not in got
    for name, g in got.items():
        torch.testing.assert_close(g, want[name], rtol=1e-3, atol=1e-5)
    again = load_pretrained(tmp_path)
    assert again.config == model.config and again.lm_head.weight is again.model.embed_tokens.weight


GALORE = {
    "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
    "hidden_size": 32, "intermediate_size": 44, "initializer_range": 0.02, "max_sequence_length": 1024,
    "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 3, "pad_token_id": -1,
    "rms_norm_eps": 1e-06, "transformers_version": "4.28.1", "use_cache": True, "vocab_size": 61,
}  # fmt: skip


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def test_a_published_configuration_file_is_the_shape_of_a_new_model(tmp_path):
    shape = read_shape(write_json(tmp_path / "llama_tiny.json", GALORE))
    assert shape == LlamaConfig(61, 32, 44, 3, 4, max_seq_len=1024, norm_eps=1e-6, init_std=0.02)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_a_configuration_of_transformers_has_the_parameters_of_its_model(transformers, name, tmp_path):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip
    config.to_json_file(tmp_path / "c.json")
    theirs = getattr(transformers, f"{name}ForCausalLM")(config)
    ours = Llama(read_shape(tmp_path / "c.json"))
    ours.load_state_dict(theirs.state_dict())
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    tokens, _ = batch()
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_dropout": 0.1}, "sets attention_dropout to 0.1, which this LLaMA does not have"),
        ({"embedding_multiplier": 12.0}, "sets embedding_multiplier to 12.0"),
        ({"attention_bias": True}, "uses attention_bias, which this LLaMA does not have"),
        ({"hidden_act": "gelu"}, "uses hidden_act 'gelu'"),
        ({"model_type": "gemma2"}, "holds a model of type 'gemma2'"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(change, words, tmp_path):
    with pytest.raises(EvenstepError) as caught:
        read_shape(write_json(tmp_path / "c.json", GALORE | change))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(EvenstepError, match=r"there is no file .*nothing\.json"):
        read_shape(tmp_path / "nothing.json")


def test_a_qwen3_of_another_shape_is_refused(tmp_path):
    saved(tmp_path, qk_norm=True)
    for change, words in (({"head_dim": None}, "head_dim"), ({"use_sliding_window": True}, "sliding-window attention")):
        before = (tmp_path / "config.json").read_text()
        edit_config(tmp_path, **change)
        with pytest.raises(EvenstepError, match=f"uses .*{words}"):
            load_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(before)


def test_sharded_and_tied_models_load(transformers, tmp_path):
    theirs = their_model(transformers, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load_pretrained(tmp_path)
    tokens, _ = batch()
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_a_config_of_an_older_transformers_loads(tmp_path):
    saved(tmp_path, rope_theta=100.0)
    edit_config(tmp_path, rope_scaling=None, head_dim=None)
    assert load_pretrained(tmp_path).config.rope_theta == 100.0


SOFTCAPS = {"attention_softcap": 2.5, "logit_softcap": 0.5}


@pytest.mark.parametrize("name", SOFTCAPS)
def test_models_with_a_softcap_are_kept_under_a_type_of_our_own(transformers, name, tmp_path):
    model = small(**{name: SOFTCAPS[name]}, qk_norm=True, **SHAPE)
    save_pretrained(model, tmp_path)
    assert load_pretrained(tmp_path).config == model.config
    with pytest.raises(ValueError, match="evenstep_llama"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_softcapped_attention_is_that_of_gemma_2(transformers):
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    from evenstep.models.ops import softcapped_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, dtype=torch.float64).mul_(3).requires_grad_() for _ in range(3))
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    module = torch.nn.Module()
    module.num_key_value_groups = 1
    added = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    theirs, _ = eager_attention_forward(module, q, k, v, added, dropout=0.0, scaling=8**-0.5, softcap=2.5)
    want = torch.autograd.grad(theirs.square().sum(), (q, k, v))
    ours = softcapped_attention(q, k, v, 2.5, seen)
    torch.testing.assert_close(ours.transpose(1, 2), theirs, rtol=1e-6, atol=1e-6)  # both have softmax in fp32
    for got, wanted in zip(torch.autograd.grad(ours.square().sum(), (q, k, v)), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["pre", "post", "mix"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_round_trip_is_exact(norm, qk_norm, dtype, tmp_path):
    model = small(norm=norm, norm_alpha=0.7, qk_norm=qk_norm, **SHAPE).to(dtype)
    save_pretrained(model, tmp_path / "new" / "place")
    again = load_pretrained(tmp_path / "new" / "place")
    assert again.config == model.config or (
        norm == "pre" and again.config.qk_norm == qk_norm
    )  # norm_alpha means nothing to a Pre-LN model and is not kept
    assert all(
        torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert all(p.requires_grad for p in again.parameters())
    assert torch.equal(model(batch()[0]), again(batch()[0]))


def test_post_norm_models_do_not_open_as_something_else(transformers, tmp_path):
    saved(tmp_path)  # a Pre-LN model that was there before is replaced, not left beside
    saved(tmp_path, norm="post")
    with pytest.raises(ValueError, match="evenstep_llama"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "holds a model of type 'gpt2': only 'llama' can be loaded, and 'qwen3' of its"),
        ({"head_dim": 16}, "uses a head_dim other than"),
        ({"attention_bias": True}, "uses attention_bias"),
        ({"mlp_bias": True}, "uses mlp_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "uses scaled rotary positions"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "uses scaled rotary positions"),
        ({"hidden_act": "gelu"}, "uses hidden_act 'gelu'"),
        ({"intermediate_size": 40}, "mlp.gate_proj.weight has shape [44, 32] where config.json asks for [40, 32]"),
        ({"num_hidden_layers": 4}, "model.layers.3.self_attn.q_proj.weight is missing (and 8 more)"),
        ({"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight is not part of the model (and 8 more)"),
    ],
)
def test_what_we_do_not_have_is_one_clear_line(changes, words, tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(EvenstepError) as caught:
        load_pretrained(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_broken_files_are_one_clear_line(tmp_path):
    with pytest.raises(EvenstepError, match=r"there is no .*config\.json: give a directory"):
        load_pretrained(tmp_path / "nowhere")
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(EvenstepError, match=r"cannot read .*model\.safetensors"):
        load_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(EvenstepError, match=r"there is no .*model\.safetensors: the model in .* is incomplete"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EvenstepError, match=r"cannot read .*config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(EvenstepError, match="has no 'vocab_size'"):
        load_pretrained(tmp_path)


def test_config_is_written_last(tmp_path, monkeypatch):
    saved(tmp_path)
    import safetensors.torch

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(small(seed=1), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_without_safetensors_the_pip_line_is_said(tmp_path, monkeypatch):
    saved(tmp_path)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: load_pretrained(tmp_path), lambda: save_pretrained(small(), tmp_path)):
        with pytest.raises(EvenstepError, match=r"pip install 'evenstep\[train\]'"):
            call()
    assert (tmp_path / "model.safetensors").exists()
