"""Tables, progress and the two measures of the demo."""

import csv
import sys
import time

import numpy


def heading(text):
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def table(rows):
    """Prints rows of cells; the first is the heading, the first column is set to the left."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))))
    sys.stdout.flush()


class Progress:
    """A bar on stderr: rewritten in place on a terminal, else a line every five seconds."""

    def __init__(self, label):
        self.label, self.terminal = label, sys.stderr.isatty()
        self.next = time.monotonic() + (0 if self.terminal else 5)

    def __call__(self, done, total):
        if self.terminal:
            filled = 30 * done // total
            end = "\n" if done == total else ""
            print(f"\r{self.label} [{'#' * filled}{'.' * (30 - filled)}] {done} of {total}", end=end, file=sys.stderr,
                  flush=True)
        elif time.monotonic() >= self.next:
            self.next += 5
            print(f"{self.label}: {done} of {total}", file=sys.stderr, flush=True)


def read_calls(path):
    """(called labels, probabilities, novelties) of a table that `eduba atlas annotate` wrote."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return (numpy.array([row["label"] for row in rows]), numpy.array([float(row["probability"]) for row in rows]),
            numpy.array([float(row["novelty"]) for row in rows]))


def auroc(positives, negatives):
    """How often a positive scores above a negative; ties count half."""
    higher = (positives[:, None] > negatives[None, :]).mean()
    equal = (positives[:, None] == negatives[None, :]).mean()
    return higher + equal / 2
