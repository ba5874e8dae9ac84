"""The help text of a setting as its description in the API reference (an extension of griffe; see mkdocs.yml)."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class SettingsHelp(griffe.Extension):
    """Read ``name: type = setting(default, "help", ...)`` as a field with that default and that description."""

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Describe a field, once its whole package is read."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "setting" and len(call.arguments) > 1:
            attr.docstring = griffe.Docstring(self._text(call.arguments[1]), parent=attr, parser="google")
            attr.value = call.arguments[0]

    def _text(self, written: str | griffe.Expr) -> str:
        """Return a text that is written in the code, the constants that it names filled in."""
        if isinstance(written, griffe.ExprJoinedStr):
            return "".join(self._text(part) for part in written.values)
        if isinstance(written, griffe.ExprFormatted):
            constant = written.value
            return str(constant.resolved.value) if isinstance(constant, griffe.ExprName) else str(constant)
        text = str(written)
        return ast.literal_eval(text) if text[:1] in "'\"" else text
