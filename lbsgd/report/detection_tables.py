"""Table 3 in the paper's layout: box and mask AP, the paper's beside ours."""

from __future__ import annotations

from collections.abc import Mapping

from lbsgd.report.groups import Group
from lbsgd.report.measure import BOX_AP, MASK_AP
from lbsgd.report.page import Section
from lbsgd.report.statistics import difference, spread
from lbsgd.units import markdown_table

HEADS = ("paper box AP", "paper mask AP", "η", "iterations", "box AP", "mask AP", "seeds", "box AP difference [95 %]")


def ap_section(
    title: str,
    what: str,
    groups: Mapping[str, Group],
    labels: Mapping[str, str],
    papers: Mapping[str, tuple[float, float]],
) -> Section:
    """Return a table with a row per group that has a label, in the order of the labels; the first is the baseline.

    what: the head of the labels. papers: box and mask AP of the paper, by the groups' names.
    """
    there = [name for name in labels if name in groups]
    baseline = groups[there[0]] if there else None
    rows = []
    for name in there:
        group = groups[name]
        paper = [f"{ap:.1f}" for ap in papers[name]] if name in papers else ["-", "-"]
        ours = [str(spread(group.values_of(measure)) or "-") for measure in (BOX_AP, MASK_AP)]
        apart = None
        if baseline is not None and group is not baseline:
            apart = difference(group.values_of(BOX_AP), baseline.values_of(BOX_AP))
        steps = f"{group.header['num_iterations']:,}"
        rows.append([labels[name], *paper, f"{group.lr:.4g}", steps, *ours, str(len(group.finished)), str(apart or "")])
    return Section(title, "mean ± std over seeds, of the last evaluation", (what, *HEADS), rows)


def markdown(section: Section) -> str:
    """Return a section's table as Markdown."""
    return f"**{section.title}.** {section.note}\n\n{markdown_table(section.heads, section.rows)}\n"
