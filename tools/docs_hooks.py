"""Hooks of mkdocs: pages that may be missing, examples of docstrings as code, links from pages to files of the
repository, a sample report, and llms.txt."""

import os
import re
import tempfile
from pathlib import Path

from markdown import Extension
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:benchmarks|recipes|tests|evenstep|lab|examples)/[^)#\s]+)\)")
"""A link from a page to a file of the repository."""

SUMMARY = (
    "`from evenstep import StableSPAM, SPAM, SCALE, scale_groups, stabilize, AdaClip, AdaGN, GradientStabilizer, "
    "SpikeMonitor, quantize_`. The optimizers are torch optimizers: `StableSPAM(model.parameters(), lr=1e-3)` takes "
    "the place of `torch.optim.AdamW` (whose default weight decay is 0.01; here it is 0). `SCALE(scale_groups(model))` "
    "needs its groups. `stabilize(optimizer, GradientStabilizer())` wraps any torch optimizer; step the result.",
)
"""The first paragraph of llms.txt."""


class DoctestBlocks(Extension):
    """A paragraph that begins with ``>>>`` is code. Markdown alone would read it as three nested quotations, and
    ``x["a"]["b"]`` in it as a link."""

    def extendMarkdown(self, md):
        # Below 25, the priority of fences, whose content is stashed by then
        md.preprocessors.register(_IndentDoctests(md), "doctests", 22)


class _IndentDoctests(Preprocessor):
    def run(self, lines):
        found, inside = [], False
        for line in lines:
            starts = line.startswith(">>> ") and not inside
            inside = (inside or starts) and bool(line.strip())
            found += [""] if starts else []
            found.append(f"    {line}" if inside else line)
        return found


def on_config(config):
    config.markdown_extensions.append(DoctestBlocks())
    docs = Path(config.docs_dir)
    named = set()
    config.nav = _existing(config.nav, docs, named)
    pages = [str(path.relative_to(docs)) for path in docs.rglob("*") if path.suffix in (".md", ".ipynb")]
    rest = sorted(page for page in pages if page not in named and ".ipynb_checkpoints" not in page)
    if rest:
        config.nav.append({"More": rest})
    return config


def _existing(nav, docs, named):
    found = []
    for item in nav:
        [(title, target)] = item.items()
        if str(target).endswith("/"):  # every page of a folder
            target = [{_title(docs / page): page} for page in _pages_of(docs, target)]
        if isinstance(target, list):
            inside = _existing(target, docs, named)
            found += [{title: inside}] if inside else []
        elif (docs / target).exists():
            named.add(target)
            found.append(item)
    return found


def _pages_of(docs, folder):
    return sorted(str(path.relative_to(docs)) for path in (docs / folder).glob("*.md"))


def _title(path):
    return path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")


SAMPLE = "sample-report.html"
"""The report of docs/sample-run, the run that the tutorial breaks."""


def on_files(files, config):
    """Copy the files of the repository to which pages link into the site, and write the sample report."""
    files.append(File.generated(config, SAMPLE, content=_sample_report(Path(config.docs_dir) / "sample-run")))
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for target in OUTSIDE.findall(page.content_string):
            if (ROOT / target).is_file() and not files.get_file_from_path(f"repository/{target}"):
                content = (ROOT / target).read_bytes()
                files.append(File.generated(config, f"repository/{target}", content=content))
    return files


def _sample_report(run):
    from evenstep.telemetry.foreign import load_log
    from evenstep.telemetry.page import write_report

    log = load_log(run)
    log.name, log.path = "broken", Path("runs/broken")  # as in the tutorial, not the place of this checkout
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, SAMPLE)
        write_report([log], page)
        return page.read_bytes()


def on_page_markdown(markdown, page, config, files):
    def inside(match):
        if not (ROOT / match[1]).is_file():
            return match[0]
        return f"]({os.path.relpath(f'repository/{match[1]}', os.path.dirname(page.file.src_uri) or '.')})"

    return OUTSIDE.sub(inside, markdown)


PICTURE = re.compile(r'(?<!">)<img [^>]*src="(?!data:)([^"]+)"[^>]*>')
"""A picture that is no link."""


def on_page_content(html, page, config, files):
    """Let every picture open at its own size, since its text is tiny on a phone."""
    return PICTURE.sub(lambda match: f'<a href="{match[1]}">{match[0]}</a>', html)


def on_post_page(output, page, config):
    """Convert the links of notebooks, which mkdocs leaves as they are, to those of HTML pages."""
    if page.file.src_uri.endswith(".ipynb"):
        output = re.sub(r'href="([^":]+)\.(?:md|ipynb)((?:#[^"]*)?)"', r'href="\1.html\2"', output)
    return output


def on_post_build(config):
    """Write llms.txt, which lists every page with its first sentence for language models."""
    lines = ["# evenstep", "", f"> {config.site_description}", "", *SUMMARY, ""]
    lines += _listed(config.nav, Path(config.docs_dir), 2)
    (Path(config.site_dir) / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _listed(nav, docs, level):
    lines = []
    for item in nav:
        title, target = next(iter(item.items())) if isinstance(item, dict) else (Path(item).stem, item)
        if isinstance(target, list):
            lines += ["", f"{'#' * level} {title}", "", *_listed(target, docs, level + 1)]
        else:
            lines.append(
                f"- [{title}]({Path(target).with_suffix('.html').as_posix()}): {_first_sentence(docs / target)}"
            )
    return lines


def _first_sentence(path):
    if path.suffix == ".ipynb":
        import json

        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "".join(next(cell for cell in cells if cell["cell_type"] == "markdown")["source"])
    else:
        text = path.read_text(encoding="utf-8")
    for paragraph in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        paragraph = " ".join(paragraph.split())
        if paragraph and paragraph[0] not in "#|<:-*!":
            paragraph = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)  # links become their text
            return re.split(r"(?<=[a-z0-9)`]\.)\s", paragraph)[0]
    return ""
