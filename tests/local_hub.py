"""A stand-in for the Hub's file API on this machine: repositories in memory, whose files go up and down."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        repos, parts = self.server.repos, self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            repos.setdefault(name, {})
            self._json({"url": f"{self.server.address}/{name}"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif parts[4:5] == ["preupload"]:
            files = [x["path"] for x in json.loads(body)["files"]]
            self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        elif parts[4:5] == ["commit"]:
            name = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json({"commitUrl": f"{self.server.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.send_error(404)

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        owner, name, kind, _, *path = [*self.path.split("?")[0].strip("/").split("/"), "", "", ""]
        files = self.server.repos.get(f"{owner}/{name}")
        path = "/".join(x for x in path if x)
        if kind != "resolve" or files is None or path not in files:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if files is None else "EntryNotFound")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(files[path], head)

    def _json(self, data):
        self._send(json.dumps(data).encode())

    def _send(self, content, head=False):
        self.send_response(200)
        self.send_header("ETag", hashlib.sha256(content).hexdigest())
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not head:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def local_hub():
    """A server; its ``repos`` are the files by repository and path, its ``address`` is for ``HF_ENDPOINT``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.repos, server.address = {}, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
