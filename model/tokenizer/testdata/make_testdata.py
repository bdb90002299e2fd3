"""Writes the tokenizers and the recorded answers that golden_test.cc compares with.

    pip install tokenizers==0.23.3 sentencepiece==0.2.3 xxhash
    python make_testdata.py            # writes beside itself, the same bytes every time

Small tokenizers of the kinds that model folders have are trained on text that is made here. cases.json holds, for each,
strings with the ids and the decoded texts that Hugging Face's tokenizers (or sentencepiece) gave, and digests over
every Unicode character in a few surroundings."""

import collections
import io
import json
import pathlib
import random

import sentencepiece
import tokenizers
import xxhash
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).resolve().parent
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

WORDS = """the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one
you were all her she there would their we him been has when who will no more if out so said what up its about into than them
can only other time new some could these two may first then do any like my now over such our man me even most made after
cell gene expression human mouse tissue myoblast CD3E MALAT1 MT-CO1 ACTB GAPDH don't it's we'll they've I'm you'd 12 3456 7
naïve café straße größe мир язык слово 細胞 遺伝子 发现 数据 데이터 שלום مرحبا नमस्ते 🙂 👩🏽‍🔬 α β → ≤ “quoted” — … x=1; foo(bar) // !? $5.00""".split()


def text_of(rng, words):
    out = []
    for _ in range(words):
        word = rng.choice(WORDS)
        out.append(rng.choice([word, word, word, word.upper(), word.capitalize()]))
        out.append(rng.choice([" "] * 12 + ["  ", "\n", "\n\n", "\t", ", ", ". ", "\r\n"]))
    return "".join(out)


def corpus():
    rng = random.Random(7)
    return [text_of(rng, 40) for _ in range(300)]


def byte_level(pattern, normalizer, ignore_merges, prefix_space=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_byte_level(tokenizer, special, size=500):
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(corpus(), trainer)


def template(tokenizer, bos):
    return processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])


def make_gpt2():
    tokenizer = byte_level(None, None, False, prefix_space=True)
    train_byte_level(tokenizer, ["<|endoftext|>"])
    return tokenizer


def make_neox():
    tokenizer = byte_level(None, normalizers.NFC(), False)
    train_byte_level(tokenizer, ["<|endoftext|>", "<|padding|>"])
    # Runs of spaces, looked for in normalized text, as GPT-NeoX has them; and stranger ones.
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    tokenizer.add_tokens([AddedToken("e\u0301<", normalized=True), AddedToken("e\u0301>", normalized=False),
                          AddedToken("[L]", lstrip=True), AddedToken("[R]", rstrip=True),
                          AddedToken("[LR]", lstrip=True, rstrip=True), AddedToken("[LR]x"), AddedToken("é")])
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im", special=True)])
    return tokenizer


def make_llama3():
    tokenizer = byte_level(LLAMA3, None, True)
    train_byte_level(tokenizer, [])
    # A word that no merges lead to: ignore_merges finds it whole.
    description = json.loads(tokenizer.to_str())
    description["model"]["vocab"]["zzzqqq"] = len(description["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False),
                                                    template(tokenizer, "<|begin_of_text|>")])
    return tokenizer


def make_qwen2():
    tokenizer = byte_level(QWEN2, normalizers.NFC(), False)
    train_byte_level(tokenizer, [])
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    return tokenizer


def make_o200k():
    tokenizer = byte_level(O200K, None, False)
    train_byte_level(tokenizer, ["<|endoftext|>"])
    return tokenizer


def fallback_bpe(fuse_unknown):
    """A BPE over characters with byte tokens: what Llama-2 and Gemma have."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=fuse_unknown))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # The most frequent characters, chosen here: the trainer's choice among equals differs from run to run.
    counts = collections.Counter("".join(corpus()).replace(" ", "▁"))
    alphabet = sorted(counts, key=lambda c: (-counts[c], c))[:90]
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, limit_alphabet=90, initial_alphabet=alphabet,
                                  special_tokens=["<unk>", "<s>", "</s>"] + ["<0x%02X>" % b for b in range(256)])
    # Trained on words; used on whole texts, as the converted SentencePiece models are.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(corpus(), trainer)
    description = json.loads(tokenizer.to_str())
    # The bytes are ordinary tokens.
    description["added_tokens"] = [t for t in description["added_tokens"] if not t["content"].startswith("<0x")]
    description["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(description))


def make_llama2():
    tokenizer = fallback_bpe(True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = template(tokenizer, "<s>")
    return tokenizer


def make_mistral():
    tokenizer = fallback_bpe(True)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = template(tokenizer, "<s>")
    return tokenizer


def make_metaspace():
    tokenizer = fallback_bpe(False)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def make_gemma():
    tokenizer = fallback_bpe(True)
    # No pre-tokenizer but one that never finds anything, and byte tokens that are not complete, so that <unk> is seen.
    description = json.loads(tokenizer.to_str())
    vocabulary = description["model"]["vocab"]
    vocabulary["<no byte>"] = vocabulary.pop("<0xF0>")
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("\n\n\n", normalized=False),
                          AddedToken("▁▁", normalized=False), AddedToken("<b>", normalized=False)])
    tokenizer.post_processor = template(tokenizer, "<s>")
    return tokenizer


MAKERS = {"gpt2": make_gpt2, "neox": make_neox, "llama3": make_llama3, "qwen2": make_qwen2, "o200k": make_o200k,
          "llama2": make_llama2, "mistral": make_mistral, "metaspace": make_metaspace, "gemma": make_gemma}

FIXED = ["", " ", "  ", "a", " a", "a ", "\n", "\r\n\r\n  x", "Hello, world!", "don't DON'T we'LL it'ſ I'M", "x'S 'tis",
         "12345678 1,234.56 ١٢٣ ⅷ²", "tabs\t\ttabs \t x", "a\u00a0b\u2003c\u3000d\u180ee\u200bf\u0085g", "\x00\x01\x7f",
         "e\u0301 é o\u0323\u0302 ộ \u1100\u1161\u11a8 각 ﬁ Å \u212b", "a\u08d3\u0323\u0301b \u09fe\u09bc",
         "👩🏽‍🔬👨‍👩‍👧 🇩🇪 🙂🙂", "細胞と遺伝子", "\U0001F468 𝔸 \U0002ebf0 \U00031350 \U0010ffff", "נֵר مُحَمَّد", "<|endoftext|>",
         "a <|endoftext|> b<|endoftext|>", "<|im_start|>user\n<|im|im_start|>", "  [L] x [R]  y  [LR]  z [LR]x [L][R] [L]",
         "<s>text</s> <s> <unk><0x41>", "▁ ▁▁ ▁▁▁ _", "e\u0301< e\u0301> é< é>", "zzzqqq zzzqqqq", "a" * 300,
         " " * 60 + "x", "\n\n\n\n\n", "<b>bold</b>", "\u2581a \u2581"]


def random_text(rng):
    """Anything: characters of all kinds, close together."""
    pools = [lambda: chr(rng.randrange(32, 127)), lambda: rng.choice(" \n\t\r\u00a0\u3000"), lambda: rng.choice("'’ sStTrRmMdDlLvVeE"),
             lambda: chr(rng.randrange(0xA0, 0x250)), lambda: chr(rng.randrange(0x300, 0x370)),
             lambda: chr(rng.randrange(0x370, 0x2000)), lambda: chr(rng.randrange(0x2000, 0x3100)),
             lambda: chr(rng.randrange(0x4E00, 0xA000)), lambda: chr(rng.randrange(0xAC00, 0xD7A4)),
             lambda: chr(rng.randrange(0x10000, 0x1FFFF)), lambda: rng.choice(WORDS),
             lambda: rng.choice(["<|endoftext|>", "<s>", "[L]", "[R]", "[LR]", "  ", "<b>", "\n\n", "▁▁"])]
    weights = [rng.random() ** 3 for _ in pools]
    return "".join(f() for f in rng.choices(pools, weights, k=rng.randrange(1, 40)))


def cases(encode, decode, vocab, seed):
    rng = random.Random(seed)
    texts = FIXED + [random_text(rng) for _ in range(60)]
    encoded = [[text, encode(text)] for text in texts]
    # Any ids, as a model may generate them: cut characters, bytes in a row, special tokens in between.
    decoded = []
    for _ in range(60):
        ids = [rng.randrange(vocab) for _ in range(rng.randrange(0, 24))]
        decoded.append([ids, decode(ids, True), decode(ids, False)])
    for text, ids in encoded[:len(FIXED) + 10]:
        decoded.append([ids, decode(ids, True), decode(ids, False)])
    return {"encode": encoded, "decode": decoded}


SURROUNDINGS = ["{}", "a{}b ", "'{}1{}\n"]
CHUNK = 512


def codes():
    """Every character below U+20000 but for the large uniform blocks, of which, as of all above, every 16th."""
    uniform = [(0x3400, 0x4DB0), (0x4E00, 0x9FF0), (0xAC00, 0xD7A0), (0xE000, 0xF8F0), (0x17000, 0x187F0)]
    return [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and
            (c % 16 == 0 or not (c >= 0x20000 or any(a <= c < b for a, b in uniform)))]


def digest(encode_batch):
    """Over the ids, as little-endian int32 with -1 after each text. A text is a surrounding with each of CHUNK
    characters put in, one after the other."""
    state = xxhash.xxh3_64()
    for surrounding in SURROUNDINGS:
        pieces = [surrounding.replace("{}", chr(c)) for c in codes()]
        for ids in encode_batch(["".join(pieces[i:i + CHUNK]) for i in range(0, len(pieces), CHUNK)]):
            state.update(b"".join(i.to_bytes(4, "little") for i in ids) + b"\xff\xff\xff\xff")
    return state.hexdigest()


def make_sentencepiece(kind, symbols, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in corpus() for line in text.split("\n") if line]), model_writer=model,
        model_type=kind, num_threads=1, minloglevel=2, character_coverage=0.98, byte_fallback=True, pad_id=3,
        user_defined_symbols=symbols, hard_vocab_limit=False, **options)
    return model.getvalue()


# A run of spaces as a symbol, as Gemma has it. (Where other spaces are taken out, releases of sentencepiece disagree about it.)
SENTENCEPIECE = {
    "spm_bpe": dict(kind="bpe", symbols=["<start_of_turn>", "▁▁"], vocab_size=520, normalization_rule_name="identity", remove_extra_whitespaces=False),
    "spm_bpe_plain": dict(kind="bpe", symbols=["▁▁"], vocab_size=520, normalization_rule_name="identity", remove_extra_whitespaces=False,
                          add_dummy_prefix=False),
    "spm_unigram": dict(kind="unigram", symbols=["<start_of_turn>"], vocab_size=480, normalization_rule_name="identity"),
}


def main():
    recorded = {"versions": {"tokenizers": tokenizers.__version__, "sentencepiece": sentencepiece.__version__},
                "surroundings": SURROUNDINGS, "json": {}, "sentencepiece": {}}
    for number, (name, make) in enumerate(MAKERS.items()):
        tokenizer = make()
        (HERE / f"{name}.json").write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=0,
                                                      separators=(",", ":")).replace("\n", "") + "\n")
        vocab = max(tokenizer.get_vocab().values()) + 1
        entry = cases(lambda t: tokenizer.encode(t).ids,
                      lambda ids, skip: tokenizer.decode(ids, skip_special_tokens=skip), vocab, number)
        entry["plain"] = [[t, tokenizer.encode(t, add_special_tokens=False).ids] for t in FIXED[:12]]
        entry["vocab_size"] = vocab
        entry["digest"] = digest(lambda texts: [e.ids for e in tokenizer.encode_batch(texts)])
        recorded["json"][name] = entry
    for number, (name, options) in enumerate(SENTENCEPIECE.items()):
        data = make_sentencepiece(**options)
        (HERE / f"{name}.model").write_bytes(data)
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        entry = cases(lambda t: processor.encode(t), lambda ids, skip: processor.decode(ids), processor.get_piece_size(), number)
        entry["vocab_size"] = processor.get_piece_size()
        recorded["sentencepiece"][name] = entry
    (HERE / "cases.json").write_text(json.dumps(recorded, ensure_ascii=True, separators=(",", ":")) + "\n")


main()
