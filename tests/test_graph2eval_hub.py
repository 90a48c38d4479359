"The line that loads the released benchmark by its id, with a hub on loopback in place of the hub"

import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as constants
import pytest

from common import nbs
from llmpapers.graph2eval.bench_io import load_bench, save_bench

page = json.loads((nbs / "graph2eval" / "18_bench_io.ipynb").read_text(encoding="utf-8"))
prose = "\n".join("".join(c["source"]) for c in page["cells"] if c["cell_type"] == "markdown")
lines = re.findall(r"`(load_bench\(\"[\w-]+/[\w.-]+\"\))`", prose)

document = dict(
    task_id="doc-1",
    template_id="basic_extraction",
    task_type="extraction",
    difficulty="easy",
    prompt="How many models were compared?",
    gold_answer="12",
    gold_nodes=["n1"],
    gold_edges=[],
    source_document="a.pdf",
)
web = dict(
    task_id="web-1",
    prompt="Open the list of issues.",
    web_task_type="basic_navigation",
    difficulty="medium",
    task_steps=[dict(step_type="click", target_som_mark="M3", action_description="click")],
    start_page="https://shop.example/",
    success_criteria=dict(expected_url="https://shop.example/issues"),
)
files = {
    "README.md": b"# a card",
    "doc/a_1/datasets/tasks.jsonl": (json.dumps(document) + "\n").encode(),
    "doc/a_1/vectors/index.pkl": b"cos\nsystem\n(S'touch /nowhere/owned'\ntR.",
    "web/shop_1/datasets/tasks.json": json.dumps([web]).encode(),
    "web/shop_1/file_images/page.png": b"\x89PNG",
}


class Hub(BaseHTTPRequestHandler):
    "What the hub's client asks for when a data set is fetched"

    protocol_version = "HTTP/1.1"
    commit = "a" * 40

    def log_message(self, *_):
        "Say nothing"

    def _answer(self, status, body, **headers):
        self.send_response(status)
        for k, v in headers.items():
            self.send_header(k.replace("_", "-"), v)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        name = self.server.name
        if path.startswith(f"/api/datasets/{name}/"):
            rows = [dict(rfilename=f, type="file", path=f, size=len(b)) for f, b in files.items()]
            rows = [r | dict(oid="0" * 40) for r in rows]
            info = dict(id=name, sha=self.commit, siblings=rows, tags=[], downloads=0)
            body = json.dumps(rows if "/tree/" in path else info).encode()
            return self._answer(200, body, Content_Type="application/json")
        file = path.partition(f"/datasets/{name}/resolve/{self.commit}/")[2]
        if file not in files:
            return self._answer(404, b"", X_Error_Code="EntryNotFound")
        return self._answer(
            200, files[file], ETag=f'"{file}"', X_Repo_Commit=self.commit, Accept_Ranges="none"
        )

    do_HEAD = do_GET


@contextlib.contextmanager
def hub_of(name):
    "A hub on loopback that has one data set"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.name, server.asked = name, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def as_client(tmp_path, monkeypatch):
    "A client of an empty cache; a function that tells it which hub to ask"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)

    def connect(server):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", server is None)
        if server is not None:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            monkeypatch.setattr(constants, "ENDPOINT", url)
            template = url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return connect


def test_the_page_names_the_released_benchmark_once():
    assert lines == ['load_bench("yurun-chen/Graph2Eval-Bench")']


def test_the_line_of_the_page_loads_the_benchmark_and_asks_for_no_pickle(as_client):
    name = re.search(r'"(.*)"', lines[0])[1]
    with hub_of(name) as server:
        as_client(server)
        got = eval(lines[0], dict(load_bench=load_bench))
        asked = set(server.asked)
    assert [(t.domain, t.type) for t in got.tasks] == [
        ("document", "extraction"),
        ("web", "basic_navigation"),
    ]
    assert got.tasks[0].goal.check("", {}, "12") and got.manifest["skipped"] == {}
    assert any(p.endswith("tasks.jsonl") for p in asked)
    assert not any(p.endswith((".pkl", ".png", ".md")) for p in asked)
    as_client(None)  # without a network: from the cache
    again = eval(lines[0], dict(load_bench=load_bench))
    assert [t.key for t in again.tasks] == [t.key for t in got.tasks]


def test_a_name_that_no_hub_has_is_an_error_that_says_so(as_client):
    as_client(None)
    with pytest.raises(ValueError, match="no data set of the hub"):
        load_bench("nobody/nothing")


def test_what_was_loaded_can_be_kept_as_a_benchmark_of_ones_own(as_client, tmp_path):
    name = re.search(r'"(.*)"', lines[0])[1]
    with hub_of(name) as server:
        as_client(server)
        got = load_bench(name)
    save_bench(tmp_path / "mine", got.tasks)
    assert load_bench(tmp_path / "mine").tasks == got.tasks
