"""Hooks of mkdocs: pages of the site that are made from other files, such as the README, docstrings and the help.

The pages in docs/ are written for a code host, and link to files of the repository by relative paths. On the site, a
link to a file that is not a page leads to a page that shows the file, and formulas become MathML. What a page would
load from another host is a warning, which `mkdocs build --strict` turns into an error.
"""

import contextlib
import html
import io
import json
import logging
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Link, Navigation
from mkdocs.structure.pages import Page

from capsnet_jax.cli.main import COMMANDS, describe_commands, parse
from capsnet_jax.routing import ROUTINGS

ROOT = Path(__file__).parents[2]
ICON = ROOT / "capsnet_jax" / "explore" / "page" / "icon.svg"
LIVE = "live"  # folder of the site with the explorer
HELP_WIDTH = 80  # characters, which fit beside the table of contents

# Files that are pages of the site under another name.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/tutorial.ipynb": "tutorial.md",
}

# The modules and functions whose docstrings a page of the reference shows.
REFERENCE = {
    "capsnet_jax": ["capsnet_jax"],
    "routing": [
        "capsnet_jax.routing",
        *(f"{function.__module__}.{name}" for name, function in ROUTINGS.items()),
        "capsnet_jax.routing.properties.check_routing",
        "capsnet_jax.ops.squash",
        "capsnet_jax.ops.capsule_norm",
    ],
    "figures": ["capsnet_jax.figures", "capsnet_jax.train.inspection"],
    "capsnet_verify": ["capsnet_verify"],
    "capsnet_torch": [f"capsnet_torch.{name}" for name in ("model", "layers", "conv_capsules", "losses", "ops")],
}

LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")  # the path in [text](path#anchor)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
LOADED = r'script|img|source|iframe|link(?! rel="(?:canonical|prev|next)")'
LOADS_FROM_OUTSIDE = re.compile(rf'<(?:{LOADED})\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"')

log = logging.getLogger("mkdocs.hooks.pages")
origins: dict[str, str] = {}  # pages of the site, and the files of the repository that they show, with links


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, and those that show files which a page links to."""
    files.append(File.generated(config, "icon.svg", abs_src_path=str(ICON)))
    paths = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for page, names in REFERENCE.items():
        files.append(File.generated(config, f"reference/{page}.md", content=reference(names)))
    files.append(File.generated(config, "reference/commands.md", content=help_of_commands()))
    for path in paths:  # which grows by the files that a page links to
        uri = page_of(path)
        if path.endswith((".md", ".ipynb")):
            origins[uri] = path
            targets = {linked_file(path, link) for link in LINK.findall(text_of(path))}
            paths += sorted(target for target in targets.difference(paths) if (ROOT / target).is_file())
        if uri in files.src_uris:
            continue
        content = {"content": text_of(path)} if uri.endswith(".md") else {"abs_src_path": str(ROOT / path)}
        files.append(File.generated(config, uri, **content))
    return files


def on_nav(nav: Navigation, *, config: MkDocsConfig, files: Files) -> Navigation:
    """Add a link to the explorer, which is not a page of mkdocs."""
    (section,) = (item for item in nav.items if item.title == "Explore")
    section.children.insert(1, Link("Draw a digit here", f"{LIVE}/index.html"))
    return nav


def on_post_build(*, config: MkDocsConfig) -> None:
    """Write the explorer into the site, where the browser computes the network."""
    parse(["explore", "--static", f"{config.site_dir}/{LIVE}"]).run()


def page_of(path: str) -> str:
    """Return where the site has a file of the repository: text as a page, pictures and data as they are."""
    if path in PAGES:
        return PAGES[path]
    if posixpath.splitext(path)[1] not in (".md", ".png", ".gif", ".json", ".csv"):
        return f"source/{path}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"


def linked_file(path: str, link: str) -> str:
    """Return the path in the repository that a relative link in a file leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def text_of(path: str) -> str:
    """Write a page that shows a file of the repository."""
    text, suffix = (ROOT / path).read_text(), posixpath.splitext(path)[1]
    if suffix == ".ipynb":
        return "\n\n".join(part for cell in json.loads(text)["cells"] for part in parts_of(cell))
    return text if suffix == ".md" else f"# `{path}`\n\n{block(suffix.removeprefix('.'), text)}"


def parts_of(cell: dict[str, Any]) -> Iterator[str]:
    """Write a cell of a notebook, and below code what it printed and drew."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield block("python", source)
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", [])})
        if picture := data.get("image/png"):
            yield f'<p><img alt="what the code above draws" src="data:image/png;base64,{"".join(picture.split())}"></p>'
        else:
            yield block("text", "".join(data["text/plain"]))


def block(language: str, text: str) -> str:
    """Write a block of code or output."""
    return f"```` {language}\n{text.rstrip()}\n````\n"


def reference(names: list[str]) -> str:
    """Write a page that shows docstrings, which mkdocstrings inserts."""
    heading = "" if len(names) == 1 else "    options: {show_root_heading: true}\n"
    return "".join(f"::: {name}\n{heading}\n" for name in names)


def help_of_commands() -> str:
    """Write a page with the help of each command, as it is printed."""
    os.environ["COLUMNS"] = str(HELP_WIDTH)
    parts = ["# Commands", block("text", describe_commands())]
    for name in COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            parse([name, "--help"])
        parts += [f"## capsnet {name}", block("text", printed.getvalue())]
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the pages of the site."""
    uri = page.file.src_uri
    if uri not in origins:
        return markdown

    def link_on_site(link: re.Match[str]) -> str:
        target = linked_file(origins[uri], link[1])
        is_file = (ROOT / target).is_file()  # otherwise mkdocs warns
        return posixpath.relpath(page_of(target), posixpath.dirname(uri) or ".") if is_file else link[1]

    return LINK.sub(link_on_site, markdown)


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, which browsers show without a script."""

    def formula(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")

    return FORMULA.sub(formula, content)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Warn of what a browser would load from another host."""
    for tag in LOADS_FROM_OUTSIDE.findall(output):
        log.warning(f"{page.file.src_uri} loads from another host: {tag}")
    return output
