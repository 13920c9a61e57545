"""A stand-in of the Hugging Face Hub on the loopback: the few calls that an upload and a download make."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """repositories: name -> {file: bytes}. private: name -> as it was made. allowed: whether uploads are let in."""

    def __init__(self):
        self.repositories, self.private, self.allowed, self.asked = {}, {}, True, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, code, value=b"", headers=()):
                body = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(code)
                for name, text in (("Content-Length", str(len(body))), *headers):
                    self.send_header(name, text)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.answer(*hub.post(self.path.partition("?")[0], body))

            def do_GET(self):
                self.answer(*hub.get(self.path.partition("?")[0]))

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def post(self, path, body):
        self.asked.append(path)
        if not self.allowed:
            return 403, {"error": "you are not allowed to"}
        if path == "/api/validate-yaml":  # of the card's front matter
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.repositories:
                told = {"error": "it exists", "url": f"{self.endpoint}/{name}"}
                return 409, told, (("X-Error-Code", "RepoAlreadyExists"),)
            self.repositories[name] = {}
            self.private[name] = asked.get("private", asked.get("visibility") == "private")
            return 200, {"url": f"{self.endpoint}/{name}", "name": name, "id": name}
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", path):
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for one in json.loads(body)["files"]]  # fmt: skip
            return 200, {"files": files}
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.repositories[found[1]][value["path"]] = base64.b64decode(value["content"])
            url = f"{self.endpoint}/{found[1]}/commit/{COMMIT}"
            return 200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}
        return 404, {"error": f"no such call: {path}"}

    def get(self, path):
        self.asked.append(path)
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+?)(?:/revision/\w+)?", path):
            if found[1] not in self.repositories:
                return 404, {"error": "Repository not found"}, (("X-Error-Code", "RepoNotFound"),)
            files = [{"rfilename": name} for name in sorted(self.repositories[found[1]])]
            return 200, {"id": found[1], "sha": COMMIT, "siblings": files, "private": True, "tags": [], "downloads": 0,
                         "likes": 0}  # fmt: skip
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/([\w.-]+)", path):
            data = self.repositories.get(found[1], {}).get(found[2])
            if data is None:
                return 404, {"error": "Entry not found"}, (("X-Error-Code", "EntryNotFound"),)
            etag = hashlib.sha256(data).hexdigest()
            return 200, data, (("ETag", f'"{etag}"'), ("X-Repo-Commit", COMMIT))
        return 404, {"error": f"no such call: {path}"}
