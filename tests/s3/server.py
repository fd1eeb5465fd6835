# SPDX-License-Identifier: BSD-3-Clause
"""moto's S3 server, with faults on demand. Prints its port, then answers each line of stdin with one line:

    fault KIND NTH TIMES     the NTH request from now on and those after it, TIMES in all, suffer it
    clear                    no faults, and the count of requests starts anew
    count                    requests since then, and how many of them suffered a fault
    peak                     most requests at the same time since then
    last                     what the request was that suffered one first, or -
    uploads                  uploads that are neither complete nor aborted
    parts                    parts that were sent for those

With an argument it speaks TLS, for the name localhost; its certificate is then in ARGUMENT.crt.

Ends with its stdin. Kinds: slow_down, internal_error, late_error (after 200), refuse (before anything is done; the answer echoes the headers); reset_before, reset_after (the
connection, before or after the request took effect), truncate (half of the answer), wrong_etag, wrong_range, stall (takes
effect, no answer for as long as the client waits), stall_before.
"""
import hashlib
import io
import logging
import os
import select
import socket
import struct
import sys
import threading

os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
try:
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
except ImportError as error:
    print(error)
    sys.exit(1)
from werkzeug.serving import WSGIRequestHandler, make_server, make_ssl_devcert

logging.getLogger("werkzeug").setLevel(logging.CRITICAL)

REFUSALS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "refuse": (403, "AccessDenied", "Access Denied"),
    "late_error": (200, "InternalError", "We encountered an internal error. Please try again."),
    "unsigned": (403, "SignatureDoesNotMatch", "The signature is not the one that Amazon's client makes."),
}


ACCOUNT = Credentials("AKIDOFTHETEST", "secret-of-the-test", "token-of-the-test")


def is_signed(method, url, headers, body):
    """Whether Amazon's own client would have signed the request so."""
    wanted = headers.get("Authorization", "")
    names = wanted.partition("SignedHeaders=")[2].partition(",")[0].split(";")
    signed = {name: headers[name] for name in names if name in headers and name != "x-amz-security-token"}
    request = AWSRequest(method=method, url=url, headers=signed | {"X-Amz-Security-Token": headers.get("x-amz-security-token", "")})
    request.context["timestamp"] = headers.get("x-amz-date", "")
    auth = S3SigV4Auth(ACCOUNT, "s3", "us-east-1")
    signature = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
    return wanted.endswith("Signature=" + signature) and headers.get("x-amz-content-sha256") == hashlib.sha256(body).hexdigest()


class Faults:
    def __init__(self):
        self.lock = threading.Lock()
        self.under_way = 0
        self.clear()

    def clear(self):
        self.kind, self.nth, self.times, self.count, self.hits, self.last, self.peak = None, 0, 0, 0, 0, "-", 0

    def done(self):
        with self.lock:
            self.under_way -= 1

    def next(self, what):
        with self.lock:
            self.count += 1
            self.under_way += 1
            self.peak = max(self.peak, self.under_way)
            if self.kind is None or not self.nth <= self.count < self.nth + self.times:
                return None
            self.hits += 1
            if self.hits == 1:
                self.last = what
            return self.kind


faults = Faults()


class Handler(WSGIRequestHandler):
    timeout = 60

    def log(self, *args):
        pass

    def send_now(self, answer):
        self.wfile.write(answer)
        self.wfile.flush()

    def cut(self, reset):
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            if not reset:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.connection.close()
        except OSError:
            pass

    def stall(self):
        """Until the client hangs up."""
        self.close_connection = True
        select.select([self.connection], [], [], 60)

    def run_wsgi(self):
        # The body is read in any case: a reset must not race with a client that is still sending.
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        kind = faults.next(f"{self.command} {self.path}")
        try:
            if not is_signed(self.command, f"http://{self.headers['Host']}{self.path}", self.headers, body):
                kind = "unsigned"
            if length:
                self.rfile = io.BytesIO(body)
            if kind in REFUSALS:
                status, code, message = REFUSALS[kind]
                message += " " + str(self.headers).replace("\r\n", " ").replace("<", "").replace("&", "")
                answer = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
                self.send_now(f"HTTP/1.1 {status} X\r\nContent-Length: {len(answer)}\r\n\r\n".encode() +
                              (b"" if self.command == "HEAD" else answer))
            elif kind == "reset_before":
                self.cut(reset=True)
            elif kind == "stall_before":
                self.stall()
            elif kind is None:
                super().run_wsgi()
            else:
                real, self.wfile = self.wfile, io.BytesIO()
                try:
                    super().run_wsgi()
                    answer = self.wfile.getvalue()
                finally:
                    self.wfile = real
                head, _, body = answer.partition(b"\r\n\r\n")
                if kind == "reset_after":
                    self.cut(reset=True)
                elif kind == "stall":
                    self.stall()
                elif kind == "truncate":
                    self.send_now(head + b"\r\n\r\n" + body[: len(body) // 2] if body else head[: len(head) // 2])
                    self.cut(reset=False)
                else:
                    lines = head.split(b"\r\n")
                    name, value = {"wrong_etag": (b"etag:", b'ETag: "0123456789abcdef0123456789abcdef"'),
                                   "wrong_range": (b"content-range:", b"Content-Range: bytes 0-0/1")}[kind]
                    lines = [value if line.lower().startswith(name) else line for line in lines]
                    self.send_now(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        except OSError:
            self.close_connection = True
        finally:
            self.rfile = self.connection_rfile
            faults.done()

    def setup(self):
        super().setup()
        self.connection_rfile = self.rfile


server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True, request_handler=Handler,
                     ssl_context=make_ssl_devcert(sys.argv[1], cn="localhost") if len(sys.argv) > 1 else None)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket("bucket", "us-east-1")
print(server.server_port, flush=True)
for line in sys.stdin:
    command, *arguments = line.split()
    if command == "fault":
        with faults.lock:
            faults.clear()
            faults.kind, faults.nth, faults.times = arguments[0], int(arguments[1]), int(arguments[2])
        answer = "ok"
    elif command == "clear":
        with faults.lock:
            faults.clear()
        answer = "ok"
    elif command == "count":
        answer = f"{faults.count} {faults.hits}"
    elif command == "peak":
        answer = str(faults.peak)
    elif command == "last":
        answer = faults.last
    elif command in ("uploads", "parts"):
        uploads = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets["bucket"].multiparts.values()
        answer = str(len(uploads) if command == "uploads" else sum(len(upload.parts) for upload in uploads))
    else:
        answer = "unknown command"
    print(answer, flush=True)
os._exit(0)
