"""A local HTTP server that serves a folder and, by a plan, drops connections, truncates, stalls or answers 503."""

import collections
import contextlib
import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(SimpleHTTPRequestHandler):
    """`drop`: no answer at all; `truncate`: half of the bytes announced; `short`: half of the bytes, announced as all;
    `stall`: half of the bytes, and then nothing; `flip`: a bit is wrong; a number: that status."""

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.asked[name] += 1
        faults = self.server.plan.get(name, [])
        fault = faults.pop(0) if faults else self.server.always.get(name)
        path = Path(self.directory, name)
        if fault is None:
            return super().do_GET()
        if fault == "drop":
            return self.connection.close()
        if fault.isdigit():
            return self.send_error(int(fault))
        content = path.read_bytes()
        half = len(content) // 2
        sent = {"flip": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]}.get(fault, content[:half])
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent if fault == "short" else content)))
        self.end_headers()
        self.wfile.write(sent)
        self.wfile.flush()
        if fault == "stall":
            self.server.released.wait()

    def log_message(self, *words):
        pass


@contextlib.contextmanager
def serve(folder):
    """The server, at `server.url`. `plan[file]` lists the faults of its next answers, `always[file]` that of all
    others; `asked` counts the requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    server.plan, server.always, server.asked = {}, {}, collections.Counter()
    server.released = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
