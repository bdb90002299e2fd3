"""The program itself: usage, exit codes, starting and ending, processes that come and go."""

import concurrent.futures
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import tempfile
import unittest

import numpy as np

import program

SHAPE = ["--query-heads", 2, "--kv-heads", 1, "--head-dim", 16]


class Usage(unittest.TestCase):
    def explain(self, *command):
        """Visits the command and all below it; returns those that do something, and are not only a group of others."""
        result = program.eduba(*command, "--help")
        self.assertEqual((result.returncode, result.stderr), (0, ""), command)
        self.assertIn(f"Usage: {' '.join(['eduba', *command])}", result.stdout)
        below = re.findall(r"^  (\w+) ", result.stdout.partition("\nSubcommands:\n")[2], re.M)
        if not below:
            self.assertIn("\n  --json ", result.stdout, f"{command} has no --json")
            return [" ".join(command)]
        return [leaf for name in below for leaf in self.explain(*command, name)]

    def test_every_command_explains_itself_and_takes_json(self):
        commands = self.explain()
        self.assertLessEqual({"up", "coordinator", "worker", "workers", "doctor", "version", "session create", "session append",
                              "session attend", "session show", "session list", "session delete", "session fork", "atlas load",
                              "atlas annotate", "bench stream", "bench attend", "bench merge", "bench append", "generate",
                              "score", "embed", "model show"}, set(commands))

    def test_servers_say_in_json_too_that_they_are_ready_and_nothing_else(self):
        def start(*arguments):
            process = subprocess.Popen([program.EDUBA, *arguments, "--listen", "127.0.0.1:0", "--json"], text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self.addCleanup(process.stdout.close)
            self.addCleanup(process.kill)
            ready = json.loads(process.stdout.readline())
            self.assertEqual(set(ready), {"event", "address"})
            self.assertEqual(ready["event"], "ready")
            self.assertRegex(ready["address"], r"\A127\.0\.0\.1:[1-9]\d*\Z")
            return process, ready["address"]
        memory = ["--memory-bytes", "8MiB"]
        coordinator, address = start("coordinator", "--group-size", "1")
        worker, _ = start("worker", "--coordinator", address, *memory)
        started = [worker, coordinator, start("up", *memory)[0], start("up", "--processes", "--workers", "1", *memory)[0]]
        for process in started:
            process.terminate()
            self.assertEqual(process.wait(30), 0)
            self.assertEqual(process.stdout.read(), "")

    def test_errors_are_one_line_on_stderr_with_json_too(self):
        for line, code in (("up --workers 0", 2), ("up --listen nonsense", 1), ("coordinator --group-size 1 --listen nonsense", 1),
                           ("worker --coordinator nonsense --listen 127.0.0.1:0", 1), ("session list --server nonsense", 1),
                           ("session show", 2)):
            with self.subTest(line):
                result = program.eduba(*line.split(), "--json")
                self.assertEqual((result.returncode, result.stdout), (code, ""), result)
                self.assertRegex(result.stderr, r"\Aeduba: [^\n]+\n\Z")

    def test_bad_usage_is_exit_code_2_and_one_line(self):
        create = "session create x --query-heads 1 --kv-heads 1 --head-dim 4"
        for line, naming in (("", "subcommand"), ("frobnicate", "frobnicate"), ("session", "subcommand"),
                             ("session frob", "frob"), ("session list --frob", "--frob"), ("session create", "NAME"),
                             ("session create x --kv-heads 1 --head-dim 4", "--query-heads"), (f"{create} --dtype f64", "f64"),
                             ("session create x --head-dim many", "many"), (f"{create} y", "y"), ("session append x --keys", "--keys"),
                             ("session attend x --queries q --out o --policy some", "some"), ("up --workers 0", "--workers"),
                             ("up --workers 65", "--workers"), ("up --memory-bytes lots", "lots"),
                             ("up --memory-bytes -5", "-5"), ("up --transport gloo", "--processes"), ("coordinator --listen 127.0.0.1:0", "--group-size"),
                             ("worker --listen 127.0.0.1:0", "--coordinator"), ("session list --timeout 0", "--timeout")):
            with self.subTest(line):
                result = program.eduba(*line.split())
                self.assertEqual(result.returncode, 2, result)
                self.assertEqual(result.stdout, "")
                self.assertRegex(result.stderr, r"\Aeduba: [^\n]+; see 'eduba [a-z ]*--help'\n\Z")
                self.assertIn(naming, result.stderr)

    def test_no_server_is_said_so(self):
        with socket.socket() as held:  # Bound but not listening: nobody else gets the port.
            held.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{held.getsockname()[1]}"
            for arguments in (["workers"], ["session", "list"], ["session", "create", "x", *SHAPE]):
                result = program.eduba(*arguments, server=address)
                self.assertEqual(result.returncode, 1)
                self.assertRegex(result.stderr, rf"\Aeduba: [^\n]*no server answers at {address}[^\n]*\n\Z")
        for address in ("nonsense", "127.0.0.1:x"):
            self.assertEqual(program.eduba("up", "--listen", address).returncode, 1)

    def test_version_and_doctor_report(self):
        self.assertRegex(program.eduba("version").stdout, r"\Aeduba \d+\.\d+\.\d+\n\Z")
        self.assertIn("grpc", json.loads(program.eduba("version", "--json").stdout)["libraries"])
        self.assertIn("cpu/", program.eduba("doctor", "--timeout", 1).stdout)
        with program.Server() as server:
            findings = server.report("doctor")
            self.assertEqual(findings["server"]["state"], "ok")
            self.assertIn("CUDA", findings["cuda"]["text"])  # Built or not, here or not: it says which.
            for library in ("nccl", "cublaslt"):
                self.assertRegex(findings[library]["text"], "^(version |not used: )|; install ")

    def test_what_keeps_it_from_starting_is_one_line_with_processes_too(self):
        with tempfile.TemporaryDirectory() as folder:
            locked, file, model = (pathlib.Path(folder) / name for name in ("data", "file", "model"))
            file.write_bytes(b"")
            model.mkdir()
            with program.Server("--workers", 1, "--data-dir", locked) as server:
                for arguments, naming in ((["--data-dir", locked], "another coordinator uses it"),
                                          (["--data-dir", file], f"data folder {file} cannot be created"),
                                          (["--listen", server.address], "the port is taken"),
                                          (["--model", model], f"{model}/config.json")):
                    for extra in ([], ["--processes"]):
                        with self.subTest(naming, extra=extra):
                            listen = [] if "--listen" in arguments else ["--listen", "127.0.0.1:0"]
                            result = program.eduba("up", "--workers", 1, "--memory-bytes", "8MiB", *listen, *extra, *arguments)
                            self.assertEqual((result.returncode, result.stdout), (1, ""), result)
                            self.assertRegex(result.stderr, r"\Aeduba: up: [^\n]+\n\Z")
                            self.assertIn(naming, result.stderr)


class Life(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.dir = pathlib.Path(folder.name)
        random = np.random.default_rng(3)
        for name, shape in (("k", (5000, 1, 16)), ("v", (5000, 1, 16)), ("q", (4, 2, 16))):
            np.save(self.dir / f"{name}.npy", random.standard_normal(shape, dtype=np.float32))

    def fill(self, server):
        server.run("session", "create", "s", *SHAPE, "--stripe-pages", 1)
        server.run("session", "append", "s", "--keys", self.dir / "k.npy", "--values", self.dir / "v.npy")

    def attend(self, server):
        return program.eduba("session", "attend", "s", "--queries", self.dir / "q.npy", "--out", self.dir / "o.npy",
                             "--timeout", 20, server=server.address)

    def test_sessions_can_be_listed_shown_and_deleted(self):
        with program.Server() as server:
            self.assertEqual(server.report("session", "list"), [])
            self.fill(server)
            created = server.report("session", "create", "another", *SHAPE, "--sink-logit", "-2.5", "--dtype", "bf16")
            self.assertEqual(created, server.report("session", "show", "another"))
            self.assertEqual([s["name"] for s in server.report("session", "list")], ["another", "s"])
            shown = server.report("session", "show", "s")
            self.assertEqual((shown["length"], shown["bytes"], shown["scale"]), (5000, 5000 * 2 * 16 * 4, 0.25))
            self.assertEqual(server.report("session", "show", "another")["sink_logits"], [-2.5, -2.5])
            self.assertIn("5000 positions", server.run("session", "show", "s"))
            self.assertEqual(server.report("session", "delete", "s"), {"deleted": "s"})
            self.assertEqual([s["name"] for s in server.report("session", "list")], ["another"])
            program.wait_until(lambda: all(w["memory_used_bytes"] == 0 for w in server.report("workers")["workers"]),
                               "the deleted session's memory is free")

    def test_memory_is_given_in_units_and_split_over_the_workers(self):
        for transport in ([], ["--processes"]):
            with program.Server("--workers", 3, *transport, memory="1.5GiB") as server:
                self.assertEqual([w["memory_bytes"] for w in server.report("workers")["workers"]], [512 << 20] * 3)

    def test_sigint_ends_it_too(self):
        with program.Server() as server:
            server.process.send_signal(signal.SIGINT)
            self.assertEqual(server.process.wait(30), 0)

    def test_what_is_under_way_when_it_is_asked_to_end_may_finish(self):
        """Many clients at once, SIGTERM among them: each gets its whole answer or an error, and the server ends well."""
        queries = np.random.default_rng(4).standard_normal((3000, 2, 16), dtype=np.float32)
        np.save(self.dir / "q.npy", queries)
        with program.Server() as server:
            self.fill(server)
            self.assertEqual(self.attend(server).returncode, 0)
            want = (self.dir / "o.npy").read_bytes()
            def ask(i):
                out = self.dir / f"o{i}.npy"
                result = program.eduba("session", "attend", "s", "--queries", self.dir / "q.npy", "--out", out,
                                       server=server.address)
                return result, out.read_bytes() if out.exists() else None
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                answers = [pool.submit(ask, i) for i in range(8)]
                next(concurrent.futures.as_completed(answers))
                self.assertEqual(server.stop(), 0)
            for answer in answers:
                result, content = answer.result()
                if result.returncode == 0:
                    self.assertTrue(content == want)
                else:
                    self.assertEqual((result.returncode, content), (1, None))
                    self.assertRegex(result.stderr, r"\Aeduba: [^\n]+\n\Z")

    def test_a_killed_worker_is_reported_and_never_gives_a_wrong_answer(self):
        with program.Server("--processes", "--workers", 2) as server:
            self.fill(server)
            self.assertEqual(self.attend(server).returncode, 0)
            victim = program.children(server.process.pid)[-1]
            os.kill(victim, signal.SIGKILL)
            result = self.attend(server)
            self.assertEqual(result.returncode, 1)
            self.assertRegex(result.stderr, r"\Aeduba: session attend: [^\n]+\n\Z")
            program.wait_until(lambda: f"(process {victim}) ended: signal 9" in server.messages(), "the report")
            self.assertIn("it is started again", server.messages())
            # It comes back and holds nothing; what was lost is said to be lost.
            program.wait_until(lambda: server.report("workers")["state"] == "active", "a new group")
            self.assertTrue(server.report("session", "show", "s")["lost"])
            result = self.attend(server)
            self.assertEqual(result.returncode, 1)
            self.assertIn("delete", result.stderr)
            server.run("session", "delete", "s")
            self.fill(server)
            self.assertEqual(self.attend(server).returncode, 0)

    def test_with_a_data_dir_any_process_may_be_killed(self):
        with program.Server("--processes", "--workers", 2, "--data-dir", self.dir / "data") as server:
            self.fill(server)
            self.assertEqual(self.attend(server).returncode, 0)
            want = (self.dir / "o.npy").read_bytes()
            for index in range(3):  # The coordinator, and each worker.
                (self.dir / "o.npy").unlink()
                victim = program.children(server.process.pid)[index]
                os.kill(victim, signal.SIGKILL)
                program.wait_until(lambda: f"(process {victim}) ended: signal 9" in server.messages(), "the report")
                program.wait_until(lambda: self.attend(server).returncode == 0, "an answer")
                self.assertEqual((self.dir / "o.npy").read_bytes(), want)

    def test_its_processes_end_with_it_however_it_ends(self):
        server = program.Server("--processes", "--workers", 2)
        children = program.children(server.process.pid)
        self.assertEqual(len(children), 3)
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()
        program.wait_until(lambda: not any(map(program.alive, children)), "children end after SIGKILL of their parent")
        server.log.close()

    def test_a_dead_coordinator_is_started_again_at_its_address(self):
        with program.Server("--processes", "--workers", 1) as server:
            self.fill(server)
            os.kill(program.children(server.process.pid)[0], signal.SIGKILL)
            program.wait_until(lambda: "the coordinator (process" in server.messages(), "the report")
            program.wait_until(lambda: server.report("workers")["state"] == "active", "a new group")
            self.fill(server)  # Its records were in memory, so the session is gone.
            self.assertEqual(self.attend(server).returncode, 0)

    def test_a_data_dir_keeps_the_sessions(self):
        data = ["--data-dir", self.dir / "data"]
        with program.Server(*data) as server:
            self.fill(server)
            server.run("session", "create", "kept", *SHAPE)
            self.assertEqual(self.attend(server).returncode, 0)
            want = (self.dir / "o.npy").read_bytes()
        with program.Server(*data, "--model", "nano") as server:  # A model changes nothing of what is there.
            lost = {s["name"]: s["lost"] for s in server.report("session", "list")}
            self.assertEqual(lost, {"kept": False, "s": False})
            self.assertEqual(self.attend(server).returncode, 0)
            self.assertEqual((self.dir / "o.npy").read_bytes(), want)
            for path in (self.dir / "data").rglob("*"):
                self.assertEqual(path.stat().st_mode & 0o077, 0, path)

    def test_benchmarks_report(self):
        merge = json.loads(program.eduba("bench", "merge", "--rounds", 20, "--json").stdout)
        self.assertEqual({m["transport"] for m in merge}, {"local", "gloo"})
        stream = json.loads(program.eduba("bench", "stream", "--bytes", "16MiB", "--rounds", 1, "--json").stdout)
        self.assertGreater(stream["gb_per_s"], 0)
        attend = json.loads(program.eduba("bench", "attend", "--bytes", "16MiB", "--rounds", 1, "--json").stdout)
        self.assertEqual({(a["head_dim"], a["queries_per_kv_head"]) for a in attend if a["query_rows"] == 1},
                         {(dim, queries) for dim in (64, 128) for queries in (1, 4, 8)})
        for result in attend:
            self.assertLessEqual({"dtype", "bytes", "seconds", "gb_per_s", "stream_gb_per_s", "share"}, set(result))
        append = json.loads(program.eduba("bench", "append", "--bytes", "16MiB", "--rounds", 2, "--json").stdout)
        self.assertGreater(append["append_gb_per_s"], 0)
        self.assertAlmostEqual(append["share"], append["append_gb_per_s"] / append["stream_gb_per_s"])


if __name__ == "__main__":
    unittest.main()
