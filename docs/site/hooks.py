"""What mkdocs calls while it builds the site: the generated pages, links that lead out of docs/, equations as MathML.

The Markdown in docs/ is written for a reader of the repository, so its links lead to files. Here a link out of docs/ to
a Markdown file (or a folder with a README) becomes a page of the site, with its pictures; any other one becomes text.
"""

import html
import os
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import reference

ROOT = Path(__file__).resolve().parents[2]
# Files beside docs/ that are pages of the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ELSEWHERE = "repository"  # the folder of pages that were linked to
# A wider page, so that a terminal of 80 columns fits; names in tables stay whole.
STYLE = """.md-grid { max-width: 76rem; }
.md-typeset table:not([class]) td code { word-break: keep-all; overflow-wrap: anywhere; }
.md-typeset table:not([class]) td:first-child code { white-space: nowrap; }
"""
# A link (its label may hold code), or else a piece of code, which is passed over.
LINK = re.compile(r"(!?)\[((?:[^\]`]|`[^`]*`)*)\]\(([^)\s#]*)(#[^)\s]*)?\)|```.*?```|`[^`\n]+`", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    files.append(File.generated(config, "site.css", content=STYLE))
    queue = [(path, ROOT / path) for path in PAGES]
    queue += [(f"docs/{file.src_uri}", ROOT / "docs" / file.src_uri) for file in files.documentation_pages()
              if (ROOT / "docs" / file.src_uri).is_file()]  # fmt: skip
    seen = {path for path, _ in queue}
    while queue:
        path, file = queue.pop()
        text = file.read_text(encoding="utf-8")
        if not path.startswith("docs/"):
            files.append(File.generated(config, page_of(path), content=rewritten(text, path)))
        for target in targets(text, path):
            found = followed(target)
            if found is None or found in seen or found.startswith("docs/"):
                continue
            seen.add(found)
            if found.endswith(".md"):
                queue.append((found, ROOT / found))
            else:
                files.append(File.generated(config, page_of(found), abs_src_path=str(ROOT / found)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    path = f"docs/{page.file.src_uri}"
    return rewritten(markdown, path) if (ROOT / path).is_file() else markdown


def on_page_content(content: str, **_: Any) -> str:
    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', _mathml, content, flags=re.DOTALL)


def _mathml(match: re.Match[str]) -> str:
    return convert(html.unescape(match[3]).strip(), display="block" if match[2] == "[" else "inline")


def targets(text: str, path: str) -> list[str]:
    """Paths from the repository's root that this text links to."""
    found = [match[3] for match in LINK.finditer(text)]
    return [resolved(target, path) for target in found if target and "://" not in target]


def resolved(target: str, path: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(path), target)).replace(os.sep, "/")


def followed(target: str) -> str | None:
    """The file of the repository that a link means, or None where it is no page and no picture."""
    if (ROOT / target / "README.md").is_file():
        return f"{target}/README.md"
    if (ROOT / target).is_file() and target.endswith((".md", ".png", ".svg", ".jpg")):
        return target
    return None


def page_of(path: str) -> str:
    """Where a file of the repository lies on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"{ELSEWHERE}/{path}")


def rewritten(text: str, path: str) -> str:
    """The text with its links as they are on the site; ``path`` is where it lies in the repository."""
    here = os.path.dirname(page_of(path))

    def link(match: re.Match[str]) -> str:
        bang, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or "://" in target:
            return match[0]
        found = followed(resolved(target, path))
        if found is None:
            return label
        return f"{bang}[{label}]({os.path.relpath(page_of(found), here or '.').replace(os.sep, '/')}{anchor})"

    return LINK.sub(link, text)
