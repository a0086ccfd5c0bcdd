#!/usr/bin/env python3
"""Writes tests/golden/tokenizer/*.golden: what llama.cpp makes of 20,000 lines a model.

Needs the Python package xllamacpp (llama.cpp inside) and the two models that `kvloom model pull`
fetches. Run: python3 tests/golden/make_tokenizer_golden.py

A line is put together from pieces (FRAGMENTS, random characters, random bytes) by a generator that
tests/unit/model_tokenizer_test.c has too, so that only the pieces, the ids of some lines and one
hash for every hundred lines are kept. A file is made of records; a letter, numbers, and bytes where
a number says how many:

    F n bytes             a piece
    L special n bytes     a line, whether special tokens are looked for
    I n ids               its ids
    E n ids               tokens that end an answer
    H hash                of the ids of the next hundred generated lines

llama.cpp puts U+FFFD in place of every byte that is no UTF-8. KVLoom keeps the byte; the test puts
U+FFFD there itself before it compares ids, and checks the bytes apart. No piece and no random byte
can make an overlong form or a character past U+10FFFF: the first llama.cpp reads as what it stands
for, at the second it aborts.
"""
import ctypes
import os
import pathlib
import tempfile

N_LINES = 20000
N_SHOWN = 220
LINES_A_HASH = 100
SEED = 0x6B766C6F6F6D
MASK = (1 << 64) - 1
HERE = pathlib.Path(__file__).resolve().parent / "tokenizer"
MODELS = ["smollm2-135m-instruct.q4_1", "qwen2.5-coder-0.5b-instruct.q4_k_m"]
# Other pre-tokenizers, tried on the first model's vocabulary.
OTHERS = ["gpt-2", "qwen2", "llama-bpe"]

FRAGMENTS = [
    # English, with what contractions and marks do to it
    "The", " quick", " brown", " fox", "ing", " agents", " share", " what", " they", " have", " read",
    "I'm", "we've", " don't", "they'LL", "'S", "'t", " 're", "O'Neill's", "''", " rock 'n' roll", "it'd",
    "Caches", " caches", " CACHES", " cAcHeS", "internationalization", " antidisestablishmentarianism",
    " The five agents stand in a line, and each reads what the others wrote.",
    " Nobody had opened the letter; it lay under the lamp, sealed, for eleven days.",
    "Dear all,\n\nplease find the minutes (2 pages) below.\n\n- item one\n- item two\n",
    " e.g.", " i.e.,", "...", "?!", " --", " — ", "“quoted”", " ‘single’", "(", ")", " [1]", "{}", ": ",
    # spaces and line ends
    " ", "  ", "   ", "    ", "        ", "\t", "\t\t", " \t ", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", "\n\n\n ",
    "\v", "\f", "\u0085", "\u00a0", " \u00a0 ", "\u1680", "\u2002\u2003", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\u3000\u3000",
    "\u200b", "\ufeff", "\u180e", "\u2060", "\x1c", "\x1d\x1e", "\x00", "\x01\x02", "\x7f", "\x1b[31m",
    # code
    "def f(x, *args):\n    return x[0] + 1\n", "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\n",
    "#include <stdio.h>\n", "    if (p != NULL) free(p);\n", "SELECT * FROM t WHERE id = 42;", "x->y.z()", "a&&b||!c",
    "0xDEADBEEF", "1e-9", "3.14159", "--flag=value", "$HOME/.cache", "C:\\Users\\x", "https://example.org/a?b=c&d=%20#e",
    "<div class=\"x\">&nbsp;</div>", "{\"k\": [1, 2.5, null]}", "snake_case_name", "camelCaseName", "SCREAMING_CASE", "// note\n",
    "/* */", "'''", "\"\"\"", "\\n\\t\\\\", "===", "!==", "=>", "<<=", "::", "@decorator", "0b1010", "1_000_000", "lambda x: x**2",
    # digits and numbers of several scripts
    "0", "7", "42", "123", "1234", "12345", "1234567890", " 9", " 99", "3,000", "10:30", "٣", "٠١٢٣٤٥", "۷۸۹", "१२३", "๑๒", "೧೨೩",
    "１２３", "Ⅷ", "ⅻ", "½", "¾ cup", "²", "x³", "①②", "㊿", "𝟙𝟚", "𐄇", "〇", "一二三", "𑽐𑽑", "𞓰",
    # letters of many scripts
    "Größe", " naïve", "façade", "Ελληνικά", " слово", "Привет, мир", "שלום", "مرحبا", " بالعالم", "हिन्दी", "বাংলা", "ไทยไม่มีช่องว่าง",
    "ქართული", "አማርኛ", "Tiếng Việt", "İstanbul", "ſt", "'ſ", "K", "ǅ", "ﬁ", "ʼn", "ª", "ⅷ", "Ⓐ", "𝔘𝔫𝔦", "𐐀𐐨", "𑼂𑼃", "𑄀",
    "中文字符", "日本語のテキスト", "カタカナ", "ひらがな", "한국어 문장", "繁體", "𠀀𠀁", "𱍐", "㐀", "々", "，", "。", "「」", "！", "・",
    "这是一个没有空格的句子，用来测试分词。", "これは空白のない文です。",
    # marks that combine
    "e\u0301", "n\u0303o", "a\u0308\u0323", "\u0301", "क्षि", "\u094d", "Z\u0351\u036b\u0343a\u0329l", "\u20dd", "กำ", "นี้", "\u05b0",
    # emoji, with joiners, skin tones, flags, variation selectors, keycaps
    "😀", " 🎉🎉", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "❤️", "☺", "1️⃣", "#️⃣", "🧑🏿‍🚀", "👁️‍🗨️", "\u200d", "\ufe0f",
    # other signs
    "€", " £5", "±", "×", "→", "∑", "√2", "∞", "©", "™", "№", "°C", "§3", "•", "─│┌", "█", "\ue000", "\U000f0000", "\U0010ffff", "\ufffd", "\ufffe",
    # special tokens and what looks like them
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end", "|>", "<|", "<|im_start|>user\n", "<file_sep>", "<tool_call>", "</tool_call>",
    " <tool_call>", "</s>", "<s>", "[INST]", "<|fim_prefix|>", "<repo_name>", "[PAD151665]", "<|eot_id|>",
    # no UTF-8
    b"\xff", b"\xfe\xff", b"\x80", b"\xbf\xbf", b"\xc3", b"\xe4\xb8", b"\xf1\x80\x80", b"\xe4", b"caf\xe9", b"\xed\xa0\x80", b"\xed\xb0\x80", b"\xc3(",
]
FRAGMENTS = [f.encode() if isinstance(f, str) else f for f in FRAGMENTS]

# Bytes that cannot begin an overlong form or one past U+10FFFF.
RANDOM_BYTES = [*range(0x80, 0xC0), 0xC3, 0xE4, 0xED, 0xF1, 0xFE, 0xFF]
# Half-open ranges of code points that random characters come from.
RANDOM_RANGES = [(0x20, 0x7F), (0xA0, 0x250), (0x250, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0x20000, 0x110000)]

SHOWN = [
    "", "a", " ", "  a", "a ", "a  ", "a\n", "\n a", "  \n  a", "1 2  3", "a 1", "a  1", "a   1\n", " 1", "'s 'S", "'ll'LL", "x" * 300, " " * 1000, " " * 1000 + "x",
    "\n" * 500, "\t" * 77 + "1", "0" * 500, "=" * 333, "é" * 200, "好" * 300, "😀" * 100, "ab" * 400, "<|im_end|>" * 3, "<|im_end|><|im_end", "<<|im_end|>>",
    "<|im_start|>system\nx<|im_end|>\n", "a<tool_call>b</tool_call>", "The</s> end", "\ufffd\ufffd", "a\u00a0b", "a\u3000 b", "e\u0301e\u0301", "\u0301a",
]


class Random:
    """splitmix64, and the test's way to a number below a limit."""

    def __init__(self, seed):
        self.state = seed & MASK

    def below(self, limit):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return (z ^ (z >> 31)) % limit


def piece(random):
    kind = random.below(16)
    if kind < 13:
        return FRAGMENTS[random.below(len(FRAGMENTS))]
    if kind < 15:
        first, past = RANDOM_RANGES[random.below(len(RANDOM_RANGES))]
        return chr(first + random.below(past - first)).encode()
    return bytes(RANDOM_BYTES[random.below(len(RANDOM_BYTES))] for _ in range(1 + random.below(4)))


def line(index):
    random = Random(SEED + index)
    parts = []
    for _ in range(1 + random.below(12)):
        times = 1 if random.below(20) else 1 + random.below(60)
        parts.append(piece(random) * times)
    return b"".join(parts)


def is_special(index):
    return index % 4 == 3


class Params(ctypes.Structure):
    """llama_model_params, whatever it holds: larger than it is, which its callers do not mind."""

    _fields_ = [("bytes", ctypes.c_ubyte * 1024)]


class LlamaCpp:
    def __init__(self, path):
        import xllamacpp.xllamacpp as module

        lib = self.lib = ctypes.CDLL(module.__file__)
        self.log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        lib.llama_log_set(self.log, None)
        lib.llama_backend_init()
        lib.llama_model_default_params.restype = Params
        lib.llama_model_load_from_file.restype = ctypes.c_void_p
        lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Params]
        lib.llama_model_free.argtypes = [ctypes.c_void_p]
        lib.llama_model_get_vocab.restype = ctypes.c_void_p
        lib.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
        lib.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
        lib.llama_vocab_is_eog.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        lib.llama_vocab_is_eog.restype = ctypes.c_bool
        lib.llama_tokenize.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32,
            ctypes.c_bool, ctypes.c_bool,
        ]
        self.model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        assert self.model, path
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.ids = (ctypes.c_int32 * 65536)()

    def tokenize(self, text, special):
        n = self.lib.llama_tokenize(self.vocab, text, len(text), self.ids, len(self.ids), False, special)
        assert n >= 0, text
        return self.ids[:n]

    def ends(self):
        n = self.lib.llama_vocab_n_tokens(self.vocab)
        return [i for i in range(n) if self.lib.llama_vocab_is_eog(self.vocab, i)]

    def close(self):
        self.lib.llama_model_free(self.model)


def hashes(model):
    found = []
    for first in range(0, N_LINES, LINES_A_HASH):
        value = 0xCBF29CE484222325  # FNV-1a, a number at a time
        for index in range(first, first + LINES_A_HASH):
            ids = model.tokenize(line(index), is_special(index))
            for number in [len(ids), *ids]:
                value = ((value ^ number) * 0x100000001B3) & MASK
        found.append(b"H %016x\n" % value)
    return b"".join(found)


def id_record(letter, ids):
    return b"%s %d%s\n" % (letter, len(ids), b"".join(b" %d" % i for i in ids))


def shown(model):
    lines = [(text.encode(), special) for text in SHOWN for special in (False, True)]
    lines += [(line(index), is_special(index)) for index in range(N_SHOWN)]
    records = [id_record(b"E", model.ends())]
    for text, special in lines:
        records.append(b"L %d %d %s\n" % (special, len(text), text))
        records.append(id_record(b"I", model.tokenize(text, special)))
    return b"".join(records)


def set_text(data, key, change):
    """Changes the text behind a key of a GGUF file; returns by how much it grew."""
    at = data.index(key) + len(key) + 4
    n = int.from_bytes(data[at : at + 8], "little")
    old = bytes(data[at + 8 : at + 8 + n])
    new = change(old)
    data[at : at + 8 + n] = len(new).to_bytes(8, "little") + new
    return len(new) - len(old)


def with_pretokenizer(path, name):
    """The file with another pre-tokenizer, as long as before: the chat template gives or takes."""
    data = bytearray(path.read_bytes())
    grown = set_text(data, b"tokenizer.ggml.pre", lambda old: name.encode())
    set_text(data, b"tokenizer.chat_template", lambda old: (old + b" " * 16)[: len(old) - grown])
    return data


def main():
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "kvloom/models"
    HERE.mkdir(exist_ok=True)
    pieces = b"".join(b"F %d %s\n" % (len(f), f) for f in FRAGMENTS)
    (HERE / "pieces.golden").write_bytes(pieces)
    for name in MODELS:
        model = LlamaCpp(cache / f"{name}.gguf")
        (HERE / f"{name}.golden").write_bytes(shown(model) + hashes(model))
        model.close()
    for other in OTHERS:
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            file.write(with_pretokenizer(cache / f"{MODELS[0]}.gguf", other))
            file.flush()
            model = LlamaCpp(file.name)
            (HERE / f"{MODELS[0]}.{other}.golden").write_bytes(hashes(model))
            model.close()


if __name__ == "__main__":
    main()
