"""A demo that answers on a free port, in a thread of the test's own process."""

import http.client
import json
import threading
from contextlib import contextmanager

from lightning_igpt.commands.demo import listening, make_app, make_server


@contextmanager
def serving(*studios, host="127.0.0.1"):
    """The port of a server in front of studios."""
    with listening(host, 0) as listener:
        server = make_server(make_app(studios, host))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def request(port, method, path, body=None, **headers):
    """Status, headers and content of an answer; ``content_type`` and the like become header names."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def ask(port, path, **values):
    """The lines of JSON of an answer to a JSON object."""
    body = json.dumps(values)
    status, _, content = request(port, "POST", path, body, content_type="application/json")
    return status, [json.loads(line) for line in content.splitlines()]
