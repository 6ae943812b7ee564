"""Mistakes of the inspection page and picture: wrong figures, text that becomes code, a page that needs the network."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.browser import CHROMIUM, open_page
from trimkv_cli.events import HeadMemory, LayerMemory, MemoryUse, Retained, survival
from trimkv_cli.ui.inspection import draw_inspection, inspection_page

MEMORY = MemoryUse(
    weights_bytes=4096, gate_bytes=10, kv_bytes=100, workspace_bytes=90, peak_bytes=9000, budget_bytes=10000,
    seen_tokens=4000, full_cache_bytes=4000,
)  # fmt: skip
HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[2J<!--"


@dataclass(frozen=True)
class Case:
    """A cache of `layers` × `heads` that has seen `seen` tokens."""

    seen: int
    layers: int = 2
    heads: int = 2
    slots: int = 16

    def log_beta(self) -> list[list[list[float]]]:
        return [
            [[-1 / (2.0 + (p * (7 + h) + layer) % 97) for p in range(self.seen)] for h in range(self.heads)]
            for layer in range(self.layers)
        ]

    def retained(self) -> Retained:
        layers = []
        for layer in self.log_beta():
            heads = []
            for values in layer:
                scores = [value * (self.seen + 1 - p) for p, value in enumerate(values)]
                best = sorted(range(self.seen), key=lambda p: (-scores[p], p))[: self.slots]
                kept = tuple(sorted(best))
                betas = tuple(values[p] for p in kept)
                heads.append(HeadMemory(positions=kept, log_beta=betas, threshold=min(scores[p] for p in kept)))
            layers.append(LayerMemory(slots=self.slots, window=None, heads=tuple(heads)))
        return Retained(seen=self.seen, layers=tuple(layers))

    def page(self) -> str:
        pieces = [f" w{p}" if p % 9 else "line\n" for p in range(self.seen - 1)]
        return inspection_page(
            self.retained(), [*pieces, HOSTILE], MEMORY, self.log_beta(),
            model="<b>mini</b>", gates="g", prompt_tokens=self.seen - 5,
        )  # fmt: skip


class _Structure(HTMLParser):
    """Collect what a browser would do with the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "action", "srcset") and not (value or "").startswith("data:"):
                self.references.append(value or "")
            elif name == "aria-labelledby":
                self.labels.append(value or "")


def test_the_page_needs_nothing_else_and_text_stays_text() -> None:
    """Catches links to other files, a token that ends the script, control characters, and labels that point nowhere."""
    page = Case(seen=60).page()
    structure = _Structure(page)
    assert structure.references == []
    assert structure.tags.count("script") == 2
    assert {"img", "link", "iframe"} & set(structure.tags) == {"link"}
    assert "<b>" not in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    assert len(set(structure.ids)) == len(structure.ids)
    assert structure.labels
    assert set(structure.labels) <= set(structure.ids)
    script = Path(__file__).parents[2].joinpath("trimkv_cli/ui/page/page.js").read_text(encoding="utf-8")
    assert set(re.findall(r'getElementById\("([\w-]+)"\)', script)) <= set(structure.ids)
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["pieces"][-1] == HOSTILE.replace("\x1b", "␛")


def test_scores_that_do_not_fade_are_shown_as_they_are(tmp_path: Path) -> None:
    """Catches a page and a picture that speak of half-lives where there are none."""
    case = Case(seen=60)
    faded = case.retained()
    retained = replace(faded, layers=tuple(replace(layer, static=True) for layer in faded.layers))
    log_beta = [[[value + 0.1 for value in head] for head in layer] for layer in case.log_beta()]
    log_beta[0][0][3] = math.nan
    pieces = ["x"] * 60
    page = inspection_page(retained, pieces, MEMORY, log_beta, model="m", gates="g", prompt_tokens=9)
    assert '"static":true' in page
    assert "half-life of" not in page.partition("<script")[0]
    draw_inspection(retained, log_beta, str(tmp_path / "a.png"), model="m")
    if CHROMIUM is not None:
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        with open_page(tmp_path / "profile") as browser:
            browser.open(tmp_path / "page.html")
            browser.hover("#t59")
            shown = browser.run("document.body.innerText")
            assert browser.run("score(0, 59)") in shown
            assert "more tokens" not in shown


def test_4000_tokens_of_8_layers_and_4_heads_stay_below_2_mb() -> None:
    """Catches a page that grows past what can be mailed."""
    assert len(Case(seen=4000, layers=8, heads=4, slots=64).page().encode()) < 2_000_000


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not opened in a browser")
def test_a_browser_shows_the_figures_of_the_cache(tmp_path: Path) -> None:
    """Catches errors in the console, requests, a hover that shows nothing or other figures than Python's."""
    case = Case(seen=300, layers=3, heads=2)
    path = tmp_path / "page.html"
    path.write_text(case.page(), encoding="utf-8")
    retained, log_beta = case.retained(), case.log_beta()
    with open_page(tmp_path / "profile") as page:
        page.open(path)
        assert page.run("document.querySelectorAll('#tokens > span').length") == 300
        assert page.run("Array.from(shares)") == pytest.approx(retained.shares())
        for layer, head, position in [(0, 0, 299), (1, 1, 298), (2, 0, retained.layers[2].heads[0].positions[0])]:
            memory, value = retained.layers[layer].heads[head], log_beta[layer][head][position]
            shown = page.run(f"[halfLife({2 * layer + head}, {position}), survival({2 * layer + head}, {position})]")
            expected = survival(300, position, value, memory.threshold, None)
            assert shown == pytest.approx([math.log(0.5) / value, expected], rel=1e-4, abs=1e-3)
        assert page.run("logBeta[0] = Infinity, [halfLife(0, 0), survival(0, 0)].map(String)") == ["Infinity"] * 2
        page.hover("#t299")
        assert "at position 299 of 300: answer, kept by 6 of 6 heads" in page.run("document.body.innerText")
        page.run("document.getElementById('tokens').focus()")
        page.press("Home")
        assert "at position 0 of 300: prompt" in page.run("document.getElementById('detail-text').innerText")
        assert page.run("document.querySelectorAll('[aria-selected=true]').length") == 1
        page.run("document.querySelector('#grid button').click()")
        assert page.run("document.getElementById('large').open")
        light = page.screenshot()
        page.open(path, dark=True)
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
        assert page.screenshot() != light
        assert page.complaints == []


def test_the_picture_is_a_png_and_a_missing_folder_is_named(tmp_path: Path) -> None:
    """Catches an empty file, and a traceback where nothing can be written."""
    from trimkv_cli.errors import UsageError

    case = Case(seen=40, layers=2, heads=1)
    draw_inspection(case.retained(), case.log_beta(), str(tmp_path / "x.png"), model="mini")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="cannot write"):
        draw_inspection(case.retained(), case.log_beta(), str(tmp_path / "none" / "x.png"), model="mini")


def test_the_terminal_as_svg_loads_nothing() -> None:
    """Catches web fonts, and text of a model that becomes markup."""
    from trimkv_cli.ui.inspection import terminal_picture

    svg = terminal_picture("\x1b[38;5;61mheld\x1b[0m <script> & more\nsecond", title="t", width=40)
    assert "url(http" not in svg
    assert "<script>" not in svg
    assert "held" in svg
