"""Every architecture of transformers: documents that share a row are computed as each is alone, or do not share one."""

import json

import numpy as np
import pytest
import torch
from tiny_models import KINDS, WINDOW, tiny

from evenstep.data.tokenizer import train_bpe
from evenstep.errors import EvenstepError
from evenstep.finetune import models as hub
from evenstep.finetune.config import FineTuneConfig
from evenstep.finetune.data import Document, collate
from evenstep.finetune.models import HubCausal, Source, keeps_documents_apart, load_hub, open_to_write
from evenstep.finetune.run import Tuning
from evenstep.train.config_io import build

transformers = pytest.importorskip("transformers")

PACKS = {"llama": "own", "gemma3_text": "own", "llama4_text": "own", "gpt_oss": "layers", "opt": "layers"}
APART = ("bloom", "mamba", "qwen3_next")
"""Of these a row holds one text: a bias by distance in the row, and states that are carried along it."""

BY_LENGTH = ("hy_v4", "prophetnet")
"""Of these logits depend on how long a row is, padded or not; each row is computed for itself."""

DRAW = np.random.default_rng(0)
DOCUMENTS = [  # longer than the windows, shorter, and a single token
    Document(*[DRAW.integers(3, 90, n).astype(np.int32)] * 2) for n in (3 * WINDOW + 2, 7, 2 * WINDOW, 1, WINDOW + 3, 5)
]
ROWS = [tuple(DOCUMENTS[:2]), tuple(DOCUMENTS[2:])]


def alone(net, document):
    return net(input_ids=torch.from_numpy(document.inputs.astype(np.int64))[None], use_cache=False).logits[0]


@torch.no_grad()
def assert_same_as_alone(model, rows):
    inputs, _ = collate(rows)
    logits = model(inputs[:, 0], inputs[:, 1])
    for i, row in enumerate(rows):
        start = 0
        for document in row:
            expected = alone(model.net, document)
            off = (logits[i, start : start + len(document)] - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert off.max() < 1e-4, (model.packs, model.masks, len(document), off)
            start += len(document)


def gradients(model, rows):
    model.zero_grad()
    inputs, targets = collate(rows)
    model.loss(inputs[:, 0], targets, positions=inputs[:, 1]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check(kind):
    """Logits, gradients, and rows of one text that are padded to the longest."""
    model = HubCausal(tiny(kind)).eval()
    assert not hub.sees_later_tokens(model.net)
    packs = keeps_documents_apart(model, 40)
    assert model.packs == packs
    if packs:
        assert_same_as_alone(model, ROWS)
    packed = gradients(model, ROWS) if packs else None
    model.packs = False
    for rows in [[(document,)] for document in DOCUMENTS] if kind in BY_LENGTH else [[(d,) for d in DOCUMENTS]]:
        assert_same_as_alone(model, rows)
    each = gradients(model, [(document,) for document in DOCUMENTS])
    assert each.isfinite().all()
    if packed is not None:
        assert (packed - each).norm() < 1e-3 * each.norm()
    return packs, model.masks


@pytest.mark.parametrize("kind", PACKS)
def test_packed_rows_equal_each_text_alone(kind):
    assert check(kind) == (True, PACKS[kind])


@pytest.mark.parametrize("kind", APART)
def test_where_that_cannot_be_each_text_has_a_row(kind):
    assert not check(kind)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*KINDS} - {*PACKS} - {*APART}))
def test_every_architecture_packs_exactly_or_not_at_all(kind):
    try:
        tiny(kind)
    except Exception as problem:  # another version of transformers may want other numbers
        pytest.skip(f"{kind} cannot be made small here: {problem}")
    check(kind)


@pytest.mark.parametrize("kind", ["mistral", "cohere2", "qwen2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_window_is_kept_in_every_attention(kind, attention):
    model = HubCausal(tiny(kind)).eval()
    model.net.set_attn_implementation(attention)
    assert keeps_documents_apart(model)
    assert_same_as_alone(model, ROWS)


def test_the_trial_is_as_long_as_the_rows_of_training(monkeypatch):
    """A mask without windows is right until a text is longer than one."""
    monkeypatch.setattr(hub, "MASKS", ("one",))
    model = HubCausal(tiny("mistral")).eval()
    assert keeps_documents_apart(model, WINDOW)
    assert not keeps_documents_apart(model, WINDOW + 8) and not model.packs
    assert not keeps_documents_apart(model)
    assert_same_as_alone(model, [(document,) for document in DOCUMENTS])


def test_half_precision_packs():
    model = HubCausal(tiny("mixtral").bfloat16()).eval()
    assert not hub.sees_later_tokens(model.net) and keeps_documents_apart(model, 40)
    assert not keeps_documents_apart(HubCausal(tiny("mamba").bfloat16()).eval(), 40)


# ---- models that write no text ----

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def saved(folder, kind, auto="AutoModelForMaskedLM", **shape):
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **shape})
    torch.manual_seed(0)
    net = auto(config) if callable(auto) else getattr(transformers, auto).from_config(config)
    net.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "electra", "roformer"])
def test_encoders_write_no_text(kind, dtype, tmp_path):
    with pytest.raises(EvenstepError, match="outputs depend on later tokens") as raised:
        load_hub(saved(tmp_path, kind), (), dtype)
    assert "\n" not in str(raised.value)
    with pytest.raises(EvenstepError, match="outputs depend on later tokens"):
        open_to_write(Source(tmp_path, "transformers"))


def test_a_permutation_model_writes_no_text(tmp_path):
    saved(tmp_path, "xlnet", "AutoModelForCausalLM", d_model=32, n_layer=2, n_head=2, d_inner=48)
    with pytest.raises(EvenstepError, match="outputs depend on later tokens"):
        load_hub(tmp_path, (), torch.float32)


def test_an_encoder_made_a_decoder_writes(tmp_path):
    net, _ = load_hub(saved(tmp_path, "bert", "AutoModelForCausalLM", is_decoder=True), (), torch.float32)
    assert not hub.sees_later_tokens(net)


SMALL_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
SMALL_BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
OTHERS = {
    "t5": ("AutoModelForSeq2SeqLM", SMALL_T5, "is an encoder-decoder"),
    "bart": ("AutoModelForSeq2SeqLM", SMALL_BART, "is an encoder-decoder"),
    "t5 encoder": (lambda config: transformers.T5EncoderModel(config), SMALL_T5, "no causal language model of type t5"),
    "deberta-v2": ("AutoModelForMaskedLM", {}, "no causal language model of type deberta-v2"),
    "modernbert": ("AutoModelForMaskedLM", {"pad_token_id": 0}, "no causal language model of type modernbert"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_transformers_opens_as_no_writer_is_refused_in_one_line(kind, tmp_path):
    auto, shape, message = OTHERS[kind]
    with pytest.raises(EvenstepError, match=message) as raised:
        load_hub(saved(tmp_path, kind.split()[0], auto, **shape), (), torch.float32)
    assert "\n" not in str(raised.value)


# ---- runs ----


def config(model, out, **more):
    rows = [{"prompt": f"{word}:", "response": word[::-1] * (i % 3 + 1)} for i, word in enumerate(["abc", "bcd"] * 8)]
    out.mkdir()
    (out / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = {
        "model": {"path": str(model)},
        "data": {"file": str(out / "x.jsonl"), "val_fraction": 0.2, **more.pop("data", {})},
        "train": {"steps": 2, "batch_size": 2, "seq_len": 40},
        "eval": {"max_new_tokens": 2},
        "log": {"curve": False},
        "out": str(out / "run"),
        **more,
    }
    return build(tables, FineTuneConfig)


def folder_of(kind, folder, **more):
    train_bpe(iter(["a"]), 257).save(folder)
    tiny(kind, vocab_size=300, **more).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bloom", "falcon", "mamba"])
def test_a_row_for_each_example_takes_the_models_own_mask(kind, tmp_path):
    model = folder_of(kind, tmp_path, **({"alibi": True} if kind == "falcon" else {}))
    told = []
    run = Tuning(config(model, tmp_path / "no", data={"pack": "no"}), say=told.append)
    assert len(run.data.train) == len(run.data.train_documents) and not any("row of its own" in line for line in told)
    assert np.isfinite(run.fit()["val_loss"])
    told = []
    run = Tuning(config(model, tmp_path / "auto"), say=told.append)
    assert any("each has a row of its own" in line for line in told) == (not run.model.packs)
    with torch.no_grad():
        inputs, _ = collate(run.data.train[:4])
        logits = run.model.eval()(inputs[:, 0], inputs[:, 1])
        first = run.data.train[0][0]
        torch.testing.assert_close(logits[0, : len(first)], alone(run.model.net, first), rtol=1e-3, atol=1e-3)


def test_lora_tells_what_it_does_not_adapt(tmp_path):
    pytest.importorskip("peft")
    told = []
    Tuning(config(folder_of("mixtral", tmp_path), tmp_path / "x", tune={"adapter": "lora", "rank": 2}), say=told.append)
    (adapted,) = (line for line in told if line.startswith("LoRA of rank 2"))
    assert adapted.endswith("k_proj, o_proj, q_proj, v_proj")
    (left,) = (line for line in told if line.startswith("frozen, without an adapter"))
    assert "experts.down_proj (stacked)" in left and "lm_head" in left and "q_proj" not in left
    assert any(line.startswith("stacked: ") for line in told)
