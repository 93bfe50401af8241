"""The Python blocks of the documentation, and the names that their pages take for granted."""

import random
import re
import shlex
from pathlib import Path

import torch
from torch import nn

from evenstep import StableSPAM

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<indent> *)```python(?P<info>[^\n]*)\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)

ANY = re.compile(r"^ *```(?P<info>[^\n]*)\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)

SIGNATURES = ("docs/architecture.md",)
"""Pages whose blocks are signatures for people to read."""


def texts():
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def pages():
    return [str(path.relative_to(ROOT)) for path in texts() if blocks(path)]


def shell_lines():
    """(page, number, text) for each line of the shell blocks of the pages, continued lines joined."""
    for path in texts():
        text = path.read_text(encoding="utf-8")
        for block in (each for each in ANY.finditer(text) if each["info"] in ("sh", "bash", "shell", "")):
            first = text[: block.start("code")].count("\n") + 1
            for i, line in enumerate(block["code"].replace("\\\n", "  ").splitlines()):
                yield str(path.relative_to(ROOT)), first + i, line


def commands():
    """(page, line, words after ``evenstep``) for each command of ours in the shell blocks of the pages."""
    found = []
    for page, number, line in shell_lines():
        ours = re.match(r"\s*(?:[A-Z_]+=\S+ )*(?:\S+ .*-m |\S*/bin/)?evenstep (\w.*)", line)
        if ours:
            words = shlex.split(re.split(r" [|>]|&&|;", ours[1])[0], comments=True)
            found.append((page, number, words))
    return found


def redirected():
    """{(page, line): file} for the commands whose output the shell writes to a file."""
    found = {(page, number): re.search(r" > (\S+)\s*$", line) for page, number, line in shell_lines()}
    return {place: match[1] for place, match in found.items() if match}


def programs():
    """(page, line, words) for each command of the shell blocks that starts a Python file or module."""
    found = []
    for page, number, line in shell_lines():
        words = shlex.split(re.sub(r"^(\s*[A-Z_]+=\S+)+", "", line), comments=True) if "python" in line else []
        if words and words[0].startswith("python"):
            found.append((page, number, words[1:]))
    return found


def blocks(path):
    """(line, why it is not run or "", code) for each block of a page. A block that needs what a machine may lack says
    so in its title: ```python title="not run: needs a GPU".
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    return [
        (
            text[: match.start("code")].count("\n") + 1,
            next(iter(re.findall(r'title="not run: ([^"]+)"', match["info"])), ""),
            re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE),
        )
        for match in FENCE.finditer(text)
    ]


class Example(nn.Module):
    """What `model` is on the pages: called with tokens it gives a loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.norm = nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, 64, bias=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.lm_head(self.norm(x)).flatten(0, -2), tokens.flatten())


def common(folder):
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(64, (4, 8), generator=draw) for _ in range(3)]
    model = Example()
    names = {"torch": torch, "nn": nn, "model": model, "fresh_model": Example(), "StableSPAM": StableSPAM}
    return names | {"optimizer": StableSPAM(model.parameters()), "batches": batches, "batch": batches[0]}


def integrations(folder):
    from integration_support import tiny_data, tiny_model

    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(32, (2, 8), generator=draw) for _ in range(4)]
    return {"model": tiny_model(), "dataset": tiny_data(), "batches": batches}


def guard(folder):
    from integration_support import tiny_data, tiny_model

    return {"language_model": tiny_model(), "dataset": tiny_data()}


def data(folder):
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(3000)]
    (folder / "notes").mkdir()
    for i in range(200):
        (folder / "notes" / f"{i}.md").write_text(" ".join(draw.choices(words, k=120)) + "\n")
    return {}


def migrating(folder):
    """In the loops of litgpt and nanochat, which run a backward pass before the lines of the page."""
    names = common(folder)
    loss = names["model"](names["batch"])
    loss.backward()
    loop = {
        "orig_model": names["model"],
        "loss": loss,
        "train_loss": loss.detach(),
        "step": 0,
        "state": {"iter_num": 1},
    }
    return names | guard(folder) | loop


PRELUDES = {
    "docs/cookbook.md": guard,
    "docs/data.md": data,
    "docs/guard.md": guard,
    "docs/integrations.md": integrations,
    "docs/migrating.md": migrating,
}
"""Names beside the common ones, by page; called with the folder in which the page runs."""

BEFORE = {"docs/lowbit.md": {"save_quantized(model": "from evenstep import quantize_\nmodel = quantize_(model, 'fp4')"}}
"""What comes before the block in which a text stands, by page."""


def namespace(page, folder):
    return {"__name__": "__main__"} | common(folder) | PRELUDES.get(page, lambda folder: {})(folder)


def run(page, line, code, names):
    before = next((setup for text, setup in BEFORE.get(page, {}).items() if text in code), "")
    exec(compile(before, f"before {page}", "exec"), names)
    exec(compile("\n" * (line - 1) + code, page, "exec"), names)
