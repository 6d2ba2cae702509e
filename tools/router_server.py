"""A process that speaks OpenAI's chat protocol and routes requests without a language model.

`python tools/router_server.py` prints its address, the `router_url` of `experiments/deployment`. It reads the effects
from the first message and the request from the second, as a language model would, and gives the entry that is most alike:
by TF-IDF, or by the cosine of sentence embeddings with `--embedding FOLDER`. `--faults` makes every seventh answer a 503,
every eleventh a refusal and every thirteenth prose, so that a client can be tried on all of them."""

import argparse
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from collectionlora.bases.endpoint import completion
from collectionlora.use.deployment import ByMeaning, ByWords, Request

ENTRY = re.compile(r'^([\w+-]+): (.*)$', re.M)


class Routes:
    "Routers by their list of effects, made once each."

    def __init__(self, embedding: str):
        self.embedding, self.made, self.lock = embedding, {}, threading.Lock()

    def answer(self, messages: list[dict]) -> str:
        "The JSON text of a route."
        listed, text = messages[0]['content'], messages[1]['content']  # what follows is talk about the form
        if not isinstance(text, str):
            text = ' '.join(p['text'] for p in text if p['type'] == 'text')
        with self.lock:
            if listed not in self.made:
                known = [dict(id=id, description=words) for id, words in ENTRY.findall(listed)]
                self.made[listed] = ByMeaning(known, self.embedding) if self.embedding else ByWords(known)
            return json.dumps(dict(effect=self.made[listed]([Request('', '', text)])[0]))


def faulty(n: int) -> tuple[int, dict] | None:
    "The fault of the n-th answer, counted from 1; None for most."
    if n % 7 == 0:
        return 503, dict(error=dict(message='busy'))
    if n % 11 == 0:
        return 200, completion('', refusal='I do not help with this.')
    return (200, completion('I would take the first one.')) if n % 13 == 0 else None


def handler_of(routes: Routes, name: str, faults: bool):
    "The class of HTTP handlers of a server."
    count = itertools.count(1)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            found = faulty(next(count)) if faults else None
            status, reply = found or (200, completion(routes.answer(body['messages']), name))
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument('--port', type=int, default=0, help='0: a free one')
    args.add_argument('--embedding', default='', help='folder of a sentence-transformers model')
    args.add_argument('--faults', action='store_true')
    args = args.parse_args()
    name = 'embeddings' if args.embedding else 'TF-IDF'
    made = handler_of(Routes(args.embedding), name, args.faults)
    server = ThreadingHTTPServer(('127.0.0.1', args.port), made)
    print(f'http://127.0.0.1:{server.server_port}/v1', flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == '__main__':
    main()
