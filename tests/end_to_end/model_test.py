"""Model sessions through the real program: against what transformers computed (tests/golden/models), the same bytes for any
number of workers and either transport, and one line for every mistake."""

import json
import pathlib
import shutil
import subprocess
import tempfile
import threading
import unittest

import h5py
import numpy as np
import scipy.sparse

import program

GOLDEN = program.ROOT / "tests" / "golden" / "models"
VOCABULARY = 97


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def write_h5ad(path, x, symbols, index):
    """Cells with their genes' names in var/feature_name, as anndata 0.8 to 0.12 writes them."""
    with h5py.File(path, "w") as file:
        for table, names in (("obs", [f"cell{i}" for i in range(x.shape[0])]), ("var", index)):
            file.create_group(table).attrs["_index"] = "_index"
            file[table]["_index"] = np.array(names, dtype=h5py.string_dtype())
        file["var/feature_name"] = np.array(symbols, dtype=h5py.string_dtype())
        if not scipy.sparse.issparse(x):
            file["X"] = x
            return
        matrix = file.create_group("X")
        matrix.attrs["encoding-type"] = "csr_matrix"
        matrix.attrs["shape"] = x.shape
        for part in ("data", "indices", "indptr"):
            matrix.create_dataset(part, data=getattr(x, part), compression="gzip")


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
                # Nor is the prompt read then.
                (["generate", "s", "--tokens", self.path("ids.npy"), "--max-tokens", 0], "max_tokens is 0"),
                (["generate", "s", "--tokens", self.path("ids.npy"), "--max-tokens", 1, "--top-p", "nan"], "top_p"),
                (["generate", "s", "--tokens", self.path("ids.npy"), "--max-tokens", 1, "--stop-id", 97], "stop ids: id 0"),
                (["generate", "s", "--tokens", self.path("ids.npy"), "--max-tokens", 1, "--stop", "x"], "tokenizer"),
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

    def gene_model(self, name, **streaming):
        """The model, with a streaming.json of these fields and a vocabulary of genes after [sOS] and [CELL]."""
        folder = self.dir / name
        shutil.copytree(self.model, folder)
        (folder / "streaming.json").write_text(json.dumps(streaming))
        (folder / "genes.txt").write_text("".join(
            ["[sOS]\n", "[CELL]\n", "TBCE|E7\n", *(f"g{i}\n" for i in range(3, VOCABULARY))]))
        return folder

    def test_a_folder_says_how_its_sessions_are_meant_to_be(self):
        defaults = {"policy": "streaming", "positions": "rolling", "window": 64, "sink_tokens": 3, "sink_token_id": 5}
        with self.up("--workers", 2, model=self.gene_model("meant", **defaults)) as server:
            shown = server.report("model", "show")["session_defaults"]
            self.assertEqual(shown, {"policy": "streaming", "positions": "rolling", "window": 64, "sink_tokens": 3, "sink_token": 5})
            self.assertIn("sink_tokens 3", server.run("model", "show"))
            got = server.report("session", "create", "s", "--model")
            self.assertEqual({key: got[key] for key in shown}, shown)
            self.assertEqual(got["length"], 0)
            self.assertIn("positions 0 to 2 are token 5", server.run("session", "show", "s"))
            # The first token of a client is after them, wherever it comes from.
            appended = server.report("session", "append", "s", "--tokens", self.path("ids.npy"))
            self.assertEqual((appended["at"], appended["length"]), (3, 3 + len(self.ids)))
            again = server.report("session", "append", "s", "--tokens", self.path("ids.npy"), "--at", 3)
            self.assertEqual(again["already_stored"], len(self.ids))
            server.run("session", "create", "t", "--model")
            self.assertEqual(server.report("generate", "t", "--prompt", "g8 g9", "--max-tokens", 4, "--ignore-eos")["length"], 9)
            plain = server.report("session", "create", "plain", "--model", "--policy", "model", "--sink-token", "none")
            self.assertEqual((plain["policy"], plain["positions"], plain["sink_token"]), ("model", "absolute", None))
            other = server.report("session", "create", "other", "--model", "--window", 7, "--sink-token", 1, "--sink-tokens", 2)
            self.assertEqual((other["policy"], other["window"], other["sink_token"], other["sink_tokens"]), ("streaming", 7, 1, 2))
        for field, value, words in (("windw", 3, "windw"), ("window", 0, "window is 0"), ("policy", "all", "policy"),
                                    ("sink_token_id", VOCABULARY, "wanted -1 to 96")):
            with self.subTest(field):
                bad = self.gene_model(f"bad_{field}", **{**defaults, field: value})
                result = program.eduba("up", "--listen", "127.0.0.1:0", "--memory-bytes", "64MiB", "--model", bad)
                self.assertEqual(result.returncode, 1)
                self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
                self.assertIn("streaming.json", result.stderr)
                self.assertIn(words, result.stderr)

    def test_cells_become_their_expressed_genes(self):
        names = ["g9", "nobody", "TBCE", "g3", "g4", "g5"]
        x = np.array([[0, 5, 1, 2, 2, 1 + 1e-12], [1e-60, 0, 3, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 7, 0]])
        genes = {"g9": 9, "TBCE": 2, "g3": 3, "g4": 4, "g5": 5}
        wanted = []
        for cell in x:
            order = [i for i in np.argsort(-cell, kind="stable") if cell[i] > 0 and names[i] in genes]
            wanted.append([1] + [genes[names[i]] for i in order])
        write_h5ad(self.dir / "cells.h5ad", scipy.sparse.csr_matrix(x), names, [f"E{5 + i}" for i in range(6)])
        write_h5ad(self.dir / "dense.h5ad", x, names, [f"E{5 + i}" for i in range(6)])
        flat = np.array([id for cell in wanted for id in cell], np.int32)
        self.save("flat.npy", flat)
        self.save("some.npy", np.array([3, 0]))
        ranges = np.cumsum([0] + [len(cell) for cell in wanted])
        with self.up("--workers", 2, model=self.gene_model("cells", sink_tokens=2, sink_token_id=0)) as server:
            for name in ("cells", "dense"):
                server.run("session", "create", name, "--model")
                report = server.report("session", "append", name, "--cells", self.path(f"{name}.h5ad"), "--ranges-out", self.path("r.npy"))
                self.assertEqual((report["at"], report["count"], report["length"]), (2, len(flat), 2 + len(flat)))
                self.assertEqual((report["cells"], report["genes"], report["genes_without_token"], report["expressed_left_out"]),
                                 (4, 6, 1, 2))
                np.testing.assert_array_equal(np.load(self.path("r.npy")), 2 + np.stack([ranges[:-1], ranges[1:]], axis=1))
                # Again, in either form, it is all there.
                for form in (["--tokens", self.path("flat.npy")], ["--cells", self.path("dense.h5ad")]):
                    again = server.report("session", "append", name, *form, "--at", 2)
                    self.assertEqual(again["already_stored"], len(flat))
            embedded = server.report("embed", "cells", "--ranges", self.path("r.npy"), "--pool", "c2s", "--out", self.path("c2s.npy"))
            self.assertEqual(embedded["ranges"], 4)
            server.run("embed", "cells", "--ranges", self.path("r.npy"), "--out", self.path("mean.npy"))
            self.assertEqual((self.dir / "c2s.npy").read_bytes(), (self.dir / "mean.npy").read_bytes())
            # Some cells, their first genes, after what is there.
            report = server.report("session", "append", "cells", "--cells", self.path("cells.h5ad"), "--rows", self.path("some.npy"),
                                   "--top-genes", 1, "--ranges-out", self.path("r.npy"))
            self.assertEqual(report["at"], 2 + len(flat))
            np.testing.assert_array_equal(np.load(self.path("r.npy")) - report["at"], [[0, 2], [2, 4]])
            self.save("ends.npy", np.array([1, wanted[3][1], 1, wanted[0][1]]))
            self.assertEqual(server.report("session", "append", "cells", "--tokens", self.path("ends.npy"), "--at",
                                           report["at"])["already_stored"], 4)

            before = server.report("session", "list")
            bad = x.copy()
            for value in (-1.0, np.nan):
                bad[1, 2] = value
                write_h5ad(self.dir / f"bad_{value}.h5ad", scipy.sparse.csr_matrix(bad), names, names)
            write_h5ad(self.dir / "strangers.h5ad", x, [f"x{i}" for i in range(6)], names)
            write_h5ad(self.dir / "twice.h5ad", x, ["g3"] * 6, names)
            (self.dir / "truncated.h5ad").write_bytes((self.dir / "cells.h5ad").read_bytes()[:3000])
            cases = [("bad_-1.0.h5ad", [], "found -1 for cell 1"), ("bad_nan.h5ad", [], "found nan for cell 1"),
                     ("strangers.h5ad", [], "none of the 6 genes is in the model's vocabulary"),
                     ("twice.h5ad", [], "genes 0 and 1 of var are both"), ("truncated.h5ad", [], "truncated.h5ad"),
                     ("none.h5ad", [], "none.h5ad"), ("cells.h5ad", ["--genes", "var/no"], "no"),
                     ("cells.h5ad", ["--matrix", "layers/no"], "layers"), ("cells.h5ad", ["--at", 2, "--top-genes", 1], "already, not")]
            for file, arguments, words in cases:
                with self.subTest(file=file, arguments=arguments):
                    result = program.eduba("session", "append", "cells", "--cells", self.path(file), *arguments, server=server.address)
                    self.assertEqual(result.returncode, 1, result.stderr)
                    self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
                    self.assertIn(words, result.stderr)
            self.assertEqual(server.report("session", "list"), before)

    def test_cells_are_text_for_a_model_that_reads_text(self):
        x = np.array([[0, 2.0, 1.0], [4.0, 0, 0]])
        write_h5ad(self.dir / "text.h5ad", x, ["TP53", "ACTB", ""], ["E0", "E1", "E2"])
        (self.dir / "text.txt").write_text("ACTB\nTP53\n")
        # Byte-level BPE without a merge: one token a letter.
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        vocabulary = {letter: i for i, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789\u0120\u010a")}
        (self.dir / "letters").mkdir()
        (self.dir / "letters" / "tokenizer.json").write_text(json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": []}}))
        with self.up("--workers", 1, model=GOLDEN / "gpt_neox") as server:
            tokenizer = ["--tokenizer", self.path("letters")]
            for name in ("cells", "text"):
                server.run("session", "create", name, "--model")
            report = server.report("session", "append", "cells", "--cells", self.path("text.h5ad"), *tokenizer)
            self.assertEqual((report["cells"], report["genes_without_token"], report["expressed_left_out"]), (2, 1, 1))
            text = server.report("session", "append", "text", "--text", self.path("text.txt"), *tokenizer)
            self.assertEqual(text["count"], report["count"])

    def test_sink_mass_comes_on_request(self):
        answers = []
        for workers in (1, 3):
            with self.up("--workers", workers) as server:
                server.run("session", "create", "s", "--model")
                server.run("session", "append", "s", "--tokens", self.path("long.npy"))
                server.run("score", "s", "--tokens", self.path("ids.npy"), "--out", self.path("lp.npy"), "--sink-mass", self.path("a.npy"))
                server.run("generate", "s", "--max-tokens", 9, "--ignore-eos", "--sink-mass", self.path("b.npy"))
                show = server.report("model", "show")
                shape = (len(show["layer_windows"]), show["query_heads"])
                for name in ("a.npy", "b.npy"):
                    mass = np.load(self.path(name))
                    self.assertEqual((mass.dtype, mass.shape), (np.float32, shape))
                    self.assertTrue(((mass > 0) & (mass < 1)).all())
                answers.append([(self.dir / name).read_bytes() for name in ("a.npy", "b.npy")])
        self.assertEqual(answers[0], answers[1])

    def test_the_models_are_listed(self):
        alone = program.eduba("model", "list", server="127.0.0.1:1")
        self.assertEqual(alone.returncode, 0, alone.stderr)
        self.assertRegex(alone.stdout, r"nano +up --model nano +\d")
        with self.up("--workers", 1) as server:
            shipped, held = server.report("model", "list")
            self.assertEqual((shipped["name"], shipped["served"]), ("nano", False))
            self.assertGreater(shipped["bytes"], 1 << 20)
            self.assertEqual((held["name"], held["served"]), ("tiny", True))
            self.assertEqual(held["folder"], str(self.model.resolve()))
            self.assertIn("tiny", server.run("model", "list"))

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
