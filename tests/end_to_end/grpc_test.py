"""The wire as another language sees it: the guide's client, status codes, hostile messages. STUBS holds the generated Python."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import unittest

import program

sys.path.insert(0, os.environ["STUBS"])
import grpc  # noqa: E402
import numpy as np  # noqa: E402
from eduba.v1 import eduba_pb2 as pb  # noqa: E402
from eduba.v1 import eduba_pb2_grpc as rpc  # noqa: E402

import grpc_client_example as example  # noqa: E402

MEMORY_BYTES = 64 << 20


def peak_bytes(pid):
    """The most memory the process has had resident."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) << 10


class Guide(unittest.TestCase):
    def test_the_guide_quotes_the_example(self):
        source = (program.ROOT / "tests/end_to_end/grpc_client_example.py").read_text()
        parts = re.findall(r"^# \[\w+\]\n(.*?)^# \[end\]\n", source, re.S | re.M)
        quoted = re.findall(r"^```python\n(.*?)^```\n", (program.ROOT / "docs/grpc.md").read_text(), re.S | re.M)
        self.assertGreater(len(parts), 5)
        self.assertEqual(quoted, parts, "docs/grpc.md and the example differ: copy the example's parts into the guide")

    def test_the_example_runs(self):
        for arguments, said in (([], "no model here"), (["--processes"], "no model here"), (["--model", "nano"], "ok: model nano")):
            with program.Server("--workers", 2, *arguments) as server:
                result = subprocess.run([sys.executable, example.__file__, server.address], capture_output=True, text=True,
                                        env={**os.environ, "PYTHONPATH": os.environ["STUBS"]}, timeout=120)
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertIn("ok: relative error", result.stdout)
                self.assertIn("over 2 workers", result.stdout)
                self.assertIn(said, result.stdout)


class Wire(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = program.Server("--workers", 2, memory=MEMORY_BYTES)
        cls.addClassCleanup(cls.server.__exit__, None)
        cls.channel, cls.eduba = example.connect(cls.server.address)
        cls.addClassCleanup(cls.channel.close)
        random = np.random.default_rng(5)
        cls.keys = random.standard_normal((700, 2, 32), dtype=np.float32)
        cls.values = random.standard_normal((700, 2, 16), dtype=np.float32)
        cls.queries = random.standard_normal((3, 4, 32), dtype=np.float32)
        cls.session = example.create(cls.eduba, "s")
        example.create(cls.eduba, "empty")
        example.append_bulk(cls.eduba, "s", 0, cls.keys, cls.values)
        cls.before = cls.answer()

    @classmethod
    def answer(cls):
        outputs, lse, sink_mass, _ = example.attend(cls.eduba, cls.session, cls.queries)
        return outputs.tobytes(), lse.tobytes(), sink_mass.tobytes()

    def expect(self, code, call, naming=""):
        with self.assertRaises(grpc.RpcError) as raised:
            call()
        self.assertEqual(raised.exception.code(), code, raised.exception.details())
        self.assertIn(naming, raised.exception.details())
        self.assertEqual(self.answer(), self.before)
        self.assertTrue(example.is_serving(self.channel))

    def test_reflection_knows_the_services(self):
        self.assertEqual(example.services(self.channel), ["eduba.v1.Eduba", "grpc.health.v1.Health"])

    def test_every_mistake_has_its_code(self):
        bad = self.keys.copy()
        bad[5, 1, 7] = np.nan
        code = grpc.StatusCode
        huge = MEMORY_BYTES // 4
        for append in (example.append_bulk, example.append_proxied):
            with self.subTest(append.__name__):
                self.expect(code.INVALID_ARGUMENT, lambda: append(self.eduba, "empty", 0, bad, self.values), "keys")
                self.expect(code.NOT_FOUND, lambda: append(self.eduba, "nobody", 0, self.keys, self.values), "nobody")
                self.expect(code.OUT_OF_RANGE, lambda: append(self.eduba, "s", 701, self.keys, self.values), "700")
                self.expect(code.ALREADY_EXISTS, lambda: append(self.eduba, "s", 0, self.keys + 1, self.values))
        plan = lambda **args: lambda: self.eduba.PlanAppend(pb.PlanAppendRequest(session="empty", **args), timeout=30)
        self.expect(code.RESOURCE_EXHAUSTED, plan(count=huge), "memory")
        self.expect(code.INVALID_ARGUMENT, plan(count=0))
        self.expect(code.INVALID_ARGUMENT, plan(count=-1))
        self.expect(code.ALREADY_EXISTS, lambda: example.create(self.eduba, "s"))
        empty = self.eduba.GetSession(pb.GetSessionRequest(name="empty"), timeout=30)
        self.expect(code.FAILED_PRECONDITION, lambda: example.attend(self.eduba, empty, self.queries), "empty")
        self.expect(code.INVALID_ARGUMENT, lambda: example.attend(self.eduba, self.session, self.queries * np.float32(np.inf)))
        self.expect(code.INVALID_ARGUMENT, lambda: example.attend(self.eduba, self.session, self.queries[:, :3]))
        self.expect(code.NOT_FOUND, lambda: example.attend(self.eduba, pb.Session(name="nobody"), self.queries))

    def test_a_stream_without_a_header_is_refused(self):
        call = lambda kind, request: lambda: list(kind(iter([request]), timeout=30))
        self.expect(grpc.StatusCode.INVALID_ARGUMENT, call(self.eduba.Attend, pb.AttendRequest(rows=pb.AttendRequest.Rows())))
        self.expect(grpc.StatusCode.INVALID_ARGUMENT, lambda: self.eduba.Append(iter([pb.AppendRequest()]), timeout=30))

    def test_one_append_at_a_time_and_an_aborted_one_leaves_nothing(self):
        request = pb.PlanAppendRequest(session="empty", count=10)
        plan = self.eduba.PlanAppend(request, timeout=30)
        self.expect(grpc.StatusCode.ABORTED, lambda: self.eduba.PlanAppend(request, timeout=30))
        self.expect(grpc.StatusCode.FAILED_PRECONDITION,
                    lambda: self.eduba.CommitAppend(pb.CommitAppendRequest(append_id=plan.append_id), timeout=30))
        self.eduba.AbortAppend(pb.AbortAppendRequest(append_id=plan.append_id), timeout=30)
        self.expect(grpc.StatusCode.NOT_FOUND,
                    lambda: self.eduba.CommitAppend(pb.CommitAppendRequest(append_id=plan.append_id), timeout=30))
        plan = self.eduba.PlanAppend(request, timeout=30)
        self.eduba.AbortAppend(pb.AbortAppendRequest(append_id=plan.append_id), timeout=30)
        self.assertEqual(self.eduba.GetSession(pb.GetSessionRequest(name="empty"), timeout=30).length, 0)

    def test_a_broken_message_ends_its_stream_with_an_error(self):
        """Never with a short answer: what gRPC's own reader calls the end of the stream may be a message that it cannot decode."""
        attend = [pb.AttendRequest(header=pb.AttendRequest.Header(session="s")).SerializeToString()]
        attend += [pb.AttendRequest(rows=pb.AttendRequest.Rows(queries=self.queries.tobytes())).SerializeToString()] * 2
        plan = pb.PlanAppendRequest(session="empty", count=700)
        append = [pb.AppendRequest(plan=plan)]
        append += [pb.AppendRequest(piece=piece) for piece in example.pieces(0, 0, 0, 700, self.keys, self.values)]
        append = [message.SerializeToString() for message in append]
        identity = lambda data: data
        stub = lambda kind, name: kind(f"/eduba.v1.Eduba/{name}", request_serializer=identity, response_deserializer=identity)
        calls = [(attend, lambda messages: list(stub(self.channel.stream_stream, "Attend")(messages, timeout=30))),
                 (append, lambda messages: stub(self.channel.stream_unary, "Append")(messages, timeout=30))]
        for messages, call in calls:
            for at in range(len(messages) + 1):
                for broken in (b"\xff\xff\xff\xff", messages[-1][:-10], messages[0][:-1]):
                    with self.subTest(call=messages is attend, at=at, bytes=len(broken)):
                        self.expect(grpc.StatusCode.INVALID_ARGUMENT,
                                    lambda: call(iter(messages[:at] + [broken] + messages[at:])), "is not a whole")
        planned = self.eduba.PlanAppend(plan, timeout=30)
        pieces = [piece.SerializeToString() for piece in
                  example.pieces(planned.append_id, 0, 0, 256, self.keys, self.values)]
        with grpc.insecure_channel(planned.workers[planned.extents[0].worker]) as channel:
            upload = channel.stream_unary("/eduba.v1.Pages/Upload", request_serializer=identity, response_deserializer=identity)
            self.expect(grpc.StatusCode.INVALID_ARGUMENT, lambda: upload(iter(pieces + [pieces[0][:-10]]), timeout=30),
                        "is not a whole")
        self.eduba.AbortAppend(pb.AbortAppendRequest(append_id=planned.append_id), timeout=30)

    def test_a_broken_message_is_refused_by_name_whatever_the_method(self):
        identity = lambda data: data
        for method in pb.DESCRIPTOR.services_by_name["Eduba"].methods:
            kind = ("stream_" if method.client_streaming else "unary_") + ("stream" if method.server_streaming else "unary")
            stub = getattr(self.channel, kind)(f"/eduba.v1.Eduba/{method.name}", request_serializer=identity,
                                               response_deserializer=identity)

            def call():
                broken = b"\xff\xff\xff\xff"
                answer = stub(iter([broken]) if method.client_streaming else broken, timeout=30)
                return list(answer) if method.server_streaming else answer
            with self.subTest(method.name):
                self.expect(grpc.StatusCode.INVALID_ARGUMENT, call,
                            f"a message of 4 bytes is not a whole {method.input_type.full_name}: ")

    def test_a_call_without_a_message_is_refused(self):
        identity = lambda data: data
        for method in pb.DESCRIPTOR.services_by_name["Eduba"].methods:
            kind = self.channel.stream_stream if method.server_streaming else self.channel.stream_unary
            stub = kind(f"/eduba.v1.Eduba/{method.name}", request_serializer=identity, response_deserializer=identity)
            with self.subTest(method.name):
                self.expect(grpc.StatusCode.INVALID_ARGUMENT,
                            lambda: list(stub(iter([]), timeout=30)) if method.server_streaming else stub(iter([]), timeout=30),
                            "message")

    def test_an_overflowing_query_fails_alone_and_names_its_own_row(self):
        """Rows of calls that come together share steps; what overflows in one is no business of the others."""
        bad = np.concatenate([self.queries, np.full_like(self.queries, 3e38)])
        errors = []

        def ask_bad():
            for _ in range(10):
                try:
                    example.attend(self.eduba, self.session, bad)
                    errors.append("no error")
                except grpc.RpcError as error:
                    if error.code() != grpc.StatusCode.INVALID_ARGUMENT or "query row 3, head" not in error.details():
                        errors.append(error.details())

        def ask_good():
            for _ in range(20):
                try:
                    if self.answer() != self.before:
                        errors.append("other bits")
                except grpc.RpcError as error:
                    errors.append(error.details())
        threads = [threading.Thread(target=target) for target in (ask_good, ask_bad, ask_good, ask_bad)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])

    def test_a_pause_of_the_service_loses_nothing(self):
        """The pause is longer than a worker may be silent, but a paused process hears nobody: it proves no silence."""
        epoch = self.eduba.ListWorkers(pb.ListWorkersRequest(), timeout=30).epoch
        self.server.process.send_signal(signal.SIGSTOP)
        time.sleep(4)  # The pause itself: the service counts real time.
        self.server.process.send_signal(signal.SIGCONT)
        for _ in range(20):
            self.assertEqual(self.answer(), self.before)
        self.assertEqual(self.eduba.ListWorkers(pb.ListWorkersRequest(), timeout=30).epoch, epoch)

    def test_a_compressed_call_is_refused_by_name(self):
        gzip = {"compression": grpc.Compression.Gzip, "timeout": 30}
        header = pb.AttendRequest(header=pb.AttendRequest.Header(session="s"))
        rows = pb.AttendRequest(rows=pb.AttendRequest.Rows(queries=self.queries.tobytes()))
        planned = self.eduba.PlanAppend(pb.PlanAppendRequest(session="empty", count=700), timeout=30)
        piece = next(example.pieces(planned.append_id, 0, 0, 256, self.keys, self.values))
        with grpc.insecure_channel(planned.workers[planned.extents[0].worker]) as channel:
            for call in (lambda: self.eduba.GetSession(pb.GetSessionRequest(name="s" * 2000), **gzip),
                         lambda: list(self.eduba.Attend(iter([header, rows, rows]), **gzip)),
                         lambda: self.eduba.Append(iter([pb.AppendRequest(plan=pb.PlanAppendRequest(session="empty", count=1))]),
                                                   **gzip),
                         lambda: rpc.PagesStub(channel).Upload(iter([piece]), **gzip)):
                self.expect(grpc.StatusCode.UNIMPLEMENTED, call, "ompression algorithm 'gzip' is disabled")
        self.eduba.AbortAppend(pb.AbortAppendRequest(append_id=planned.append_id), timeout=30)

    def test_a_bomb_is_refused_without_being_unpacked(self):
        bomb = pb.CreateSessionRequest(name="bomb", spec=pb.SessionSpec(notes="0" * (512 << 20)))
        before = peak_bytes(self.server.process.pid)
        with self.assertRaises(grpc.RpcError) as raised:
            self.eduba.CreateSession(bomb, compression=grpc.Compression.Gzip, timeout=60)
        self.assertIn(raised.exception.code(), (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED))
        self.assertLess(peak_bytes(self.server.process.pid) - before, 64 << 20)
        self.assertEqual(self.answer(), self.before)

    def test_a_message_above_the_limit_is_refused(self):
        large = pb.CreateSessionRequest(name="large", spec=pb.SessionSpec(notes="0" * (16 << 20)))
        self.expect(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: self.eduba.CreateSession(large, timeout=60))

    def test_a_deadline_is_kept(self):
        def never_ending():
            yield pb.AttendRequest(header=pb.AttendRequest.Header(session="s"))
            self.addCleanup(done.set)
            done.wait(30)
        done = threading.Event()
        self.expect(grpc.StatusCode.DEADLINE_EXCEEDED, lambda: list(self.eduba.Attend(never_ending(), timeout=0.5)))


if __name__ == "__main__":
    unittest.main()
