# SPDX-License-Identifier: Apache-2.0
"""MkDocs hooks: links to files outside docs/, and formulas without JavaScript."""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# ](../benchmarks/results/x.json) in docs/, ](../../examples/1.ipynb) in docs/guides/
OUTSIDE = re.compile(
    r"\]\((?:\.\./)+((?:benchmarks|configs|examples|launch|tests)/[^)#]+)\)"
)
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)
COPIES = "repository"  # the folder of the site that holds the files linked to


def on_files(files: Any, config: Any) -> Any:
    """Adds the files of the repository that pages link to; others stay broken links."""
    for page in files.documentation_pages():
        for path in OUTSIDE.findall(page.content_string):
            name = f"{COPIES}/{path}"
            if (ROOT / path).is_file() and name not in files.src_uris:
                file = File.generated(config, name, abs_src_path=str(ROOT / path))
                files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links that leave docs/ to the copies."""
    up = "../" * page.file.src_uri.count("/")
    return OUTSIDE.sub(rf"]({up}{COPIES}/\1)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Replaces formulas by MathML, which browsers show by themselves."""

    def mathml(found: re.Match) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]).strip(), display=display)

    return FORMULA.sub(mathml, content)
