"""Reads R's .rda files as far as tables of numbers and text go (R's own description: R Internals, "Serialization Formats",
version 2 and 3 in XDR). Vectors become numpy arrays, lists become lists; each with its attributes."""

import gzip
import struct

import numpy

SYMBOL, PAIR_LIST, TEXT, LOGICAL, INTEGER, REAL, TEXTS, LIST = 1, 2, 9, 10, 13, 14, 16, 19
NIL, REFERENCE = 254, 255


class Vector:
    """`data`: a numpy array, or a list of text or of Vectors. `attributes`: by name."""

    def __init__(self, data, attributes):
        self.data, self.attributes = data, attributes

    def names(self):
        return self.attributes["names"].data

    def column(self, name):
        """Of a data frame: a list of text (also where it is a factor) or an array."""
        column = self.data[self.names().index(name)]
        if "levels" not in column.attributes:
            return column.data
        levels = column.attributes["levels"].data
        return [levels[code - 1] for code in column.data]


class Reader:
    def __init__(self, data):
        self.data, self.at, self.seen = data, 0, []

    def take(self, size):
        if self.at + size > len(self.data):
            raise ValueError("the file ends early")
        self.at += size
        return self.data[self.at - size:self.at]

    def integer(self):
        return struct.unpack(">i", self.take(4))[0]

    def numbers(self, kind):
        count = self.integer()
        return numpy.frombuffer(self.take(count * numpy.dtype(kind).itemsize), kind).astype(kind[1:])

    def item(self):
        flags = self.integer()
        kind, has_attributes, has_tag = flags & 255, flags & 512, flags & 1024
        if kind == NIL:
            return None
        if kind == REFERENCE:
            return self.seen[(flags >> 8) - 1]
        if kind == SYMBOL:
            self.seen.append(self.item())
            return self.seen[-1]
        if kind == TEXT:
            size = self.integer()
            return None if size < 0 else self.take(size).decode()
        if kind == PAIR_LIST:
            return self.pairs(has_attributes, has_tag)
        if kind in (LOGICAL, INTEGER):
            data = self.numbers(">i4")
        elif kind == REAL:
            data = self.numbers(">f8")
        elif kind in (TEXTS, LIST):
            data = [self.item() for _ in range(self.integer())]
        else:
            raise ValueError(f"an R object of type {kind}, which is no table")
        return Vector(data, self.item() if has_attributes else {})

    def pairs(self, has_attributes, has_tag):
        """A pair list with tags, whose rest is a pair list, too."""
        found = {}
        while True:
            if has_attributes:
                self.item()
            tag = self.item() if has_tag else len(found)
            found[tag] = self.item()
            flags = self.integer()
            if flags & 255 == NIL:
                return found
            has_attributes, has_tag = flags & 512, flags & 1024


def read_rda(path):
    """The objects of the file, by name."""
    data = gzip.decompress(path.read_bytes())
    if data[:7] not in (b"RDX2\nX\n", b"RDX3\nX\n"):
        raise ValueError(f"{path}: found {data[:7]!r}, wanted an .rda file in XDR")
    reader = Reader(data)
    reader.at = 7
    version, _, _ = reader.integer(), reader.integer(), reader.integer()
    if version == 3:
        reader.take(reader.integer())  # The name of the encoding, which is UTF-8 today.
    return reader.item()
