"""A reward model of your own, served by slime's HTTP contract: ``python examples/reward_server_http.py 8000``.

In the run's configuration: [reward] scorer = "remote", and [reward.remote] urls = "http://127.0.0.1:8000/reward"; from
slime: --rm-type remote_rm --rm-url http://127.0.0.1:8000/reward.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def reward(_prompt: str | list[dict[str, str]], response: str, label: str | None) -> float:
    """Put your model here. This one likes responses as long as the label; what it cannot score, it raises."""
    if not label:
        raise ValueError("the prompt has no label")
    return 1 / (1 + abs(len(response) - len(label)))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            self._answer(200, {"score": reward(asked["prompt"], asked["response"], asked["label"])})
        except ValueError as why:  # never a made-up number: after some attempts the sample becomes a dead letter
            self._answer(422, {"detail": str(why)})

    def _answer(self, status: int, body: dict[str, object]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
