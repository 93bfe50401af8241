"""From the runs of compare_lowbit.py to one small file, and from that to docs/results-lowbit.md with its pictures.

    python benchmarks/lowbit_results.py collect runs/lowbit --json benchmarks/results/2026-11-25-lowbit.json
    python benchmarks/lowbit_results.py page benchmarks/results/2026-11-25-lowbit.json

Both work on a comparison that is not finished; the page then says what is missing. The verdicts on the papers' claims
follow from the numbers by the rules in lowbit_claims.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compare_lowbit import OPTIMIZERS, PRECISIONS
from lowbit_claims import PUBLISHED, RULES, Results, Row, verdicts

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = "results-lowbit.md"
RATES, SEEDS = "results-lowbit-rates.png", "results-lowbit-seeds.png"


# ---- collecting ----


def collect(out: Path) -> dict[str, Any]:
    """What the finished cells under ``out`` say; a run that stopped at a NaN counts, with a loss of None."""
    rows, facts, commits, skipped = [], {}, [], []
    for config_file in sorted(out.glob("*/config.toml")):
        cell = config_file.parent
        config, summary = tomllib.loads(config_file.read_text()), cell / "summary.json"
        log = cell.with_name(f"{cell.name}.log")
        done = json.loads(summary.read_text()) if summary.exists() else {}
        if not done and "training stopped" not in (log.read_text() if log.exists() else ""):
            skipped.append(cell.name)
            continue
        optim, train = config["optim"], config["train"]
        rows.append(
            {
                "optimizer": optim["name"] + (" + clip" if train["clip_norm"] else ""),
                "precision": config.get("lowbit") or train["dtype"].removesuffix("-autocast"),
                **{"lr": optim["lr"], "seed": config["seed"], "tokens": train["tokens"]},
                "val_loss": done.get("val_loss"),
                "tokens_per_second": round(done["tokens_per_second"]) if done else None,
            }
        )
        if done:
            commits.append(_short(done["commit"]))
            facts = {key: done[key] for key in ("model", "parameters", "hardware", "versions")} | {
                "setting": {
                    **{key: config["data"][key] for key in ("source", "vocab_size")},
                    **{key: train[key] for key in ("batch_size", "seq_len")},
                    "schedule": config["schedule"]["name"],
                }
            }
    if skipped:
        print(f"not finished, left out: {', '.join(skipped)}")
    order = list(OPTIMIZERS), list(PRECISIONS)
    rows.sort(
        key=lambda r: (r["tokens"], order[1].index(r["precision"]), order[0].index(r["optimizer"]), r["lr"], r["seed"])
    )
    return {**facts, "commits": sorted(set(commits)), "rows": rows}


def _short(commit: str) -> str:
    name, plus, changes = commit.partition("+")
    return name[:7] + plus + changes


# ---- the page ----


def page(document: dict[str, Any], source: str) -> str:
    results = Results([Row(**row) for row in document["rows"]])
    return "\n".join(
        [
            *_head(document, results, source),
            *_claims(results),
            *_sweep(results),
            *_seeds(results),
            *_published(),
            *_limits(document, results),
        ]
    )


def _head(document: dict[str, Any], results: Results, source: str) -> list[str]:
    setting, hardware = document["setting"], document["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    commits, seeds = document["commits"], sorted({row.seed for row in results.long})
    lines = [
        "# Low-bit training: results",
        "",
        f"<!-- Written by `python benchmarks/lowbit_results.py page {source}`. Change the program, not the page. -->",
        "",
        f"A LLaMA of {document['parameters'] / 1e6:.2f}M parameters (`{document['model']}`, vocabulary "
        f"{setting['vocab_size']}) on `{setting['source']}`, {setting['batch_size']} x {setting['seq_len']} tokens a "
        f"step, {setting['schedule']} schedule, no weight decay. Losses are nats per token on the validation split, in "
        "the quantised model where training was quantised. fp32 is full precision, bf16 is autocast; `int4`, `fp4`, "
        "`nvfp4` and `fp4-official` are the recipes of [lowbit.md](lowbit.md). Stable-SPAM has the paper's gammas of "
        "the precision; SPAM resets every 100 steps; clip is the norm clip at 1.0.",
        "",
        f"Hardware: {hardware['cpu']}, {hardware['threads']} thread a run. {versions}. Code of commit "
        f"{', '.join(commits)}. Sweep: {_tokens(results.sweep)} tokens a run, seed 0."
        + (f" Long runs: {_tokens(results.long)} tokens, seeds {', '.join(map(str, seeds))}." if seeds else ""),
        "",
    ]
    if missing := results.missing():
        lines += [f"**Not finished:** {missing}.", ""]
    return lines


def _tokens(rows: list[Row]) -> str:
    return f"{rows[0].tokens / 1e6:g}M" if rows else "-"


def _claims(results: Results) -> list[str]:
    lines = ["## The claims", "", *RULES, "", "| claim | papers | here | verdict |", "|---|---|---|---|"]
    lines += [f"| {v.claim} | {v.papers} | {v.here} | **{v.verdict}** |" for v in verdicts(results)]
    return [*lines, ""]


def _sweep(results: Results) -> list[str]:
    rates = sorted({row.lr for row in results.sweep})
    lines = ["## Loss by learning rate", "", f"![Loss by learning rate]({RATES})", ""]
    lines += [f"| precision | optimizer | {' | '.join(f'{lr:g}' for lr in rates)} | best rate | range over rates |"]
    lines += ["|---|---|" + "---|" * (len(rates) + 2)]
    for optimizer, precision in results.cells(results.sweep):
        loss = results.by_rate(optimizer, precision)
        best, span = results.best_rate(optimizer, precision), results.rate_range(optimizer, precision)
        cells = [
            (f"**{_loss(loss[lr], 3)}**" if lr == best else _loss(loss[lr], 3)) if lr in loss else "" for lr in rates
        ]
        shown = "" if span is None else _loss(span, 3)
        lines.append(f"| {precision} | {optimizer} | {' | '.join(cells)} | {'' if best is None else best} | {shown} |")
    return [*lines, ""]


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def _difference(a: float, b: float) -> str:
    return f"{a - b:+.4f}" if max(a, b) < float("inf") else ""


def _loss(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value < float("inf") else "diverged"


def _seeds(results: Results) -> list[str]:
    if not results.long:
        return []
    count = max(len(results.seeds(*cell)) for cell in results.cells(results.long))
    lines = [f"## {count} seeds at the best rate", "", f"![Loss of the long runs]({SEEDS})", ""]
    lines += [
        "The rate is the best of the sweep (bf16: of fp32); of several tried, the best. The sweep is a quarter as long "
        "as these runs, and a step of its rates may cost as much as a change of optimizer: compare cells at different "
        "rates with care.",
        "",
        "| precision | optimizer | rate | mean loss | range over seeds | seeds | against fp32 | also tried |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for optimizer, precision in results.cells(results.long):
        losses, base = results.seeds(optimizer, precision), results.seeds(optimizer, "fp32")
        values = list(losses.values())
        cost = "" if precision == "fp32" or not base else _difference(_mean(values), _mean(base.values()))
        spread = f"{max(values) - min(values):.4f}" if max(values) < float("inf") else ""
        lines.append(
            f"| {precision} | {optimizer} | {results.long_rate(optimizer, precision):g} | "
            f"{_loss(_mean(values), 4)} | {spread} | {len(values)} | {cost} | "
            f"{_others(results, optimizer, precision)} |"
        )
    return [*lines, ""]


def _others(results: Results, optimizer: str, precision: str) -> str:
    """What was tried besides."""
    chosen, tried = results.long_rate(optimizer, precision), results.long_by_rate(optimizer, precision)
    return ", ".join(f"{_loss(_mean(tried[lr]), 4)} at {lr:g}" for lr in sorted(tried) if lr != chosen)


def _published() -> list[str]:
    lines = [
        "## The papers' numbers",
        "",
        "Perplexity on C4 (arXiv:2502.17055). Their evaluation makes each loss N / (N + 1) of the true one. Their FP4 "
        "is a grid of nine even levels, and their groups span tokens where a width is no multiple of 256 (350M, 1B), "
        "so those 4-bit numbers are too low ([lowbit.md](lowbit.md), Causality).",
        "",
        "| precision | optimizer | 60M | 130M | 350M | 1B |",
        "|---|---|---|---|---|---|",
    ]
    for (optimizer, precision), numbers in PUBLISHED.items():
        cells = " | ".join(f"{numbers[size]:g}" if size in numbers else "" for size in ("60M", "130M", "350M", "1B"))
        lines.append(f"| {precision} | {optimizer} | {cells} |")
    return [*lines, ""]


def _limits(document: dict[str, Any], results: Results) -> list[str]:
    setting = document["setting"]
    steps = (results.long or results.sweep)[0].tokens // (setting["batch_size"] * setting["seq_len"])
    return [
        "## What this does not show",
        "",
        "Models of this size and runs of this length have few spikes, which is what Stable-SPAM is made for. Its "
        f"moment reset comes every 1000 steps, and the longest run here has {steps}. The rate is chosen by one seed, "
        "in runs shorter than those it is used for, and the best rate of a longer run may be lower. "
        "The papers measure perplexity on C4 with models 40 to 700 times as large and far longer runs; the direction "
        "of a difference can be compared, its size cannot. All low-bit arithmetic is simulated.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("collect", help="write the results of runs to a file")
    one.add_argument("out", type=Path, help="what compare_lowbit.py had for --out")
    one.add_argument("--json", type=Path, required=True, metavar="FILE")
    two = commands.add_parser("page", help="write the page and its pictures")
    two.add_argument("file", type=Path, help="what collect wrote")
    two.add_argument("--docs", type=Path, default=DOCS, help="where to (default: docs)")
    args = parser.parse_args()
    if args.command == "collect":
        document = collect(args.out)
        if not document["rows"]:
            parser.error(f"{args.out} holds no finished run of compare_lowbit.py")
        rows = document.pop("rows")
        listed = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = json.dumps(document, indent=1).removesuffix("\n}")
        args.json.write_text(f'{head},\n "rows": [\n{listed}\n ]\n}}\n', encoding="utf-8")
        print(f"{len(rows)} runs -> {args.json}")
        return
    from lowbit_plots import draw_rates, draw_seeds

    document = json.loads(args.file.read_text(encoding="utf-8"))
    results = Results([Row(**row) for row in document["rows"]])
    draw_rates(results, args.docs / RATES)
    if results.long:
        draw_seeds(results, args.docs / SEEDS)
    (args.docs / PAGE).write_text(page(document, f"benchmarks/results/{args.file.name}"), encoding="utf-8")
    print(f"written: {args.docs / PAGE}")
    for verdict in verdicts(results):
        print(f"{verdict.verdict:14} {verdict.claim}")


if __name__ == "__main__":
    main()
