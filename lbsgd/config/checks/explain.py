"""Explain the codes of `lbsgd check`, on the screen or as docs/checks.md."""

from __future__ import annotations

import difflib
import json
import textwrap
from typing import Any

from lbsgd.config.checks.registry import CODES, GROUPS
from lbsgd.config.checks.rule import Rule
from lbsgd.errors import ConfigError
from lbsgd.units import markdown_table

WIDTH, LEAST_WIDTH = 100, 30


def explain(code: str, width: int = WIDTH) -> str:
    """Format one code's entry for a screen. Raises ConfigError for an unknown code, which names similar codes."""
    rule = CODES.get(code.upper())
    if rule is None:
        near = difflib.get_close_matches(code.upper(), CODES, n=4, cutoff=0.5)
        instead = f"near it are {', '.join(sorted(near))}" if near else "say `--explain all` for the whole list"
        raise ConfigError(f"--explain {code}: there is no such code; {instead}")
    head = [*part(f"{rule.code}  ", rule.title, width), *part(" " * 6, severities(rule), width)]
    texts = (("why", rule.why), ("example", written(rule) + where(rule)), ("fix", rule.fix))
    return "\n".join([*head, "", *(line for name, text in texts for line in part(f"{name:9}", text, width))])


def part(name: str, text: str, width: int) -> list[str]:
    """Return the lines of a text next to its name, wrapped between words."""
    return textwrap.wrap(
        text,
        max(LEAST_WIDTH, min(width, WIDTH)),
        initial_indent=name,
        subsequent_indent=" " * len(name),
        break_long_words=False,
        break_on_hyphens=False,
    )


def explain_all(width: int = WIDTH) -> str:
    """Format the entries of all codes for a screen."""
    return "\n\n".join(explain(code, width) for code in CODES)


def severities(rule: Rule[Any]) -> str:
    """Return a rule's severity in both kinds of JSON, in words."""
    said = ((rule.lbsgd, "with an lbsgd block"), (rule.plain, "in plain DeepSpeed"))
    if rule.lbsgd == rule.plain:
        return f"{rule.lbsgd} in every JSON"
    return ", ".join(f"{severity} {where}" for severity, where in said if severity)


def written(rule: Rule[Any]) -> str:
    """Return a rule's example as JSON, or as it is if it is a text."""
    return rule.example if isinstance(rule.example, str) else json.dumps(rule.example)


def where(rule: Rule[Any]) -> str:
    """Return the number of processes or the version with which an example triggers its rule, if that matters."""
    on = f" on {rule.processes} processes" if rule.processes > 1 else ""
    return on + (f" for DeepSpeed {rule.version}" if rule.version else "")


HEAD = """\
<!-- Written by `lbsgd check --explain all --markdown` from the rules in lbsgd/config/checks; a test compares. -->
# The codes of `lbsgd check`

Each code is one rule. Its severity depends on the file: with an `lbsgd` block, which states the intent, or without
one, in plain DeepSpeed. An error is refused by DeepSpeed or by lbsgd, or does not train; a warning is probably not
meant; a note is good to know. A dash means that the rule does not apply.

What DeepSpeed accepts is read from DeepSpeed itself (`tools/deepspeed_schema.py`), for 0.16.9, 0.17.6, 0.18.9 and
0.19.8: `lbsgd check --deepspeed 0.18` asks one of them, by default the installed one, and `--deepspeed 0.16..0.19`
prints a table of what changes.

`lbsgd check --explain CODE` prints one entry. `lbsgd check --fix FILE` keeps the file as `FILE.orig` and corrects what
has one right answer, in the layout that the file has; in a plain JSON only what DeepSpeed refuses, and no number that
DeepSpeed uses is lost. In a folder only DeepSpeed's JSONs are looked at; `node_modules`, `.git` and virtual
environments are not entered.

Every example triggers its own code and no other. It is laid over a file in the manner of a JSON merge patch: blocks are
merged, `null` deletes a key. The file is `ds_configs/8k.json` where the rule applies beside an `lbsgd` block, else
`{"train_batch_size": 256, "gradient_clipping": 0.0, "timers": {"throughput": {"enabled": false}}}`. (A plain optimizer
block always brings the note D55 as well.)
Codes that begin with L are looked for with `--for LIBRARY` only. Their examples are laid over the file that
`lbsgd config --from ds_configs/8k.json --for LIBRARY --gpus 8` writes.
"""


def markdown() -> str:
    """Return docs/checks.md."""
    return "\n".join([HEAD, *(group(title, rules) for title, rules in GROUPS.items())])


def group(title: str, rules: tuple[Rule[Any], ...]) -> str:
    """Return the section of one group: a table of its codes, then their entries."""
    rows = [[f"[{r.code}](#{r.code.lower()})", r.title, r.lbsgd or "-", r.plain or "-"] for r in rules]
    table = markdown_table(["code", "finds", "with an lbsgd block", "plain DeepSpeed"], rows)
    return "\n".join([f"## {title}", "", table, "", *map(entry, rules)])


def entry(rule: Rule[Any]) -> str:
    """Return the entry of one rule: what it finds, why it hurts, an example and the fix."""
    on = where(rule).strip()
    on = f" {on[0].upper()}{on[1:]}:" if on else ""
    return f"""\
### {rule.code}

*{rule.title}* ({severities(rule)})

{rule.why}{on}

```json
{written(rule)}
```

Fix: {rule.fix}.
"""
