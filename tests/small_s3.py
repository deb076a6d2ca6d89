"""A stand-in for S3 in this process: as much of its protocol as pyarrow's client speaks.

Objects are whole or not there, as with S3: those uploaded in parts appear with the last request.
Signatures are not checked. It can refuse to answer, and counts what is put.
"""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"


class Store:
    """The objects of one bucket."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.changed: dict[str, float] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.puts: list[str] = []
        """Keys of the objects that were completed, in order."""
        self.broken = False
        """Refuse everything, as S3 does where access was taken away."""
        self.refused = 0
        """Requests that were."""
        self.port = 0

    @property
    def address(self) -> str:
        """Of the bucket, with credentials."""
        return f"s3://me:secret@{BUCKET}"

    @property
    def query(self) -> str:
        """What an address needs to reach this server and no other."""
        return f"?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def complete(self, key: str, data: bytes) -> None:
        self.objects[key], self.changed[key] = data, time.time()
        self.puts.append(key)


@contextmanager
def serving() -> Iterator[Store]:
    """A server on a free port of this machine."""
    store = Store()
    handler = type("Handler", (_Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    store.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client has what it wanted
            self.close_connection = True

    def _request(self) -> tuple[str, dict[str, str], bytes]:
        """Key, query and body; the key is "" for the bucket."""
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if chunked else self.rfile.read(length)
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = _unchunked(body)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        assert bucket == BUCKET
        return key, query, body

    def _chunks(self) -> bytes:
        raw = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            raw += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return raw

    def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        fields = {"Content-Length": str(len(body)), "Content-Type": "application/xml"}
        for name, value in (fields | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refused(self) -> bool:
        if self.store.broken:
            self.store.refused += 1
            text = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self._answer(403, text.encode())
        return self.store.broken

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _get(self) -> None:
        key, query, _ = self._request()
        if self._refused():
            return
        if not key:
            self._answer(200, self._listing(query).encode())
            return
        data = self.store.objects.get(key)
        if data is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        headers = {
            "ETag": f'"{md5(data).hexdigest()}"',
            "Last_Modified": formatdate(self.store.changed[key], usegmt=True),
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._answer(200, data, **headers)
            return
        first = int(asked[1])
        last = min(int(asked[2] or len(data)), len(data) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
        self._answer(206, data[first : last + 1], **headers)

    def _listing(self, query: dict[str, str]) -> str:
        prefix = query.get("prefix", "")
        keys = sorted(key for key in self.store.objects if key.startswith(prefix))
        common: set[str] = set()
        if delimiter := query.get("delimiter"):
            inner = {key: key[len(prefix) :].partition(delimiter) for key in keys}
            common = {prefix + head + sep for head, sep, _ in inner.values() if sep}
            keys = [key for key in keys if not inner[key][1]]
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key>"
            f"<LastModified>{_iso(self.store.changed[key])}</LastModified>"
            f"<Size>{len(self.store.objects[key])}</Size></Contents>"
            for key in keys
        ) + "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            for name in sorted(common)
        )
        count = len(keys) + len(common)
        return (
            f"<ListBucketResult><Name>{BUCKET}</Name><KeyCount>{count}</KeyCount>"
            f"<IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        )

    def do_PUT(self) -> None:
        key, query, body = self._request()
        if self._refused():
            return
        if "uploadId" in query:
            self.store.parts[query["uploadId"]][int(query["partNumber"])] = body
        elif key:
            self.store.complete(key, body)
        self._answer(200, ETag=f'"{md5(body).hexdigest()}"')

    def do_POST(self) -> None:
        key, query, body = self._request()
        if self._refused():
            return
        if "uploads" in query:
            upload = uuid.uuid4().hex
            self.store.parts[upload] = {}
            answer = f"<UploadId>{upload}</UploadId>"
            tag = "InitiateMultipartUploadResult"
        elif "uploadId" in query:
            parts = self.store.parts.pop(query["uploadId"])
            self.store.complete(key, b"".join(parts[number] for number in sorted(parts)))
            answer, tag = f"<Key>{escape(key)}</Key><ETag>x</ETag>", "CompleteMultipartUploadResult"
        else:
            for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                self.store.objects.pop(name, None)
            answer, tag = "", "DeleteResult"
        self._answer(200, f"<{tag}>{answer}</{tag}>".encode())

    def do_DELETE(self) -> None:
        key, query, _ = self._request()
        if self._refused():
            return
        if "uploadId" in query:
            self.store.parts.pop(query["uploadId"], None)
        else:
            self.store.objects.pop(key, None)
        self._answer(204)


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def _unchunked(body: bytes) -> bytes:
    """A body in AWS' own chunks, each after a line with its size."""
    data = b""
    while body:
        head, _, body = body.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        if size == 0:
            break
        data += body[:size]
        body = body[size + 2 :]
    return data
