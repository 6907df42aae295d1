"""One HTML page about runs that needs no other file and no network."""

import base64
import html
import itertools
from collections import Counter
from pathlib import Path

from flax.traverse_util import flatten_dict

from beit_jax import health, stored_config
from beit_jax.report import curves, describe, svg
from beit_jax.report.runs import Run
from beit_jax.report.tables import RESULTS, Table

HERE = Path(__file__).parent
Numbered = list[tuple[int, Run]]  # the number chooses a run's colour, on the whole page

# What the rows of a picture are, from above, by its name and the run's task; or one sentence.
ROWS = {
    ("reconstruction", "dvae"): ("image", "by way of its tokens"),
    ("reconstruction", "pixel_decoder"): ("image", "its tokens decoded"),
    ("reconstruction", "mim"): ("image", "masked", "its own tokens", "masked ones predicted"),
}
CAPTIONS = {
    "reconstruction": "Held-out images, and what becomes of them",
    "masks": "Held-out images, and what the encoder sees of them",
    "attention": "Where the patches of held-out images look, in heads of the last block (bright: "
    "most)",
    "codes": "The commonest codes, a row each: where in images it stands (white: most often), and "
    "patches that get it, amid their neighbours",
}


def page(runs: list[Run], tables: list[Table]) -> str:
    """The whole page."""
    numbered = _numbered(_distinct(runs))
    runs = [run for _, run in numbered]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    parts = {
        **{f"Curves: {describe.TASKS[t]}": _curves(group) for t, group in _by_task(numbered)},
        **{table.title: _table(table) for table in tables},
        "Pictures": _pictures(runs),
        "Configuration": _configuration(runs),
        "Environment": "".join(map(_environment, runs)),
    }
    parts = {name: inside for name, inside in parts.items() if inside}
    links = "".join(f'<a href="#part{i}">{_(name)}</a>' for i, name in enumerate(parts))
    cards = "".join(map(_card, numbered))
    sections = "\n".join(
        f'<section id="part{i}"><h2>{_(name)}</h2>{inside}</section>'
        for i, (name, inside) in enumerate(parts.items())
    )
    style, script = ((HERE / name).read_text() for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{_(title)} - beit_jax report</title><link rel="icon" href="data:,">'
        f'<style>{style}</style></head>\n<body><main><header><p class="eyebrow">beit_jax report'
        f"</p><h1>{_(title)}</h1><nav>{links}</nav></header>"
        f'<div class="cards">{cards}</div>\n{sections}</main>'
        f'<div id="tip" hidden></div><script>{script}</script></body></html>\n'
    )


def _distinct(runs: list[Run]) -> list[Run]:
    """Runs whose names tell them apart: of those of one name, with their parents' folders."""
    names = [run.name for run in runs]
    return [
        run._replace(name=f"{run.folder.parent.name}/{run.name}")
        if names.count(run.name) > 1
        else run
        for run in runs
    ]


def _numbered(runs: list[Run]) -> Numbered:
    """Each run's number leads to a colour that no other of its task has, while there are enough."""
    alike, found = Counter(), {}
    for run in runs:
        of_its_colour = itertools.count(alike[run.task] % svg.COLOURS, svg.COLOURS)
        found[next(number for number in of_its_colour if number not in found)] = run
        alike[run.task] += 1
    return list(found.items())


def _(text: object) -> str:
    return html.escape(str(text))


def _by_task(runs: Numbered) -> list[tuple[str, Numbered]]:
    """Runs of one task together, tasks in the order of their first run."""
    order = list(dict.fromkeys(run.task for _, run in runs))
    groups = itertools.groupby(sorted(runs, key=lambda r: order.index(r[1].task)), _task)
    return [(task, list(group)) for task, group in groups]


def _task(numbered: tuple[int, Run]) -> str:
    return numbered[1].task


def _card(numbered: tuple[int, Run]) -> str:
    """What a run is and what came of it."""
    number, run = numbered
    scores = run.last()
    tiles = [
        f"<div><b>{_(form.format(scores[key]))}</b><span>{_(name)}</span></div>"
        for key, name, form in RESULTS[run.task]
        if scores.get(key) is not None
    ]
    facts = [f"<div><dt>{_(k)}</dt><dd>{_(v)}</dd></div>" for k, v in describe.facts(run)]
    return (
        f'<article class="card c{number % svg.COLOURS}"><p class="task">'
        f"{_(describe.TASKS[run.task])}</p><h2>{_(run.name)}</h2><p>{_(describe.sentence(run))}</p>"
        f'<div class="tiles">{"".join(tiles)}</div>{_health(run)}<dl>{"".join(facts)}</dl>'
        "</article>"
    )


def _health(run: Run) -> str:
    """The verdicts, each with its evidence and what to try."""
    boxes = []
    for verdict in run.health:
        tone = {health.NORMAL: "good", health.EARLY: "early"}.get(verdict.kind, "bad")
        advice = f" <em>What to try:</em> {_(verdict.advice)}." if verdict.advice else ""
        said = f"<p>{_(_sentence(verdict.evidence))}.{advice}</p>"
        boxes.append(f'<div class="verdict {tone}"><b>{_(verdict.kind)}</b>{said}</div>')
    return "".join(boxes)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _curves(group: Numbered) -> str:
    """All charts of the runs of one task, under one legend."""
    charts = curves.charts(group)
    if not charts:
        return ""
    legend = "".join(
        f'<button type="button" class="c{number % svg.COLOURS}" data-run="{number}" '
        f'aria-pressed="true">{_(run.name)}</button>'
        for number, run in group
    )
    figures = "".join(
        f"<figure><figcaption><b>{_(chart.title)}</b>{_styles(chart)}</figcaption>"
        f"{svg.draw(chart)}</figure>"
        for chart in charts
    )
    legend = f'<div class="legend">{legend}</div>' if len(group) > 1 else ""
    return f'{legend}<div class="charts">{figures}</div>'


def _styles(chart: svg.Chart) -> str:
    """What line, dots and dashes mean, where a chart has more than one kind."""
    first = {}
    for series in chart.series:
        first.setdefault(series.style, series.label.rpartition(", ")[2])
    if len(first) < 2:
        return ""
    keys = (f'<span class="key {style}">{_(label)}</span>' for style, label in first.items())
    return f"<span>{''.join(keys)}</span>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{_(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    kind = ' class="long"' if len(text) > 40 else ""
    return f"<td{kind}>{_(text)}</td>"


def _pictures(runs: list[Run]) -> str:
    """The newest picture of each kind, of each run."""
    shown = [_picture(run, name, path) for run in runs for name, path in run.pictures.items()]
    return f'<div class="pictures">{"".join(shown)}</div>' if shown else ""


def _picture(run: Run, name: str, path: Path) -> str:
    labels = ROWS.get((name, run.task), ())
    if name == "attention":
        labels = ("image", *(f"head {head}" for head in run.config["eval"]["attention"]))
    data = base64.b64encode(path.read_bytes()).decode()
    rows = "".join(f"<span>{_(label)}</span>" for label in labels)
    about, update = CAPTIONS.get(name, name), path.stem.rpartition("_")[2]
    return (
        f'<figure class="picture"><figcaption><b>{_(run.name)}</b> at update {_(update)}. '
        f'{_(about)}.</figcaption><div><div class="rows">{rows}</div>'
        f'<img alt="{_(run.name)}: {_(about)}" src="data:image/png;base64,{data}"></div></figure>'
    )


def _configuration(runs: list[Run]) -> str:
    """What differs from the defaults or between the runs, then each config whole."""
    configs = [flatten_dict(run.config, sep=".") for run in runs]
    defaults = {}
    if stored_config.COMMON.is_file():  # it is no part of an installed package
        defaults = flatten_dict(stored_config.every_key().to_dict(), sep=".")
    rows = []
    for key in sorted({key for config in configs for key in config}):
        values = [_value(config, key) for config in configs]
        if len({*values, *([_value(defaults, key)] if defaults else [])}) > 1:
            rows.append((key, *values, *([_value(defaults, key)] if defaults else [])))
    header = ("key", *(run.name for run in runs), *(["default"] if defaults else []))
    found = _table(Table("", header, rows)) if rows else ""
    for run, config in zip(runs, configs, strict=True):
        text = "\n".join(f"{key} = {_value(config, key)}" for key in sorted(config))
        found += f"<details><summary>All of {_(run.name)}</summary><pre>{_(text)}</pre></details>"
    return found


def _value(config: dict, key: str) -> str:
    """A setting as a person reads it."""
    if key not in config:
        return "-"
    value = config[key]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _environment(run: Run) -> str:
    """Where and with what the run was started, the last start first."""
    if not run.starts:
        return ""
    keys = [key for key in run.starts[-1] if key not in ("mode", "step", "time")]
    rows = [(key, *(str(_value(start, key)) for start in reversed(run.starts))) for key in keys]
    header = [f"{s['mode']} from update {s['step']}, {s['time']}" for s in reversed(run.starts)]
    table = _table(Table("", ("", *header), rows))
    return f"<details><summary>{_(run.name)}</summary>{table}</details>"
