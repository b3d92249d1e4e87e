"""What a loop of one's own asks for: the keys of the command line, with its defaults and checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fpgm.config import Pruning
from fpgm.errors import Error
from fpgm.keys import CONFIGS
from fpgm.training.asked import asked_by_a_loop

Named = str | Mapping[str, Any]  # "soft", or {"name": "soft", "settle": 0.6}

# What needs more of the loop than the moments at which it calls.
ELSEWHERE = {
    "method": "changes the loss or is trained itself, which a loop of your own does without fpgm",
    "latency_target": "is looked for by fpgm-train; widths= takes over what a run has found",
}


def pruning(
    criterion: Named, schedule: Named, pretrained: bool, words: Mapping[str, Any]
) -> Pruning:
    """The configuration of these words; those that are not given have the default that they have on
    the command line. Raises Error with a line for each mistake there is."""
    for key, why in ELSEWHERE.items():
        if words.get(key):
            raise Error(f"{key}={words[key]}: {why}")
    defaults = yaml.safe_load((CONFIGS / "config.yaml").read_text())
    given = {key: list(v) if isinstance(v, tuple) else v for key, v in words.items()}
    values = {key: defaults[key] for key in Pruning.model_fields if key in defaults} | given
    values["criterion"] = entry("criterion", criterion)
    values["schedule"] = entry("schedule", schedule)
    if values["epochs"] == 0 and not pretrained:
        raise Error("epochs=0: nothing is trained; of a trained network say so, pretrained=True")
    return asked_by_a_loop(values, from_scratch=not pretrained)


def entry(group: str, chosen: Named) -> dict[str, Any]:
    """name and options of what is chosen from a group, by its YAML, as far as there is one."""
    options = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise Error(
            f"{group}={chosen}: a name, or a mapping with one, {{'name': NAME, KEY: VALUE}}"
        )
    file = CONFIGS / group / f"{name}.yaml"
    if not file.exists():  # one's own, or a mistake that is found where all are looked for
        return {"name": name, **options}
    values = yaml.safe_load(file.read_text())
    for other in values.pop("defaults", ()):
        if other != "_self_":
            values = entry(group, other) | values
    return {"name": name, **values, **options}
