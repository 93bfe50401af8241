"""The fine-tuning experiments in miniature, and their page."""

import importlib.util
import re

import pytest

from lab import finetune
from lab.finetune_report import write_page

needs_gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym")


@needs_gym
def test_reasoning_runs_in_miniature_and_makes_its_page(tmp_path, monkeypatch):
    monkeypatch.setenv("EVENSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(finetune.tempfile, "tempdir", str(tmp_path))
    store = tmp_path / "store"
    finetune.main(["reasoning", "--smoke", "--store", str(store)])
    assert len(list(store.rglob("*.json"))) == len(finetune.OPTIMIZERS)
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
