"""The chat template of a bundle, rendered as transformers renders it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgeprune.errors import BundleError, PromptError


class ChatTemplate:
    """A Jinja template that writes a conversation as the model was trained to read it."""

    def __init__(self, source: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise BundleError(
                f"the chat template is not valid Jinja ({error}): export the bundle again"
            ) from error

    def render(self, content: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
        """One message of the user, followed by the beginning of the answer.

        Args:
            content: Parts ``{"type": "image"}`` and ``{"type": "text", "text": …}``.
            special_tokens: What the template may use by name, such as ``bos_token``.

        Raises:
            PromptError: The template refuses the message.
        """
        try:
            return self._template.render(
                **special_tokens,
                messages=[{"role": "user", "content": list(content)}],
                tools=None,
                documents=None,
                add_generation_prompt=True,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise PromptError(
                f"the model's chat template refuses the prompt ({error}): ask in another form, or export the "
                "checkpoint with a template for messages with pictures"
            ) from error


class _GenerationBlock(Extension):
    """``{% generation %}``, with which templates mark answers for training: here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives to chat templates; sandboxed, as they come from strangers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which is wrong in a prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
