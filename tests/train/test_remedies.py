"""The options of the trainer against growing logits and weights: each trains, is logged, and resumes bit for bit."""

import json

import parallel_support
import pytest
import torch
from parallel_support import silent
from train_support import quick, quick_overrides, write_corpus

from evenstep.cli import main
from evenstep.errors import EvenstepError
from evenstep.finetune.config import FineTuneConfig
from evenstep.train.config import ModelConfig
from evenstep.train.config_io import load_config
from evenstep.train.log import read_metrics
from evenstep.train.plan import shape_of
from evenstep.train.trainer import Run
from evenstep.train.weights import export

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


# The options that change a step, beside those that test_run.py resumes.
OPTIONS = {
    "z_loss": {"train__z_loss": "1e-3", "train__micro_batch_size": "2"},
    "softcaps": {"model__attention_softcap": "0.5", "model__logit_softcap": "5", "train__z_loss": "1e-3"},
    "corrected decay": {"optim__weight_decay": "0.5", "optim__decay_correction": "true"},
    "cautious decay": {"optim__weight_decay": "0.5", "optim__cautious_decay": "true"},
    "hyperball": {"optim__hyperball": "7"},
    "grouped and tied": {"model__kv_heads": "2", "model__tie_embeddings": "true"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(corpus, tmp_path, name):
    whole = Run(quick(corpus, tmp_path / "whole", **OPTIONS[name]), say=silent)
    losses = [whole.step().loss.item() for _ in range(8)]
    first = Run(quick(corpus, tmp_path / "cut", **OPTIONS[name]), say=silent)
    head = [first.step().loss.item() for _ in range(3)]
    first.save()
    second = Run.resume(tmp_path / "cut", say=silent)
    assert head + [second.step().loss.item() for _ in range(5)] == losses
    pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    plain = Run(quick(corpus, tmp_path / "plain"), say=silent)
    assert [plain.step().loss.item() for _ in range(8)] != losses  # the option has an effect


def test_the_scales_are_shown_before_a_run_and_by_a_plan(corpus, tmp_path, capsys):
    options = {"optim__lr_scale__embedding": "10", "optim__lr_scale__last": "0.5"}
    run = Run(quick(corpus, tmp_path / "run", **options), say=silent)
    assert "adamw, lr 0.003 (embedding x 10, last x 0.5), cosine" in "\n".join(run.header())
    main(["plan", "--gpus", "1", "--optim.lr_scale.embedding", "10"])
    assert "stable_spam, lr 0.001 (embedding x 10), fp32" in capsys.readouterr().out


# ---- z-loss ----


def test_the_printed_loss_is_the_cross_entropy_and_the_z_loss_is_logged_beside_it(corpus, tmp_path):
    plain = Run(quick(corpus, tmp_path / "plain", train__steps="4"), say=silent)
    plain.fit()
    options = {"train__steps": "4", "train__z_loss": "0.01", "train__micro_batch_size": "2"}
    run = Run(quick(corpus, tmp_path / "run", **options), say=silent)
    run.fit()
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "run"))
    # The first step starts from the same weights.
    assert other[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6) and "z_loss" not in one[0]
    # At the start all logits are near 0, so that logsumexp is near log V.
    expected = 0.01 * torch.tensor(run.model.config.vocab_size).log().item() ** 2
    assert other[0]["z_loss"] == pytest.approx(expected, rel=0.02)
    assert run.evaluate().loss == pytest.approx(other[-1]["val_loss"])


def test_the_z_loss_pulls_the_normaliser_towards_one(corpus, tmp_path):
    def normaliser(**options):
        run = Run(quick(corpus, tmp_path / str(len(options)), **options), say=silent)
        for _ in range(8):
            run.step()
        inputs, _ = run.loader.next_batch()
        return run.model(inputs).logsumexp(-1).abs().mean().item()

    assert normaliser(train__z_loss="1") < normaliser() - 0.1


def test_fine_tuning_has_no_z_loss():
    given = [("model.path", "m"), ("data.file", "f"), ("train.z_loss", "1e-4")]
    with pytest.raises(EvenstepError, match=r"train\.z_loss 0\.0001 cannot be used for fine-tuning; leave it out"):
        load_config(None, given, FineTuneConfig)


# ---- the shape of the model ----


def test_a_run_keeps_its_softcaps_and_its_export_says_what_is_missing(corpus, tmp_path):
    options = {"model__attention_softcap": "20", "model__logit_softcap": "30"}
    run = Run(quick(corpus, tmp_path / "run", **options), say=silent)
    run.fit()
    assert (run.model.config.attention_softcap, run.model.config.logit_softcap) == (20.0, 30.0)
    given = quick_overrides(corpus, tmp_path / "next", model__init=str(tmp_path / "run"))
    given = [(key, value) for key, value in given if key != "model.size"]
    assert Run(load_config(None, given), say=silent).model.config == run.model.config
    with pytest.raises(EvenstepError, match=r"model\.logit_softcap 9\.0 contradicts the model in .*, which has 30\.0"):
        Run(load_config(None, [*given, ("model.logit_softcap", "9"), ("out", str(tmp_path / "other"))]), say=silent)
    with pytest.raises(EvenstepError, match=r"no LLaMA with attention_softcap 20; give --to safetensors"):
        export(tmp_path / "run", "hf", tmp_path / "hf", silent)


def test_a_tied_run_is_exported_with_one_table(corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    options = {"model__kv_heads": "1", "model__tie_embeddings": "true", "train__steps": "2"}
    run = Run(quick(corpus, tmp_path / "run", **options), say=silent)
    run.fit()
    export(tmp_path / "run", "hf", tmp_path / "hf", silent)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(theirs(tokens).logits, run.model(tokens), rtol=0, atol=1e-5)
    export(tmp_path / "run", "safetensors", tmp_path / "st", silent)
    with pytest.raises(EvenstepError, match="last layer lm_head shares the weight of the embedding"):
        Run(quick(corpus, tmp_path / "scale", **options, optim__name="scale"), say=silent)


def test_a_published_configuration_is_trained_planned_and_resumed(corpus, tmp_path):
    shape = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "max_sequence_length": 64, "vocab_size": 320,
        "tie_word_embeddings": True,
    }  # fmt: skip
    path = tmp_path / "llama_tiny.json"
    path.write_text(json.dumps(shape))
    given = dict(quick_overrides(corpus, tmp_path / "run", model__config=str(path), model__qk_norm="true"))
    config = load_config(None, [*given.items()])
    run = Run(config, say=silent)
    expected = {"vocab_size": 320, "num_layers": 2, "kv_heads": 2, "tie_embeddings": True, "qk_norm": True}
    assert {name: getattr(run.model.config, name) for name in expected} == expected
    assert run.config.name == "llama_tiny-adamw" and shape_of(config) == run.model.config
    run.fit()
    path.unlink()  # a resume needs the checkpoint alone
    assert Run.resume(tmp_path / "run", say=silent).model.config == run.model.config


def test_a_configuration_that_does_not_fit_is_refused(corpus, tmp_path):
    with pytest.raises(EvenstepError, match=r"model\.config and model\.size both state the shape"):
        ModelConfig(config="c.json", size="tiny")
    path = tmp_path / "c.json"
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4}
    path.write_text(json.dumps(shape | {"num_hidden_layers": 2, "max_sequence_length": 8, "vocab_size": 100}))
    given = dict(quick_overrides(corpus, tmp_path / "run", model__config=str(path)))
    with pytest.raises(EvenstepError, match=r"tokenizer has \d+ entries, but model\.config .* only 100; give"):
        Run(load_config(None, [*given.items()]), say=silent)
    path.write_text(json.dumps(shape | {"num_hidden_layers": 2, "max_sequence_length": 8, "vocab_size": 400}))
    with pytest.raises(EvenstepError, match=r"train\.seq_len 16 is longer than the 8 positions of .*c\.json"):
        Run(load_config(None, [*given.items()]), say=silent)


# ---- several processes ----


def test_two_processes_give_the_losses_of_one(corpus, tmp_path):
    options = {"train__z_loss": "0.01", "optim__lr_scale__embedding": "3", "train__micro_batch_size": "2"}
    options |= {"model__attention_softcap": "0.5", "model__logit_softcap": "5", "model__kv_heads": "2"}
    options |= {"model__tie_embeddings": "true"}
    Run(quick(corpus, tmp_path / "one", **options), say=silent).fit()
    jobs = [(tmp_path / mode, options | {"parallel__mode": mode}, False, None) for mode in ("ddp", "fsdp")]
    parallel_support.train(2, corpus, *jobs)
    whole = read_metrics(tmp_path / "one" / "metrics.jsonl")
    for mode in ("ddp", "fsdp"):
        shared = read_metrics(tmp_path / mode / "metrics.jsonl")
        assert len(shared) == len(whole)
        for one, other in zip(whole, shared, strict=True):
            for key in {"loss", "val_loss", "z_loss"} & one.keys():
                assert other[key] == pytest.approx(one[key], rel=1e-4), (mode, key)
