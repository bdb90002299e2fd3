"""Model sessions through the real program: against what transformers computed (tests/golden/models), the same bytes for any
number of workers and either transport, and one line for every mistake."""

import json
import pathlib
import shutil
import subprocess
import tempfile
import threading
import unittest

import numpy as np

import program

GOLDEN = program.ROOT / "tests" / "golden" / "models"
VOCABULARY = 97


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class ModelSessions(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.dir = pathlib.Path(cls.folder.name)
        # A tokenizer of our own beside a golden model: token i is called g<i>.
        cls.model = cls.dir / "tiny"
        shutil.copytree(GOLDEN / "llama", cls.model)
        (cls.model / "genes.txt").write_text("".join(f"g{i}\n" for i in range(VOCABULARY)))
        cls.ids = np.load(GOLDEN / "llama" / "ids.npy").reshape(-1)
        cls.save("ids.npy", cls.ids)
        cls.save("first.npy", cls.ids[:1])
        cls.save("rest.npy", cls.ids[1:])
        random = np.random.default_rng(5)
        cls.save("long.npy", random.integers(0, VOCABULARY, 1500, dtype=np.int64))
        cls.save("ranges.npy", np.array([[0, 10], [300, 301], [700, 1500]], np.int64))

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

    def up(self, *arguments, model=None):
        return program.Server("--model", model or self.model, *arguments)

    def test_it_says_what_transformers_says(self):
        for name in ("llama", "gemma3"):
            golden = GOLDEN / name
            ids = np.load(golden / "ids.npy").reshape(-1)
            logits = np.load(golden / "logits_f64.npy").reshape(len(ids), VOCABULARY)
            continuation = np.load(golden / "continuation.npy").reshape(-1)
            self.save("golden.npy", ids)
            self.save("golden_first.npy", ids[:1])
            self.save("golden_rest.npy", ids[1:])
            with self.up("--workers", 2, model=golden) as server:
                server.run("session", "create", "s", "--model", "--stripe-pages", 1)
                server.run("session", "append", "s", "--tokens", self.path("golden_first.npy"))
                server.run("score", "s", "--tokens", self.path("golden_rest.npy"), "--out", self.path("lp.npy"))
                wanted = log_softmax(logits[:-1])[np.arange(len(ids) - 1), ids[1:]]
                np.testing.assert_allclose(np.load(self.path("lp.npy")), wanted, atol=2e-4 * np.abs(logits).max())
                server.run("session", "append", "s", "--tokens", self.path("golden_rest.npy"))
                answer = server.report("generate", "s", "--max-tokens", len(continuation), "--ignore-eos")
                self.assertEqual(answer["tokens"], continuation.tolist(), name)
                self.assertEqual(answer["finish_reason"], "length")
                self.assertEqual(answer["length"], len(ids) + len(continuation))

    def answers(self, server, *policy):
        """Bytes of everything that a session answers."""
        server.run("session", "create", "s", "--model", "--stripe-pages", 1, *policy)
        server.run("session", "append", "s", "--tokens", self.path("long.npy"))
        server.run("session", "fork", "s", "fork")
        server.run("score", "fork", "--tokens", self.path("ids.npy"), "--out", self.path("lp.npy"))
        server.run("embed", "s", "--ranges", self.path("ranges.npy"), "--pool", "mean", "--out", self.path("e.npy"))
        drawn = server.report("generate", "s", "--max-tokens", 20, "--seed", 3, "--temperature", 0.9, "--ignore-eos")
        again = server.report("generate", "fork", "--max-tokens", 20, "--seed", 3, "--temperature", 0.9, "--ignore-eos")
        self.assertEqual(drawn["tokens"], again["tokens"])
        self.assertEqual(drawn["log_probs"], again["log_probs"])
        self.assertEqual(np.load(self.path("e.npy")).shape, (3, server.report("model", "show")["hidden_size"]))
        return (self.dir / "lp.npy").read_bytes(), (self.dir / "e.npy").read_bytes(), drawn["tokens"], drawn["log_probs"]

    def test_any_number_of_workers_and_either_transport_give_the_same_bytes(self):
        for policy in ([], ["--policy", "streaming", "--window", 300, "--positions", "rolling"]):
            wanted = None
            for arguments in (["--workers", 1], ["--workers", 3], ["--processes", "--workers", 2]):
                with self.up(*arguments) as server:
                    got = self.answers(server, *policy)
                wanted = wanted or got
                self.assertEqual(got, wanted, f"{policy} {arguments}")

    def test_text_goes_in_and_comes_out(self):
        with self.up("--workers", 2) as server:
            show = server.report("model", "show")
            self.assertEqual((show["name"], show["family"], show["tokenizer"]), ("tiny", "llama", "genes"))
            server.run("session", "create", "s", "--model")
            (self.dir / "cell.txt").write_text("g5 g6\ng7\n")
            self.assertEqual(server.report("session", "append", "s", "--text", self.path("cell.txt"))["count"], 3)
            self.save("three.npy", np.array([5, 6, 7]))
            again = server.report("session", "append", "s", "--tokens", self.path("three.npy"), "--at", 0)
            self.assertEqual(again["already_stored"], 3)
            server.run("session", "fork", "s", "t")
            answer = server.report("generate", "s", "--prompt", "g8 g9", "--max-tokens", 10, "--ignore-eos")
            self.assertEqual(answer["prompt_tokens"], 2)
            self.assertEqual(answer["text"].split(), [f"g{i}" for i in answer["tokens"]])
            self.assertEqual(answer["length"], 15)
            # The same up to a word that it will say: that word is the last.
            stop = f"g{answer['tokens'][4]}"
            first = [f"g{i}" for i in answer["tokens"]].index(stop)
            stopped = server.report("generate", "t", "--prompt", "g8 g9", "--max-tokens", 10, "--ignore-eos",
                                    "--stop-id", stop[1:])
            self.assertEqual(stopped["tokens"], answer["tokens"][:first + 1])
            self.assertEqual(stopped["finish_reason"], "stop")
            plain = server.run("generate", "s", "--max-tokens", 3, "--ignore-eos")
            self.assertRegex(plain, r"^ ?g\d+ g\d+ g\d+\n$")

    def test_a_deadline_leaves_the_session_intact_and_says_how_far_it_got(self):
        with self.up("--workers", 2) as server:
            server.run("session", "create", "s", "--model")
            result = program.eduba("generate", "s", "--tokens", self.path("ids.npy"), "--max-tokens", 1000000, "--ignore-eos",
                                   "--timeout", 1, "--json", server=server.address)
            self.assertEqual(result.returncode, 1, result.stderr)
            self.assertRegex(result.stderr, r"^eduba: generate: the time is over after \d+ of 1000000 tokens; [^\n]*\n$")
            length = server.report("session", "show", "s")["length"]
            self.assertGreater(length, len(self.ids))
            self.assertEqual(server.report("generate", "s", "--max-tokens", 2, "--ignore-eos")["length"], length + 2)

    def test_a_worker_that_is_killed_in_mid_generation_makes_it_unavailable(self):
        with self.up("--processes", "--workers", 2) as server:
            server.run("session", "create", "s", "--model")
            server.run("session", "append", "s", "--tokens", self.path("ids.npy"))
            results = []
            call = threading.Thread(target=lambda: results.append(program.eduba(
                "generate", "s", "--max-tokens", 1000000, "--ignore-eos", server=server.address)))
            call.start()
            children = subprocess.run(["pgrep", "-P", str(server.process.pid), "-f", "eduba worker"],
                                      capture_output=True, text=True).stdout.split()
            self.assertEqual(len(children), 2)
            program.wait_until(lambda: self.refused_as_busy(server), "the generation is under way")
            subprocess.run(["kill", "-9", children[0]], check=True)
            call.join()
            self.assertEqual(results[0].returncode, 1)
            self.assertIn("retry", results[0].stderr)

    def refused_as_busy(self, server):
        result = program.eduba("score", "s", "--tokens", self.path("first.npy"), "--out", self.path("x.npy"),
                               server=server.address)
        return "extended by another" in result.stderr

    def test_mistakes_get_one_line_each(self):
        bad = {"range": np.array([0, VOCABULARY]), "negative": np.array([-1]), "float": np.zeros(3, np.float32),
               "two_axes": np.zeros((2, 2), np.int64), "empty": np.zeros(0, np.int64),
               "long_question": np.zeros(196609, np.int64)}
        for name, array in bad.items():
            self.save(f"{name}.npy", array)
        self.save("empty_range.npy", np.array([[3, 3]], np.int64))
        self.save("beyond.npy", np.array([[0, 100000]], np.int64))
        with self.up("--workers", 2, model=GOLDEN / "llama") as server:
            server.run("session", "create", "s", "--model")
            server.run("session", "create", "none", "--model")
            server.run("session", "create", "tensors", "--query-heads", 1, "--kv-heads", 1, "--head-dim", 4)
            server.run("session", "append", "s", "--tokens", self.path("ids.npy"))
            before = server.report("session", "list")
            out = ["--out", self.path("x.npy")]
            cases = [
                (["session", "append", "s", "--tokens", self.path("range.npy")], "97, wanted 0 to 96"),
                (["session", "append", "s", "--tokens", self.path("negative.npy")], "token 0 is -1"),
                (["session", "append", "s", "--tokens", self.path("float.npy")], "float32"),
                (["session", "append", "s", "--tokens", self.path("two_axes.npy")], "(2, 2)"),
                (["session", "append", "s", "--tokens", self.path("empty.npy")], "0 token ids"),
                (["session", "append", "s", "--tokens", self.path("ids.npy"), "--at", 9999], "gap"),
                (["session", "append", "s", "--tokens", self.path("long.npy"), "--at", 0], "already, not"),
                (["session", "append", "s", "--text", __file__], "no tokenizer"),
                (["session", "append", "tensors", "--tokens", self.path("ids.npy")], "keys and values"),
                (["generate", "none", "--max-tokens", 1], "empty"),
                (["generate", "s", "--max-tokens", 0], "max_tokens is 0"),
                (["generate", "s", "--max-tokens", 1, "--temperature", -1], "temperature"),
                (["generate", "s", "--max-tokens", 1, "--stop", "x"], "tokenizer"),
                (["generate", "tensors", "--max-tokens", 1], "keys and values"),
                (["score", "none", "--tokens", self.path("ids.npy"), *out], "empty"),
                (["score", "s", "--tokens", self.path("long_question.npy"), *out], "bytes"),
                (["embed", "s", "--ranges", self.path("empty_range.npy"), *out], "range 0 is empty"),
                (["embed", "s", "--ranges", self.path("beyond.npy"), *out], "ends at 100000"),
                (["session", "fork", "s", "none"], "exists already"),
                (["session", "create", "w", "--model", "--policy", "streaming"], "window is 0"),
                (["session", "create", "w", "--model", "--window", 5], "window"),
            ]
            for arguments, words in cases:
                with self.subTest(arguments=arguments):
                    result = program.eduba(*arguments, server=server.address)
                    self.assertEqual(result.returncode, 1, result.stderr)
                    self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
                    self.assertIn(words, result.stderr)
            self.assertEqual(server.report("session", "list"), before)

    def test_the_model_that_comes_with_the_program_is_called_by_name(self):
        with program.Server("--processes", "--workers", 2, "--model", "nano") as server:
            show = server.report("model", "show")
            self.assertEqual((show["name"], show["tokenizer"]), ("nano", "genes"))
        lonely = self.dir / "lonely"
        lonely.mkdir()
        shutil.copy(program.EDUBA, lonely)
        for model, words in (("nano", "lonely/models/nano"), ("./nano", "no folder './nano'"), ("nono", "no folder 'nono'")):
            result = subprocess.run([lonely / "eduba", "up", "--listen", "127.0.0.1:0", "--model", model], cwd=lonely,
                                    capture_output=True, text=True, timeout=program.COMMAND_TIMEOUT_S)
            self.assertEqual(result.returncode, 2, result.stderr)
            self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
            self.assertIn(words, result.stderr)
        # An installed program finds it in the share folder; a folder of the name in the working directory is "./nano".
        share = self.dir / "share" / "eduba" / "models"
        share.mkdir(parents=True)
        shutil.copytree(self.model, share / "nano")
        shutil.copytree(GOLDEN / "gemma3", lonely / "nano")
        for model, family in (("nano", "llama"), ("./nano", "gemma3_text")):
            process = subprocess.Popen([lonely / "eduba", "up", "--workers", "1", "--listen", "127.0.0.1:0", "--memory-bytes", "64MiB",
                                        "--model", model], cwd=lonely, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            try:
                address = process.stdout.readline().removeprefix("ready: ").strip()
                shown = program.eduba("model", "show", "--json", server=address)
                self.assertEqual(json.loads(shown.stdout)["family"], family, shown.stderr)
            finally:
                process.terminate()
                process.communicate(timeout=program.COMMAND_TIMEOUT_S)

    def test_a_broken_model_is_refused_at_the_start(self):
        broken = self.dir / "broken"
        shutil.copytree(self.model, broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        result = program.eduba("up", "--listen", "127.0.0.1:0", "--memory-bytes", "64MiB", "--model", broken)
        self.assertEqual(result.returncode, 1)
        self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
        self.assertIn("model.safetensors", result.stderr)

    def test_a_worker_with_another_model_is_refused(self):
        with self.up("--processes", "--workers", 1) as server:
            worker = program.eduba("worker", "--coordinator", server.address, "--listen", "127.0.0.1:0", "--memory-bytes", "64MiB",
                                   "--model", GOLDEN / "gemma3")
            self.assertEqual(worker.returncode, 1, worker.stderr)
            self.assertIn("one --model", worker.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=1)
