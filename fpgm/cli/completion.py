"""Completion of values: Hydra offers those of groups, this those of keys: `residual=`, `tune=`."""

from __future__ import annotations

from hydra.plugins.completion_plugin import CompletionPlugin

_query = CompletionPlugin._query  # what the plugins of all shells ask


def offer_choices() -> None:
    """For this process. A plugin of our own would stand in for bash's in every Hydra program."""
    CompletionPlugin._query = query  # type: ignore[assignment, method-assign]


def query(plugin: CompletionPlugin, config_name: str | None, line: str) -> list[str]:
    """The words that the last one of a command line may become. Several values are a sweep."""
    from fpgm.config import choices  # pydantic: help need not wait for it

    key, _, value = line.rpartition(" ")[2].partition("=")
    before, comma, begun = value.rpartition(",")
    fitting = [choice for choice in choices().get(key, ()) if choice.startswith(begun)]
    if fitting:
        return [f"{key}={before}{comma}{choice}" for choice in fitting]
    return list(_query(plugin, config_name, line))
