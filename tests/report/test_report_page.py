"""The page: complete, self-contained, escaped, and still a page where parts of the data are missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from results import answer, results

from dynadepth.report.html import render, write_page

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        self.handle_attributes(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.handle_attributes(attrs)

    def handle_attributes(self, attrs):
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.references.append(value)
            elif name == "id":
                self.ids.append(value)
            elif value and "url(" in value:
                self.references += re.findall(r"url\(([^)]*)\)", value)

    def handle_endtag(self, tag):
        assert self._open[-1:] == [tag], self._open[-3:]
        self._open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_nothing_outside_of_the_page_is_referred_to():
    text = render(results())
    page = Page(text)
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text


def test_everything_is_on_it():
    page = Page(render(results()))
    text = " ".join(page.text)
    for part in (
        "tiny: 75% of the attention sublayers",
        "25.00",
        "Routed.",
        "·■□■□■",
        "1.20×",
        "A processor",
        "1:01.0",
    ):
        assert part in text, part
    assert page.tags.count("svg") == 5
    assert "perplexity goes from 20.00 to 25.00" in text
    assert "the static twin is better" in text


def test_answers_with_more_depth_are_marked():
    samples = [{"prompt": str(n), "answers": {"routed": answer("Yes.", {"1.attention": 1.0})}} for n in range(2)]
    samples[1]["answers"]["routed"]["keep_ratio"]["all"] = 0.9
    text = render(results(samples=samples))
    assert text.count('class="soft more">▲ 90% of all, 100% of the routed sites; its mean: 80%<') == 1
    assert text.count("▲") == 2  # with the legend
    assert ">70% of all, 100% of the routed sites<" in text


def test_light_and_dark_and_phones():
    text = render(results())
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    for svg in svgs:
        assert "var(--" in svg
        assert "aria-label=" in svg
        head = svg[: svg.index(">")]
        assert "viewBox" in head
        assert " width=" not in head
        assert " height=" not in head


def test_texts_are_escaped():
    nasty = "<script>alert(1)</script> & \"quotes\" 'single' {{ 7 * 7 }}"
    sample = {"prompt": nasty, "answers": {"dense": answer(nasty), "routed": answer(nasty, {"1.attention": 1.0})}}
    page = Page(
        text := render(results(samples=[sample], settings={"model": nasty}, target=nasty, provenance={"k": nasty}))
    )
    assert "script" not in page.tags
    assert "<script>" not in text
    assert " ".join(page.text).count("alert(1)") >= 5


@pytest.mark.parametrize("key", sorted(results()))
def test_any_part_may_be_missing(key):
    without = results()
    del without[key]
    Page(render(without))


def test_parts_may_be_null():
    assert "None" not in render(results(**dict.fromkeys(results())))


def test_an_empty_page_is_a_page():
    page = Page(render({}))
    assert "svg" not in page.tags
    assert "table" not in page.tags


def test_variants_and_figures_may_be_partly_known():
    variants = {"dense": {"perplexity": 20.0}, "routed": {"perplexity": 21.0, "kl": None}}
    text = " ".join(Page(render(results(variants=variants, speed={"routed": []}, samples=[]))).text)
    assert "20.00" in text
    assert "static twin is" not in text


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = write_page(tmp_path / "report.html", results())
    assert path.read_text(encoding="utf-8") == render(results())
    with pytest.raises(ValueError, match="cannot be written"):
        write_page(tmp_path / "nowhere" / "report.html", results())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html"]
