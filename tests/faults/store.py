"""A small Google Cloud Storage on 127.0.0.1, for the real blobfile to talk to. Its objects can be damaged,
and it can be made to fail.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

UPDATED = "2024-01-01T00:00:00.000000+0000"


class Store:
    """The server, in a thread of this process.

    Attributes:
        objects: contents by name, all in the bucket "bucket".
        fail: told the method and the object's name of each request; true makes it answer 503.
        log: (method, name) of what was read, written and removed, in order.
        url: where it listens.
    """

    def __init__(self):
        self.objects, self.versions, self.begun, self.log = {}, {}, {}, []
        self.fail = lambda method, name: False
        store = self

        class Handler(_Handler):
            owner = store

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def put(self, name, content):
        self.objects[name] = content
        self.versions[name] = self.versions.get(name, 0) + 1

    def names(self, folder):
        return {name.removeprefix(folder) for name in self.objects if name.startswith(folder)}

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 1 << 16, True  # an answer in two packets waits for 40 ms between them
    owner: Store

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url, store = urlsplit(self.path), self.owner
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        bucket, objects, name = re.fullmatch(
            r"(?:/upload)?/storage/v1/b/([^/]+)(/o/?)?(.*)", url.path
        ).groups()
        name = (
            unquote(name) or query.get("name") or (json.loads(body)["name"] if self.command == "POST" else "")
        )
        if bucket != "bucket":
            return self.answer(404, {"error": "no such bucket"})
        if store.fail(self.command, name):
            return self.answer(503)
        if self.command == "POST":  # the start of an upload, whose pieces are put at the place it names
            return self.answer(200, Location=f"{store.url}/upload/storage/v1/b/bucket/o?name={name}")
        if self.command == "PUT":
            return self.piece(name, body)
        if not name:
            return self.listing(query) if objects else self.answer(200)
        self.owner.log.append((self.command, name))
        if name not in store.objects:
            return self.answer(404)
        if self.command == "DELETE":
            del store.objects[name]
            return self.answer(204)
        if query.get("alt") == "media":
            start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            return self.answer(206, store.objects[name][start : end + 1])
        return self.answer(200, self.described(name))

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def piece(self, name, body):
        begun = self.owner.begun
        span, total = re.fullmatch(r"bytes (\*|\d+-\d+)/(\*|\d+)", self.headers["Content-Range"]).groups()
        begun[name] = (b"" if span.startswith("0-") else begun.get(name, b"")) + body
        if total == "*":
            return self.answer(308)
        self.owner.log.append(("PUT", name))
        self.owner.put(name, begun.pop(name))
        return self.answer(200, {})

    def listing(self, query):
        prefix = query["prefix"]
        names = [
            n for n in sorted(self.owner.objects) if n.startswith(prefix) and "/" not in n[len(prefix) :]
        ]
        self.answer(200, {"items": [self.described(name) for name in names]} if names else {})

    def described(self, name):
        content = self.owner.objects[name]
        return {
            "name": name,
            "size": str(len(content)),
            "generation": str(self.owner.versions[name]),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "updated": UPDATED,
            "timeCreated": UPDATED,
        }
