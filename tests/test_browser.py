"A real browser opens a notebook in JupyterLab and runs it, and reads the built site"

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


@pytest.fixture
def lab(tmp_path, browser):  # (address, token)
    """A server of JupyterLab on a copy of the project, started as a user does: `llmpapers lab
    --no-browser --port N`"""
    proj, conf, port = tmp_path / "project", tmp_path / "conf", free_port()
    smoke_copy(proj)
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


def notebook_to_open():
    "A notebook with figures and maths: the first method of the first paper, else one of core"
    names = sorted(
        (p.as_posix() for p in notebooks()),
        key=lambda n: (n != "attention_rhythm/01_metrics.ipynb", n),
    )

    def text(n):
        return (root / "nbs" / n).read_text(encoding="utf-8")

    return next((n for n in names if "$$" in text(n) and "#| label: fig-" in text(n)), None)


@pytest.mark.xdist_group("lab")
def test_a_notebook_runs_in_jupyterlab(browser, lab):
    url, token = lab
    rel = notebook_to_open()
    if not rel:
        pytest.skip("no notebook with figures and maths yet")

    def get(path):
        return urllib.request.urlopen(f"{url}/api/contents/{path}?token={token}&content=0")

    try:
        get(rel)
    except OSError:
        rel = f"nbs/{rel}"
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    page.set_default_timeout(120_000)
    errors = []
    page.on("pageerror", lambda e: errors.append(str(e)))
    try:
        page.goto(f"{url}/lab/tree/{rel}?token={token}&reset", wait_until="domcontentloaded")
        page.wait_for_selector(".jp-Notebook")
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext")
        # the status indicator is idle before the kernel is connected, so wait for the kernel itself
        page.evaluate("""async () => { const w = jupyterapp.shell.currentWidget; await w.context.ready; await w.sessionContext.ready;
                         await w.sessionContext.session.kernel.info; }""")
        page.evaluate('async () => { await jupyterapp.commands.execute("notebook:run-all-cells") }')
        page.wait_for_timeout(1000)
        cells = page.evaluate("""() => jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells
            .filter(c => c.cell_type == "code" && [].concat(c.source).join("").trim())
            .map(c => ({src: [].concat(c.source).join("").slice(0, 80), n: c.execution_count,
                        err: c.outputs.filter(o => o.output_type == "error").map(o => o.ename + ": " + o.evalue)}))""")
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
            """() => [...document.querySelectorAll(".jp-OutputArea-output img")].map(i => [i.naturalWidth, i.getBoundingClientRect().width])"""
        )
        assert images and all(w > 0 and shown > 0 for w, shown in images), (
            f"figures that are not drawn: {images}"
        )
        assert not errors, errors
    finally:
        page.screenshot(path=shots / "jupyterlab.png")
        page.close()


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
