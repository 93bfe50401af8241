"""Generation: the cache changes the cost, not the text; drawing is seeded; the context never outgrows the model."""

import pytest
import torch

from evenstep.errors import EvenstepError
from evenstep.models import generate
from tests.models.test_llama import batch, small


def uncached(model, tokens, count):
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[-count:]


def watch(model):
    """Record the number of tokens of every pass through the model."""
    widths = []
    model.model.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    return widths


@pytest.mark.parametrize("norm", ["pre", "mix"])
@pytest.mark.parametrize(
    "variant", [{}, {"qk_norm": True}, {"attention_softcap": 1.0, "logit_softcap": 2.0, "kv_heads": 2}]
)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_equals_decoding_without_a_cache(norm, variant, seed):
    model = small(seed, norm=norm, max_seq_len=64, **variant)
    assert generate(model, [3, 1, 4, 1, 5], 50, temperature=0) == uncached(model, [3, 1, 4, 1, 5], 50)


def test_cached_logits_equal_those_of_one_pass():
    from evenstep.models.generate import _LayerCache

    model = small()
    tokens = batch()[0][:1]
    caches = [_LayerCache(16) for _ in model.model.layers]
    parts = [model.model(tokens[:, :5], 0, caches)]
    parts += [model.model(tokens[:, i : i + 1], i, caches) for i in range(5, 12)]
    torch.testing.assert_close(torch.cat(parts, 1), model.model(tokens), rtol=0, atol=1e-5)


def test_each_new_token_costs_one_token():
    model = small(max_seq_len=64)
    widths = watch(model)
    generate(model, [1, 2, 3], 20)
    assert widths == [3] + [1] * 19


def test_a_full_context_starts_again_from_its_last_half():
    model = small(max_seq_len=16)
    widths = watch(model)
    new = generate(model, list(range(10)), 30, temperature=0)
    # ten tokens and six more fill it; from then on: eight in one pass, eight one by one
    assert widths == ([10] + [1] * 6) + ([8] + [1] * 8) * 2 + [8] + [1] * 4
    text = list(range(10)) + new
    assert new[7] == uncached(model, text[9:17], 1)[0]  # the first after the restart sees the last eight


def test_a_long_prompt_is_cut_to_its_end():
    model = small(max_seq_len=16)
    widths = watch(model)
    long = [i % 61 for i in range(40)]
    assert generate(model, long, 1, temperature=0) == uncached(model, long[-16:], 1)
    assert widths[0] == 16
    assert len(generate(small(max_seq_len=1), [1], 5)) == 5


def test_drawing_is_seeded_and_leaves_the_global_generator_alone():
    model = small()

    def draw(seed):
        return generate(model, [1], 30, temperature=1.0, top_k=None, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(before, torch.get_rng_state())


def test_top_k_and_temperature_shape_the_draw():
    model = small()
    generator = torch.Generator().manual_seed(0)
    greedy = generate(model, [1, 2], 12, temperature=0)
    assert generate(model, [1, 2], 12, temperature=5.0, top_k=1, generator=generator) == greedy
    assert generate(model, [1, 2], 12, temperature=1e-4, top_k=None, generator=generator) == greedy
    best = set(model(torch.tensor([[1, 2]]))[0, -1].topk(3).indices.tolist())
    drawn = {generate(model, [1, 2], 1, temperature=50.0, top_k=3, generator=generator)[0] for _ in range(60)}
    assert drawn == best
    assert (
        len({generate(model, [1, 2], 1, temperature=50.0, top_k=None, generator=generator)[0] for _ in range(60)}) > 9
    )
    assert 0 <= generate(model, [1, 2], 1, top_k=10_000)[0] < 61


def test_stop_ends_the_text_and_is_not_returned():
    model = small()
    whole = generate(model, [1, 2], 12, temperature=0)
    stop = whole[4]
    assert generate(model, [1, 2], 12, temperature=0, stop=stop) == whole[: whole.index(stop)]
    assert generate(model, [1, 2], 0) == []


def test_nothing_of_the_caller_is_changed():
    model = small()
    prompt, tracked = [1, 2, 3], []
    handle = model.model.register_forward_hook(lambda _, __, hidden: tracked.append(hidden.requires_grad))
    generate(model, prompt, 20)
    handle.remove()
    assert prompt == [1, 2, 3] and tracked and not any(tracked)
    model.loss(*batch()).backward()  # no tensor of inference mode is left behind


def test_a_compiled_model_generates_without_compiling_again():
    model, compiled = small(), small()
    graphs = []
    for block in compiled.model.layers:
        block.compile(backend=lambda graph, _: graphs.append(1) or graph.forward)
    compiled.loss(*batch())
    assert graphs
    count = len(graphs)
    assert generate(compiled, [1, 2], 12, temperature=0) == generate(model, [1, 2], 12, temperature=0)
    assert len(graphs) == count


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": []}, "the prompt has no tokens"),
        ({"tokens": [1, 61]}, "prompt token 61 is outside the model's vocabulary of 61"),
        ({"tokens": [-1]}, "prompt token -1 is outside"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1: it must be 0 or more"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0: it must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, words):
    with pytest.raises(EvenstepError) as caught:
        generate(small(), **{"tokens": [1], "max_new_tokens": 1, **arguments})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_are_drawn_from_softcapped_logits():
    model = small(logit_softcap=0.5)
    prompt = [3, 1, 4]
    probabilities = model(torch.tensor([prompt]))[0, -1].softmax(0)
    for seed in range(12):  # with the logits of the head alone, seeds 6, 7 and 10 draw other tokens
        wanted = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        assert generate(model, prompt, 1, temperature=1.0, top_k=None, generator=generator) == [int(wanted)]
