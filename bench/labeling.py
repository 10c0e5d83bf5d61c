"""Fifty browsers submit rankings at once while the server is killed again and again; then every label is counted.

    python bench/labeling.py                  # SQLite and PostgreSQL, writes docs/labeling-load.md; twenty minutes
    python bench/labeling.py --rankings 2000 --kills 2 --only sqlite

A client is somebody at a browser: it asks for the next item, thinks (exponentially distributed), submits, and repeats the submit
under the same name until it is acknowledged, when the page would: after a second, then twice as long each time, half more or less
by chance. One submit in twenty is sent twice. The server is `accord label --accounts`, killed (kill -9) at random times and started
again on the same port.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs/labeling-load.md"
K = 4


def postgres(home):
    """A server of our own on a socket, in its usual settings (a commit is on the disk before it is acknowledged)."""
    binaries = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    if user:
        shutil.chown(home, "postgres")
    run = lambda *command: subprocess.run([*user, *map(str, command)], check=True, capture_output=True, cwd=home)
    run(binaries / "initdb", "-D", home / "data", "-A", "trust", "-U", "accord")
    run(binaries / "pg_ctl", "-D", home / "data", "-w", "-o", f"-k {home} -c listen_addresses=", "-l", home / "log", "start")
    return f"postgresql://accord@/postgres?host={home}", lambda: run(binaries / "pg_ctl", "-D", home / "data", "-m", "fast", "stop")


def start(url, port, folder):
    command = [sys.executable, "-m", "accord", "label", "--store", url, "--accounts", "--port", str(port), "--requests", "1000000"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    for line in server.stdout:
        if line.startswith("Rank at"):
            return server
    raise SystemExit(f"the server did not start: {server.poll()}")


async def browser(number, at, cookie, token, csrf, think, acknowledged, times, retries):
    luck = random.Random(number)
    headers = {"Origin": at, "X-CSRF-Token": csrf}

    async def ask(path, body=None):
        wait = 1.0
        while True:
            begun = time.perf_counter()
            try:
                response = await client.post(path, json=body)
                if response.status_code < 500:
                    assert response.status_code == 200, response.text
                    return response.json(), time.perf_counter() - begun
            except httpx.TransportError:
                pass
            retries.append(path)
            await asyncio.sleep(wait * luck.uniform(0.5, 1.5))  # as the page does
            wait = min(2 * wait, 30.0)

    async with httpx.AsyncClient(base_url=at, headers=headers, cookies={cookie: token}, timeout=30) as client:
        await asyncio.sleep(luck.uniform(0, think))
        while True:
            item = (await ask("/api/next"))[0]["item"]
            if item is None:
                return
            await asyncio.sleep(luck.expovariate(1 / think))
            ranks = [luck.choice([1, 2, 3, 4, "F"]) for _ in range(K)]
            body = {"request": f"{number}-{item['id']}-{luck.random()}".replace(".", "-"), "ranks": ranks, "seconds": 1.0}
            path = f"/api/items/{item['id']}/label"
            if luck.random() < 0.05:
                (first, took), (second, _) = await asyncio.gather(ask(path, body), ask(path, body))
                assert first["new"] + second["new"] <= 1
            else:
                _, took = await ask(path, body)
            times.append(took)
            acknowledged[number][item["id"]] = ranks


def measure(url, folder, arguments):
    from accord.data.records import Completion, Prompt
    from accord.feedback.store import QueueSettings, Store

    store = Store.open(url, QueueSettings(overlap=5, gold_share=0, repeat_share=0, lease=600))
    items = -(-arguments.rankings // 5)
    store.add_items(
        {
            f"p{i}": [Completion(Prompt(f"p{i}", f"Question {i}?"), f"Answer {k} to {i}. " * 10, True, k) for k in range(K)]
            for i in range(items)
        }
    )
    people = [store.people.add(f"labeler {n}", "labeler") for n in range(arguments.clients)]
    store.people.add("owner", "owner", "four small words here")
    cookie = f"accord_session_{store.id[:8]}"
    tokens = [store.people.log_in(p) for p in people]
    sessions = [store.people.session(t) for t in tokens]
    store.close()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server, at = start(url, port, folder), f"http://127.0.0.1:{port}"
    acknowledged, times, retries = [{} for _ in people], [], []

    async def everybody():
        nonlocal server
        labeling = [
            asyncio.create_task(browser(n, at, cookie, tokens[n], sessions[n].csrf, arguments.think, acknowledged, times, retries))
            for n in range(arguments.clients)
        ]
        luck, killed = random.Random(arguments.seed), 0
        marks = sorted(luck.uniform(0.03, 0.95) * arguments.rankings for _ in range(arguments.kills))
        while not all(task.done() for task in labeling):
            await asyncio.sleep(0.02)
            if killed < len(marks) and len(times) >= marks[killed]:
                server.kill()
                await asyncio.to_thread(server.wait)
                server, killed = await asyncio.to_thread(start, url, port, folder), killed + 1
        await asyncio.gather(*labeling)
        return killed

    begun = time.perf_counter()
    killed = asyncio.run(everybody())
    seconds = time.perf_counter() - begun
    server.send_signal(signal.SIGINT)
    server.wait()
    store = Store.open(url)
    kept, submitted = {}, Counter()
    for person in people:
        for given in store.history(person, limit=10**6):
            kept[person.name, given.id] = [["F" if r is None else r for r in given.label.ranks][k] for k in given.order]
    last = 0
    while rows := store.log(last):
        last = rows[-1]["id"]
        submitted.update(row["assignment"] for row in rows if row["what"] in ("submitted", "changed"))
    progress = store.progress()
    store.close()
    sent = {(person.name, key): ranks for person, mine in zip(people, acknowledged, strict=True) for key, ranks in mine.items()}
    ordered = sorted(times)
    return {
        "acknowledged": len(sent), "lost": len(sent.keys() - kept.keys()), "other": len(kept.keys() - sent.keys()), "changed": sum(kept[key] != ranks for key, ranks in sent.items() if key in kept),
        "doubled": sum(n != 1 for n in submitted.values()), "rankings": progress["rankings"], "complete": progress["complete"], "items": progress["items"], "kills": killed,
        "retries": len(retries), "rate": len(sent) / seconds, "p50": ordered[len(ordered) // 2], "p95": ordered[int(0.95 * len(ordered))], "p99": ordered[int(0.99 * len(ordered))],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rankings", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--think", type=float, default=1.0, help="mean seconds between an item and its submit [1]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    arguments = parser.parse_args()
    found = {}
    for kind in [arguments.only] if arguments.only else ["sqlite", "postgresql"]:
        folder = Path(tempfile.mkdtemp(prefix="accord-load-"))
        url, stop = (str(folder / "labels.db"), lambda: None) if kind == "sqlite" else postgres(folder)
        try:
            found[kind] = measure(url, "/tmp", arguments)
        finally:
            stop()
            shutil.rmtree(folder, ignore_errors=True)
        print(kind, found[kind], flush=True)
    wrong = [k for k, f in found.items() if f["lost"] or f["other"] or f["changed"] or f["doubled"] or f["rankings"] != f["acknowledged"]]
    if not arguments.only:
        ms = lambda x: f"{1000 * x:.0f} ms"
        lines = [
            "# Fifty people at once", "",
            f"`python bench/labeling.py`: {arguments.clients} clients on the server's own machine ({os.cpu_count()} cores, Python {platform.python_version()}), each asking for an item, thinking for {arguments.think:g} s on average "
            f"and submitting; one submit in twenty is sent twice; the server is killed (kill -9) {arguments.kills} times. A submit is repeated until it is acknowledged; times are of those that were answered.", "",
            "| | acknowledged | lost | doubled | not as sent | never sent | kills | repeats | rankings a second | submit p50 | p95 | p99 |", "|---|---|---|---|---|---|---|---|---|---|---|---|",
            *(f"| {k} | {f['acknowledged']} | {f['lost']} | {f['doubled']} | {f['changed']} | {f['other']} | {f['kills']} | {f['retries']} | {f['rate']:.0f} | {ms(f['p50'])} | {ms(f['p95'])} | {ms(f['p99'])} |" for k, f in found.items()), "",
        ]  # fmt: skip
        PAGE.write_text("\n".join(lines))
    raise SystemExit(f"labels were lost or doubled on {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
