"""JupyterLab as an attendee meets it: a browser opens a notebook, Run All, figures and no error.

`pip install playwright` and a Chromium (Debian: `apt install chromium`), then `pytest -m browser`;
with BBKIT_SCREENSHOTS=DIR it leaves pictures of the pages there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MINUTES = 15


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebooks, so that running them changes nothing here."""
    work = tmp_path_factory.mktemp("lab")
    for name in ("bbkit", "notebooks", "data_cards"):
        shutil.copytree(ROOT / name, work / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, work / name)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(work)}
    settings |= {"JUPYTER_CONFIG_DIR": str(work / "config"), "JUPYTER_DATA_DIR": str(work / "data")}
    command = ["-m", "jupyter", "lab", "--no-browser", "--allow-root", "--port=0", "--notebook-dir"]
    log = work / "log"
    with open(log, "w") as out:
        server = subprocess.Popen(
            [sys.executable, *command, str(work)], stdout=out, stderr=out, env=settings
        )
    try:
        for _ in range(240):
            found = re.search(
                r"http://(?:localhost|127\.0\.0\.1):\d+/lab\?token=\w+", log.read_text()
            )
            if found:
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        assert found, log.read_text()
        yield work, found[0]
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not CHROMIUM:
        pytest.skip("no Chromium: apt install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


def picture(page, name: str) -> None:
    if folder := os.environ.get("BBKIT_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def kernels(url: str) -> list[dict]:
    base, token = url.split("/lab?token=")
    with urllib.request.urlopen(f"{base}/api/kernels?token={token}") as answer:
        return json.loads(answer.read())


@pytest.mark.parametrize("name", ["05_gradient_orthogonality", "00_start_here"])
def test_run_all_in_jupyterlab(lab, page, name):
    work, url = lab
    path = work / "notebooks" / f"{name}.ipynb"
    before = nbformat.read(path, 4)
    for cell in before.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(before, path)
    page.goto(url.replace("/lab?", f"/lab/tree/notebooks/{name}.ipynb?reset&"))
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=120_000)
    choice = page.locator(".jp-Dialog button.jp-mod-accept")  # which kernel? It asks at times
    for _ in range(60):
        page.wait_for_timeout(1000)
        if choice.count():
            choice.first.click()
        elif page.get_by_text("| Idle").count():
            break
    picture(page, f"{name}_begin")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    count = sum(cell.cell_type == "code" for cell in before.cells)
    deadline = time.time() + 60 * MINUTES
    while time.time() < deadline:  # it saves itself, and a cell that ran has its number
        time.sleep(5)
        page.keyboard.press("Control+s")
        try:
            cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        except nbformat.reader.NotJSONError:
            continue  # half-written
        failed = [o for c in cells for o in c.outputs if o.output_type == "error"]
        idle = all(kernel["execution_state"] == "idle" for kernel in kernels(url))
        if failed or (idle and all(c.execution_count for c in cells)):
            break
    picture(page, f"{name}_end")
    assert not failed, failed[0].evalue
    assert len([c for c in cells if c.execution_count]) == count
    kinds = [kind for c in cells for o in c.outputs for kind in o.get("data", {})]
    figures = kinds.count("image/png")
    assert figures >= 1
    panel = page.locator(".jp-WindowedPanel-outer").first
    panel.evaluate("e => e.scrollTo(0, 0)")
    seen, widgets, place, bars = set(), 0, -1.0, 0
    while panel.evaluate("e => e.scrollTop") > place:  # a long notebook draws what is in view
        place = panel.evaluate("e => e.scrollTop")
        page.wait_for_timeout(400)
        for image in page.locator(".jp-OutputArea-output img").all():
            if image.evaluate("e => e.complete && e.naturalWidth > 100"):
                seen.add(image.get_attribute("src")[-200:])
        ended = re.compile("grpo: 100%.*domain=")
        reward = page.locator(".jp-OutputArea-output pre", has_text=ended)
        if reward.count() > bars:
            bars = reward.count()
            reward.first.scroll_into_view_if_needed()
            page.wait_for_timeout(1500)  # until what came into view is drawn
            picture(page, f"{name}_bar")
        sliders = page.locator(".jupyter-widgets .noUi-target, .widget-slider").count()
        if sliders > widgets:
            widgets = sliders
            page.locator(".noUi-target, .widget-slider").first.scroll_into_view_if_needed()
            picture(page, f"{name}_widget")
        panel.evaluate("e => e.scrollBy(0, 700)")
    assert len(seen) >= figures, "figures that the browser did not draw"
    if any("widget-view" in kind for kind in kinds):
        assert widgets, "no slider was drawn"
    if any("grpo: 100%" in o.get("text", "") for c in cells for o in c.outputs):
        assert bars, "the bar of GRPO's steps does not show its rewards"
