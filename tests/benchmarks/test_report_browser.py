"""The page in a real headless Chromium, over its DevTools pipe: no error, charts, filters, harmless names."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from report_results import HOSTILE, made_up, pictures_of
from scl_defense_benchmarks.report import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Browser:
    """One page at a time. ``faults``: exceptions, console errors, log entries and requests that left the page."""

    def __init__(self, folder: Path):
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                 f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]  # fmt: skip

        def ends() -> None:  # the browser reads file 3 and writes file 4
            read, written = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(read, 3)
            os.dup2(written, 4)

        self.process = subprocess.Popen(
            [str(CHROMIUM), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False,
            preexec_fn=ends, start_new_session=True,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in, self._rest = ours_out, ours_in, b""
        self._number, self.faults, self._events = 0, [], []
        target = self._send("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        self._session = self._send("Target.attachToTarget", {"targetId": target, "flatten": True}, None)["sessionId"]
        self.send("Page.bringToFront")  # what is behind gets no frames, and nothing in it comes into sight
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._send("Browser.close", {}, None)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._out)
        os.close(self._in)

    def send(self, method: str, **parameters: Any) -> Any:
        return self._send(method, parameters, self._session)

    def _send(self, method: str, parameters: dict[str, Any], session: str | None) -> Any:
        self._number += 1
        number = self._number
        content = {"id": number, "method": method, "params": parameters}
        if session is not None:
            content["sessionId"] = session
        os.write(self._out, json.dumps(content).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._in, 1 << 16)
            if not piece:
                raise RuntimeError("the browser has gone")
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, about: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.faults.append(str(about["exceptionDetails"].get("exception", {}).get("description", about)))
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.faults.append(str(about["args"]))
        elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.faults.append(about["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not about["request"]["url"].startswith(
            ("data:", "file:", "about:")
        ):
            self.faults.append(f"a request to {about['request']['url']}")
        elif method == "Page.javascriptDialogOpening":
            self.faults.append(f"a dialog: {about['message']}")
            self._send("Page.handleJavaScriptDialog", {"accept": True}, self._session)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def open(
        self, page: Path, *, dark: bool = False, width: int = 1200, height: int = 900, script: bool = True
    ) -> float:
        """Load a page and wait until its script is done; seconds that took."""
        self.faults.clear()
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = "dark" if dark else "light"
        self.send("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": scheme}])
        started = time.perf_counter()
        self.send("Page.navigate", url=page.resolve().as_uri())
        ready = "document.documentElement?.dataset.ready === 'yes'" if script else "document.readyState === 'complete'"
        self.wait(f"location.href !== 'about:blank' && {ready}")
        return time.perf_counter() - started

    def wait(self, condition: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition}; {self.faults}")
            time.sleep(0.05)

    def draw_all(self) -> None:
        """Scroll past every chart, so that all are made."""
        self.run("""(async () => { for (const figure of document.querySelectorAll('figure.chart')) {
            for (let up = figure.parentElement; up; up = up.parentElement) if (up.tagName === 'DETAILS') up.open = true;
            figure.scrollIntoView({behavior: 'instant'});
            for (let k = 0; k < 100 && !figure.dataset.drawn; k++) await new Promise((done) => setTimeout(done, 20)); }
            scrollTo({top: 0, behavior: 'instant'}); })()""")

    def shot(self, path: Path) -> None:
        import base64

        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    """Two balls, a search, saved pictures, a network: every part of the page, and classes with wicked names."""
    import torch
    from torch import nn

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.head = nn.Linear(64, 6), nn.Linear(6, 10)

        def features(self, images):
            return self.map(images.flatten(1))

        def forward(self, images):
            return self.head(self.features(images))

    folder = tmp_path_factory.mktemp("hostile")
    attacks = (HOSTILE[1], HOSTILE[0], "fgsm", "pgd")
    result = made_up(80, names=HOSTILE, attacks=attacks, radii=("0.05", "0.1"), command=HOSTILE[1] + HOSTILE[0])
    images, file = pictures_of(result, folder)
    torch.manual_seed(0)
    made = report(result, folder / "p.html", examples=file, images=images, network=Encoder().eval(), pictures=120)
    return result, made.page


CARDS = "[...document.querySelectorAll('.card')]"
CHARTS = "[...document.querySelectorAll('figure.chart')]"

# Chart -> points, colours that cover their pixel, and width of what stands on its canvas.
DRAWN = """Object.fromEntries([...document.querySelectorAll('figure.chart')].map((figure) => {
    const canvas = figure.querySelector('canvas'), seen = new Set();
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    for (let k = 0; k < data.length; k += 4) if (data[k + 3] > 200) seen.add(data.slice(k, k + 3).join());
    return [figure.dataset.chart, [Number(figure.dataset.drawn), seen.size, canvas.clientWidth]]; }))"""

# What runs or phones home when it gets into a page that lets it. (port) -> nothing.
INTRUDERS = """((port) => {
    const script = document.createElement('script'), box = document.createElement('div');
    script.textContent = 'window.ran = 1';
    box.innerHTML = `<img src="http://127.0.0.1:${port}/x.png" onerror="window.ran = 2">`;
    document.body.append(script, box);
    fetch(`http://127.0.0.1:${port}/`).catch(() => 0); })"""

# (name, value) -> the texts of the pictures that a filter leaves.
PICK = """((name, value) => {
    const select = document.querySelector('form.control').elements[name];
    if (![...select.options].some((option) => option.value === value)) throw new Error(`no option ${value}`);
    select.value = value;
    select.dispatchEvent(new Event('change', {bubbles: true}));
    return [...document.querySelectorAll('.card')].map((card) => card.textContent); })"""

# (attack) -> the sum of the confusion matrix that stands there when it is chosen.
CONFUSED = """((label) => {
    const box = document.querySelector('[data-confusion]'), select = box.querySelector('select');
    select.value = label;
    select.dispatchEvent(new Event('change'));
    return [...box.querySelectorAll('.matrix td')].reduce((sum, cell) => sum + Number(cell.textContent || 0), 0); })"""

# Texts whose colour does not stand out from what lies behind them by 4.5 to 1 (WCAG 2.2, 1.4.3).
WEAK = r"""(() => {
    const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const parse = (text) => { const n = text.match(/[\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
    const over = (top, below) => top.slice(0, 3).map((v, k) => v * top[3] + below[k] * (1 - top[3]));
    const ground = (node) => {
        const all = [];
        for (let up = node; up; up = up.parentElement) all.push(parse(getComputedStyle(up).backgroundColor));
        return all.reverse().reduce((below, top) => over(top, below), [255, 255, 255]); };
    const own = (node) => [...node.childNodes].some((one) => one.nodeType === 3 && one.textContent.trim());
    const shown = [...document.querySelectorAll('body *')].filter((node) => node.offsetParent && own(node));
    const contrast = (node) => {
        const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05); };
    const weak = shown.filter((node) => contrast(node) < 4.5);
    return [shown.length, weak.map((node) => `${node.tagName}.${node.className}: ${node.textContent.slice(0, 30)}`)];
})()"""


def test_every_chart_is_drawn_without_a_fault_and_names_are_harmless(browser, hostile_page):
    browser.open(hostile_page[1])
    browser.draw_all()
    drawn = browser.run(DRAWN)
    assert set(drawn) == {"r0-curve-linf", "r0-curve-l2", "r0-classes", "r0-map-0"}
    for key, (points, colours, width) in drawn.items():
        assert points >= 10 and colours >= 4 and width > 300, (key, points, colours, width)
    strange = "#main img:not(.card img), #main script, svg script, iframe, [onerror], [onload]"
    assert browser.run(f"document.querySelectorAll('{strange}').length") == 0
    assert browser.run("document.documentElement.textContent.includes('<img src=x onerror=alert(1)>')")
    time.sleep(0.3)  # an alert would come now
    assert browser.faults == []


def test_the_policy_lets_no_other_script_run(browser, hostile_page):
    browser.open(hostile_page[1])
    with socket.create_server(("127.0.0.1", 0)) as home:
        home.settimeout(0.5)
        browser.run(f"{INTRUDERS}({home.getsockname()[1]})")
        with pytest.raises(TimeoutError):
            home.accept()
    assert browser.run("window.ran === undefined")
    assert sum("Content Security Policy" in fault for fault in browser.faults) >= 3, browser.faults


def test_pictures_are_filtered_by_attack_class_and_outcome(browser, hostile_page):
    result, page = hostile_page

    def picked(name, value):
        return browser.run(f"{PICK}({json.dumps(name)}, {json.dumps(value)})")

    browser.open(page)
    assert browser.run(f"{CARDS}.length") == 24
    assert browser.run("document.querySelector('.count').textContent") == "24 of 120 shown"
    browser.run("document.querySelector('.more').click()")
    assert browser.run(f"{CARDS}.length") == 48
    labels = [row.label for row in result.attacks if row.eps == "0.1"]
    names = [name.replace("\u202e", "\ufffd") for name in HOSTILE]
    for name, values in (("label", names), ("attack", labels), ("outcome", ["held", "fools", "fools beyond eps"])):
        for value in values:
            shown = picked(name, value)
            assert shown and all(value in text for text in shown), (name, value)
        picked(name, "")
    both = picked("label", HOSTILE[9])
    fewer = picked("outcome", "fools")
    assert 0 < len(fewer) < len(both) and all("; fools;" in text for text in fewer)
    browser.wait(f"{CARDS}.every((card) => card.querySelector('img').naturalWidth === 24)", 5)
    assert browser.faults == []


def test_tables_sort_confusions_change_and_keys_read_the_charts(browser, hostile_page):
    result, page = hostile_page
    browser.open(page)
    browser.draw_all()
    rows = "[...document.querySelectorAll('table.attacks tbody tr:not([class])')]"
    column = f"{rows}.map((row) => Number(row.cells[1].textContent))"
    button = "document.querySelectorAll('table.attacks th button')[1].click()"
    given = browser.run(column)
    for expected in (sorted(given), sorted(given, reverse=True), given):
        browser.run(button)
        assert browser.run(column) == expected
    assert sorted(given) != given and len(given) == len(result.attacks)
    first = result.attacks[0]
    assert browser.run(f"{CONFUSED}({json.dumps(first.label)})") == first.broken
    browser.run("document.querySelector('[data-chart=r0-curve-linf] canvas').focus()")
    for key in ("ArrowRight", "ArrowRight"):
        browser.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
    told = browser.run("document.getElementById('say').textContent")
    case = next(case for case in result.worst_cases if case.eps == "0.05")
    assert told.startswith(f"worst case: {100 * case.robust_accuracy:.1f} (") and told.endswith("0.05"), told
    assert browser.faults == []


def test_a_click_in_the_legend_hides_a_line_with_its_band_and_a_class_with_its_adversarials(browser, hostile_page):
    browser.open(hostile_page[1])
    browser.draw_all()
    for key, gone in (("r0-curve-linf", 3), ("r0-map-0", 2)):  # a line and both edges of its band; dots and crosses
        canvas = f"document.querySelector('[data-chart={key}] canvas')"
        visible = f"Chart.getChart({canvas}).getVisibleDatasetCount()"
        before = browser.run(visible)
        for expected in (before - gone, before):
            browser.run(f"{canvas}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
            x, y = browser.run(f"""(() => {{ const place = {canvas}.getBoundingClientRect();
                const box = Chart.getChart({canvas}).legend.legendHitBoxes[0];
                return [place.x + box.left + box.width / 2, place.y + box.top + box.height / 2]; }})()""")
            for kind in ("mousePressed", "mouseReleased"):
                browser.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
            browser.wait(f"{visible} === {expected}", 5)
    threads = "document.querySelector('.map input')"
    image = f"{threads}.closest('figure').querySelector('canvas').toDataURL()"
    without = browser.run(image)
    browser.run(f"{threads}.click()")
    assert browser.run(image) != without
    assert browser.faults == []


@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 1200), (True, 390), (False, 320)])
def test_it_is_readable_light_dark_and_on_a_phone(browser, hostile_page, dark, width):
    """Nothing is wider than the screen, and every text stands out from its ground."""
    browser.open(hostile_page[1], dark=dark, width=width)
    browser.draw_all()
    assert browser.run("document.documentElement.scrollWidth") <= width
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 23, 27)") == dark
    looked_at, weak = browser.run(WEAK)
    assert looked_at > 200 and weak == []
    assert browser.faults == []


def test_without_a_script_the_page_is_whole(browser, hostile_page):
    browser.open(hostile_page[1], script=False)
    try:
        heights = browser.run(f"""{CHARTS}.map((one) => [one.querySelector('.still svg').getBoundingClientRect().height,
            one.querySelector('.live').offsetHeight])""")
        assert len(heights) == 4 and all(still > 100 and live == 0 for still, live in heights)
        assert browser.run(f"{CARDS}.filter((card) => card.querySelector('img').naturalWidth === 24).length") == 12
        controls = "[...document.querySelectorAll('.control, .more')]"
        assert browser.run(f"{controls}.every((one) => one.offsetHeight === 0)")
        assert browser.faults == []
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


def test_print_shows_the_still_pictures_and_what_was_folded(browser, hostile_page):
    browser.open(hostile_page[1])
    browser.draw_all()
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.run(f"""{CHARTS}.every((one) => one.querySelector('.live').offsetHeight === 0
        && one.querySelector('.still svg').getBoundingClientRect().height > 100)""")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("[...document.querySelectorAll('details.print')].map((one) => one.open)") == [True]
    assert len(browser.send("Page.printToPDF")["data"]) > 50_000


def test_ten_thousand_images_open_quickly(browser, tmp_path):
    result = made_up(10_000, attacks=[f"attack-{k}" for k in range(12)], radii=("0.05", "0.1"))
    made = report(result, tmp_path / "p.html", alone=True)
    assert browser.open(made.page) < 15  # measured: 0.2 s
    browser.draw_all()
    assert browser.faults == [] and len(browser.run(f"{CHARTS}.filter((one) => one.dataset.drawn)")) == 3


def test_several_results_and_a_study_draw_their_charts(browser, tmp_path):
    study = Path(__file__).parents[2] / "benchmarks" / "results" / "q1-digits"
    results = [made_up(seed=seed, radii=("0.05", "0.1")) for seed in range(3)]
    for name, sources, many in (("all", results, 2 + 3 * 3), ("study", study, 3)):
        made = report(sources, tmp_path / f"{name}.html", alone=name == "all")
        browser.open(made.page)
        browser.draw_all()
        assert len(browser.run(f"{CHARTS}.filter((one) => one.dataset.drawn)")) == many, name
        assert browser.faults == []
