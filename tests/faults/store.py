"""A small store on 127.0.0.1 for the real blobfile to talk to, as Google's and as Azure's. Its objects can be
damaged, and it can be made to fail.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import blobfile._common

UPDATED = "2024-01-01T00:00:00.000000+0000"
MODIFIED = "Mon, 01 Jan 2024 00:00:00 GMT"


class Store:
    """The server, in a thread of this process.

    Attributes:
        objects: contents by name, all in the bucket, or of account "account" the container, "bucket".
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

    def pool(self):
        """blobfile's pool of connections, which lead here."""
        real, own = blobfile._common.PoolDirector(32, 10).get_http_pool(), self.url

        class Pool:
            def request(self, url, **options):
                url = url.replace("https://storage.googleapis.com", own)
                url = url.replace("https://account.blob.core.windows.net", f"{own}/azure")
                return real.request(url=url, **options)

        return Pool()

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
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/azure/"):
            return self.azure(body)
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

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def azure(self, body):
        url, store = urlsplit(self.path), self.owner
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        _, _, container, *parts = url.path.split("/", 3)
        name = unquote(parts[0]) if parts else ""
        if container != "bucket":
            return self.answer(404, **{"x-ms-error-code": "ContainerNotFound"})
        if store.fail(self.command, name):
            return self.answer(503)
        if query.get("comp") == "list":
            return self.azure_listing(query.get("prefix", ""))
        store.log.append((self.command, name))
        if query.get("comp") == "block":
            store.begun[query["blockid"]] = body
            return self.answer(201)
        if query.get("comp") == "blocklist" and self.command == "PUT":
            store.put(
                name, b"".join(store.begun[i] for i in re.findall("<Latest>(.*?)</Latest>", body.decode()))
            )
            return self.answer(201, ETag="1")
        if name not in store.objects or query.get("comp") == "blocklist":  # there are no half-written blobs
            return self.answer(404, **{"x-ms-error-code": "BlobNotFound"})
        if self.command == "DELETE":
            del store.objects[name]
            return self.answer(202)
        if self.command == "GET":
            start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            return self.answer(206, store.objects[name][start : end + 1])
        return self.answer(200, store.objects[name], **self.azure_described(name))

    def azure_listing(self, prefix):
        blobs = ""
        for name in sorted(self.owner.objects):
            if name.startswith(prefix) and "/" not in name[len(prefix) :]:
                facts = self.azure_described(name) | {"Content-Length": len(self.owner.objects[name])}
                inside = "".join(f"<{key}>{value}</{key}>" for key, value in facts.items())
                blobs += f"<Blob><Name>{name}</Name><Properties>{inside}</Properties></Blob>"
        page = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker/></EnumerationResults>"
        self.answer(200, page.encode())

    def azure_described(self, name):
        digest = base64.b64encode(hashlib.md5(self.owner.objects[name]).digest()).decode()
        facts = {"Last-Modified": MODIFIED, "Creation-Time": MODIFIED, "Content-MD5": digest}
        return facts | {"Etag": str(self.owner.versions[name]), "x-ms-blob-type": "BlockBlob"}

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
