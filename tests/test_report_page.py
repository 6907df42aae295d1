"""The report's page: whole, alone, safe to open, and drawn by a real browser."""

import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import tiny
from PIL import Image

from beit_jax.report import curves, describe, svg
from beit_jax.report.page import page
from beit_jax.report.runs import Run, read_run
from beit_jax.report.tables import make_tables
from configs import digits_mim

VOID = {"meta", "link", "img"}
HOSTILE = "<script>alert(1)</script>\"'&"


class Checked(html.parser.HTMLParser):
    """Reads a page, and fails on tags that are not closed where they should be."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.references = [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def write_run(folder, task: str, updates: int, **changes):
    """A run of so many updates, logged every 10, evaluated three times, with one picture."""
    folder.mkdir()
    tree = tiny.config(task, **changes)
    (folder / "config.json").write_text(json.dumps(tree.to_dict()))
    (folder / "classes.txt").write_text("cat\ndog\n" if task == "classify" else "")
    lines = []
    for step in (1, *range(10, updates + 1, 10)):
        loss = 1 + 3 * math.exp(-step / 200) + 0.2 * math.sin(step)
        numbers = {"loss": loss, "accuracy": 0.9 - loss / 5, "lr": 1e-3 * step, "skipped": 0.0}
        numbers |= {"grad_norm": 10 ** (4 - loss), "guess_accuracy": 0.1}
        lines.append({"step": step, "split": "train", **numbers})
        rates = {"images_per_second": 900 + step % 70, "data_wait_share": 0.02, "step_seconds": 0.1}
        lines.append({"step": step, "split": "timing", **rates})
    lines[8]["loss"] = None
    for step in (updates // 2, updates):
        scores = {"loss": 1.5, "accuracy": 0.6, "knn": step / updates, "knn_from_cls": 0}
        scores |= {"knn_block": 2, "probe": 0.5, "probe_block": 1, "probe_from_cls": 1}
        lines.append({"step": step, "split": "validation", **scores})
    lines.append({"step": updates, "split": "timing", "train_seconds": 7200, "devices": 4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {"mode": "train", "step": 0, "time": "2026-01-01", "devices": 4, "device": "TPU v9"}
    start |= {"parameters": 1234567, "command": f"python {HOSTILE}"}
    (folder / "environment.jsonl").write_text(json.dumps(start) + "\n" + '{"mode": "tr')
    (folder / "pictures").mkdir()
    picture = Image.fromarray(np.zeros((264, 526, 3), np.uint8))
    picture.save(folder / "pictures" / f"reconstruction_{updates}.png")
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    root = tmp_path_factory.mktemp("runs")
    folders = [
        write_run(root / "first", "mim", 3000),
        write_run(root / ("second_" + "long_name" * 12), "mim", 900, model__width=48),
        write_run(root / "tuned", "classify", 200, data__source=HOSTILE),
    ]
    return [read_run(folder) for folder in folders]


@pytest.fixture(scope="module")
def text(runs) -> str:
    return page(runs, make_tables(runs))


def test_the_page_is_whole_and_needs_no_other_file(text):
    found = Checked(text)
    assert found.references and all(link[:5] in ("data:", "#part") for link in found.references)
    assert not re.search(r"https?:|url\(|@import|fetch\(|import\(", text)
    assert found.tags.count("script") == 1 and HOSTILE not in text
    assert found.tags.count("svg") == text.count("<svg") >= 12
    assert found.tags.count("img") == 3


def test_a_page_that_is_not_whole_is_seen():
    with pytest.raises(AssertionError):
        Checked("<p><b>bold</p></b>")
    with pytest.raises(AssertionError):
        Checked("<main><p>text</p>")


def test_what_the_page_says(text):
    assert "<h1>3 runs compared</h1>" in text
    assert "predict the tokens of" in text and "classify images of 8 x 8 pixels" in text
    assert "<dt>device-hours</dt><dd>8.00</dd>" in text and "4 x TPU v9" in text
    assert "<b>normal</b>" in text
    assert "model.width</td><td>32</td><td>48</td><td>32</td><td>768</td>" in text
    for chart in ("Loss", "Accuracy", "Learning rate", "Gradient norm", "Images a second",
                  "k-NN and linear probe"):  # fmt: skip
        assert f"<b>{chart}" in text


def test_runs_of_one_name_and_of_many_tasks_are_told_apart(runs, tmp_path):
    first, _, tuned = runs
    twin = first._replace(folder=tmp_path / "other" / "first")
    many = [first, *[tuned] * 8, twin]  # the twin is the tenth, and the second of its task
    text = page(many, [])
    assert f"{first.folder.parent.name}/first</h2>" in text and "other/first</h2>" in text
    legend = re.findall(r'<button type="button" class="(c\d)" data-run="(\d+)"', text)
    assert [colour for colour, _ in legend] == ["c0", "c1"] + [f"c{i}" for i in range(8)]
    assert len({number for _, number in legend}) == len(many)


def test_curves_keep_their_spikes_and_gaps():
    points = [(step, 1.0) for step in range(10_000)]
    points[4321] = (4321, 50.0)
    points[77] = (77, None)
    found = svg.buckets(points)
    assert len(found) <= svg.BUCKETS
    assert max(bucket.high for bucket in found) == 50.0
    alone = svg.buckets([(1, 2.0), (2, None), (3, 4.0)])
    assert [b.mean for b in alone] == [2.0, None, 4.0]
    series = svg.Series("loss", svg.buckets([(1, 2.0), (2, None), (3, 4.0), (4, 5.0)]), "line", 0)
    drawn = svg.draw(svg.Chart("Loss", (series,)))
    assert drawn.count('class="gap"') == 1 and drawn.count('class="curve"') == 1
    assert drawn.count("<circle") == 1  # a point alone


@pytest.mark.parametrize(
    ("values", "log", "labels"),
    [
        ([0.0, 1.0], False, ["0", "0.5", "1"]),
        ([1e-3, 1e4], True, ["1e-3", "1"]),
        ([-3.0, -1.0], False, ["-3", "-1"]),
        ([2.0, 2.0], False, ["2"]),
        ([1e6, 3e6], False, ["1M", "3M"]),
    ],
)
def test_axes_have_round_labels(values, log, labels):
    series = svg.Series("x", svg.buckets(list(enumerate(values))), "line", 0)
    drawn = svg.draw(svg.Chart("x", (series,), may_be_log=True))
    found = re.findall(r'text-anchor="end">([^<]*)<', drawn)
    assert set(labels) <= set(found), found
    places = re.findall(r'class="curve" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', drawn)[0]
    x0, y0, x1, y1 = map(float, places)
    assert x0 == svg.LEFT and x1 == svg.WIDTH - svg.RIGHT
    assert svg.TOP <= y1 <= y0 <= svg.HEIGHT - svg.BOTTOM


def test_charts_of_runs_of_one_task(runs):
    charts = {chart.title: chart for chart in curves.charts([(0, runs[0]), (1, runs[1])])}
    loss = charts["Loss"]
    assert [(s.run, s.style) for s in loss.series] == [
        (0, "line"), (0, "dots"), (1, "line"), (1, "dots")
    ]  # fmt: skip
    assert loss.series[0].label == "first, training"
    assert {s.style for s in charts["Accuracy"].series} == {"line", "dots", "baseline"}
    assert "Perplexity of the codes" not in charts
    tuned = {chart.title: chart for chart in curves.charts([(2, runs[2])])}
    baseline = next(s for s in tuned["Accuracy"].series if s.style == "baseline")
    assert [(b.x, b.mean) for b in baseline.buckets] == [(1, 0.5), (200, 0.5)]  # two classes


def test_runs_like_ours_are_drawn_before_ours():
    config = digits_mim.get_config().to_dict()
    lines = [{"step": step, "split": "train", "loss": 3.0} for step in (1, 1700)]
    charts = {c.title: c for c in curves.charts([(0, Run("run", config, lines))])}
    assert [s.style for s in charts["Loss"].series] == ["line", "reference"]
    drawn = svg.draw(charts["Loss"])
    assert drawn.index("series reference") < drawn.index("series line")
    assert "2.606 to 2.913" in drawn


@pytest.mark.parametrize("task", tiny.RECIPES)
def test_every_task_can_be_told(task):
    run = Run("run", tiny.config(task).to_dict(), [])
    said = describe.sentence(run)
    assert said.endswith(".") and "8 x 8" in said
    assert page([run], make_tables([run]))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
# Appended to the page: what a person would see on it, written where --dump-dom shows it.
PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("load", () => {
  const chart = document.querySelector("svg.chart"), box = chart.getBoundingClientRect();
  const move = {clientX: box.left + box.width / 2, clientY: box.top + 20, bubbles: true};
  chart.dispatchEvent(new PointerEvent("pointermove", move));
  const tip = document.getElementById("tip").innerText;
  chart.dispatchEvent(new PointerEvent("pointerleave", {}));
  const drawn = [...document.querySelectorAll("svg.chart")].filter(
    svg => svg.getBoundingClientRect().width > 200
      && [...svg.querySelectorAll("path")].some(
        path => path.getBoundingClientRect().width > 100)).length;
  const button = document.querySelector("button[data-run]");
  if (button) button.click();
  document.body.dataset.found = JSON.stringify({
    errors, tip,
    off: document.querySelectorAll(".series.off").length,
    width: innerWidth,
    overflow: document.documentElement.scrollWidth - innerWidth,
    drawn,
    pictures: [...document.images].filter(image => image.naturalWidth > 0).length,
  });
});
</script>"""


def opened(text: str, tmp_path, width: int) -> dict:
    """What headless chromium finds on the page in a frame of `width` pixels."""
    (tmp_path / "page.html").write_text(text.replace("<body>", f"<body>{PROBE}"))
    # A frame, as a browser's own window cannot be as narrow as a phone.
    (tmp_path / "frame.html").write_text(
        f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe><script>'
        "onload = () => setTimeout(() => document.body.dataset.found ="
        'document.querySelector("iframe").contentDocument.body.dataset.found, 200)</script>'
    )
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,1000", "--virtual-time-budget=3000", "--dump-dom",
            f"file://{tmp_path / 'frame.html'}",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<body data-found="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open the page in")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_the_page(text, tmp_path, width):
    found = opened(text, tmp_path, width)
    assert found["width"] == width
    assert found["errors"] == []
    assert found["drawn"] == text.count("<svg") and found["pictures"] == 3
    assert found["overflow"] <= 0, "the page scrolls sideways"
    assert found["tip"].startswith("update ") and "first, training: " in found["tip"]
    assert found["off"] > 6  # the legend's first button switches the first run's curves off


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open the page in")
def test_a_browser_sees_what_is_wrong(text, tmp_path):
    broken = text.replace('"use strict";', '"use strict"; later(); function later() { nothing(); }')
    broken = broken.replace("<main>", '<main><div style="width:600px">wide</div>')
    found = opened(broken, tmp_path, 390)
    assert found["overflow"] >= 200 and "nothing" in found["errors"][0]
