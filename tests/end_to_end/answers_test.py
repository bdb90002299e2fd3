"""Answers of the real program: right, and the same bytes however they are computed."""

import concurrent.futures
import pathlib
import tempfile
import unittest

import numpy as np

import program

TOKENS = 12000
HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 8, 2, 64, 24
SINKS, WINDOW, ROWS = 5, 3000, 120
ERROR_MAX = 3e-6
SHAPE = ["--query-heads", HEADS, "--kv-heads", KV_HEADS, "--head-dim", HEAD_DIM, "--value-dim", VALUE_DIM,
         "--sink-tokens", SINKS, "--window", WINDOW]

# What is asked of every session: name -> extra arguments of `session attend`.
QUESTIONS = {
    "all": [],
    "causal": ["--positions", "p.npy"],
    "window": ["--policy", "window"],
    "causal-window": ["--policy", "window", "--positions", "p.npy"],
}


class Answers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.dir = pathlib.Path(cls.folder.name)
        random = np.random.default_rng(20240)
        cls.keys = random.standard_normal((TOKENS, KV_HEADS, HEAD_DIM), dtype=np.float32)
        cls.values = random.standard_normal((TOKENS, KV_HEADS, VALUE_DIM), dtype=np.float32)
        cls.queries = 2 * random.standard_normal((ROWS, HEADS, HEAD_DIM), dtype=np.float32)
        # Early and late positions, the sinks themselves, both ends of the sequence.
        cls.positions = random.integers(0, TOKENS, ROWS)
        cls.positions[:8] = [0, 1, SINKS - 1, SINKS, WINDOW, WINDOW + SINKS, TOKENS - 2, TOKENS - 1]
        np.save(cls.dir / "k.npy", cls.keys)
        np.save(cls.dir / "v.npy", cls.values)
        np.save(cls.dir / "q.npy", cls.queries)
        np.save(cls.dir / "p.npy", cls.positions)
        # Chunks of every kind: one token, around a page, many pages.
        cuts = [0, 1, 3, 7, 255, 256, 300, 1024, 9000, 9001, TOKENS]
        cls.chunks = []
        for i, (first, last) in enumerate(zip(cuts, cuts[1:])):
            np.save(cls.dir / f"k{i}.npy", cls.keys[first:last])
            np.save(cls.dir / f"v{i}.npy", cls.values[first:last])
            cls.chunks.append((first, f"k{i}.npy", f"v{i}.npy"))

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def path(self, name):
        return str(self.dir / name)

    def fill(self, server, name, *, create=(), chunked=False, proxied=False, keys="k.npy", values="v.npy"):
        server.run("session", "create", name, *SHAPE, *create)
        extra = ["--proxied"] if proxied else []
        if not chunked:
            return server.report("session", "append", name, "--keys", self.path(keys), "--values", self.path(values), *extra)
        for first, k, v in self.chunks:
            server.run("session", "append", name, "--keys", self.path(k), "--values", self.path(v), "--at", first, *extra)
        return None

    def ask(self, server, name, question, queries="q.npy", positions="p.npy", suffix="x"):
        """The three answers' files as bytes, and the report."""
        out, lse, mass = (self.path(f"{kind}-{suffix}.npy") for kind in ("o", "l", "m"))
        arguments = [self.path(positions) if a == "p.npy" else a for a in QUESTIONS[question]]
        report = server.report("session", "attend", name, "--queries", self.path(queries), "--out", out, "--lse", lse,
                               "--sink-mass", mass, *arguments)
        return tuple(pathlib.Path(p).read_bytes() for p in (out, lse, mass)), report

    def load(self, suffix="x"):
        return tuple(np.load(self.path(f"{kind}-{suffix}.npy")) for kind in ("o", "l", "m"))

    def expect_right(self, dtype, question, sink_logits=None, softcap=0.0, scale=HEAD_DIM ** -0.5):
        limits = self.positions if "--positions" in QUESTIONS[question] else np.full(ROWS, TOKENS - 1)
        policy = "window" if "window" in QUESTIONS[question] else "global"
        seen = program.visible(TOKENS, limits, policy, SINKS, WINDOW)
        want = program.oracle(program.ROUND[dtype](self.keys), program.ROUND[dtype](self.values), self.queries, seen,
                              scale, SINKS, sink_logits, softcap)
        outputs, lse, mass = self.load()
        self.assertEqual(outputs.shape, (ROWS, HEADS, VALUE_DIM))
        self.assertEqual(outputs.dtype, np.float32)
        self.assertLess(program.relative_error(outputs, want[0]), ERROR_MAX, (dtype, question))
        self.assertLess(np.abs(lse - want[1]).max(), 2e-5, (dtype, question))
        self.assertLess(np.abs(mass - want[2]).max(), 1e-5, (dtype, question))

    def test_answers_are_right_for_every_type_and_policy(self):
        with program.Server("--workers", 2) as server:
            for dtype in ("f32", "bf16", "f16"):
                self.fill(server, dtype, create=["--dtype", dtype, "--stripe-pages", 3])
                for question in QUESTIONS:
                    _, report = self.ask(server, dtype, question)
                    self.expect_right(dtype, question)
                    self.assertEqual(report["rows"], ROWS)
                    self.assertEqual(report["workers"], 2)
                    self.assertEqual(report["path"]["sink"] + report["path"]["max"], ROWS * HEADS)
                    self.assertGreater(report["bytes_read"], 0)
                    self.assertGreaterEqual(report["collectives"], 1)

    def test_learned_sinks_softcap_and_scale_are_in_the_answer(self):
        sink_logits = [1.5, -2, 0, 9, -30, 4, 2, 30]
        create = ["--sink-logit", ",".join(map(str, sink_logits)), "--softcap", 20, "--scale", 0.2]
        with program.Server("--workers", 2) as server:
            self.fill(server, "s", create=create)
            for question in QUESTIONS:
                _, report = self.ask(server, "s", question)
                self.expect_right("f32", question, sink_logits, 20.0, 0.2)
                # Sinks of every strength: both paths are taken.
                self.assertGreater(report["path"]["sink"], 0)
                self.assertGreater(report["path"]["max"], 0)

    def test_answers_do_not_depend_on_how_they_are_computed(self):
        create = ["--dtype", "bf16", "--sink-logit", "2"]
        with program.Server("--workers", 1) as server:
            receipt = self.fill(server, "s", create=create)
            want = {question: self.ask(server, "s", question)[0] for question in QUESTIONS}
            self.assertEqual({q: self.ask(server, "s", q)[0] for q in QUESTIONS}, want, "asked again")
            self.batches_and_single_rows_agree(server, want)
        setups = [
            (["--workers", 2], ["--stripe-pages", 1], {}),
            (["--workers", 3], ["--stripe-pages", 2], {"chunked": True}),
            (["--workers", 5], ["--stripe-pages", 1], {"chunked": True, "proxied": True}),
            (["--workers", 1, "--processes"], [], {"proxied": True}),
            (["--workers", 2, "--processes"], ["--stripe-pages", 7], {"chunked": True}),
            (["--workers", 3, "--processes"], ["--stripe-pages", 1], {}),
        ]
        for arguments, stripes, how in setups:
            with self.subTest(server=arguments, create=stripes, how=how), program.Server(*arguments) as server:
                got = self.fill(server, "s", create=create + stripes, **how)
                if got is not None:
                    self.assertEqual(got["digest"], receipt["digest"])
                for question in QUESTIONS:
                    answer, report = self.ask(server, "s", question)
                    self.assertEqual(report["workers"], arguments[1])
                    self.assertTrue(answer == want[question], f"{question}: other bytes")

    def batches_and_single_rows_agree(self, server, want):
        """The same rows one by one, and from many clients at once."""
        self.ask(server, "s", "causal")
        whole = self.load()
        for row in (0, 3, ROWS - 1):
            np.save(self.dir / "q1.npy", self.queries[row:row + 1])
            np.save(self.dir / "p1.npy", self.positions[row:row + 1])
            server.run("session", "attend", "s", "--queries", self.path("q1.npy"), "--positions", self.path("p1.npy"),
                       "--out", self.path("o1.npy"), "--lse", self.path("l1.npy"))
            self.assertEqual(np.load(self.dir / "o1.npy").tobytes(), whole[0][row:row + 1].tobytes())
            self.assertEqual(np.load(self.dir / "l1.npy").tobytes(), whole[1][row:row + 1].tobytes())
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = pool.map(lambda i: self.ask(server, "s", "causal", suffix=f"c{i}")[0], range(6))
            for answer in answers:
                self.assertTrue(answer == want["causal"], "other bytes when asked at the same time")

    def test_layers_are_apart(self):
        keys = np.stack([self.keys[:1000], self.keys[1000:2000]])
        values = np.stack([self.values[:1000], self.values[1000:2000]])
        np.save(self.dir / "k2.npy", keys)
        np.save(self.dir / "v2.npy", values)
        np.save(self.dir / "q2.npy", self.queries[:5])
        with program.Server("--workers", 2) as server:
            server.run("session", "create", "two", *SHAPE, "--layers", 2, "--stripe-pages", 1)
            server.run("session", "append", "two", "--keys", self.path("k2.npy"), "--values", self.path("v2.npy"))
            for layer in (0, 1):
                server.run("session", "attend", "two", "--layer", layer, "--queries", self.path("q2.npy"),
                           "--out", self.path("o2.npy"))
                want, _, _ = program.oracle(keys[layer], values[layer], self.queries[:5], np.ones((5, 1000), bool),
                                            HEAD_DIM ** -0.5, SINKS)
                self.assertLess(program.relative_error(np.load(self.dir / "o2.npy"), want), ERROR_MAX)

    def test_half_precision_files_are_read_as_they_are(self):
        for name, array in (("kh", self.keys), ("vh", self.values)):
            np.save(self.dir / f"{name}.npy", array.astype(np.float16))
            np.save(self.dir / f"{name}32.npy", array.astype(np.float16).astype(np.float32))
        with program.Server("--workers", 2) as server:
            digests = [self.fill(server, name, keys=keys, values=values)["digest"]
                       for name, keys, values in (("a", "kh.npy", "vh.npy"), ("b", "kh32.npy", "vh32.npy"),
                                                  ("c", "kh.npy", "vh32.npy"))]
            self.assertEqual(len(set(digests)), 1)

    def check_shape(self, server, random, tokens, heads, kv_heads, head_dim, value_dim, *, sinks=0, window=100, softcap=0.0,
                    sink_logits=None, dtype="f32", files="f32", proxied=False):
        """A session of that shape from files of the type `files`, asked everything and held to the oracle."""
        name = f"{tokens}-{heads}-{kv_heads}-{head_dim}-{value_dim}-{dtype}-{files}"
        keys = random.standard_normal((tokens, kv_heads, head_dim)).astype(program.NUMPY[files])
        values = random.standard_normal((tokens, kv_heads, value_dim)).astype(program.NUMPY[files])
        queries = 2 * random.standard_normal((9, heads, head_dim), dtype=np.float32)
        positions = random.integers(0, tokens, 9)
        positions[:3] = [0, tokens - 1, min(tokens - 1, sinks)]
        for file, array in (("kx", keys), ("vx", values), ("qx", queries), ("px", positions)):
            np.save(self.dir / f"{file}.npy", array)
        learned = ["--sink-logit", ",".join(map(str, sink_logits))] if sink_logits else []
        server.run("session", "create", name, "--query-heads", heads, "--kv-heads", kv_heads, "--head-dim", head_dim,
                   "--value-dim", value_dim, "--sink-tokens", sinks, "--window", window, "--softcap", softcap, "--dtype", dtype,
                   "--stripe-pages", 1, *learned)
        server.run("session", "append", name, "--keys", self.path("kx.npy"), "--values", self.path("vx.npy"),
                   *(["--proxied"] if proxied else []))
        stored = [program.ROUND[dtype](array.astype(np.float32)) for array in (keys, values)]
        for question, arguments in QUESTIONS.items():
            self.ask(server, name, question, queries="qx.npy", positions="px.npy")
            limits = positions if "--positions" in arguments else np.full(9, tokens - 1)
            seen = program.visible(tokens, limits, "window" if "window" in arguments else "global", sinks, window)
            want = program.oracle(*stored, queries, seen, head_dim ** -0.5, min(sinks, tokens), sink_logits, softcap)
            outputs, lse, mass = self.load()
            self.assertEqual(outputs.shape, (9, heads, value_dim))
            self.assertLess(program.relative_error(outputs, want[0]), ERROR_MAX, question)
            self.assertLess(np.abs(lse - want[1]).max(), 2e-5, question)
            self.assertLess(np.abs(mass - want[2]).max(), 1e-5, question)
            if tokens <= sinks:
                self.assertTrue((mass == 1).all())
        server.run("session", "delete", name)

    def test_answers_are_right_for_every_shape(self):
        random = np.random.default_rng(77)
        # tokens, query heads, kv heads, head_dim, value_dim
        shapes = [
            # Values wider and narrower than keys, down to one number; heads alone and in groups.
            ((1000, 6, 3, 24, 80), {"sinks": 4}),
            ((1000, 5, 5, 33, 1), {"sinks": 1, "window": 1}),
            ((700, 7, 1, 1, 300), {"window": 257}),
            # Half precision files into every type.
            ((600, 4, 2, 40, 24), {"files": "f16", "sinks": 7}),
            ((600, 4, 2, 40, 24), {"files": "f16", "dtype": "f16", "sinks": 7}),
            ((600, 4, 2, 40, 24), {"files": "f16", "dtype": "bf16", "proxied": True}),
            # Fewer tokens than sinks, as many, one more; learned sinks and a softcap among them.
            ((3, 4, 2, 64, 24), {"sinks": 5}),
            ((3, 4, 2, 32, 48), {"sinks": 5, "softcap": 3.0, "sink_logits": [1.5, -2, 0, 30], "dtype": "bf16"}),
            ((300, 4, 2, 32, 16), {"sinks": 400, "window": 3, "files": "f16"}),
            ((5, 4, 2, 32, 16), {"sinks": 5, "window": 2}),
            ((6, 4, 2, 32, 16), {"sinks": 5, "window": 2}),
            ((1, 2, 1, 8, 8), {"window": 1}),
            ((900, 2, 1, 16, 20), {"sinks": 300, "softcap": 5.0, "sink_logits": [-40, 40]}),
        ]
        with program.Server("--workers", 3) as server:
            for shape, how in shapes:
                with self.subTest(shape=shape, **how):
                    self.check_shape(server, random, *shape, **how)


if __name__ == "__main__":
    unittest.main()
