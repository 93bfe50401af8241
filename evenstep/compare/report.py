"""Reports: a document as a table (rows, Markdown, CSV), its pictures, and the page of all results.

`write_page` writes docs/results.md from the JSON files of ``evenstep compare --store``: every claim with our number,
the paper's number and the verdict, the lines that lost their number by a correction of their setting
(``superseded.jsonl`` beside the files), the remarks in ``notes.md``, and a ranking of all lines. Every table has a page
of its own, with its pictures, in the directory results/ beside it. The pages of the studies in lab/
are made of the same parts (`table`, `draw_curves`, `place`).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evenstep.compare.claims import (
    ALPHA,
    FLOOR,
    LEVEL,
    UNMEASURED,
    below_the_false_discovery_rate,
    called,
    judged,
    kept_bytes,
    losses_of,
    settled,
)
from evenstep.compare.results import envelope, reference_of, stopped_early
from evenstep.compare.table import Document
from evenstep.errors import EvenstepError
from evenstep.train.files import replace_text
from evenstep.train.hardware import short_commit
from evenstep.train.log import short_count


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


HEADS = (
    *("optimizer", "precision", "size", "best lr", "loss", "spread", "perplexity", "paper's perplexity"),
    *("tokens to reference", "state MB", "model + state", "peak MB", "tokens/s", "seeds"),
)


def rows(document: Document) -> list[list[str]]:
    """One row for each line. For a line without a second stage, the loss is the best of the sweep, in brackets."""
    lines = document["lines"]
    return [_row(line, reference_of(line, lines, document["reference"])) for line in lines]


def _row(line: Document, reference: Document | None) -> list[str]:
    swept = [cell["loss"] for cell in line["sweep"] if cell["status"] == "finished" and cell["loss"] is not None]
    loss = line["mean"] if line["mean"] is not None else min(swept, default=None)
    brackets = "{}" if line["mean"] is not None else "({})"
    lost = sum(cell["status"] == "diverged" for cell in line["finals"])
    ended = len(line["finals"]) - lost
    return [
        line["label"],
        line["precision_label"],
        line["size"],
        _number(line["best_lr"], "g") + _about_the_rate(line),
        brackets.format(f"{loss:.4f}") if loss is not None else ("diverged" if lost else "-"),
        _number(line["spread"] if ended > 1 else None, ".4f"),
        brackets.format(f"{math.exp(loss):.2f}") if loss is not None else "-",
        "/".join(f"{value:g}" for value in line["published"].values()) or "-",
        _reached(line, reference),
        _number(line["state_bytes"], ".2f", 1e6),
        _share(line, reference),
        _number(line["peak_memory"], ".0f", 2**20),
        _number(line["tokens_per_second"], ",.0f"),
        f"{ended}" + (f" ({lost} diverged)" if lost else ""),
    ]


def _about_the_rate(line: Document) -> str:
    """A note on a best rate at the edge of the sweep, beyond which a better one may lie, and `TESTED` on one that was
    chosen on a seed that is also tested."""
    rates = [cell["lr"] for cell in line["sweep"]]
    note = TESTED if is_tuned_on_a_tested_seed(line) else ""
    if len(rates) < 2 or line["best_lr"] not in (rates[0], rates[-1]):
        return note
    return note + (" (lowest tried)" if line["best_lr"] == rates[0] else " (highest tried)")


TESTED = "†"


def is_tuned_on_a_tested_seed(line: Document) -> bool:
    """Whether the line's rate was chosen on a seed whose long run is part of its result."""
    return bool({cell["seed"] for cell in line["sweep"]} & {cell["seed"] for cell in line["finals"]})


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value / unit, form)


def _reached(line: Document, reference: Document | None) -> str:
    at = line["tokens_to_reference"]
    if at is None or reference is None or not reference["tokens"]:
        return "-"
    return f"{at / reference['tokens']:.0%}"


def _share(line: Document, reference: Document | None) -> str:
    if line["model_bytes"] is None or reference is None or reference["model_bytes"] is None:
        return "-"
    return f"{kept_bytes(line) / kept_bytes(reference):.0%}"


def below(document: Document) -> str:
    """The lines below a table: runs that were stopped early, the meaning of columns, and the claims."""
    lines = [f"stopped early: {text}" for text in stopped_early(document)]
    if document["reference"]:
        lines.append(
            f"tokens to reference: after which share of the tokens of {document['reference']} its final loss was "
            f"reached; model + state: bytes relative to it"
        )
    if any(map(is_tuned_on_a_tested_seed, document["lines"])):
        lines.append(f"{TESTED} the rate was chosen on a seed that is also tested")
    for claim in document["claims"]:
        lines.append(f"claim ({claim['size']}): {claim['text']}: {claim['verdict']} {claim['ours']}".rstrip())
    return "\n".join(lines)


def markdown(document: Document) -> str:
    """The table of a document as Markdown."""
    return table(HEADS, rows(document))


def comma_separated(document: Document) -> str:
    """Every cell as a row of CSV, with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "precision", "size", "stage", "lr", "seed", "status", "loss", "tokens", "state_bytes"])
    for line in document["lines"]:
        for stage in ("sweep", "finals"):
            for cell in line[stage]:
                where = (line["row"], line["precision"], line["size"], stage.removesuffix("s"), cell["lr"])
                what = (cell["seed"], cell["status"], cell["loss"], cell["tokens"], line["state_bytes"])
                writer.writerow([*where, *what])
    return text.getvalue()


# ---- pictures ----


def draw(document: Document, directory: Path) -> list[Path]:
    """Draw the pictures for which there are data, and delete the others; returns their paths. Raises EvenstepError if
    matplotlib is not installed."""
    written = []
    for name, wanted, paint in PICTURES:
        lines = [line for line in document["lines"] if wanted(line)]
        path = directory / f"{document['table']}-{name}.png"
        if not lines:
            path.unlink(missing_ok=True)
            continue
        with picture(path, document["title"], _footer(document)) as axes:
            paint(axes, lines)
            axes.legend(fontsize=7, frameon=False, ncols=2 if len(lines) > 8 else 1)
        written.append(path)
    return written


@contextmanager
def picture(path: Path, title: str, footer: str) -> Iterator[Any]:
    """Axes of a figure that is written to ``path`` at the end. Raises EvenstepError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EvenstepError("pictures need matplotlib; pip install 'evenstep[plots]'") from None
    figure = Figure(figsize=(7, 4.4), layout="constrained")  # not pyplot, which has global state
    axes = figure.add_subplot()
    yield axes
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.set_title(title, fontsize=10, loc="left")
    figure.supxlabel(footer, fontsize=7, color="gray")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _band(axes: Any, x: Any, mean: Any, low: Any, high: Any, label: str) -> None:
    """Draw a curve of means, with a band from the lowest seed to the highest."""
    [drawn] = axes.plot(x, mean, label=label, linewidth=1.4)
    axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)


def draw_curves(
    path: Path,
    lines: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    footer: str = "",
    xscale: str = "linear",
) -> Path:
    """Draw a curve for each line: the mean over its seeds, with a band from the lowest to the highest.

    Args:
        path: the picture, whose directory is created if missing.
        lines: name -> ``(x, y)`` of each seed. The curve is drawn at every x that all seeds have.
        title: of the picture.
        xlabel: name of the horizontal axis.
        ylabel: name of the vertical axis.
        footer: small text below the axes, such as `place`.
        xscale: "linear" or "log".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with picture(path, title, footer) as axes:
        for name, seeds in lines.items():
            points = envelope([dict(zip(*curve, strict=True)) for curve in seeds])
            x, means, low, high = zip(*points, strict=True) if points else ([], [], [], [])
            _band(axes, x, means, low, high, name)
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale)
        axes.legend(fontsize=7, frameon=False)
    return path


def _footer(document: Document) -> str:
    machine, commit = (document[key][0] if document[key] else None for key in ("hardware", "commit"))
    return f"scale {document['scale']}, {_processor(machine or {})}, {short_commit(commit)}, {document['date']}"


def _processor(hardware: Document) -> str:
    return str(hardware.get("gpu") or hardware.get("cpu", ""))


def _name(line: Document) -> str:
    return f"{line['label']}, {line['precision_label']}"


def _curves(axes: Any, lines: list[Document]) -> None:
    losses = []
    for line in lines:
        curve = line["curve"]
        _band(axes, curve["tokens"], curve["mean"], curve["low"], curve["high"], _name(line))
        losses += curve["mean"][len(curve["mean"]) // 4 :]
    low, high = min(losses), max(losses)
    axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    axes.set(xlabel="tokens", ylabel="validation loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda x, _: short_count(x))


def _rates(axes: Any, lines: list[Document]) -> None:
    for line in lines:
        cells = [cell for cell in line["sweep"] if cell["loss"] is not None]
        [drawn] = axes.plot([c["lr"] for c in cells], [c["loss"] for c in cells], "-", linewidth=1.2, label=_name(line))
        for status, mark in (("finished", "o"), ("hopeless", "x")):
            points = [(cell["lr"], cell["loss"]) for cell in cells if cell["status"] == status]
            axes.plot([x for x, _ in points], [y for _, y in points], mark, color=drawn.get_color(), markersize=4)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss after the sweep (x: stopped early)")


def _memory(axes: Any, lines: list[Document]) -> None:
    """Perplexity over the memory of model and state; the dashed line is the Pareto front."""
    points = [(kept_bytes(line) / 1e6, math.exp(line["mean"]), line) for line in lines]
    for x, y, line in points:
        axes.plot(x, y, "o", markersize=6, label=_name(line))
    front: list[tuple[float, float]] = []
    for x, y, _ in sorted(points, key=lambda point: point[:2]):
        if not front or y < front[-1][1]:
            front.append((x, y))
    axes.step(*zip(*front, strict=True), where="post", color="gray", linewidth=1, linestyle="--", zorder=0)
    axes.set(xlabel="model and optimizer state (MB)", ylabel="perplexity")


PICTURES: list[tuple[str, Callable[[Document], bool], Callable[[Any, list[Document]], None]]] = [
    ("curves", lambda line: len(line["curve"]["tokens"]) > 1, _curves),
    ("rates", lambda line: sum(cell["loss"] is not None for cell in line["sweep"]) > 1, _rates),
    ("memory", lambda line: line["mean"] is not None and line["state_bytes"] is not None, _memory),
]
"""Name of a picture, whether a line has the data for it, and the function that draws it."""


# ---- pages ----


def place(runs: Iterable[Document]) -> str:
    """Hardware, commits, versions and dates of task results, for the caption of a table or picture."""
    runs = list(runs)
    machines = dict.fromkeys(_processor(run["hardware"]) for run in runs)
    commits = dict.fromkeys(short_commit(run["commit"]) for run in runs)
    packages = dict.fromkeys(f"{name} {number}" for run in runs for name, number in run["versions"].items())
    dates = sorted({run["finished"][:10] for run in runs})
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"{', '.join(machines)}; commit {', '.join(commits)}; {', '.join(packages)}; {days}"


HEAD = """\
# Results

Generated by `evenstep results {stored}`; do not edit. Each table is one command: `evenstep compare
recipes/tables/NAME.toml`.

The numbers are of
{what}

## How a verdict is found

The claims are registered in the table files before their runs. These rules decide; nobody writes a verdict by hand
(`evenstep/compare/claims.py`).

1. A claim compares two lines of a table over the seeds that both have, at least two. Runs with the same seed start from
   the same weights and see the same data, so the test is paired: Student's t of the differences.
2. The number after ± is the half-width of the 95 % interval of the mean difference, at least {floor} nats. It is that
   of one claim by itself. "Matches" means at most {level} nats above.
3. **p** is corrected by Holm's method over all {tests} claims of this page about losses, those that are not measured
   included: the probability that any verdict below is wrong by chance is at most {alpha:.0%}.
4. **confirmed**: p < {alpha:g}, and the difference is on the paper's side. **opposite**: p < {alpha:g}, and it is on
   the other side. **not confirmed**: p is larger. A line of which every run diverged has lost, without a test, and so
   have bytes outside their range.
5. **not tested**: there is one seed. **not measured**: a line has no runs with its present setting. **not testable
   here**: the size of these runs cannot answer, as the claim says; such claims are not among the {tests}.
6. The rate of a line is the best of a sweep with a seed that is not tested. The column *rates* names what falls short
   of that in one of the two lines: **tested seed**, the rate was chosen on a seed that is also tested, which favours
   the line; **edge**, the best rate is the outermost that was tried.

The papers' perplexities of Stable-SPAM, SPAM and SCALE come from an evaluation whose batch counter starts at 1, so
every loss that it prints is N/(N+1) of the true one, about 1 % too low (a perplexity about 3 % too low). Differences
between rows of one table change little. The papers' perplexities cannot be compared with ours in any case, which are
of another text, another tokenizer and a smaller model. The papers' 4-bit rows at 60M, 350M and 1B use a quantizer that
reads ahead (docs/lowbit.md); ours do not.
"""

SMALL = """\
models of 1.4M parameters, trained on {tokens} tokens of the King James Bible. Lines that the papers train in BF16 are
trained in fp32 here, and are called so. Directions may differ at another size, and the spikes of long runs do not occur
in short ones; an opposite direction here does not refute the paper's result at its size."""

SMOKE = """\
runs of a few steps, which only show that the program works (`--smoke`); every direction below is an
accident."""

OTHER = "models of the sizes and budgets that each table states."


def write_page(stored: Path, page: Path) -> list[Path]:
    """Write ``page``, and a page for each table with its pictures into a directory of the same name beside it; returns
    all paths. Raises EvenstepError if there are no stored results."""
    documents = load(stored)
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {d["table"]: draw(d, folder) for d in documents}
    lost = superseded(stored, documents)
    claims = settled(_all_claims(documents))
    parts = [_head(documents, stored, claims), _claims(claims, lost)]
    parts += filter(None, [_superseded(lost), _notes(stored), overview(documents)])
    parts.append(_contents(documents, claims))
    replace_text(page, _with_links("\n".join(parts), documents, folder.name))
    written = [page]
    for document in documents:
        own = folder / f"{document['table']}.md"
        replace_text(own, _table_page(document, drawn[document["table"]], page))
        written += [own, *drawn[document["table"]]]
    return written


def _with_links(text: str, documents: list[Document], folder: str) -> str:
    """The text with its links to tables (``#NAME``) as links to their pages."""
    for document in documents:
        text = text.replace(f"](#{document['table']})", f"]({folder}/{document['table']}.md)")
    return text


def _contents(documents: list[Document], claims: list[Document]) -> str:
    """A list of the tables, with the verdicts of their claims."""
    rows = []
    for document in documents:
        verdicts = Counter(claim["verdict"] for claim in claims if claim["document"] is document)
        found = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()) or "-"
        rows.append((f"[{document['title']}](#{document['table']})", document["paper"], found))
    return f"## The tables\n\n{table(('table', 'paper', 'claims'), rows)}"


def load(stored: Path) -> list[Document]:
    """The stored documents of a directory, sorted by file name. Raises EvenstepError if there are none."""
    paths = sorted(stored.glob("*.json")) if stored.is_dir() else []
    if not paths:
        raise EvenstepError(f"{stored}: no stored results; evenstep compare TABLE.toml --store {stored} makes some")
    documents = []
    for path in paths:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            documents.append({key: document[key] for key in (*NEEDED, *document)})
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise EvenstepError(f"{path}: not a result of evenstep compare ({problem}); remove it") from None
    return documents


NEEDED = ("table", "title", "paper", "scale", "lines", "claims", "commit", "hardware", "setting")


def _head(documents: list[Document], stored: Path, claims: list[Document]) -> str:
    scales = {document["scale"] for document in documents}
    tokens = short_count(max(document["setting"]["tokens"] for document in documents))
    what = SMOKE if "smoke" in scales else SMALL.format(tokens=tokens) if scales == {"small"} else OTHER
    tests = sum(claim["p"] is not None for claim in claims)
    return HEAD.format(stored=stored, what=what, floor=FLOOR, level=LEVEL, alpha=ALPHA, tests=tests)


def superseded(stored: Path, documents: list[Document]) -> list[Document]:
    """The lines of ``superseded.jsonl`` beside the results whose setting was corrected and that have no runs with the
    present one. Each names ``table``, ``line``, ``label``, what ``changed``, and the numbers of the old setting."""
    path = stored / "superseded.jsonl"
    known = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    measured = {(d["table"], line["name"]) for d in documents for line in d["lines"] if line["mean"] is not None}
    return [line for line in known if (line["table"], line["line"]) not in measured]


def _superseded(lost: list[Document]) -> str:
    if not lost:
        return ""
    rows = []
    for line in lost:
        loss = f"{line['loss']:.4f}" if line["seeds"] else f"({line['loss']:.4f})"
        where = f"[{line['table']}](#{line['table']})"
        rows.append((line["label"], line["changed"], loss, f"{line['lr']:g}", line["seeds"], where))
    return SUPERSEDED + table(("line", "corrected", "loss before", "lr", "seeds", "table"), rows)


SUPERSEDED = """\
## Not measured again since a correction

The setting of these lines was corrected, and they have not been trained with the new one: they have no number in the
tables, and their claims are not measured. The number before is the loss with the **old** setting, and stands only here.
In brackets: the best of a sweep, one seed.

"""


def _notes(stored: Path) -> str:
    """The remarks in ``notes.md`` beside the results, written by hand."""
    path = stored / "notes.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _all_claims(documents: list[Document]) -> list[Document]:
    """The claims of all documents, each judged by itself, and its ``document``."""
    claims = []
    for document in documents:
        for claim in document["claims"]:
            found = judged(claim, [line for line in document["lines"] if line["size"] == claim["size"]])
            claims += [] if found is None else [{**found, "document": document}]
    return claims


def _claims(claims: list[Document], lost: list[Document]) -> str:
    rows = []
    for claim in claims:
        document = claim["document"]
        text = claim["text"] if document["scale"] == "small" else f"{claim['text']} ({claim['size']})"
        p = "-" if claim["holm"] is None else f"{claim['holm']:.3f}" if claim["holm"] >= 0.001 else "< 0.001"
        ours, rates = claim["ours"] or _why_unmeasured(claim, lost), _remarks_on_rates(claim)
        cells = (text, f"**{claim['verdict']}**", ours, p, claim["seeds"], rates, claim["paper"])
        rows.append((*cells, f"[{document['table']}](#{document['table']})"))
    heads = ("claim", "verdict", "ours (loss in nats)", "p", "seeds", "rates", "the paper's", "table")
    return f"## Claims\n\n{table(heads, rows)}\n{_count(claims)}"


def _count(claims: list[Document]) -> str:
    tests = [claim for claim in claims if claim["p"] is not None]
    kept = sum(claim["holm"] is not None and claim["holm"] < ALPHA for claim in tests)
    weaker = below_the_false_discovery_rate(tests)
    open_ones = sum(claim["verdict"] == UNMEASURED for claim in tests)
    return (
        f"Of {len(tests)} claims about losses, {open_ones} are not measured and {kept} have a verdict. By the weaker "
        f"method of Benjamini and Hochberg, which lets {ALPHA:.0%} of the verdicts be wrong, {weaker} would have one.\n"
    )


def _sides(claim: Document) -> list[Document]:
    lines = [line for line in claim["document"]["lines"] if line["size"] == claim["size"]]
    return [called(lines, claim[key])[0] for key in ("better", "than")]


def _why_unmeasured(claim: Document, lost: list[Document]) -> str:
    gone = {(line["table"], line["line"]) for line in lost}
    labels = [_name(line) for line in _sides(claim) if (claim["document"]["table"], line["name"]) in gone]
    return f"not measured again since the correction of {' and '.join(labels)}" if labels else "-"


def _remarks_on_rates(claim: Document) -> str:
    """What falls short of the rules in the choice of the two lines' rates."""
    if not claim["ours"] or claim["rule"] in ("memory", "flatter"):
        return "-"
    sides = _sides(claim)
    remarks = {
        "tested seed": any(map(is_tuned_on_a_tested_seed, sides)),
        "edge": any("tried" in _about_the_rate(line) for line in sides),
    }
    return ", ".join(word for word, holds in remarks.items() if holds) or "-"


def _table_page(document: Document, pictures: list[Path], overview: Path) -> str:
    setting = document["setting"]
    where = (
        f"`evenstep compare recipes/tables/{document['table']}.toml --scale {document['scale']}`: {setting['data']}, "
        f"vocabulary {setting['vocab_size']}, {setting['batch_size']} x {setting['seq_len']} tokens a step, "
        f"{short_count(setting['sweep_tokens'])} tokens in a sweep of rates, {short_count(setting['tokens'])} at the "
        f"best, {setting['schedule']} to {setting['min_lr_ratio']:.0%}. {_where(document)}"
    )
    images = [f"![{path.stem}]({path.name})" for path in pictures]
    notes = [f"- {line}" for line in below(document).splitlines() if not line.startswith("claim (")]
    parts = [
        f"# {document['title']}",
        f"{document['paper']}. {document.get('about', '')} [The claims, and the rules](../{overview.name}).",
        markdown(document).rstrip(),
        "\n".join(notes),
        "\n".join(images),
        where,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _where(document: Document) -> str:
    """Hardware, commit, date and hours."""
    machines = ", ".join(_processor(fact) for fact in document["hardware"] if fact)
    commits = ", ".join(short_commit(commit) for commit in document["commit"] if commit)
    hours = document.get("seconds", 0) / 3600
    return f"{machines}; commit {commits or 'none'}; {document['date']}; {hours:.2f} h."


# ---- one ranking over all tables ----

RANKING = """\
## Every line, best first

Lines of all tables that saw the same data with the same budget ({setting}). **loss**: mean over the seeds; **behind**:
nats above the best line of that precision; **model + state**: bytes relative to {reference}. In brackets: one seed.
{tested}: the rate was chosen on a seed that is also tested.
"""
REFERENCE = "Adam"
COLUMNS = ("line", "loss", "spread", "behind", "best lr", "model + state", "tables")
SAME = ("data", "vocab_size", "batch_size", "seq_len", "tokens", "schedule")


def overview(documents: list[Document]) -> str:
    """The ranking of all lines as Markdown; empty if no two tables share a setting."""
    settings = Counter(_common(d) for d in documents if any(line["mean"] is not None for line in d["lines"]))
    if not settings or settings.most_common(1)[0][1] < 2:
        return ""
    common = settings.most_common(1)[0][0]
    entries: dict[tuple[Any, ...], Entry] = {}
    for document in documents:
        for line in document["lines"] if _common(document) == common else []:
            if line["mean"] is None or line["tokens"] < 0.99 * document["setting"]["tokens"]:
                continue  # not trained to the end, or with a smaller budget of its own
            entry = entries.setdefault((line["precision_label"], line["best_lr"], *losses_of(line)), Entry(line))
            entry.labels[line["label"]] = None
            entry.tables[document["table"]] = None
    named = dict(zip(SAME, common, strict=True))
    setting = f"{named['data']}, {named['tokens']:,} tokens, {named['batch_size']} x {named['seq_len']} a step"
    parts = [RANKING.format(setting=setting, reference=REFERENCE, tested=f"`{TESTED}`")]
    for precision in sorted({key[0] for key in entries}, key=lambda label: (-_bits(label), label)):
        of_precision = [entry for key, entry in entries.items() if key[0] == precision]
        parts.append(f"### {precision}\n\n{_ranking(of_precision)}")
    return "\n".join(parts)


def _bits(label: str) -> int:
    """The number in the label of a precision, such as 32 of fp32."""
    return int("0" + "".join(filter(str.isdigit, label)))


@dataclass
class Entry:
    """A line, which may be part of several tables under several names."""

    line: Document
    labels: dict[str, None] = field(default_factory=dict)
    tables: dict[str, None] = field(default_factory=dict)


def _common(document: Document) -> tuple[Any, ...]:
    return tuple(document["setting"][key] for key in SAME)


def _ranking(entries: list[Entry]) -> str:
    entries = sorted(entries, key=lambda entry: entry.line["mean"])
    best = entries[0].line["mean"]
    reference = next((kept_bytes(entry.line) for entry in entries if REFERENCE in entry.labels), None)
    rows = []
    for entry in entries:
        line, seeds = entry.line, len(losses_of(entry.line))
        rows.append((
            ", ".join(entry.labels),
            f"{line['mean']:.4f}" if seeds > 1 else f"({line['mean']:.4f})",
            f"{line['spread']:.4f}" if seeds > 1 else "-",
            f"{line['mean'] - best:.4f}",
            f"{line['best_lr']:g}{_about_the_rate(line)}",
            f"{kept_bytes(line) / reference:.0%}" if reference else "-",
            ", ".join(f"[{table}](#{table})" for table in entry.tables),
        ))  # fmt: skip
    return table(COLUMNS, rows)
