"""Checks every link of a built site: `python tools/check_links.py site`. Links within the site must lead to a file, and
to an anchor in it; pages must load nothing from other sites. Links to other sites are not followed.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """``links``: (address, whether the page loads it). ``places``: the anchors that a fragment may name."""

    def __init__(self, text):
        super().__init__()
        self.links, self.places = [], {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.places |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        loads = tag in ("img", "script", "source", "iframe") or (tag == "link" and attrs.get("rel") == "stylesheet")
        self.links += [(attrs[key], loads) for key in ("href", "src") if attrs.get(key)]


def broken(site):
    """The broken links of the pages in the folder ``site``, one line each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":  # served for any address, so its links are absolute
            continue
        for address, loads in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if loads and parts.scheme != "data":
                    found.append(f"{path.relative_to(site)}: loads {address}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                found.append(f"{path.relative_to(site)}: {address} leads nowhere")
            elif target in pages and unquote(parts.fragment) not in pages[target].places:
                found.append(f"{path.relative_to(site)}: {address} has no such place")
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    problems = broken(folder)
    print("\n".join(problems) or f"all links of {folder.name}/ lead somewhere")
    sys.exit(bool(problems))
