"""Prompts and completions as HTML that can do nothing: whatever a model has written, no script runs and nothing is fetched."""

from __future__ import annotations

from functools import cache
from typing import Any

import nh3
from markdown_it import MarkdownIt

from accord.data.records import Content, as_chat

TAGS = {
    "a", "blockquote", "br", "code", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip


@cache
def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).disable("image")


def markdown(text: str) -> str:
    """Sanitised HTML. Images stay text: showing one would tell its server who reads."""
    html: str = nh3.clean(
        _markdown().render(text),
        tags=TAGS,
        attributes={"a": {"href"}, "ol": {"start"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )
    return html


def turns(content: Content) -> list[dict[str, Any]]:
    """A prompt's messages: role, text and html."""
    messages = as_chat(content)
    return [{"role": m["role"], "text": m["content"], "html": markdown(m["content"])} for m in messages]
