"""Models of transformers with the interface of evenstep's LLaMA: what is accepted, and what they compute."""

import json

import pytest
import torch
from torch.nn import functional as F

from evenstep.errors import EvenstepError
from evenstep.models import generate
from evenstep.models.hub import HubShape, check_causal

pytest.importorskip("transformers")

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 16,
}  # fmt: skip


def shape(kind, **more):
    return HubShape("config.json", json.dumps({"model_type": kind, **TINY, **more}))


def built(kind, **more):
    torch.manual_seed(0)
    return shape(kind, **more).build()


def rows():
    tokens = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def test_the_loss_is_the_cross_entropy_of_the_models_logits():
    model = built("llama").eval()
    x, y = rows()
    expected = F.cross_entropy(model.net(input_ids=x).logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(model.loss(x, y), expected)
    torch.testing.assert_close(model.loss(x, y, reduction="sum"), expected * y.numel())
    loss, z_loss = model.loss(x, y, z_loss=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z_loss, 0.1 * model(x).logsumexp(-1).square().mean())


@pytest.mark.parametrize("z_loss", [None, 0.1])
def test_experts_are_balanced_where_the_configuration_says_so(z_loss):
    """The value stays the cross entropy, and the gradient is of both."""
    experts = {"num_local_experts": 4, "num_key_value_heads": 2, "router_aux_loss_coef": 0.5}
    balanced, plain = built("mixtral", output_router_logits=True, **experts), built("mixtral", **experts)
    x, y = rows()
    values = [model.loss(x, y, z_loss=z_loss) for model in (balanced, plain)]
    torch.testing.assert_close(*values)
    for value in values:
        value.sum().backward()
    router = next(name for name, _ in plain.named_parameters() if "gate.weight" in name)
    one, other = (dict(model.named_parameters())[router].grad for model in (balanced, plain))
    aux = torch.autograd.grad(balanced.net(input_ids=x).aux_loss, balanced.get_parameter(router))[0]
    torch.testing.assert_close(one - other, 0.5 * aux, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(balanced.loss(x, y), plain.loss(x, y))


def test_the_vocabulary_is_that_of_the_tokenizer_and_no_token_is_padding():
    made = shape("llama", vocab_size=32000, pad_token_id=31999, eos_token_id=2).with_vocabulary(50)
    model = made.build()
    table = model.net.get_input_embeddings()
    assert made.vocab_size == table.num_embeddings == 50 and table.padding_idx is None
    assert model.net.config.eos_token_id is None


def test_bf16_leaves_the_rotary_frequencies_alone():
    model = shape("llama").build(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.net.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_it_generates_beyond_its_positions(kind):
    model = built(kind, n_positions=16, state_size=4).eval()
    new = generate(model, [1, 2, 3], 20, temperature=0)
    assert len(new) == 20
    with torch.no_grad():
        assert new[0] == model(torch.tensor([[1, 2, 3]]))[0, -1].argmax()


@pytest.mark.parametrize(
    "facts, words",
    [
        ({"model_type": "t5"}, "is an encoder-decoder .t5.; give a causal language model, such as llama"),
        ({"model_type": "vit"}, "type vit, which generates no text; give a causal language model"),
        ({"model_type": "lama"}, "has no model of type 'lama'.*did you mean 'llama'"),
        ({"model_type": "gemma3"}, "type gemma3, which has more parts than a language model.*text_config"),
        ({"hidden_size": 8}, "has no model_type"),
        ([], "has no model_type"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_in_one_line(facts, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(EvenstepError, match=words) as problem:
        HubShape.read(tmp_path)
    assert "\n" not in str(problem.value)


def test_a_file_that_is_missing_or_broken_is_refused_in_one_line(tmp_path):
    with pytest.raises(EvenstepError, match=r"there is no file .*config\.json; give the config\.json"):
        HubShape.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EvenstepError, match=r"config\.json cannot be read"):
        HubShape.read(tmp_path / "config.json")
    with pytest.raises(EvenstepError, match=r"transformers (refuses|cannot build) config\.json"):
        shape("llama", num_attention_heads=3, head_dim=None, hidden_size=32).build()


def test_an_encoder_is_refused_in_one_line():
    with pytest.raises(EvenstepError, match=r"c\.json is a BertLMHeadModel, an encoder.*give a causal"):
        check_causal(built("bert"), "c.json")
    check_causal(built("bert", is_decoder=True), "c.json")
    check_causal(built("mixtral", num_local_experts=4, num_key_value_heads=2), "c.json")


def test_operations_are_those_of_the_same_llama():
    from evenstep.models import Llama, LlamaConfig

    ours = Llama(LlamaConfig(64, 32, 48, 2, 2, max_seq_len=16))
    norms = 6 * 32 * (2 * 2 + 1)  # our own count leaves the norms out
    assert built("llama").flops_per_token(16) == ours.flops_per_token(16) + norms
    tied = built("llama", tie_word_embeddings=True)
    assert tied.flops_per_token(16) == ours.flops_per_token(16) + norms
    # Each token is sent to two experts.
    experts = [built("mixtral", num_local_experts=n, num_key_value_heads=2).flops_per_token(16) for n in (2, 4)]
    assert experts[1] - experts[0] == 6 * 2 * 2 * 32  # the rows of the routers alone
