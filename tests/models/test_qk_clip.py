"""QK-clip: the largest logit of a clipped head is the threshold, and other heads keep theirs to the bit."""

import pytest
import torch

from evenstep.errors import EvenstepError
from evenstep.models import max_attention_logits, qk_clip
from evenstep.models.ops import rotate
from tests.models.test_llama import batch, small

SHAPES = [{}, {"kv_heads": 2}, {"norm": "post"}]


def every_logit(model, tokens):
    """The largest causal logit of each head by the plain formula in float64, from the inputs of the projections."""
    inputs = []
    handles = [
        b.self_attn.q_proj.register_forward_pre_hook(lambda _, x: inputs.append(x[0])) for b in model.model.layers
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    cos, sin = model.model._rotation(torch.arange(tokens.shape[1]))
    seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    found = []
    for block, x in zip(model.model.layers, inputs, strict=True):
        attention = block.self_attn
        heads = [(x @ p.weight.T).view(*tokens.shape, -1, 8) for p in (attention.q_proj, attention.k_proj)]
        if attention.q_norm is not None:
            heads = [attention.q_norm(heads[0]), attention.k_norm(heads[1])]
        q, k = (rotate(h, cos, sin).double().transpose(1, 2) for h in heads)
        logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) / 8**0.5
        found.append(logits[:, :, seen].amax((0, 2)))
    return torch.stack(found)


@pytest.mark.parametrize("shape", [*SHAPES, {"qk_norm": True}])
def test_the_largest_logit_of_every_head_is_found(shape):
    model, (tokens, _) = small(**shape), batch()
    exact = every_logit(model, tokens)
    found = max_attention_logits(model, tokens, queries=99)
    assert found.shape == (3, 4) and not found.requires_grad
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert (max_attention_logits(model, tokens, queries=3) <= found + 1e-5).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_clipped_head_reaches_the_threshold_and_no_other_moves(shape):
    """In the first block alone, since the inputs of later blocks change with it."""
    model, (tokens, _) = small(**shape), batch()
    before = max_attention_logits(model, tokens, queries=99)
    tau = before[0].sort().values[1:3].mean().item()  # between the second and the third head
    state = {name: p.clone() for name, p in model.named_parameters()}
    gamma = qk_clip(model, before, tau)
    after = max_attention_logits(model, tokens, queries=99)
    large = before[0] > tau
    assert large.sum() == 2 and torch.equal(gamma < 1, before > tau)
    torch.testing.assert_close(after[0][large], torch.full((2,), tau), rtol=1e-5, atol=0)
    torch.testing.assert_close(after[0][~large], before[0][~large], rtol=1e-6, atol=0)
    q, old = (x.view(4, 8, 32) for x in (model.model.layers[0].self_attn.q_proj.weight, state[Q]))
    assert torch.equal(q[~large], old[~large])
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters() if "q_proj" not in n and "k_proj" not in n)


Q = "model.layers.0.self_attn.q_proj.weight"


def test_below_the_threshold_nothing_changes():
    model, (tokens, _) = small(), batch()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert (qk_clip(model, max_attention_logits(model, tokens), tau=1e6) == 1).all()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_wrong_arguments_are_one_clear_line():
    with pytest.raises(EvenstepError, match="tau is 0: it must be a positive number"):
        qk_clip(small(), torch.ones(3, 4), tau=0)
    with pytest.raises(EvenstepError, match=r"max_logits has shape \[4\]: it must be \[layers, heads\], \[3, 4\]"):
        qk_clip(small(), torch.ones(4))
    with pytest.raises(EvenstepError, match="no effect on a model with QK-norm"):
        qk_clip(small(qk_norm=True), torch.ones(3, 4))
