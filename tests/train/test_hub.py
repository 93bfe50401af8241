"""``model.hf``: models of transformers under the same trainer as evenstep's LLaMA."""

import json
import re

import parallel_support
import pytest
import torch
from parallel_support import losses, silent
from train_support import quick, write_corpus

from evenstep.baselines.rules import hidden_and_rest
from evenstep.cli import main
from evenstep.errors import EvenstepError
from evenstep.optim.groups import edge_weights, scale_groups
from evenstep.train.config_io import load_config
from evenstep.train.memory import dry_run, kept_bytes
from evenstep.train.plan import make_plan, shape_of
from evenstep.train.runs import list_runs
from evenstep.train.trainer import Run
from evenstep.train.weights import export

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "llama": SMALL | {"max_position_embeddings": 32, "num_key_value_heads": 2},
    # With dropout, and a last layer that is tied to the embedding.
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "gpt_neox": SMALL | {"max_position_embeddings": 32},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "mixtral": SMALL | {"num_local_experts": 3, "num_key_value_heads": 2, "output_router_logits": True},
    "bert": SMALL,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a corpus, and a configuration of each kind in a directory of its name."""
    place = tmp_path_factory.mktemp("hub")
    write_corpus(place / "corpus.jsonl")
    for kind, facts in KINDS.items():
        (place / kind).mkdir()
        (place / kind / "config.json").write_text(json.dumps({"model_type": kind, **facts}))
    return place


def given(place, kind, **more):
    """The options of a run of that kind, for `quick` and `parallel_support.train`."""
    return {"model__size": "none", "model__hf": str(place / kind), "sample__tokens": "4", **more}


def config(place, kind, out, **more):
    return quick(place / "corpus.jsonl", out, **given(place, kind, **more))


@pytest.fixture(scope="module")
def llama(place):
    """A finished run, and what it printed."""
    said = []
    run = Run(config(place, "llama", place / "run", train__steps="4", telemetry__activations="2"), say=said.append)
    run.fit()
    return run, "\n".join(said)


# ---- training ----


@pytest.mark.parametrize("kind", ["gpt_neox", "mamba", "mixtral"])
def test_every_architecture_learns(place, tmp_path, kind):
    run = Run(config(place, kind, tmp_path / "run"), say=silent)
    first = [run.step().loss.item() for _ in range(8)]
    assert first[-1] < first[0] - 0.1


def test_the_vocabulary_is_named_and_the_telemetry_measures(llama):
    run, said = llama
    words = run.data.vocab_size
    assert f"the model has a vocabulary of {words} entries, that of the tokenizer, instead of 32,000" in said
    assert run.model.config.vocab_size == words and run.config.name == "llama-adamw"
    assert list_runs(run.out.parent)[0].size == "llama"
    sample = (run.out / "metrics.jsonl").read_text()
    assert "attention_max" in sample and "logit_rms" in sample and "net.model.layers.1" in sample


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(place, tmp_path):
    """With dropout, a tied last layer, accumulated gradients, recomputed activations and a z-loss."""
    options = {"train__micro_batch_size": "2", "train__z_loss": "1e-3", "train__activation_checkpointing": "true"}
    whole = Run(config(place, "gpt2", tmp_path / "whole", **options), say=silent)
    losses = [whole.step().loss.item() for _ in range(6)]
    cut = config(place, "gpt2", tmp_path / "cut", **options)
    first = Run(cut, say=silent)
    head = [first.step().loss.item() for _ in range(3)]
    first.save()
    moved = place / "gpt2" / "moved.json"
    (place / "gpt2" / "config.json").rename(moved)  # a resume needs the checkpoint alone
    try:
        second = Run.resume(tmp_path / "cut", say=silent)
    finally:
        moved.rename(place / "gpt2" / "config.json")
    assert head + [second.step().loss.item() for _ in range(3)] == losses
    assert all(map(torch.equal, whole.model.parameters(), second.model.parameters()))
    net = second.model.net
    assert net.get_output_embeddings().weight is net.get_input_embeddings().weight
    second.save()
    export(tmp_path / "cut", "hf", tmp_path / "hf", silent)
    export(tmp_path / "cut", "safetensors", tmp_path / "st", silent)  # which refuses keys that share memory
    theirs, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), torch.arange(12)[None]
    assert torch.equal(theirs(tokens).logits, second.model.eval()(tokens))


def test_a_rewound_run_is_one_that_never_saw_the_rows(place, tmp_path):
    ladder = {"guard__ladder": "rewind", "guard__snapshot_every": "2", "optim__name": "stable_spam"}
    calm = Run(config(place, "llama", tmp_path / "calm", **ladder), say=silent)
    calm.skipped = [(8, 12)]
    calm.fit()
    run = Run(config(place, "llama", tmp_path / "run", **ladder), say=silent)
    real = run.task.loss

    def loss(model_loss, inputs, targets, chunk):
        bad = run.loader.position == 12 and not run.skipped
        return real(model_loss, inputs, targets, chunk) * (float("nan") if bad else 1)

    run.task.loss = loss
    run.fit()
    assert run.skipped == [(8, 12)]
    assert all(map(torch.equal, calm.model.parameters(), run.model.parameters()))


def test_two_processes_give_the_losses_of_one(place, tmp_path):
    options = given(place, "llama", train__micro_batch_size="1", train__steps="4", train__clip_norm="1")
    Run(quick(place / "corpus.jsonl", tmp_path / "one", **options), say=silent).fit()
    modes = {"ddp": {}, "fsdp": {"train__activation_checkpointing": "true"}}
    jobs = [(tmp_path / mode, options | more | {"parallel__mode": mode}, False, None) for mode, more in modes.items()]
    parallel_support.train(2, place / "corpus.jsonl", *jobs)
    for mode in modes:
        assert losses(tmp_path / mode) == pytest.approx(losses(tmp_path / "one"), rel=1e-5), mode


@pytest.mark.parametrize("dtype", ["bf16", "bf16-autocast"])
def test_it_trains_in_16_bits_and_in_low_bits(place, tmp_path, dtype):
    said = []
    run = Run(config(place, "llama", tmp_path / "run", train__dtype=dtype, lowbit="fp4"), say=said.append)
    losses = [run.step().loss.item() for _ in range(8)]
    assert losses[-1] < losses[0] and "low-bit recipe fp4: 14 linear layers" in "\n".join(said)


# ---- weights ----


def test_an_export_computes_the_same_in_transformers(llama, tmp_path, capsys):
    run, _ = llama
    export(run.out, "hf", tmp_path / "hf", silent)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(12)[None]
    run.model.eval()
    assert torch.equal(theirs(tokens).logits, run.model(tokens))
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert words.decode(words("the river 7").input_ids) == "the river 7"
    assert theirs.config.eos_token_id == run.tokenizer.eos_id == theirs.generation_config.eos_token_id
    export(run.out, "safetensors", tmp_path / "st", silent)
    names = run.model.net.state_dict().keys()
    from safetensors.torch import load_file

    assert load_file(tmp_path / "st" / "model.safetensors").keys() == names
    capsys.readouterr()
    main(["generate", str(run.out), "--prompt", "the", "--tokens", "5"])
    assert capsys.readouterr().out.startswith("the")


def test_fine_tuning_a_run_names_the_export(llama, place, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 8)
    with pytest.raises(EvenstepError, match=r"has a model of transformers; export it with evenstep export"):
        main(["--debug", "finetune", str(llama[0].out), "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path)])


def test_a_run_starts_from_the_weights_of_another(llama, place, tmp_path):
    run, _ = llama
    export(run.out, "hf", tmp_path / "hf", silent)
    for start in (run.out, tmp_path / "hf"):
        new = Run(config(place, "llama", tmp_path / f"from-{start.name}", model__init=str(start)), say=silent)
        assert all(map(torch.equal, new.model.parameters(), run.model.parameters()))
    with pytest.raises(EvenstepError, match=r"model\.init: .* has a model of type llama, but model\.hf .* is a gpt2"):
        Run(config(place, "gpt2", tmp_path / "a", model__init=str(run.out)), say=silent)
    own = {"model__size": "none", "model__init": str(run.out)}
    with pytest.raises(EvenstepError, match=r"has a model of transformers; give --model\.hf .*step-000004 too"):
        Run(quick(place / "corpus.jsonl", tmp_path / "b", **own), say=silent)


# ---- refusals ----


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("llama", {"model__size": "tiny"}, r"model\.size tiny is an option of evenstep's LLaMA.*leave it out"),
        ("llama", {"model__qk_norm": "true"}, r"model\.qk_norm true is an option of evenstep's LLaMA"),
        ("llama", {"model__tie_embeddings": "false"}, r"model\.tie_embeddings false is an option"),
        ("llama", {"model__config": "c.json"}, r"model\.config c\.json is an option of evenstep's LLaMA"),
        ("llama", {"train__loss_chunk": "64"}, r"train\.loss_chunk 64 cannot be used with model\.hf"),
        ("llama", {"parallel__mode": "tp+fsdp"}, r"tp\+fsdp divides the matrices of evenstep's LLaMA.*fsdp"),
        (
            "llama",
            {"train__seq_len": "33"},
            r"train\.seq_len 33 is longer than the 32 positions of the model of .*llama; give at most 32",
        ),
        ("gpt2", {"lowbit": "fp4"}, r"found no layer to change in GPT2LMHeadModel.*Conv1D"),
        ("bert", {}, r"is a BertLMHeadModel, an encoder: its outputs depend on later tokens; give a causal"),
        ("gpt2", {"optim__name": "scale"}, r"scale_groups could not classify net\.transformer\.h\.0"),
        ("none", {}, r"model\.hf: there is no file .*none; give the config\.json"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(place, tmp_path, kind, options, words):
    with pytest.raises(EvenstepError, match=words) as problem:
        Run(config(place, kind, tmp_path / "run", **options), say=silent)
    assert "\n" not in str(problem.value) and not (tmp_path / "run").exists()


def test_without_transformers_the_extra_is_named(place, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(EvenstepError, match=r"needs the package transformers; pip install 'evenstep\[hf\]'"):
        Run(config(place, "llama", tmp_path / "run"), say=silent)


# ---- the groups of optimizers ----


def test_optimizers_find_the_ends_of_every_architecture(place):
    def built(kind, **more):
        overrides = [("model.hf", str(place / kind)), ("data.vocab_size", "300")]
        return shape_of(load_config(None, overrides)).build()

    for kind in ("llama", "gpt2", "gpt_neox", "mixtral"):
        model = built(kind)
        table, head = model.net.get_input_embeddings().weight, model.net.get_output_embeddings().weight
        ends = edge_weights(model)
        assert any(p is table for p in ends["embedding"])
        assert [id(p) for p in ends["last"]] == ([] if head is table else [id(head)])
        hidden, rest = hidden_and_rest(model)
        assert all(p.dim() == 2 and p is not table and p is not head for _, p in hidden)
        assert len(hidden) + len(rest) == len(list(model.parameters()))
    # A matrix inside of a block whose name is that of a last layer.
    model = built("llama")
    block = model.net.model.layers[0]
    block.mlp.output = torch.nn.Linear(32, 32, bias=False)
    assert [id(p) for p in edge_weights(model)["last"]] == [id(model.net.lm_head.weight)]
    groups = {group["kind"]: [name for name, _ in group["params"]] for group in scale_groups(model)}
    assert groups["last"] == ["net.lm_head.weight"] and groups["embedding"] == ["net.model.embed_tokens.weight"]


def test_the_ends_have_their_own_learning_rates(place, tmp_path):
    options = {"optim__lr_scale__embedding": "10", "optim__lr_scale__last": "0.5"}
    run = Run(config(place, "llama", tmp_path / "run", **options), say=silent)
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    table, head = run.model.net.get_input_embeddings().weight, run.model.net.get_output_embeddings().weight
    assert rates[id(table)] == pytest.approx(0.03) and rates[id(head)] == pytest.approx(0.0015)
    with pytest.raises(EvenstepError, match=r"lr_scale\.last 0\.5: the model has no trained output layer of its own"):
        Run(config(place, "gpt2", tmp_path / "tied", **options), say=silent)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {"optim__name": "scale"}),
        ("mixtral", {"optim__name": "muon"}),
        ("gpt2", {"optim__name": "spam", "optim__density": "0.1", "optim__density_of": "hidden"}),
    ],
)
def test_optimizers_with_rules_train_them(place, tmp_path, kind, options):
    run = Run(config(place, kind, tmp_path / "run", **options), say=silent)
    losses = [run.step().loss.item() for _ in range(6)]
    assert losses[-1] < losses[0]


# ---- the plan ----


@pytest.mark.parametrize("mode", ["none", "ddp", "fsdp"])
def test_a_plan_counts_what_is_built(place, mode):
    more = [("parallel.mode", mode), ("data.vocab_size", "300"), ("model.hf", str(place / "gpt2"))]
    made_for = load_config(None, more)
    shape = shape_of(made_for)
    made = make_plan(made_for, shape, 1 if mode == "none" else 4, 4, 80e9)
    numbers = shape.build().num_parameters()
    if mode != "fsdp":
        assert made.memory["parameters"] == 4 * numbers
    counted = dry_run(made_for, shape, made.grid)
    assert (counted.parameters, counted.state) == (made.memory["parameters"], made.memory["optimizer state"])


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mixtral"])
def test_planned_activations_are_what_autograd_keeps(place, kind):
    """The dry run on the meta device against a pass on the CPU, whose fused attention keeps the same tensors."""
    shape = shape_of(load_config(None, [("model.hf", str(place / kind)), ("data.vocab_size", "300")]))
    model, found = shape.build(), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(torch.zeros(3, 16, dtype=torch.int64))
    measured = sum(x.untyped_storage().nbytes() for key, x in found.items() if key not in own)
    assert kept_bytes(shape, False, 3, 16, False) == pytest.approx(measured, rel=0.1)
    assert kept_bytes(shape, True, 3, 16, False) < 0.8 * kept_bytes(shape, False, 3, 16, False)


def test_the_plan_is_printed(place, capsys):
    main(["plan", "--model.hf", str(place / "mixtral"), "--gpus", "2", "--parallel.mode", "fsdp"])
    out = capsys.readouterr().out
    assert re.search(r"mixtral \([\d.]+M parameters\) on 2 GPUs, fsdp", out) and "tp+fsdp" in out
