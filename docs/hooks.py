"""Pages of the site that are not files of docs/: mkdocs asks here for them while it builds (`hooks` in mkdocs.yml).

`reference.md` is what `forkd schema --markdown` prints. `contributing.md` and `changelog.md` are CONTRIBUTING.md and
CHANGELOG.md of the checkout, whose links into docs/ are made links between pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from forkd.config.schema import reference_page

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages to those that mkdocs has found."""
    from mkdocs.structure.files import File  # noqa: PLC0415 - the rest of this file needs no mkdocs

    for name, text in pages(Path(config.config_file_path).parent).items():
        files.append(File.generated(config, name, content=text))
    return files


def pages(checkout: Path) -> dict[str, str]:
    """The pages by the name that they have in docs/, as Markdown."""
    return {
        "reference.md": "---\nhide: [toc]\n---\n\n" + reference_page(),  # its table takes the whole width
        "contributing.md": (checkout / "CONTRIBUTING.md").read_text().replace("](docs/", "]("),
        "changelog.md": (checkout / "CHANGELOG.md").read_text().replace("](docs/", "]("),
    }
