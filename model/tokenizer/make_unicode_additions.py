"""Writes unicode_additions.h: what Oniguruma's general categories have and Unicode 14 has not.

Run with a Python whose unicodedata is Unicode 14 (3.11), and tokenizers 0.23.3 from PyPI:
    python make_unicode_additions.py > unicode_additions.h"""

import unicodedata

import tokenizers
from tokenizers import Regex, pre_tokenizers

CATEGORIES = ["L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "N", "Nd", "P", "S", "Z"]
CODES = [c for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000]


def members(category):
    found = set()
    split = pre_tokenizers.Split(Regex(r"\p{%s}+" % category), "removed", invert=True)
    for i in range(0, len(CODES), 50000):
        for piece, _ in split.pre_tokenize_str("".join(map(chr, CODES[i:i + 50000]))):
            found.update(map(ord, piece))
    return found


def ranges(codes):
    out = []
    for code in sorted(codes):
        if out and code == out[-1][1] + 1:
            out[-1][1] = code
        else:
            out.append([code, code])
    return [f"\\x{{{a:x}}}" + (f"-\\x{{{b:x}}}" if b > a else "") for a, b in out]


def main():
    assert unicodedata.unidata_version == "14.0.0", unicodedata.unidata_version
    print(f"""// Written by make_unicode_additions.py with tokenizers {tokenizers.__version__}. Do not edit.
#ifndef EDUBA_MODEL_TOKENIZER_UNICODE_ADDITIONS_H_
#define EDUBA_MODEL_TOKENIZER_UNICODE_ADDITIONS_H_

namespace eduba {{

// For each general category that a tokenizer's regular expression may use: the characters that Unicode 15 and 16 put
// into it, as the inside of a class. Where PCRE2 is newer than Unicode 14 they change nothing. None was taken out.
struct UnicodeAdditions {{
  const char* category;
  const char* ranges;
}};

inline constexpr UnicodeAdditions kUnicodeAdditions[] = {{""")
    for category in CATEGORIES:
        old = {c for c in CODES if unicodedata.category(chr(c)).startswith(category)}
        new = members(category)
        assert not old - new, (category, [hex(c) for c in old - new])
        parts = ranges(new - old)
        lines = ["".join(parts[i:i + 6]) for i in range(0, len(parts), 6)] or [""]
        print(f'    {{"{category}",')
        print("\n".join(f'     R"({line})"' for line in lines) + "},")
    print("""};

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_UNICODE_ADDITIONS_H_""")


main()
