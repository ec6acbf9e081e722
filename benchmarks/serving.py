"""Load on a server: many clients with mixed layouts, beside `Pipeline.stream` on the same pictures.

    python -m benchmarks.serving --clients 64 --seconds 180

A server in a process of its own draws for clients that each ask for one picture after another. Then this process draws
the same pictures with `Pipeline.stream`, and compares every one. Last, one client asks as live mode does.
"""

import argparse
import collections
import http.client
import io
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import tables
from benchmarks.tables import Column
from docs.make_screenshots import studio
from instdiff_jax.cli.box import default_checkpoint, default_layouts
from instdiff_jax.errors import ArgumentParser, exit_on_input_error
from instdiff_jax.layout import Layout
from instdiff_jax.serving.answers import LIVE

LIVE_REQUESTS = 40


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=default_checkpoint())
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--output", type=Path, default=tables.RESULTS, help="folder for the tables")
    return parser.parse_args(argv)


class Client(threading.Thread):
    """Asks for pictures one after another, each of another layout and seed, until it is late."""

    def __init__(self, port: int, number: int, layouts: Sequence[Layout], until: float):
        super().__init__(daemon=True)
        self.pictures: list[tuple[int, int, bytes]] = []  # layout, seed, PNG
        self.seconds: list[float] = []
        self.errors: collections.Counter[int] = collections.Counter()
        self._port, self._number, self._layouts, self._until = port, number, layouts, until

    def run(self) -> None:
        connection = http.client.HTTPConnection("localhost", self._port, timeout=300)
        for turn in itertools.count():
            if time.time() > self._until:
                return
            index, seed = (self._number + turn) % len(self._layouts), 1000 * self._number + turn
            began = time.perf_counter()
            status, png = ask(connection, {"layout": self._layouts[index].to_dict(), "seeds": [seed]})
            self.seconds.append(time.perf_counter() - began)
            if status == 200:
                self.pictures.append((index, seed, png))
            else:
                self.errors[status] += 1


def ask(connection: http.client.HTTPConnection, body: dict[str, Any]) -> tuple[int, bytes]:
    """The status and the PNG of one request."""
    text = json.dumps(body | {"response": "png"})
    connection.request("POST", "/v1/images", text, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def get(connection: http.client.HTTPConnection, path: str) -> tuple[int, str]:
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def resident(port: int) -> float:
    """The server's resident memory in GB, from its metrics' process."""
    inode = next(
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}")
    )
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(f"socket:[{inode}]" == str(link.readlink()) for link in (process / "fd").iterdir()):
                pages = int((process / "statm").read_text().split()[1])
                return pages * 4096 / 1e9
        except OSError:
            continue
    return float("nan")


def load(port: int, layouts: Sequence[Layout], clients: int, seconds: float) -> tuple[list[Client], dict[str, float]]:
    """Runs the clients; the first tenth of the time is not counted, as the compiler works then."""
    connection = http.client.HTTPConnection("localhost", port, timeout=600)
    while get(connection, "/readyz")[0] != 200:
        time.sleep(0.2)
    warm = [Client(port, number, layouts, time.time() + seconds / 10) for number in range(clients)]
    run_all(warm)
    began = time.perf_counter()
    asked = [Client(port, clients + number, layouts, time.time() + seconds) for number in range(clients)]
    for client in asked:
        client.start()
    time.sleep(seconds / 3)
    early = resident(port)
    for client in asked:
        client.join()
    wall = time.perf_counter() - began
    return asked, dict(wall=wall, early_memory=early, late_memory=resident(port))


def run_all(clients: Sequence[Client]) -> None:
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def live(port: int, layout: Layout) -> float:
    """The median time of a request as live mode makes it, in seconds."""
    connection, seconds = http.client.HTTPConnection("localhost", port, timeout=300), []
    values = layout.to_dict()
    for turn in range(LIVE_REQUESTS):
        values["annos"][0]["bbox"][0] += 0.1
        began = time.perf_counter()
        status, _ = ask(connection, {"layout": values, **LIVE, "live": "drag"})
        assert status == 200
        if turn >= LIVE_REQUESTS // 4:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def stream(checkpoint: Path, layouts: Sequence[Layout], asked: Sequence[tuple[int, int, bytes]]) -> dict[str, Any]:
    """Draws the same pictures offline; returns images a second, and how the served ones differ.

    The first half is not timed, as the compiler works then.
    """
    from instdiff_jax import Pipeline

    pipeline = Pipeline.from_checkpoint(checkpoint)
    results: list[Any] = []
    half, began = len(asked) // 2, time.perf_counter()
    chosen, seeds = [layouts[index] for index, _, _ in asked], [seed for _, seed, _ in asked]
    for result in pipeline.stream(chosen, layout_seeds=seeds):
        if len(results) == half:
            began = time.perf_counter()
        results.append(result)
    wall, worst, different = time.perf_counter() - began, 0, 0
    for result, (_, _, png) in zip(results, asked, strict=True):
        found = np.asarray(Image.open(io.BytesIO(png))).astype(int)
        difference = int(np.abs(found - result.array).max())
        worst, different = max(worst, difference), different + (difference > 1)
    return dict(stream_rate=(len(asked) - half) / wall, worst=worst, different=different)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    layouts = [Layout.from_json(path) for path in sorted(default_layouts().glob("*.json"))]
    with studio("--checkpoint", str(args.checkpoint), "--max_waiting", str(4 * args.clients)) as url:
        port = int(url.rstrip("/").rpartition(":")[2])
        clients, facts = load(port, layouts, args.clients, args.seconds)
        facts["live"] = live(port, Layout.from_json(default_layouts() / "boxes_pair.json"))
    pictures = [picture for client in clients for picture in client.pictures]
    seconds = sorted(second for client in clients for second in client.seconds)
    row: dict[str, Any] = {
        "clients": args.clients,
        "images": len(pictures),
        "errors": sum(sum(client.errors.values()) for client in clients),
        "rate": len(pictures) / facts["wall"],
        "p50": seconds[len(seconds) // 2],
        "p95": seconds[int(0.95 * len(seconds))],
        **facts,
        **stream(args.checkpoint, layouts, pictures),
    }
    row["share"] = row["rate"] / row["stream_rate"]
    columns = [
        Column("clients", "clients", "d"),
        Column("images", "pictures", "d"),
        Column("errors", "errors", "d"),
        Column("rate", "pictures/s", ".2f"),
        Column("stream_rate", "stream: pictures/s", ".2f"),
        Column("share", "share of stream", ".2f"),
        Column("p50", "p50 s", ".2f"),
        Column("p95", "p95 s", ".2f"),
        Column("early_memory", "GB after a third", ".2f"),
        Column("late_memory", "GB at the end", ".2f"),
        Column("different", "other pictures", "d"),
        Column("worst", "most of 255 levels", "d"),
        Column("live", "live: median s", ".3f"),
    ]
    notes = ["A picture is another one if it differs from stream's by more than one level."]
    tables.write_table(args.output, "serving", "Serving", columns, [row], notes)


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
