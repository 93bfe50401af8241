"""Fine-tuning runs, on small models that are made here."""

import dataclasses
import json

import pytest
import torch
from finetune_support import write_hub

from evenstep.cli import main
from evenstep.data.tokenizer import train_bpe
from evenstep.errors import EvenstepError
from evenstep.finetune.config import FineTuneConfig
from evenstep.finetune.data import labels_of
from evenstep.finetune.examples import read_examples
from evenstep.finetune.run import Tuning
from evenstep.models import load_pretrained
from evenstep.train.config_io import build
from evenstep.train.log import read_metrics
from evenstep.train.weights import export

WORDS = ["abc", "bcd", "cde", "def", "ace", "bdf"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"prompt": f"{word}:", "response": word[::-1]} for word in WORDS * 8]
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(model, data, out, **more):
    tables = {
        "model": {"path": str(model), "library": more.pop("library", "evenstep")},
        "data": {"file": str(data), "val_fraction": 0.1, **more.pop("examples", {})},
        "train": {"steps": more.pop("steps", 4), "batch_size": 2, "seq_len": 32},
        "eval": {"every": 0, "max_new_tokens": 4, "max_rows": 3},
        "schedule": {"name": "constant"},
        "log": {"curve": False, "every": 1},
        "out": str(out),
    }
    for key, value in more.items():
        tables[key] = {**tables.get(key, {}), **value}
    return build(tables, FineTuneConfig)


def test_the_rate_is_one_for_pretrained_weights_where_none_is_given():
    least = {"model": {"path": "m"}, "data": {"file": "f"}}
    assert build(least, FineTuneConfig).optim.lr == 5e-5
    assert build({**least, "tune": {"adapter": "lora"}}, FineTuneConfig).optim.lr == 3e-4
    assert build({**least, "optim": {"name": "spam", "density": 0.0025}}, FineTuneConfig).optim.lr == 1e-3
    given = build({**least, "tune": {"adapter": "lora"}, "optim": {"lr": 1e-3}}, FineTuneConfig)
    assert given.optim.lr == 1e-3 and given.optim.name == "stable_spam"


def fit(*args, **more):
    run = Tuning(config(*args, **more), say=lambda _: None)
    return run, run.fit()


@pytest.mark.parametrize("library", ["evenstep", "transformers"])
def test_a_run_learns_its_answers_and_leaves_a_model(library, hub, data, tmp_path):
    rate = {"optim": {"lr": 1e-2, "name": "adam"}, "steps": 120, "library": library}
    run, summary = fit(hub, data, tmp_path / "run", **rate)
    losses = [record["loss"] for record in read_metrics(run.out / "metrics.jsonl") if "loss" in record]
    assert losses[-1] < 0.3 < losses[0] and summary["score"] == 1.0 and summary["score_kind"] == "exact"
    assert load_pretrained(run.out / "model").num_parameters() == summary["parameters"]
    assert len(run.data.train) < len(run.data.train_documents)  # packed


def test_a_checkpoint_is_exported_without_the_card_of_a_pretraining_run(hub, data, tmp_path):
    run = Tuning(config(hub, data, tmp_path / "run"), say=lambda _: None)
    run.step()
    run.save()
    export(next((run.out / "checkpoints").iterdir()), "hf", tmp_path / "hf", lambda _: None)
    assert load_pretrained(tmp_path / "hf").num_parameters() == run.model.num_parameters()
    assert not (tmp_path / "hf" / "README.md").exists()


def test_both_libraries_have_the_same_loss_of_packed_rows(hub, data, tmp_path):
    from transformers import AutoModelForCausalLM

    from evenstep.finetune.data import collate
    from evenstep.finetune.models import HubCausal

    run = Tuning(config(hub, data, tmp_path / "run"), say=lambda _: None)
    inputs, targets = collate(run.data.train[:3])
    theirs = HubCausal(AutoModelForCausalLM.from_pretrained(hub))
    losses = [m.loss(inputs[:, 0], targets, positions=inputs[:, 1]).item() for m in (run.model, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_micro_batches_and_whole_batches_take_the_same_step(hub, data, tmp_path):
    losses = []
    for size in (1, 2):
        more = {"train": {"steps": 3, "batch_size": 2, "seq_len": 32, "micro_batch_size": size}}
        run, _ = fit(hub, data, tmp_path / str(size), eval={"score": "none"}, **more)
        losses.append([record["loss"] for record in read_metrics(run.out / "metrics.jsonl") if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_resume_is_bitwise_exact(adapter, hub, data, tmp_path):
    more = {"tune": {"adapter": adapter, "rank": 2}, "eval": {"score": "none"}}
    whole, _ = fit(hub, data, tmp_path / "whole", **more)
    half = Tuning(config(hub, data, tmp_path / "half", **more), say=lambda _: None)
    half.step(), half.step()
    half.save()
    half.saver.close()
    half.metrics.close()
    again = Tuning.resume(tmp_path / "half", say=lambda _: None)
    assert again.step_number == 2
    again.fit()
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_lora_trains_its_adapters_alone_and_merges(hub, data, tmp_path):
    more = {"tune": {"adapter": "lora", "rank": 2}, "optim": {"name": "adam", "lr": 1e-2}, "eval": {"score": "none"}}
    before = load_pretrained(hub)
    run, summary = fit(hub, data, tmp_path / "run", **more)
    assert summary["trained_parameters"] < summary["parameters"] / 4
    assert summary["state_bytes"] < 9 * summary["trained_parameters"]
    after = load_pretrained(run.out / "model")
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed and all("proj" in name for name in changed)
    assert (run.out / "adapter" / "adapter_model.safetensors").exists()


def test_sparse_spam_keeps_little_state(hub, data, tmp_path):
    size = {}
    for density in (1.0, 0.0025):
        more = {"optim": {"name": "spam", "density": density}, "eval": {"score": "none"}, "steps": 2}
        size[density] = fit(hub, data, tmp_path / str(density), **more)[1]["state_bytes"]
    assert size[0.0025] < size[1.0] / 10


def test_a_model_that_mixes_packed_examples_is_found_out(hub):
    from transformers import AutoModelForCausalLM

    from evenstep.finetune.models import HubCausal, keeps_documents_apart

    class Deaf(HubCausal):
        """Ignores what keeps documents apart."""

        def forward(self, tokens, positions=None):
            return super().forward(tokens)

    net = AutoModelForCausalLM.from_pretrained(hub)
    assert keeps_documents_apart(HubCausal(net)) and not keeps_documents_apart(Deaf(net))


def test_choices_are_scored_by_likelihood(hub, tmp_path):
    rows = [{"goal": "g", "sol1": "aaaa", "sol2": "bb", "label": i % 2} for i in range(12)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, summary = fit(hub, tmp_path / "x.jsonl", tmp_path / "run", steps=2)
    assert summary["score_kind"] == "choice" and 0 <= summary["score"] <= 1


def test_only_the_default_length_is_shortened_to_the_positions_of_the_model(hub, data, tmp_path):
    said = []
    run = Tuning(config(hub, data, tmp_path / "default", train={"seq_len": 256}), say=said.append)
    assert run.config.train.seq_len == 64
    assert f"train.seq_len is 64 instead of 256: the model of {hub} has no more positions" in said
    with pytest.raises(EvenstepError, match=r"train\.seq_len 100 is longer than the 64 positions"):
        Tuning(config(hub, data, tmp_path / "chosen", train={"seq_len": 100}), say=said.append)


def test_too_long_examples_are_counted_and_said(hub, tmp_path):
    rows = [{"prompt": "abc:", "response": "x"}] * 8 + [{"prompt": "abc:", "response": "x" * 99}] * 3
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = []
    settings = config(hub, tmp_path / "x.jsonl", tmp_path / "run")
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, val_fraction=0.0, pack="no"))
    run = Tuning(settings, say=told.append)
    assert len(run.data.train) == 8 and any("left out: 3 examples" in line for line in told)


def test_a_cut_that_leaves_no_answer_is_told_without_advising_itself(hub, tmp_path):
    rows = [{"prompt": "abc:", "response": "x"}] * 8 + [{"prompt": "x" * 99, "response": "x"}] * 3
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"examples": {"val_fraction": 0.0, "too_long": "cut"}}
    told = []
    run = Tuning(config(hub, tmp_path / "x.jsonl", tmp_path / "run", **more), say=told.append)
    (line,) = (line for line in told if line.startswith("left out"))
    assert "left out: 3 examples" in line and "without a part of the answer" in line and "too_long" not in line
    assert len(run.data.train_documents) == 8
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[8:]))
    with pytest.raises(EvenstepError, match="has a part of its answer in its first 32 tokens") as raised:
        Tuning(config(hub, tmp_path / "x.jsonl", tmp_path / "run", **more), say=told.append)
    assert "too_long" not in str(raised.value)


def test_bad_examples_stop_a_run_or_are_skipped_and_counted(hub, tmp_path):
    """Also those of eval.data."""
    good = [{"prompt": f"{word}:", "response": "x"} for word in WORDS * 2]
    bad = [{"prompt": "a", "response": ""}, {"prompt": "a"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good + bad))
    more = {"examples": {"val_fraction": 0.0}}
    with pytest.raises(EvenstepError, match=r"line 13: 'response' is empty; --data.on_bad skip"):
        Tuning(config(hub, tmp_path / "x.jsonl", tmp_path / "run", **more), say=lambda _: None)
    more["examples"]["on_bad"] = "skip"
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad[:1] + good[:3]))
    more["eval"] = {"data": str(tmp_path / "v.jsonl")}
    told = []
    run = Tuning(config(hub, tmp_path / "x.jsonl", tmp_path / "run", **more), say=told.append)
    summary = run.fit()
    assert summary["examples"] == 12 and summary["left_out"] == 2
    assert sum("invalid examples" in line for line in told) == 2
    assert any("left out: 2 invalid examples" in line and "line 13: 'response' is empty" in line for line in told)


def test_what_a_chat_template_refuses_is_skipped(hub, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hub)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "m")
    AutoModelForCausalLM.from_pretrained(hub).save_pretrained(tmp_path / "m")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns}] * 4 + [{"messages": [{"role": "system", "content": "s"}, *turns]}] * 2
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"library": "transformers", "examples": {"val_fraction": 0.0}}
    with pytest.raises(EvenstepError, match=r"line 5: .* refuses it: no system; --data.on_bad skip"):
        Tuning(config(tmp_path / "m", tmp_path / "x.jsonl", tmp_path / "run", **more), say=lambda _: None)
    more["examples"]["on_bad"] = "skip"
    run = Tuning(config(tmp_path / "m", tmp_path / "x.jsonl", tmp_path / "run", **more), say=lambda _: None)
    assert len(run.data.train_documents) == 4 and len(run.data.bad[str(tmp_path / "x.jsonl")]) == 2


def test_a_pretrained_run_is_named_as_it_is(hub, tmp_path, capsys):
    with pytest.raises(EvenstepError, match="no directory"):
        Tuning(config(tmp_path / "gone", hub, tmp_path / "r"), say=lambda _: None)
    assert main(["finetune", str(hub)]) == 2 and "give --data FILE.jsonl" in capsys.readouterr().err
    assert main(["finetune", str(hub), "--data", "x.jsonl", "--mode", "half"]) == 2
    assert main(["finetune", str(hub), "--data", "x.jsonl", "--train.step", "3"]) == 2
    assert "train.steps" in capsys.readouterr().err
    assert main(["finetune", "recipes/finetune-llama2-7b-commonsense.toml", "--print-config"]) == 0
    assert "density = 0.0025" in capsys.readouterr().out


# ---- classifiers ----

TEXTS = [{"text": word * 3, "label": "left" if "a" in word else "right"} for word in WORDS * 4]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A decoder that puts texts into classes, which it names in an order that is not the alphabet's."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("decoder")
    train_bpe(iter(["a"]), 257).save(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {"id2label": {0: "right", 1: "left"}, "label2id": {"right": 0, "left": 1}}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=257, **shape, **names)).save_pretrained(folder)
    return folder


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_padding_does_not_change_the_class_of_a_text(decoder, tmp_path):
    """A decoder takes the last token that is no padding."""
    from evenstep.finetune.data import collate

    settings = config(decoder, lines(tmp_path / "x.jsonl", TEXTS), tmp_path / "run", library="transformers")
    run = Tuning(settings, say=lambda _: None)
    rows = [(run.data.classified(dataclasses.replace(e, prompt=e.prompt * (i + 1)), True),)
            for i, e in enumerate(run.data.sets[0].examples[:3])]  # fmt: skip
    inputs, _ = collate(rows)
    run.model.eval()
    with torch.no_grad():
        together = run.model(inputs[:, 0], inputs[:, 1])
        for i, row in enumerate(rows):
            alone, _ = collate([row])
            torch.testing.assert_close(run.model(alone[:, 0], alone[:, 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_a_classifiers_own_order_of_classes_is_kept(decoder, tmp_path, capsys):
    data = lines(tmp_path / "x.jsonl", TEXTS)
    run, _ = fit(decoder, data, tmp_path / "run", library="transformers", steps=1)
    assert run.data.labels == ["right", "left"]
    numbers = [{"text": "ab", "label": i} for i in (2, 10, 1)] * 4
    assert labels_of(read_examples(lines(tmp_path / "n.jsonl", numbers)), ["x", "1"]) == ["1", "2", "10"]
    one = lines(tmp_path / "one.jsonl", [{"text": "ab", "label": "up"}] * 9)
    assert main(["finetune", str(decoder), "--data", str(one), "--out", str(tmp_path / "no")]) == 2
    assert "at least two" in capsys.readouterr().err


def test_evaluate_scores_the_whole_file_and_trains_nothing(hub, data, capsys):
    """Also of fewer examples than a batch."""
    capsys.readouterr()
    shared = ["--model.library", "evenstep", "--train.seq_len", "32", "--eval.max_new_tokens", "2", "--evaluate"]
    assert main(["finetune", str(hub), "--eval.data", str(data), "--train.batch_size", "64", *shared]) == 0
    said = capsys.readouterr()
    assert f"{data}: " in said.out + said.err and "(exact)" in said.out + said.err
