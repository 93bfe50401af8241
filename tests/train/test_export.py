"""Weights out of a run, and a look into its checkpoints."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from train_support import flags, quick, quick_overrides, write_corpus

from evenstep.models import load_pretrained
from evenstep.train.checkpoint import load_model_state
from evenstep.train.model_card import write_card
from evenstep.train.trainer import Run
from tests.test_cli_program import ROOT, call


def trained(place, **more):
    out = place / "run"
    run = Run(quick(write_corpus(place / "corpus.jsonl"), out, train__steps="4", checkpoint__every="2", **more))
    run.fit()
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("export"), optim__name="stable_spam", log__curve="true")


@pytest.fixture(scope="module")
def newest(run):
    return run / "checkpoints" / "step-000004"


def test_hf_opens_in_transformers_and_computes_the_same(run, newest, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    status, out, err = call(capsys, "export", run, "--to", "hf", "--out", tmp_path / "hf")
    assert (status, err) == (0, "") and "step-000004" in out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(3, 15)[None]
    ours = load_pretrained(tmp_path / "hf")
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-5)
    for name, tensor in load_model_state(newest).items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.decode(tokenizer("the river 7").input_ids) == "the river 7"
    assert theirs.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_safetensors_is_one_file_with_the_parameters(newest, tmp_path, capsys):
    assert call(capsys, "export", newest, "--to", "safetensors", "--out", tmp_path / "st")[0] == 0
    assert [path.name for path in (tmp_path / "st").iterdir()] == ["model.safetensors"]
    found, expected = load_file(tmp_path / "st" / "model.safetensors"), load_model_state(newest)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def broken(newest, place, damage):
    """A copy of the checkpoint with one file changed."""
    import shutil

    copy = place / "step-000004"
    shutil.copytree(newest, copy)
    damage(copy)
    return copy


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def first_shard(checkpoint):
    return next(checkpoint.glob("shard-*.safetensors"))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda c: flip(first_shard(c)), "altered"),
        (lambda c: first_shard(c).unlink(), "missing"),
        (lambda c: first_shard(c).write_bytes(b"\xff" * 99), "99 bytes"),
        (lambda c: flip(c / "trainer.pt"), "altered"),
        (lambda c: (c / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_a_broken_checkpoint_is_named_and_not_exported(newest, tmp_path, capsys, damage, words):
    copy = broken(newest, tmp_path, damage)
    status, _, err = call(capsys, "inspect", copy)
    assert status == 2 and words in err and err.count("\n") == 1
    status, _, err = call(capsys, "export", copy, "--to", "hf", "--out", tmp_path / "out")
    assert status == 2 and words in err and not (tmp_path / "out").exists()


def test_export_writes_nowhere_else(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    status, _, err = call(capsys, "export", run, "--to", "hf", "--out", tmp_path / "full")
    assert status == 2 and "another --out" in err and [p.name for p in (tmp_path / "full").iterdir()] == ["notes"]
    (tmp_path / "empty").mkdir()
    assert call(capsys, "export", run, "--to", "safetensors", "--out", tmp_path / "empty")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert call(capsys, "export", tmp_path / "nothing", "--to", "hf", "--out", tmp_path / "x")[0] == 2
    assert "invalid choice" in call(capsys, "export", run, "--to", "gguf", "--out", tmp_path / "x")[2]


def test_a_post_ln_model_has_no_place_in_transformers(tmp_path, capsys):
    out = trained(tmp_path, model__norm="post")
    status, _, err = call(capsys, "export", out, "--to", "hf", "--out", tmp_path / "hf")
    assert status == 2 and "--to safetensors" in err and not (tmp_path / "hf").exists()
    assert call(capsys, "export", out, "--to", "safetensors", "--out", tmp_path / "st")[0] == 0


def test_inspect_tells_what_is_there(run, newest, capsys):
    status, out, err = call(capsys, "inspect", run)
    assert (status, err) == (0, "")
    assert "step 4, 256 tokens, written by 1 process," in out and "stable_spam" in out
    assert "all checksums match" in out and "older checkpoints of this run: step-000002" in out
    assert "model.lm_head.weight" in out and "[300, 128]" in out and "float32" in out
    assert "optimizer: exp_avg of 39 parameters" in out
    facts = json.loads(call(capsys, "inspect", newest, "--json")[1])
    assert facts["world_size"] == 1 and facts["faults"] == {} and facts["tokens"] == 256
    size = sum(tensor["bytes"] for name, tensor in facts["tensors"].items() if name.startswith("model."))
    assert size == sum(tensor.nbytes for tensor in load_model_state(newest).values())
    assert "optimizer.lm_head.weight.exp_avg" in call(capsys, "inspect", newest, "--all")[1]


def test_inspect_wants_a_checkpoint(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "nowhere"):
        status, _, err = call(capsys, "inspect", path)
        assert status == 2 and str(path) in err and err.count("\n") == 1


@pytest.mark.slow
def test_what_two_processes_wrote_is_inspected_and_exported_by_one(tmp_path, capsys):
    corpus, out = write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "run"
    words = flags(quick_overrides(corpus, out, parallel__mode="fsdp", train__device="cpu"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, "-m", "evenstep", "pretrain", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "written by 2 processes" in call(capsys, "inspect", out)[1]
    assert call(capsys, "export", out, "--to", "safetensors", "--out", tmp_path / "st")[0] == 0
    expected = load_model_state(out / "checkpoints" / "step-000008")
    found = load_file(tmp_path / "st" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_the_model_card_has_the_numbers_of_the_run(run, tmp_path, capsys):
    """Up to the exported step, and no further."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    val = {one["step"]: one["val_loss"] for one in log if "val_loss" in one}
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    tensors = [{"name": "model.norm.weight", "ratio": 47.2}]
    with (copy / "metrics.jsonl").open("a") as file:
        for step in (2, 3):
            event = {"kind": "event", "event": "spike", "step": step, "count": 1, "tensors": tensors}
            file.write(json.dumps(event) + "\n")
    call(capsys, "export", copy, "--to", "hf", "--out", tmp_path / "last")
    card = (tmp_path / "last" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "tags: [evenstep, stable_spam]" in card
    assert f"| 4 | {val[4]:.4f} |" in card and "| steps | 4 |" in card and "corpus.jsonl" in card
    assert "| steps on which a gradient spiked | 2 |" in card and "47 times the usual size, `model.norm.weight`" in card
    assert (copy / "config.toml").read_text().strip() in card
    assert "](loss.png)" in card and (tmp_path / "last" / "loss.png").exists()
    call(capsys, "export", copy / "checkpoints" / "step-000002", "--to", "hf", "--out", tmp_path / "early")
    early = (tmp_path / "early" / "README.md").read_text()
    assert "| steps on which a gradient spiked | 1 |" in early and f"| 4 | {val[4]:.4f} |" not in early
    assert "loss.png" not in early and not (tmp_path / "early" / "loss.png").exists()


def test_the_card_reads_no_checksum_again(newest, run, tmp_path, monkeypatch):
    monkeypatch.setattr("evenstep.train.runs.file_fault", None)
    write_card(run, newest, 1000, tmp_path)
    seen = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["tokens"]
    card = (tmp_path / "README.md").read_text()
    assert "| steps | 4 |" in card and f"| tokens seen | {seen} |" in card


class Hub:
    """In place of huggingface_hub.HfApi: what would be sent."""

    sent: list = []  # noqa: RUF012
    problem = None

    def create_repo(self, name, **how):
        if self.problem:
            raise self.problem
        self.sent.append((name, how))

    def upload_folder(self, *, repo_id, folder_path):
        self.sent.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_push_lists_the_files_and_uploads_them_to_a_private_repository(run, tmp_path, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "sent", [])
    status, out, _ = call(capsys, "export", run, "--to", "hf", "--out", tmp_path / "a", "--push", "me/small")
    assert status == 0 and Hub.sent[0] == ("me/small", {"private": True, "exist_ok": True})
    assert "README.md" in Hub.sent[1][1] and all(f"  {name}\n" in out for name in Hub.sent[1][1])
    monkeypatch.setattr(Hub, "problem", OSError("no network\nat all"))
    status, _, err = call(
        capsys, "export", run, "--to", "hf", "--out", tmp_path / "b", "--push", "me/small", "--public"
    )
    assert (
        status == 2 and "could not upload to me/small: no network; " in err and (tmp_path / "b" / "README.md").exists()
    )
    for words, wrong in (
        (("--to", "safetensors", "--push", "me/small"), "give --to hf"),
        (("--to", "hf", "--push", "small"), "give OWNER/NAME"),
        (("--to", "hf", "--public"), "--public needs --push"),
    ):
        status, _, err = call(capsys, "export", run, *words, "--out", tmp_path / "c")
        assert status == 2 and wrong in err and not (tmp_path / "c").exists()
