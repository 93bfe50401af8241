"""The fine-tuning experiments in miniature, and their page."""

import importlib.util
import re
from pathlib import Path

import pytest

from evenstep.compare.cells import Outcome
from lab import finetune
from lab.common import stored
from lab.finetune import write_page

needs_gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym")


@needs_gym
def test_reasoning_runs_in_miniature_and_makes_its_page(tmp_path, monkeypatch):
    monkeypatch.setenv("EVENSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(finetune.tempfile, "tempdir", str(tmp_path))
    store = tmp_path / "store"
    finetune.prepared.cache_clear()
    finetune.main(["reasoning", "--smoke", "--store", str(store), "--out", str(tmp_path / "out")])
    assert len(stored(store)) == len(finetune.OPTIMIZERS)
    write_page(store, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert all(name in page for name in finetune.OPTIMIZERS) and (tmp_path / "results-finetune-reasoning.png").exists()


def test_mails_are_read_without_their_headers(tmp_path):
    (tmp_path / "spam-1").mkdir()
    (tmp_path / "spam-1" / "1.txt").write_text("Subject: Win\nX-Spam: yes\n\nmoney  now\n")
    assert finetune.read_mails(tmp_path) == [{"text": "Win. money now", "label": "spam"}]


def test_what_goes_wrong_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPAM_ASSASSIN", str(tmp_path))
    monkeypatch.setattr(finetune.tempfile, "tempdir", str(tmp_path))
    for words in (["mails", "--store", str(tmp_path)], ["report", "--store", str(tmp_path / "none")]):
        assert finetune.main(words) == 2
        assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)


def test_a_sweep_goes_on_while_its_highest_rate_does_best_and_the_seeds_follow_it():
    outcomes: dict = {}
    while waiting := [c for c in finetune.cells("mails", False, outcomes) if c.name not in outcomes]:
        for cell in waiting:
            away = abs(cell.setting["lr"] - (9e-4 if cell.setting["optimizer"] == "SPAM" else 1e-4))
            run = {"setting": cell.setting, "val_loss": away}
            outcomes[cell.name] = Outcome("finished", away, "", 1, run)
    rates = [c.setting["lr"] for c in finetune.cells("mails", False, outcomes) if "/spam-" in c.name]
    assert rates[:5] == [3e-5, 1e-4, 3e-4, 9e-4, 3e-3]
    seeds = [(c.setting["lr"], c.setting["seed"]) for c in finetune.cells("mails", False, outcomes)][-10:]
    assert seeds.count((9e-4, 1)) == seeds.count((9e-4, 2)) == 1 and seeds.count((1e-4, 1)) == 4


def test_the_page_in_docs_is_that_of_the_stored_runs(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    write_page(finetune.STORE, tmp_path / "results-finetune.md")
    assert (tmp_path / "results-finetune.md").read_text() == (root / "docs/results-finetune.md").read_text()
