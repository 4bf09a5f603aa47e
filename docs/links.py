"""A hook of MkDocs: on the site, a link to no page is a file's path, or leads to `repo_url`."""

import posixpath
import re

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>(?!\w+:|#)[^)\s]+)\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """The page with its links into the repository replaced."""
    here = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def replaced(link: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(here, link["target"].partition("#")[0]))
        if path.startswith("docs/") and path.endswith(".md"):
            return link[0]
        if config.repo_url:
            return f"[{link['text']}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        text = link["text"].strip("`")
        return f"`{path}`" if text.rstrip("/") in path else f"{link['text']} (`{path}`)"

    return LINK.sub(replaced, markdown)
