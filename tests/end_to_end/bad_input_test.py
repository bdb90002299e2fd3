"""What a user can get wrong: each mistake gets one line that names it and exit code 1, and changes nothing."""

import pathlib
import tempfile
import unittest

import numpy as np

import program

HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 32, 16
TOKENS = 600
MEMORY_BYTES = 64 << 20


class BadInput(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.dir = pathlib.Path(cls.folder.name)
        random = np.random.default_rng(7)
        cls.keys = random.standard_normal((TOKENS, KV_HEADS, HEAD_DIM), dtype=np.float32)
        cls.values = random.standard_normal((TOKENS, KV_HEADS, VALUE_DIM), dtype=np.float32)
        cls.queries = random.standard_normal((5, HEADS, HEAD_DIM), dtype=np.float32)
        cls.save("k.npy", cls.keys)
        cls.save("v.npy", cls.values)
        cls.save("q.npy", cls.queries)
        cls.server = program.Server("--workers", 2, memory=MEMORY_BYTES)
        cls.addClassCleanup(cls.server.__exit__, None)
        create = ["--query-heads", HEADS, "--kv-heads", KV_HEADS, "--head-dim", HEAD_DIM, "--value-dim", VALUE_DIM]
        for name in ("s", "empty"):
            cls.server.run("session", "create", name, *create, "--sink-tokens", 3, "--stripe-pages", 1)
        cls.server.run("session", "create", "f16", *create, "--dtype", "f16")
        cls.receipt = cls.server.report("session", "append", "s", "--keys", cls.path("k.npy"), "--values", cls.path("v.npy"))
        cls.before = cls.state()

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    @classmethod
    def path(cls, name):
        return str(cls.dir / name)

    @classmethod
    def save(cls, name, array):
        np.save(cls.dir / name, array)
        return cls.path(name)

    @classmethod
    def state(cls):
        """Everything that a mistake must leave as it was."""
        sessions = cls.server.report("session", "list")
        cls.server.run("session", "attend", "s", "--queries", cls.path("q.npy"), "--out", cls.path("o.npy"))
        return sessions, (cls.dir / "o.npy").read_bytes()

    @classmethod
    def memory_used(cls):
        return sum(worker["memory_used_bytes"] for worker in cls.server.report("workers")["workers"])

    def expect_refused(self, *arguments, naming):
        """Exit code 1, nothing on stdout, one line on stderr with all of `naming`, and nothing has changed."""
        result = program.eduba(*arguments, server=self.server.address)
        self.assertEqual(result.returncode, 1, result)
        self.assertEqual(result.stdout, "")
        self.assertRegex(result.stderr, r"\Aeduba: [^\n]+\n\Z")
        for text in naming:
            self.assertIn(str(text), result.stderr)
        self.assertEqual(self.state(), self.before, f"changed by {arguments}")

    def append(self, session="s", keys="k.npy", values="v.npy", at=None):
        place = [] if at is None else ["--at", at]
        return ["session", "append", session, "--keys", self.path(keys), "--values", self.path(values), *place]

    def attend(self, session="s", queries="q.npy", *more):
        return ["session", "attend", session, "--queries", self.path(queries), "--out", self.path("out.npy"), *more]

    def broken(self, array, value, index=(TOKENS - 1, 1, 3)):
        result = array.copy()
        result[index] = value
        return result

    def test_values_that_are_not_finite(self):
        for name, value in (("nan", np.nan), ("inf", np.inf), ("-inf", -np.inf)):
            self.save("kbad.npy", self.broken(self.keys, value))
            self.save("vbad.npy", self.broken(self.values, value))
            self.save("qbad.npy", self.broken(self.queries, value, (3, 1, 3)))
            for proxied in ([], ["--proxied"]):
                with self.subTest(value=name, proxied=proxied):
                    self.expect_refused(*self.append(keys="kbad.npy"), *proxied, naming=["keys", 2 * TOKENS - 1])
                    self.expect_refused(*self.append(values="vbad.npy"), *proxied, naming=["values", 2 * TOKENS - 1])
            self.expect_refused(*self.attend(queries="qbad.npy"), naming=["quer"])
            self.assertFalse((self.dir / "out.npy").exists())

    def test_a_value_that_the_sessions_type_cannot_hold(self):
        self.save("kbig.npy", self.broken(self.keys, 1e6))
        self.expect_refused(*self.append("f16", keys="kbig.npy"), naming=["keys", TOKENS - 1])

    def test_shapes_and_types(self):
        k = self.keys
        cases = {
            "two dimensions": (k[:, 0], ["(600, 32)", "kv_heads"]),
            "four dimensions": (k[None], ["(1, 600, 2, 32)", "kv_heads"]),
            "no dimension": (k[0, 0, 0], ["kv_heads"]),
            "other heads": (np.repeat(k, 2, axis=1), ["(600, 4, 32)"]),
            "other head_dim": (k[..., :31], ["31", "32"]),
            "no tokens": (k[:0], [" 0 tokens"]),
            "float64": (k.astype(np.float64), ["float64", "float32"]),
            "int32": (k.astype(np.int32), ["int32", "float32"]),
            "complex": (k.astype(np.complex64), ["c8"]),
            "text": (np.full(k.shape, "x"), ["<U1"]),
            "Fortran order": (np.asfortranarray(k), ["ortran"]),
            "big-endian": (k.astype(">f4"), ["big-endian"]),
            "another length": (k[:-1], [TOKENS - 1, TOKENS]),
        }
        for name, (array, naming) in cases.items():
            with self.subTest(name):
                self.save("bad.npy", array)
                self.expect_refused(*self.append(keys="bad.npy"), naming=["bad.npy", *naming])
        self.save("bad.npy", self.queries.astype(np.float16))
        self.expect_refused(*self.attend(queries="bad.npy"), naming=["bad.npy", "float16"])
        self.save("bad.npy", self.queries[:, :3])
        self.expect_refused(*self.attend(queries="bad.npy"), naming=["bad.npy", "query_heads"])

    def test_files_that_are_no_arrays(self):
        whole = (self.dir / "k.npy").read_bytes()
        cases = {"cut in the data": whole[:-1], "cut in the header": whole[:40], "empty": b"", "text": b"hello, world\n",
                 "longer": whole + b"x", "header of lies": whole.replace(b"(600,", b"(6e9,"),
                 "negative": whole.replace(b"(600,", b"(-60,"), "huge": whole.replace(b"(600, 2, 32), }", b"(99999999999999),}")}
        for name, content in cases.items():
            with self.subTest(name):
                (self.dir / "bad.npy").write_bytes(content)
                self.expect_refused(*self.append(keys="bad.npy"), naming=["bad.npy"])
        self.expect_refused(*self.append(keys="absent.npy"), naming=["absent.npy"])
        self.expect_refused("session", "append", "s", "--keys", self.dir, "--values", self.path("v.npy"), naming=[self.dir])

    def test_sessions_that_exist_or_do_not(self):
        shape = ["--query-heads", 1, "--kv-heads", 1, "--head-dim", 1]
        self.expect_refused("session", "create", "s", *shape, naming=["'s'"])
        for command in (self.append("nobody"), self.attend("nobody"), ["session", "show", "nobody"],
                        ["session", "delete", "nobody"]):
            self.expect_refused(*command, naming=["nobody"])
        self.expect_refused("session", "create", "a/b", *shape, naming=["A-Z"])
        self.expect_refused("session", "create", "", *shape, naming=["A-Z"])

    def test_specs_that_make_no_sense(self):
        def create(**changes):
            options = {"query-heads": 4, "kv-heads": 2, "head-dim": 8, **{k.replace("_", "-"): v for k, v in changes.items()}}
            return ["session", "create", "new", *(str(x) for pair in options.items() for x in (f"--{pair[0]}", pair[1]))]
        for changes, naming in (({"query_heads": 5}, "multiple"), ({"query_heads": 0}, "query_heads"),
                                ({"kv_heads": -2}, "kv_heads"), ({"head_dim": 1025}, "1025"), ({"value_dim": -1}, "value_dim"),
                                ({"layers": -1}, "layers"), ({"sink_tokens": -1}, "sink_tokens"), ({"window": -5}, "window"),
                                ({"sink_logit": "nan"}, "sink"), ({"sink_logit": "1,2"}, "sink_logits has 2"),
                                ({"scale": "inf"}, "scale"), ({"softcap": -1}, "softcap"), ({"stripe_pages": -1}, "stripe_pages")):
            with self.subTest(changes):
                self.expect_refused(*create(**changes), naming=[naming])

    def test_appends_in_the_wrong_place(self):
        self.expect_refused(*self.append(at=TOKENS + 1), naming=[TOKENS + 1, TOKENS])
        self.expect_refused(*self.append(at=-1), naming=["-1"])
        # The same positions: again is fine, other content is not, and neither is a part of both.
        again = self.server.report(*self.append(at=0))
        self.assertTrue(again["already_stored"])
        self.assertEqual(again["digest"], self.receipt["digest"])
        self.assertEqual(self.state(), self.before)
        self.save("other.npy", self.broken(self.keys, 7.5))
        self.expect_refused(*self.append(keys="other.npy", at=0), naming=["other content", f"append at {TOKENS}"])
        self.expect_refused(*self.append(at=TOKENS - 10), naming=[TOKENS - 10])

    def test_more_than_there_is_memory_for(self):
        tokens = 2 * MEMORY_BYTES // (4 * KV_HEADS * (HEAD_DIM + VALUE_DIM))
        for name, dim in (("kbig.npy", HEAD_DIM), ("vbig.npy", VALUE_DIM)):
            np.lib.format.open_memmap(self.path(name), "w+", np.float32, (tokens, KV_HEADS, dim)).flush()
        for proxied in ([], ["--proxied"]):
            self.expect_refused(*self.append("empty", "kbig.npy", "vbig.npy"), *proxied, naming=["memory"])

    def test_a_refused_append_gives_its_memory_back(self):
        # Workers report their memory twice a second.
        program.wait_until(lambda: self.memory_used() > 0, "memory of the first append is reported")
        used = self.memory_used()
        self.save("kbad.npy", self.broken(self.keys, np.nan))
        for _ in range(3):
            self.expect_refused(*self.append("empty", keys="kbad.npy"), naming=["keys"])
        program.wait_until(lambda: self.memory_used() == used, f"{used} bytes used again, as before")

    def test_queries_that_cannot_be_answered(self):
        self.expect_refused(*self.attend("empty"), naming=["empty"])
        self.expect_refused(*self.attend("s", "q.npy", "--policy", "window"), naming=["window"])
        self.expect_refused(*self.attend("s", "q.npy", "--layer", 1), naming=["layer"])
        self.expect_refused(*self.attend("s", "q.npy", "--layer", -1), naming=["layer"])
        for positions, naming in (([0, 1, 2, 3, TOKENS], TOKENS), ([0, 1, 2, 3, -1], "-1"), ([0, 1, 2, 3], "p.npy"),
                                  ([[0, 1, 2, 3, 4]], "p.npy"), ([0.0, 1, 2, 3, 4], "float64")):
            self.save("p.npy", np.array(positions))
            self.expect_refused(*self.attend("s", "q.npy", "--positions", self.path("p.npy")), naming=[naming])

    def test_results_in_one_file_and_a_timeout_that_is_no_number_are_bad_usage(self):
        out, same = self.path("out.npy"), f"{self.dir}/./out.npy"
        for more, naming in ((["--lse", out], "same file"), (["--lse", self.path("l.npy"), "--sink-mass", same], "same file"),
                             (["--timeout", "nan"], "nan")):
            result = program.eduba(*self.attend("s", "q.npy", *more), server=self.server.address)
            self.assertEqual(result.returncode, 2, result)
            self.assertRegex(result.stderr, r"\Aeduba: [^\n]+\n\Z")
            self.assertIn(naming, result.stderr)

    def test_addresses_that_do_not_work(self):
        """gRPC's own log stays out of the one line."""
        taken = self.server.address
        for arguments, naming in ((["up", "--listen", taken], "the port is taken"),
                                  (["coordinator", "--group-size", 1, "--listen", "192.0.2.1:7070"], "another machine's"),
                                  (["worker", "--coordinator", taken, "--listen", taken], "the port is taken"),
                                  (["session", "list", "--server", "no-such-host.invalid:1"], "found no machine")):
            with self.subTest(arguments):
                result = program.eduba(*arguments)
                self.assertEqual((result.returncode, result.stdout), (1, ""), result)
                self.assertRegex(result.stderr, r"\Aeduba: [^\n]+\n\Z")
                self.assertIn(naming, result.stderr)

    def test_results_that_cannot_be_written_leave_nothing_behind(self):
        self.expect_refused("session", "attend", "s", "--queries", self.path("q.npy"), "--out", self.path("no/folder.npy"),
                            naming=["no/folder.npy"])
        (self.dir / "old.npy").write_bytes(b"older")
        self.save("qbad.npy", self.broken(self.queries, np.nan, (3, 1, 3)))
        self.expect_refused("session", "attend", "s", "--queries", self.path("qbad.npy"), "--out", self.path("old.npy"),
                            naming=["quer"])
        self.assertEqual((self.dir / "old.npy").read_bytes(), b"older")
        self.assertEqual([f.name for f in self.dir.iterdir() if f.name.startswith(("old", "out"))], ["old.npy"])


if __name__ == "__main__":
    unittest.main()
