"""mlx_lm server answers over HTTP on 127.0.0.1."""

import json
import sys
import time
import urllib.error
import urllib.request

import pytest

pytestmark = pytest.mark.stock

LIMIT = 90  # seconds until a server must have answered


@pytest.fixture
def serve(checkpoint, start, stop, free_ports, tmp_path):
    """name, flags -> (process, port, log file) of a started server; all are ended afterwards."""
    processes = []

    def begin(name, *flags):
        port, log = free_ports(1), tmp_path / "server.log"
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(checkpoint(name))]
        command += ["--host", "127.0.0.1", "--port", str(port), *flags]
        with open(log, "w") as stream:
            processes.append(start(command, stdout=stream, stderr=stream))
        return processes[-1], port, log

    yield begin
    for process in processes:
        stop(process)


def wait_for_status(server, wanted):
    """Poll /health until it answers with this HTTP status."""
    process, port, log = server
    deadline, status = time.monotonic() + LIMIT, None
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
            error.close()
        except OSError:
            status = None  # not listening yet
        if status == wanted:
            return
        time.sleep(0.1)
    raise AssertionError(f"/health gives {status}, not {wanted}:\n{log.read_text()[-3000:]}")


@pytest.mark.parametrize(
    ("name", "flags"),
    [("factored", ["--trust-remote-code"]), ("pivot", ["--trust-remote-code"]), ("dense", [])],
)
def test_server_completes_a_prompt_with_the_greedy_text(
    name, flags, serve, checkpoint, greedy, prompt, max_tokens
):
    server = serve(name, *flags)
    wait_for_status(server, 200)
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server[1]}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=LIMIT) as answer:
        completion = json.load(answer)
    assert completion["choices"][0]["text"] == greedy(checkpoint(name))
    assert completion["usage"]["completion_tokens"] == max_tokens


def test_server_without_trust_is_unhealthy_and_says_why(serve):
    server = serve("factored")
    wait_for_status(server, 503)
    assert "trust_remote_code=True" in server[2].read_text()
