"""The frontier's page: whole, self-contained, rendered by a real browser where there is one, and honest about gaps."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dynadepth.errors import DataError
from dynadepth.report.folder import read_folder
from dynadepth.report.frontier_figures import drawings, write_figures
from dynadepth.report.frontier_page import render

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--dump-dom",
    "--disable-background-networking",
    "--allow-file-access-from-files",
    "--virtual-time-budget=5000",
]
PHONE = 390
PROBE = """<script>addEventListener("load", () => {
  const shown = [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
  const found = {
    fetched: performance.getEntriesByType("resource").map(entry => entry.name),
    figures: shown.filter(box => box.width > 150 && box.height > 40).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    width: document.documentElement.clientWidth,
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("svg text")).fill,
  };
  document.body.innerHTML = "<pre id='found'></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
})</script>"""


class Page(HTMLParser):
    """Everything that a browser would load, and the tags."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """The command of a Chromium that starts on this machine."""
    for command in filter(None, map(shutil.which, BROWSERS)):
        profile = tmp_path_factory.mktemp("profile")
        started = [command, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        done = subprocess.run(started, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode == 0 and "<html" in done.stdout:
            return command
    pytest.skip("no Chromium that starts on this machine (Debian: apt-get install chromium)")


def in_browser(browser: str, page: str, folder: Path, scheme: int) -> dict[str, object]:
    """What the page is in a browser as wide as a phone; `scheme` 0 is dark, 1 light.

    The policy that forbids fetching is taken out first: the page has to be good without it.
    """
    unguarded = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert unguarded != page
    # A window is at least 500 wide in headless Chromium: a frame is as narrow as it is told.
    (folder / "inner.html").write_text(unguarded.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    frame = f'<iframe src="inner.html" width="{PHONE}" height="800" style="border:0"></iframe>'
    reader = """<script>addEventListener("load", () => setTimeout(() => {
      document.title = frames[0].document.getElementById("found").textContent; }, 200))</script>"""
    (folder / "outer.html").write_text(f"<!doctype html><title>-</title>{frame}{reader}", encoding="utf-8")
    command = [browser, *OPTIONS, f"--blink-settings=preferredColorScheme={scheme}"]
    command += [f"--user-data-dir={folder / 'profile'}", (folder / "outer.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout, flags=re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(found[1].replace("&amp;", "&").replace("&gt;", ">").replace("&lt;", "<"))


@pytest.mark.parametrize(("scheme", "paper", "ink"), [(1, "rgb(255, 255, 255)", "rgb(36, 41, 47)"),
                                                      (0, "rgb(13, 17, 23)", "rgb(230, 237, 243)")])  # fmt: skip
def test_in_a_browser(browser, finished, tmp_path, scheme, paper, ink):
    found = in_browser(browser, render(read_folder(finished)), tmp_path, scheme)
    assert found["fetched"] == []
    assert found["figures"] == 4  # quality, tasks, and a map a method
    assert found["width"] == PHONE
    assert found["overflow"] <= 0, "the page scrolls sideways on a phone"
    assert (found["paper"], found["ink"]) == (paper, ink)


def test_nothing_outside_of_the_page_is_referred_to(finished):
    text = render(read_folder(finished))
    page = Page(text)
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|@import", text)
    assert "default-src 'none'" in text
    assert page.tags.count("svg") == 4
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert all("viewBox" in svg and "var(--ink)" in svg and "aria-label" in svg for svg in svgs)
    assert not [colour for svg in svgs for colour in ("#2f81f7", "#24292f") if colour in svg], "fixed colours"


def test_everything_is_on_it(finished):
    text = " ".join(Page(render(read_folder(finished))).text)
    for part in (
        "perplexity", "75.0 %", "static", "random", "alpha (4)", "Budgets asked and met", "plain text", "maths",
        "layer by layer", "Why is the sky blue?", "at a budget of 0.75", "hardware", "torch",
    ):  # fmt: skip
        assert part in text, part
    assert "could not be shown" not in text
    assert "None" not in text


def test_texts_are_escaped(folder):
    path = folder / "cells" / "static@0.75.json"
    cell = json.loads(path.read_text())
    cell["samples"][0]["text"] = "<script>alert(1)</script>"
    path.write_text(json.dumps(cell))
    text = render(read_folder(folder))
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_answers_with_more_depth_and_deeper_tokens_are_marked(folder):
    path = folder / "cells" / "random@0.75.json"
    cell = json.loads(path.read_text())
    for sample, share in zip(cell["samples"], (0.5, 0.5, 1.0, 0.5), strict=True):
        sample["keep_ratio"]["all"] = share
    cell["samples"][1]["depth"] = [["<b>", 0.25], ["deep", 1.0], [" end", None]]
    path.write_text(json.dumps(cell))
    text = render(read_folder(folder))
    assert text.count("▲") == 2  # the answer, and the legend
    assert re.search(r'class="soft more">▲ 100% of all, \d+% of the routed sites; its mean: 62%<', text)
    assert '&lt;b&gt;<span class="shade4">deep</span> end</p>' in text
    assert "Shaded: tokens that more sites executed for" in text


def test_rows_are_set_beside_the_one_they_belong_to(folder):
    path = folder / "cells" / "random@0.75.json"
    cell = json.loads(path.read_text())
    interval = {"value": 1.0625, "low": 1.01, "high": 1.1}
    cell["against"] = {"row": "static", "perplexity": {"text.txt": interval}, "kl": {"text.txt": interval}}
    cell["shuffled"] = {"texts": {"inputs": 16, "changed": 12}}
    cell["routes"] = {"distinct": 12, "sequences": 64, "entropy": 2.125, "agreement": 0.96}
    path.write_text(json.dumps(cell))
    text = " ".join(Page(render(read_folder(folder))).text)
    assert (
        "random at 0.75: perplexity 1.062 × that of static (95 % 1.010 to 1.100), KL +1.0625 (+1.0100 to +1.1000); "
        "12 of 16 windows had another route." in text
    )
    assert "12 of 64, 2.1 bits, 96 % alike" in text
    assert "one for all 2" in text


def test_damaged_and_missing_parts_are_named_and_the_rest_is_shown(folder, run):
    (folder / "cells" / "static@0.5.json").write_text("{")
    (folder / "cells" / "random@0.5.json").unlink()
    result = run("report", folder)
    assert result.exit_code == 0, result.output
    text = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).text)
    for where in (" ".join(result.stderr.split()), " ".join(text.split())):
        assert "static@0.5.json is damaged" in where
        assert "The cell random@0.5 is missing" in where
    assert "random" in text
    assert "75.0 %" in text


@pytest.mark.parametrize("left", ["cells", "no-dense", "one-row"])
def test_parts_may_be_missing(folder, left):
    cells = folder / "cells"
    if left == "cells":
        (folder / "frontier.json").unlink()
    else:
        for path in cells.glob("dense@*" if left == "no-dense" else "[!d]*"):
            path.unlink()
    found = read_folder(folder)
    assert found.problems
    text = render(found)
    assert all(problem.replace("'", "&#39;") in text for problem in found.problems)


@pytest.mark.parametrize("part", ["against_dense", "against", "tasks", "speed", "provenance", "routes", "granularity"])
def test_figures_may_be_missing_in_cells(folder, part):
    for path in (folder / "cells").iterdir():
        cell = json.loads(path.read_text())
        cell[part] = None
        path.write_text(json.dumps(cell))
    assert "<svg" in render(read_folder(folder))


DAMAGES = {
    "no text": lambda cell: cell["text"].update(perplexity={}),
    "perplexity": lambda cell: cell["text"]["perplexity"]["text.txt"].update(ppl="many"),
    "keep ratio": lambda cell: cell["text"].update(keep_ratio=0.5),
    "kind": lambda cell: cell["kinds"].update(chat=[]),
    "kind without numbers": lambda cell: cell["kinds"].update(chat={"sequences": "four", "keep_ratio": None}),
    "interval": lambda cell: cell["against_dense"]["perplexity"]["text.txt"].pop("low"),
    "against nobody": lambda cell: cell.update(against={"perplexity": {"text.txt": {}}}),
    "site": lambda cell: cell["site_keep"].update(first=0.5),
    "layer that is not there": lambda cell: cell["site_keep"].update({"99.attention": 0.5}),
    "share": lambda cell: cell["site_keep"].update({"0.attention": None}),
    "sample": lambda cell: cell["samples"].__setitem__(0, None),
    "sample without prompt": lambda cell: cell["samples"][0].pop("prompt"),
    "sample's route": lambda cell: cell["samples"][0].update(route={"zero": 1.0}),
    "sample's depth": lambda cell: cell["samples"][0].update(depth=[1, 2]),
    "speed": lambda cell: cell.update(speed=[3]),
    "speed-up": lambda cell: cell.update(speed=[{"phase": "decode", "speedup": "fast"}]),
    "routes": lambda cell: cell.update(routes=[1]),
    "tasks": lambda cell: cell.update(tasks={"tasks": {"alpha": 0.5}}),
    "provenance": lambda cell: cell.update(provenance="mine"),
    "no number": lambda cell: cell["text"].update(kl=float("nan")),
    "speed-up below zero": lambda cell: cell.update(speed=[{"phase": "decode", "speedup": -1.2, "spread": 0.1}]),
    "spread below zero": lambda cell: cell.update(speed=[{"phase": "decode", "speedup": 1.2, "spread": -0.1}]),
    "layers": lambda cell: cell.update(layers=10**9),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_cell_that_cannot_be_shown_is_named_and_the_rest_is_shown(folder, damage, run):
    path = folder / "cells" / "static@0.75.json"
    cell = json.loads(path.read_text())
    DAMAGES[damage](cell)
    path.write_text(json.dumps(cell))
    result = run("report", folder)
    assert result.exit_code == 0, result.output
    found = read_folder(folder)
    assert "static@0.75.json is damaged" in " ".join(found.problems)
    assert set(found.cells) == {"dense", "static", "random"}
    assert list(found.cells["static"]) == [0.5]


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("model", "0123456789abcdef", "models"),
        ("texts", {"other.txt": "0123456789abcdef"}, "sets of texts"),
        ("limit", 7, "limits of rows"),
        ("max_windows", 3, "numbers of windows"),
    ],
)
def test_cells_that_cannot_be_compared_are_named(folder, name, value, what):
    path = folder / "cells" / "static@0.75.json"
    cell = json.loads(path.read_text())
    cell["settings"][name] = value
    path.write_text(json.dumps(cell))
    assert read_folder(folder).problems == [f"The cells are of 2 {what}: differences between them mean nothing."]


def test_a_folder_with_nothing_usable_is_one_error(tmp_path, refused):
    assert "no folder" in refused("report", tmp_path / "nowhere")
    assert "no finished cell" in refused("report", tmp_path)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "dense@1.json").write_text("[]")
    assert "dense@1.json is damaged" in refused("report", tmp_path)
    with pytest.raises(DataError, match="dynadepth frontier MODEL"):
        read_folder(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_figures_are_written_twice(folder):
    names = sorted(path.name for path in write_figures(folder, read_folder(folder)))
    assert names == ["quality-keep.png", "quality-keep.svg", "tasks-keep.png", "tasks-keep.svg"]
    assert (folder / "quality-keep.png").read_bytes()[:4] == b"\x89PNG"
    first = (folder / "quality-keep.svg").read_bytes()
    write_figures(folder, read_folder(folder))
    assert (folder / "quality-keep.svg").read_bytes() == first


def test_quality_is_drawn_against_keep_ratio_and_speed_with_error_bars(folder):
    times = {("static", 0.75): (1.25, 1.5), ("static", 0.5): (1.5, 2.0), ("random", 0.75): (1.125, 1.375)}
    for path in (folder / "cells").iterdir():
        cell = json.loads(path.read_text())
        prefill, decode = times.get((cell["row"], cell["budget"]), (None, None))
        cell["speed"] = [
            {"phase": phase, "speedup": value, "spread": 0.25}
            for phase, value in (("prefill", prefill), ("decode", decode))
            if value is not None
        ]
        path.write_text(json.dumps(cell))
    found = read_folder(folder)
    drawn = {drawing.name: drawing.figure.axes[0] for drawing in drawings(found)}
    assert list(drawn) == ["quality-keep", "tasks-keep", "quality-prefill", "quality-decode"]
    for name, axes in drawn.items():
        series = {bars.get_label(): bars for bars in axes.containers}
        assert set(series) == {"static", "random"}, "one line a method"
        _, _, bars = series["static"].lines
        assert len(bars) == (2 if name in ("quality-prefill", "quality-decode") else 1), "timing has a spread"
    for place, phase in enumerate(("prefill", "decode")):
        line, _, bars = {b.get_label(): b for b in drawn[f"quality-{phase}"].containers}["static"].lines
        shown = sorted(zip(*line.get_data(), bars[-1].get_segments(), strict=True), key=lambda point: point[0])
        for (x, y, bar), budget in zip(shown, (0.75, 0.5), strict=True):
            cell = found.cells["static"][budget]
            ratio = cell["against_dense"]["perplexity"]["text.txt"]
            assert x == times["static", budget][place]
            assert y == cell["text"]["perplexity"]["text.txt"]["ppl"]
            assert [end[1] / y for end in bar] == pytest.approx([ratio[k] / ratio["value"] for k in ("low", "high")])
