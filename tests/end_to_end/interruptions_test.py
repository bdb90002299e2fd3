"""The running service, interrupted: asked to end in the middle of work, clients that die or give up. STUBS holds the generated Python."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import program

sys.path.insert(0, os.environ["STUBS"])
import numpy as np  # noqa: E402

import grpc_client_example as example  # noqa: E402

GRACE_S = 10  # What calls under way get when the service is asked to end (docs/flows.md).
SLACK_S = 20  # For a busy machine; what would not end by itself takes minutes.
AT_ONCE_S = GRACE_S - 1  # On a busy machine too; whoever waits for the calls under way takes the whole grace.
IDLE_S = 60  # After which an append that nobody feeds is given up.
TRANSPORTS = ([], ["--processes"])

# Plans an append and uploads a part of it, over and over; says so, and goes on until it is killed.
FEEDER = """
import sys, time
import grpc, numpy as np
from eduba.v1 import eduba_pb2 as pb, eduba_pb2_grpc as rpc
import grpc_client_example as example
channel, eduba = example.connect(sys.argv[1])
at = eduba.GetSession(pb.GetSessionRequest(name="s"), timeout=30).length
count = 20000
keys, values = np.ones((count, 2, 32), np.float32), np.ones((count, 2, 16), np.float32)
def feed(pieces):
    for i, piece in enumerate(pieces):
        if i == 2:
            print("feeding", flush=True)
        if i >= 2:
            time.sleep(3600)
        yield piece
if sys.argv[2] == "bulk":
    plan = eduba.PlanAppend(pb.PlanAppendRequest(session="s", at=at, count=count), timeout=60)
    owner = plan.extents[0].worker
    mine = [e for e in plan.extents if e.worker == owner]
    stub = rpc.PagesStub(grpc.insecure_channel(plan.workers[owner]))
    stub.Upload(feed(p for e in mine for p in
                     example.pieces(plan.append_id, at, e.first_position, e.first_position + e.count, keys, values)))
else:
    def messages():
        yield pb.AppendRequest(plan=pb.PlanAppendRequest(session="s", at=at, count=count))
        yield from feed(pb.AppendRequest(piece=p) for p in example.pieces(0, at, at, at + count, keys, values))
    eduba.Append(messages())
"""


class Interruptions(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.dir = pathlib.Path(folder.name)
        # Much work from small files: every row sees 60000 positions with 8 heads.
        for name, shape in (("k", (60000, 2, 64)), ("v", (60000, 2, 64)), ("q", (60000, 8, 64)), ("q1", (1, 8, 64))):
            np.lib.format.open_memmap(cls.dir / f"{name}.npy", "w+", np.float32, shape).flush()

    def fill(self, server, name="long"):
        server.run("session", "create", name, "--query-heads", 8, "--kv-heads", 2, "--head-dim", 64)
        server.run("session", "append", name, "--keys", self.dir / "k.npy", "--values", self.dir / "v.npy")

    def start(self, server, *arguments):
        """A client command in the background."""
        process = subprocess.Popen([program.EDUBA, *map(str, arguments), "--server", server.address], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.kill)
        return process

    def start_query(self, server):
        """One that takes minutes; returns once its rows are being answered, which its progress shows."""
        process = self.start(server, "session", "attend", "long", "--queries", self.dir / "q.npy", "--out", self.dir / "o.npy")
        self.assertRegex(process.stderr.readline(), r"attend: +\d+ %")
        return process

    def feed(self, server, kind):
        """A client in the middle of an append to `s`."""
        here = str(pathlib.Path(__file__).parent)
        feeder = subprocess.Popen([sys.executable, "-c", FEEDER, server.address, kind], stdout=subprocess.PIPE, text=True,
                                  stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": f"{os.environ['STUBS']}:{here}"})
        self.addCleanup(feeder.stdout.close)
        self.addCleanup(feeder.kill)
        self.assertEqual(feeder.stdout.readline(), "feeding\n")
        return feeder

    def expect_end(self, server, within_s, code=0):
        """Asks it to end, and measures."""
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(server.process.wait(60), code, server.messages())
        self.assertLess(time.monotonic() - started, within_s)

    def expect_failed(self, client):
        _, errors = client.communicate(timeout=30)
        self.assertEqual(client.returncode, 1, errors)
        self.assertRegex(errors.splitlines()[-1], r"\Aeduba: [^\n]+\Z")
        self.assertEqual([file.name for file in self.dir.iterdir() if file.name.startswith("o.npy")], [])

    def memory_used(self, server):
        return [worker["memory_used_bytes"] for worker in server.report("workers")["workers"]]

    def test_it_ends_within_its_grace_while_a_long_query_runs(self):
        for transport in TRANSPORTS:
            with self.subTest(transport), program.Server("--workers", 2, *transport) as server:
                self.fill(server)
                query = self.start_query(server)
                self.expect_end(server, GRACE_S + SLACK_S)
                self.expect_failed(query)

    def test_it_ends_at_once_while_an_append_is_fed(self):
        """Nobody could ever ask for what it would bring."""
        for transport in TRANSPORTS:
            for kind in ("bulk", "proxied"):
                with self.subTest(transport, kind=kind), program.Server("--workers", 2, *transport) as server:
                    example.create(example.connect(server.address)[1], "s")
                    feeder = self.feed(server, kind)
                    self.expect_end(server, GRACE_S + SLACK_S)
                    self.assertNotEqual(feeder.wait(30), 0)

    def test_asked_twice_it_ends_at_once(self):
        for transport in TRANSPORTS:
            with self.subTest(transport):
                server = program.Server("--workers", 2, *transport)
                self.addCleanup(server.log.close)
                self.addCleanup(server.process.stdout.close)
                children = program.children(server.process.pid)
                self.fill(server)
                query = self.start_query(server)
                server.process.send_signal(signal.SIGTERM)
                program.wait_until(lambda: "asked to end" in server.messages(), "the first signal was taken")
                self.expect_end(server, AT_ONCE_S, code=-signal.SIGTERM)
                program.wait_until(lambda: not any(map(program.alive, children)), "no process is left")
                self.expect_failed(query)

    def test_a_client_that_is_killed_in_an_append_leaves_nothing(self):
        """Pages that it had filled are given back: at once through the coordinator, which sees it go, and after the idle time where only the
        workers met it."""
        with program.Server("--workers", 2) as server:
            channel, eduba = example.connect(server.address)
            self.addCleanup(channel.close)
            session = example.create(eduba, "s")
            keys, values = np.ones((3000, 2, 32), np.float32), np.ones((3000, 2, 16), np.float32)
            example.append_bulk(eduba, "s", 0, keys, values)
            program.wait_until(lambda: min(self.memory_used(server)) > 0, "the append's memory is reported")
            used, before = self.memory_used(server), server.report("session", "list")
            queries = np.ones((2, 4, 32), np.float32)
            answer = [part.tobytes() for part in example.attend(eduba, session, queries)[:3]]
            for kind, timeout_s in (("proxied", 5), ("bulk", IDLE_S + 10)):
                feeder = self.feed(server, kind)
                program.wait_until(lambda: self.memory_used(server) != used, "the append has memory")
                feeder.kill()
                self.assertEqual(server.report("session", "list"), before)
                program.wait_until(lambda: self.memory_used(server) == used, f"its memory is given back ({kind})", timeout_s)
                self.assertEqual(server.report("session", "list"), before)
                self.assertEqual([part.tobytes() for part in example.attend(eduba, session, queries)[:3]], answer)
            self.assertIn("was idle for too long", server.messages())
            self.assertEqual(example.append_proxied(eduba, "s", 3000, keys, values).length, 6000)

    def test_a_deadline_ends_a_long_query_and_others_are_served_meanwhile_and_after(self):
        with program.Server("--workers", 2) as server:
            self.fill(server)
            small = ["session", "attend", "long", "--queries", self.dir / "q1.npy", "--out", self.dir / "small.npy"]
            answers = []
            other = threading.Thread(target=lambda: answers.extend(server.run(*small) for _ in range(3)))
            started = time.monotonic()
            query = self.start(server, "session", "attend", "long", "--queries", self.dir / "q.npy", "--out",
                               self.dir / "o.npy", "--timeout", 2)
            other.start()
            self.expect_failed(query)
            self.assertLess(time.monotonic() - started, 2 + SLACK_S)
            other.join()
            self.assertEqual(len(answers), 3)
            server.run(*small)

    def test_a_query_that_is_interrupted_leaves_no_file_and_no_work(self):
        with program.Server("--workers", 2) as server:
            self.fill(server)
            for asked in (signal.SIGINT, signal.SIGKILL):
                query = self.start_query(server)
                query.send_signal(asked)
                self.assertEqual(query.wait(10), -asked)
                self.assertEqual([file.name for file in self.dir.iterdir() if file.name.startswith("o.npy")], [])
            # Neither holds the service: what was left of them would take minutes.
            server.run("session", "attend", "long", "--queries", self.dir / "q1.npy", "--out", self.dir / "small.npy")
            self.expect_end(server, 5)


if __name__ == "__main__":
    unittest.main()
