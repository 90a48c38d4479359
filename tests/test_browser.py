"A real browser opens notebooks in JupyterLab, runs one, and reads them and the built site"

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from common import notebooks, root
from nb_read import Notebook
from test_style import copy_of_tree

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]
CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
shots = root / "_executed" / "screens"


@pytest.fixture(scope="module")
def browser():
    "Chromium; without one the tests are skipped, but fail where CI=true"
    if not CHROMIUM:
        why = "no Chromium on the path (Debian, Ubuntu: apt-get install chromium)"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(why)
        pytest.skip(why)
    from playwright.sync_api import sync_playwright

    shots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as p:
        b = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield b
        b.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- JupyterLab ----------------------------------------------------------------------------------
def smoke_copy(dst):
    "The project with every notebook at smoke scale and without outputs"
    copy_of_tree(dst)
    for rel in notebooks():
        p = dst / "nbs" / rel
        nb = json.loads(p.read_text(encoding="utf-8"))
        for c in nb["cells"]:
            if c["cell_type"] != "code":
                continue
            c["outputs"] = []
            if "parameters" not in c["metadata"].get("tags", []):
                continue
            src = "".join(c["source"])
            new = re.sub(r'^scale\s*=\s*"laptop"', 'scale = "smoke"', src, flags=re.M)
            assert new != src, f'{rel}: no scale = "laptop" in the parameters cell'
            c["source"] = new.splitlines(keepends=True)
        p.write_text(json.dumps(nb, indent=1))


@contextlib.contextmanager
def jupyterlab(tmp_path, prepare):  # (address, token)
    """A server of JupyterLab on a copy of the project, started as a user does: `llmpapers lab
    --no-browser --port N`"""
    proj, conf, port = tmp_path / "project", tmp_path / "conf", free_port()
    prepare(proj)
    settings = conf / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(
        '{"windowingMode": "none"}'
    )  # render all cells, not just those in view
    (conf / "jupyter_lab_config.py").write_text(
        "c.LabApp.expose_app_in_browser = True\n"
        "c.LabApp.news_url = None\n"
        'c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"\n'
        "c.ServerApp.allow_root = True\n"
    )
    env = os.environ | dict(
        PYTHONPATH=str(proj),
        JUPYTER_CONFIG_DIR=str(conf),
        JUPYTERLAB_SETTINGS_DIR=str(conf / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(conf / "workspaces"),
        JUPYTER_RUNTIME_DIR=str(conf / "runtime"),
        JUPYTER_TOKEN="smoke",
    )
    cmd = [
        sys.executable,
        "-c",
        "import sys; from llmpapers.core.cli import main; sys.exit(main())",
        "lab",
        "--no-browser",
        "--port",
        str(port),
    ]
    log = tmp_path / "lab.log"
    with open(log, "w") as f:
        server = subprocess.Popen(
            cmd, cwd=proj, env=env, stdout=f, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/api/status?token=smoke", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (
                    f"llmpapers lab ended with {server.returncode}:\n{log.read_text()[-3000:]}"
                )
                time.sleep(0.5)
        else:
            pytest.fail(f"no server after two minutes:\n{log.read_text()[-3000:]}")
        yield url, "smoke"
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture
def lab(tmp_path, browser):
    "JupyterLab with notebooks to run"
    with jupyterlab(tmp_path, smoke_copy) as server:
        yield server


@pytest.fixture(scope="module")
def reading(tmp_path_factory, browser):
    "JupyterLab with the notebooks as they are, outputs and all"
    with jupyterlab(tmp_path_factory.mktemp("reading"), copy_of_tree) as server:
        yield server


def open_notebook(page, server, rel):
    "Show a notebook in JupyterLab, all of its cells drawn"
    url, token = server
    try:
        urllib.request.urlopen(f"{url}/api/contents/{rel}?token={token}&content=0")
    except OSError:
        rel = f"nbs/{rel}"
    page.goto(f"{url}/lab/tree/{rel}?token={token}&reset", wait_until="domcontentloaded")
    page.wait_for_selector(".jp-Notebook")
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext")


def busiest(room):
    "The notebook of a room with most figures and equations; None if it has no figure"
    books = [Notebook(p) for p in notebooks() if p.parts[0] == room]
    books = [nb for nb in books if nb.figures and nb.tags] or [nb for nb in books if nb.figures]
    return max(books, key=lambda nb: len(nb.figures) + len(nb.tags), default=None)


@pytest.mark.xdist_group("lab")
def test_a_notebook_runs_in_jupyterlab(browser, lab):
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    page.set_default_timeout(120_000)
    errors = []
    page.on("pageerror", lambda e: errors.append(str(e)))
    try:
        open_notebook(page, lab, "attention_rhythm/01_metrics.ipynb")
        # the status indicator is idle before the kernel is connected, so wait for the kernel itself
        page.evaluate("""async () => {
            const w = jupyterapp.shell.currentWidget;
            await w.context.ready;
            await w.sessionContext.ready;
            await w.sessionContext.session.kernel.info;
        }""")
        page.evaluate('async () => { await jupyterapp.commands.execute("notebook:run-all-cells") }')
        page.wait_for_timeout(1000)
        cells = page.evaluate("""() => {
            const error = o => o.output_type == "error" ? [o.ename + ": " + o.evalue] : [];
            const text = c => [].concat(c.source).join("");
            return jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells
                .filter(c => c.cell_type == "code" && text(c).trim())
                .map(c => ({src: text(c).slice(0, 80), n: c.execution_count,
                            err: c.outputs.flatMap(error)}));
        }""")
        assert len(cells) > 5, cells
        assert not [c for c in cells if c["err"]], [c for c in cells if c["err"]]
        assert not [c for c in cells if c["n"] is None], (
            f"cells that did not run: {[c for c in cells if c['n'] is None]}"
        )
        page.wait_for_selector("mjx-container", state="attached")
        assert page.locator("mjx-container merror, mjx-merror").count() == 0, (
            "maths that MathJax cannot read"
        )
        images = page.evaluate(
            """() => [...document.querySelectorAll(".jp-OutputArea-output img")]
                .map(i => [i.naturalWidth, i.getBoundingClientRect().width])"""
        )
        assert images and all(w > 0 and shown > 0 for w, shown in images), (
            f"figures that are not drawn: {images}"
        )
        assert not errors, errors
    finally:
        page.screenshot(path=shots / "jupyterlab.png")
        page.close()


# What a reader sees of a notebook: the text outside of code and maths, faults of the maths, the
# numbers of equations with the place where they stand, and figures with their captions
SEEN = """() => {
    const all = (e, q) => [...e.querySelectorAll(q)], root = document.querySelector(".jp-Notebook");
    const box = e => { const r = e.getBoundingClientRect();
                       return {left: r.left, right: r.right, top: r.top, bottom: r.bottom}; };
    const texts = [];
    for (const e of all(root, ".jp-RenderedMarkdown, .jp-RenderedHTML")) {
        const walk = document.createTreeWalker(e, NodeFilter.SHOW_TEXT);
        while (walk.nextNode())
            if (!walk.currentNode.parentElement.closest("code, pre, mjx-container"))
                texts.push(walk.currentNode.data);
    }
    const captions = all(root, ".jp-OutputArea-output.jp-RenderedMarkdown").flatMap(e => {
        const lead = e.querySelector("strong"), m = lead?.textContent.match(/^Figure (\\d+)[.]$/);
        if (!m) return [];
        const images = all(e.closest(".jp-OutputArea"), "img, .jp-RenderedSVG svg");
        return [{n: +m[1], caption: box(e), words: e.innerText.length,
                 images: images.map(i => ({...box(i), width: i.naturalWidth ?? 1}))}];
    });
    const equations = all(root, "mjx-container").flatMap(e =>
        all(e, "mlabeledtr > mtd:first-child").map(t => ({
            text: t.textContent, label: box(e.querySelector("mjx-labels mjx-mtext"))})));
    return {texts, captions, equations, page: box(root),
            maths: all(root, "mjx-container").length,
            wrong: all(root, 'mjx-merror, merror, mtext[mathcolor="red"], mstyle[mathcolor="red"]')
                .map(e => e.textContent)};
}"""


@pytest.mark.xdist_group("lab")
@pytest.mark.parametrize("room", sorted({p.parts[0] for p in notebooks() if len(p.parts) > 1}))
def test_nothing_raw_is_read_in_jupyterlab(browser, reading, room):
    "Maths and captions are set, equations have their numbers, and every caption is below its image"
    nb = busiest(room)
    assert nb is not None, f"{room} has no figure"
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    page.set_default_timeout(120_000)
    try:
        open_notebook(page, reading, nb.rel.as_posix())
        if any("$" in c["source"] for c in nb.md):
            page.wait_for_selector("mjx-container", state="attached")
        n = len(nb.cells)
        page.wait_for_function(f"document.querySelectorAll('.jp-Notebook .jp-Cell').length == {n}")
        page.wait_for_function(
            f"document.querySelectorAll('.jp-Notebook mjx-labels').length == {len(nb.tags)}"
        )
        seen = page.evaluate(SEEN)
        raw = re.compile(r"@(?:fig|eq)-|\{#|\\(?:tag|label|begin|frac)\b|\$\$")
        assert not [t for t in seen["texts"] if raw.search(t)]
        assert sum(len(t) for t in seen["texts"]) > 1000, "hardly any text was drawn"
        assert not seen["wrong"], f"maths that MathJax cannot read: {seen['wrong']}"
        assert [e["text"] for e in seen["equations"]] == [f"({t})" for t in nb.tags]
        for e in seen["equations"]:
            label, inside = e["label"], seen["page"]
            assert inside["left"] < label["left"] < label["right"] <= inside["right"] + 1, e
            assert label["bottom"] > label["top"], e
        assert [c["n"] for c in seen["captions"]] == [n for _, n in nb.figures]
        for c in seen["captions"]:
            assert c["images"] and all(i["width"] > 0 for i in c["images"]), c
            below = c["caption"]["top"] - max(i["bottom"] for i in c["images"])
            assert -1 <= below < 60 and c["words"] > 20, c
        shown = page.locator(".jp-Cell", has=page.locator("strong", has_text="Figure 1.")).first
        shown.scroll_into_view_if_needed()
        page.screenshot(path=shots / f"read_{room}_figure.png")
        if nb.tags:
            page.locator("mjx-labels").first.scroll_into_view_if_needed()
            page.screenshot(path=shots / f"read_{room}_equation.png")
    finally:
        page.close()


@pytest.mark.xdist_group("lab")
def test_what_is_raw_or_wrong_is_seen(browser, reading):
    "A notebook with planted faults: each is in what the check above reads"
    url, token = reading
    shown = dict(output_type="display_data", metadata={}, data={"text/markdown": "**Figure 1.** a"})
    cells = [
        dict(cell_type="markdown", source="See @fig-line. $$ x $$ {#eq-sum}"),
        dict(cell_type="markdown", source="$$ \\frac{a}{ $$"),  # stays text
        dict(cell_type="markdown", source="$$ a^b^c $$"),
        dict(cell_type="markdown", source="$$ \\undefinedmacro{x} $$"),
        dict(cell_type="markdown", source="$$ y \\tag{7} $$ but $$ never closed \\tag{8}"),
        dict(cell_type="code", source="", outputs=[shown], execution_count=None),
    ]
    cells = [dict(id=f"c{i}", metadata={}) | c for i, c in enumerate(cells)]
    content = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    ask = urllib.request.Request(
        f"{url}/api/contents/planted.ipynb?token={token}",
        method="PUT",
        headers={"Content-Type": "application/json"},
        data=json.dumps(dict(type="notebook", content=content)).encode(),
    )
    urllib.request.urlopen(ask).close()
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    page.set_default_timeout(60_000)
    try:
        page.goto(f"{url}/lab/tree/planted.ipynb?token={token}&reset")
        page.wait_for_selector("mjx-labels", state="attached")
        page.wait_for_timeout(1000)
        seen = page.evaluate(SEEN)
    finally:
        page.screenshot(path=shots / "read_planted.png")
        page.close()
    text = "\n".join(seen["texts"])
    assert all(
        raw in text for raw in ("@fig-line", "{#eq-sum}", "\\frac", "$$ never", "\\tag{8}")
    ), text
    assert "\\undefinedmacro" in seen["wrong"] and len(seen["wrong"]) >= 2, seen["wrong"]
    assert [e["text"] for e in seen["equations"]] == ["(7)"]
    assert [(c["n"], c["images"]) for c in seen["captions"]] == [(1, [])]


# ---- the site ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def site(tmp_path_factory, browser):
    "The built site behind a small server"
    sys.path.insert(0, str(root / "tools"))
    import render_docs

    out = tmp_path_factory.mktemp("site") / "_docs"
    render_docs.build(root, out)  # its faults are the business of test_docs.py

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(out))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def open_page(browser):
    """Opens pages; their errors, failed requests and requests to other hosts are collected in
    `.faults`"""
    made, faults = [], []

    def open_(url, **kw):
        page = browser.new_page(**{"viewport": dict(width=1300, height=900), **kw})
        made.append(page)
        page.on(
            "console",
            lambda m: (
                faults.append(f"{page.url}: {m.type}: {m.text}")
                if m.type in ("error", "warning")
                else None
            ),
        )
        page.on("pageerror", lambda e: faults.append(f"{page.url}: {e}"))
        page.on(
            "response",
            lambda r: faults.append(f"{page.url}: {r.status} {r.url}") if r.status >= 400 else None,
        )
        page.on(
            "request",
            lambda r: (
                faults.append(f"{page.url}: asks {r.url}")
                if not r.url.startswith(("http://127.0.0.1", "data:", "file:"))
                else None
            ),
        )
        page.goto(url)
        return page

    open_.faults = faults
    yield open_
    for p in made:
        p.close()


@pytest.mark.xdist_group("browser")
def test_site_pages(site, open_page):
    """Every page loads with all its images, nothing is wider than the window, and no error is on
    the console"""
    page = open_page(f"{site}/index.html")
    page.wait_for_url("**/nbs/index.html")
    links = page.eval_on_selector_all("#sidebar a", "xs => xs.map(a => a.href)")
    assert len(links) == len(set(links)) == len(notebooks()), (
        f"{len(links)} links in the sidebar, {len(notebooks())} notebooks"
    )
    for url in links:
        page.goto(url)
        bad = page.evaluate(
            """() => [...document.images]
                .filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src)"""
        )
        assert not bad, f"{url}: images that are not loaded: {bad}"
        for width in (1300, 390):
            page.set_viewport_size(dict(width=width, height=900))
            wide = page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, f"{url}: {wide} pixels too wide for a window of {width}"
        page.set_viewport_size(dict(width=1300, height=900))
    assert not open_page.faults, open_page.faults


@pytest.mark.xdist_group("browser")
def test_site_navigation(site, open_page):
    """The sidebar leads to pages, marks the current one, and the neighbours follow its order;
    search finds a page"""
    page = open_page(f"{site}/nbs/index.html")
    links = page.locator("#sidebar a")
    if links.count() < 3:
        pytest.skip("too few pages")
    section = page.locator("#sidebar details").first
    if section.count() and section.get_attribute("open") is None:
        section.locator("summary").click()  # a large site folds its sections
    name, href = links.nth(1).inner_text(), links.nth(1).evaluate("a => a.href")
    links.nth(1).click()
    page.wait_for_url(href)
    assert page.locator("main h1").inner_text() == name
    assert page.locator("#sidebar a[aria-current]").inner_text() == name
    page.locator(".near .next").click()
    page.wait_for_url(page.locator("#sidebar a").nth(2).evaluate("a => a.href"))
    page.fill("#search", name)
    assert page.locator("#found a").first.inner_text().startswith(name)
    page.locator("#found a").first.click()
    page.wait_for_url(re.compile(re.escape(href)))
    assert not open_page.faults, open_page.faults


@pytest.mark.xdist_group("browser")
def test_site_light_dark_phone(site, open_page):
    """The page follows the system's theme, the switch overrides it, and on a phone the menu opens
    the contents"""

    def ground(p):
        return (
            sum(
                int(x)
                for x in re.findall(
                    r"\d+", p.evaluate("() => getComputedStyle(document.body).backgroundColor")
                )[:3]
            )
            / 3
        )

    rel = next((p for p in notebooks() if len(p.parts) > 1), None)
    if rel is None:
        pytest.skip("no page but the front")
    url = f"{site}/nbs/{rel.with_suffix('.html').as_posix()}"
    light, dark = (open_page(url, color_scheme=s) for s in ("light", "dark"))
    assert ground(light) > 200 and ground(dark) < 60
    for p, n in ((light, "light"), (dark, "dark")):
        p.screenshot(path=shots / f"site_{n}.png")
    dark.click("#theme")
    assert ground(dark) > 200
    dark.reload()
    assert ground(dark) > 200, "the choice is forgotten"
    phone = open_page(url, viewport=dict(width=390, height=800))
    assert not phone.is_visible("#sidebar")
    phone.screenshot(path=shots / "site_phone.png")
    phone.click("#menu")
    assert phone.is_visible("#sidebar")
    assert not open_page.faults, open_page.faults
