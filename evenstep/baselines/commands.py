"""``evenstep optimizers [NAME]``: the list of optimizers, and the treatment of a model's parameters by one of them."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from evenstep.baselines.catalog import BASELINES, Baseline, baseline, check_options
from evenstep.baselines.rules import describe
from evenstep.baselines.transforms import TRANSFORMS
from evenstep.console import print_table

DESCRIPTION = """\
List the optimizers that optim.name accepts. With NAME (or package.module:Class): its paper, its hyperparameters, and
how it treats each kind of parameter of a small LLaMA, with the bytes of its state.
"""


EXAMPLES = """\
examples:
  evenstep optimizers
  evenstep optimizers stable_spam
  evenstep optimizers torch.optim:NAdam
"""


def add_optimizers(commands: Any, debug: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "optimizers",
        parents=[debug],
        help="list the optimizers, and how each treats the parameters of a model",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="show this one in detail")
    parser.set_defaults(run_command=_show)


def _show(args: argparse.Namespace) -> None:
    if args.name is None:
        print_table("", *overview(), f"gradient transforms before any of them (optim.before): {', '.join(TRANSFORMS)}")
        return
    chosen = baseline(args.name)
    check_options(args.name, {})
    for line in facts(args.name, chosen):
        print(line)
    print()
    print_table("", *treatment(chosen))


def overview() -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, entry in BASELINES.items():
        installed = entry.version() or f"no: pip install 'evenstep[{entry.extra}]'"
        rows.append([name, entry.package, installed, entry.paper, "; ".join(filter(None, [_rule(entry), entry.note]))])
    return ["optimizer", "package", "installed", "paper", "parameters"], rows


def _rule(entry: Baseline) -> str:
    return describe(entry.rule)


def facts(name: str, entry: Baseline) -> list[str]:
    shown = ", ".join(f"{key} = {_value(value)}" for key, value in entry.hyperparameters().items())
    lines = [
        f"{name}: {entry.home} ({entry.package} {entry.version() or 'not installed'})",
        *([f"paper: {entry.paper}"] if entry.paper else []),
        f"parameters: {_rule(entry)}",
        *([f"note: {entry.note}"] if entry.note else []),
        f"hyperparameters: lr, weight_decay, {shown}",
    ]
    return lines


def _value(value: Any) -> str:
    return "(none)" if value is inspect.Parameter.empty else str(value).lower() if value is None else str(value)


def treatment(entry: Baseline) -> tuple[list[str], list[list[str]]]:
    """One row for each kind of parameter of a tiny LLaMA: its group and its state after a step on random gradients."""
    import torch

    from evenstep.baselines.state_size import state_bytes
    from evenstep.models import Llama, llama_config
    from evenstep.optim import scale_groups

    torch.manual_seed(0)
    model = Llama(llama_config("tiny", 256, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2))
    optimizer = entry.build(model, lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    place = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    rows = []
    for kind in scale_groups(model):
        params = [p for _, p in kind["params"]]
        groups = sorted({place[id(p)] for p in params})
        kept = [state_bytes(optimizer.state.get(p, {})) for p in params]
        entries = sorted({str(key) for p in params for key in _names(optimizer.state.get(p, {}))})
        own = {key: optimizer.param_groups[groups[0]].get(key) for key in ("rank", "update_proj_gap", "scale")}
        extra = ", ".join(f"{key} {value}" for key, value in own.items() if value)
        rows.append(
            [
                _KINDS.get(kind["kind"], kind["kind"]),
                str(len(params)),
                f"{groups[0]}" if len(groups) == 1 else f"{groups[0]}-{groups[-1]}",
                f"{sum(kept) / sum(p.numel() for p in params):.2f}",
                "; ".join(filter(None, [", ".join(entries), extra])),
            ]
        )
    return ["kind", "tensors", "group", "state bytes an entry", "kept"], rows


_KINDS = {"last": "last layer", "hidden": "hidden matrices", "vector": "vectors"}


def _names(state: Any) -> list[str]:
    return [key for key in state if key not in ("step", "age", "n")]
