"""The main job: annotate a real cell atlas, know what is not in it, do the same with a million cells, and let a model read
another atlas whole. deploy/demo.sh calls it."""

import argparse
import filecmp
import pathlib
import signal
import sys
import time

import numpy
from sklearn.neighbors import KNeighborsClassifier

from cells import PLANTED, Synthetic, read_atlas, write_h5ad
from report import Progress, auroc, heading, read_calls, table
from service import Service
from time_course import time_course

SPLITS = 5      # of which the first is shown in full
NEIGHBOURS = 15  # scanpy's default
WORKERS = 4
CELLS_MIN = 1000
PLANTED_QUERIES = 5


def split(cells, seed):
    """(reference, held out): 80 % and 20 % of the rows, in order."""
    order = numpy.random.default_rng(seed).permutation(cells)
    held_out = cells // 5
    return numpy.sort(order[held_out:]), numpy.sort(order[:held_out])


class Demo:
    def __init__(self, arguments):
        self.eduba, self.atlas, self.work = arguments.eduba, arguments.atlas, arguments.work
        self.vectors, self.labels, self.names = read_atlas(self.atlas)
        self.label_names = numpy.array(self.names)
        self.synthetic_cells = arguments.cells
        self.window = arguments.cells // 16

    def service(self, workers):
        return Service(self.eduba, workers, self.work / f"service_{workers}.log")

    def save_rows(self, name, rows):
        path = self.work / f"{name}.npy"
        numpy.save(path, rows)
        return path

    def call(self, service, reference, asked, name, show=False):
        """Loads `reference` rows, annotates `asked` rows; returns the calls and both reports."""
        out = self.work / f"{name}.csv"
        loaded = service.load(name, self.atlas, self.save_rows(f"{name}_reference", reference), show=show)
        answered = service.annotate(name, self.atlas, out, self.save_rows(f"{name}_asked", asked), show=show)
        service.delete(name)
        return read_calls(out), loaded, answered

    def knn(self, reference, asked):
        model = KNeighborsClassifier(NEIGHBOURS).fit(self.vectors[reference], self.labels[reference])
        return model.predict(self.vectors[asked])

    def accuracy(self, service):
        heading(f"Cell types: {len(self.labels)} PBMCs, 80 % reference, 20 % to call (seed 0)")
        ours, theirs = [], []
        for seed in range(SPLITS):
            reference, asked = split(len(self.labels), seed)
            (called, _, _), loaded, answered = self.call(service, reference, asked, f"pbmc_{seed}", show=seed == 0)
            right = called == self.label_names[self.labels[asked]]
            knn_right = self.knn(reference, asked) == self.labels[asked]
            ours.append(right.mean())
            theirs.append(knn_right.mean())
            if seed == 0:
                rows = [["label", "cells", "eduba", f"{NEIGHBOURS}-NN"]]
                for code, label in enumerate(self.names):
                    mine = self.labels[asked] == code
                    if mine.any():
                        rows.append([label, mine.sum(), f"{right[mine].mean():.2f}", f"{knn_right[mine].mean():.2f}"])
                rows.append(["all", len(asked), f"{ours[0]:.3f}", f"{theirs[0]:.3f}"])
                print(f"  kernel width sigma {loaded['sigma']:.3f} and sink distance {loaded['sink_distance']:.2f}, "
                      f"chosen from the reference; {answered['seconds'] * 1e3:.0f} ms on {answered['workers']} workers")
                table(rows)
        print(f"  mean accuracy over {SPLITS} splits: eduba {numpy.mean(ours):.3f}, "
              f"{NEIGHBOURS}-NN {numpy.mean(theirs):.3f}")

    def novelty(self, service):
        heading("Unknown types: one type at a time is left out of the reference; does the sink's share show it?")
        reference, held_out = split(len(self.labels), 0)
        rows = [["left out", "cells", "AUROC", "novelty > 0.5", "of the others"]]
        progress = Progress("  types")
        for code, label in enumerate(self.names):
            left_out = numpy.flatnonzero(self.labels == code)
            others = held_out[self.labels[held_out] != code]
            (_, _, novelty), _, _ = self.call(service, reference[self.labels[reference] != code],
                                              numpy.concatenate([left_out, others]), f"without_{code}")
            score, other = novelty[:len(left_out)], novelty[len(left_out):]
            rows.append([label, len(left_out), f"{auroc(score, other):.2f}", f"{(score > 0.5).mean():.2f}",
                         f"{(other > 0.5).mean():.2f}"])
            progress(code + 1, len(self.names))
        table(rows)
        print("  AUROC: how often a left-out cell is more novel than a held-out cell of a known type. Types that overlap others\n"
              "  (T-cell subtypes, and monocytes beside dendritic cells) cannot look new: their neighbours are still there.")

    def write_synthetic(self):
        """The million cells and the questions to them."""
        heading(f"Scale: {self.synthetic_cells:,} SYNTHETIC cells, the reference resampled with noise, and 3 of a type of their own")
        reference, asked = split(len(self.labels), 0)
        made = Synthetic(self.vectors[reference], self.labels[reference], self.names, self.synthetic_cells)
        file = self.work / "synthetic.h5ad"
        # Written every time: the numbers that follow are taken from the generator in this order.
        write_h5ad(file, made.count, self.vectors.shape[1], made.labels, made.names, "synthetic",
                   made.blocks(Progress("  writing")))
        questions = numpy.concatenate([self.vectors[asked], made.more_planted(PLANTED_QUERIES)])
        truth = numpy.concatenate([self.labels[asked], numpy.full(PLANTED_QUERIES, len(self.names))])
        question_file = self.work / "questions.h5ad"
        write_h5ad(question_file, len(questions), questions.shape[1], truth, made.names, "question", [questions])
        nearest = numpy.linalg.norm(self.vectors[reference] - made.home, axis=1).min()
        print(f"  {file.stat().st_size / 2**20:.0f} MiB; nearest real cell to the planted type: {nearest:.1f} away")
        return file, question_file, numpy.array(made.names)[truth]

    def scale(self, service, file, questions, truth):
        loaded = service.load("million", file, window=self.window)
        began = time.monotonic()
        answered = service.annotate("million", questions, self.work / f"million_{service.workers}.csv")
        seconds = time.monotonic() - began
        called, probability, _ = read_calls(self.work / f"million_{service.workers}.csv")
        planted = truth == PLANTED
        ordinary = (called == truth)[~planted].mean()
        found = probability[planted & (called == PLANTED)]
        print(f"  loaded in {loaded['seconds']:.2f} s ({loaded['cells'] / loaded['seconds']:,.0f} cells/s), sigma "
              f"{loaded['sigma']:.3f}; {len(truth)} questions in {answered['seconds']:.2f} s ({seconds:.2f} s with the program's "
              f"start), {answered['bytes_read'] / 2**20:,.0f} MiB of keys and values read, {answered['collectives']} collectives, "
              f"{answered['workers']} workers")
        print(f"  held-out real cells called right: {ordinary:.3f}")
        least = found.min() if len(found) else 0.0
        print(f"  planted type, global:  {len(found)} of {planted.sum()} questions find the 3 cells among "
              f"{self.synthetic_cells:,}; least probability {least:.4f}")
        if len(found) != planted.sum() or least <= 0.9:
            raise SystemExit("demo: the planted cells were not found")

        service.annotate("million", questions, self.work / "million_window.csv", policy="window")
        called, _, novelty = read_calls(self.work / "million_window.csv")
        print(f"  planted type, window:  {(called == PLANTED)[planted].sum()} of {planted.sum()} find them in the last "
              f"{self.window:,} cells; least novelty {novelty[planted].min():.4f}")
        if (called == PLANTED).any():
            raise SystemExit("demo: a window query saw cells outside its window")

    def one_worker(self, file, questions):
        heading("The same answers from 1 worker, byte for byte")
        reference, asked = split(len(self.labels), 0)
        with self.service(1) as service:
            service.load("million", file, window=self.window)
            answered = service.annotate("million", questions, self.work / "million_1.csv")
            self.call(service, reference, asked, "pbmc_1_worker")
        pairs = [(f"million_{WORKERS}.csv", "million_1.csv"), ("pbmc_0.csv", "pbmc_1_worker.csv")]
        for many, one in pairs:
            if not filecmp.cmp(self.work / many, self.work / one, shallow=False):
                raise SystemExit(f"demo: {many} and {one} differ")
            print(f"  {many} ({WORKERS} workers) and {one} (1 worker): same bytes")
        print(f"  {answered['seconds']:.2f} s on 1 worker")

    def run(self):
        with self.service(WORKERS) as service:
            self.accuracy(service)
            self.novelty(service)
            file, questions, truth = self.write_synthetic()
            self.scale(service, file, questions, truth)
        self.one_worker(file, questions)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eduba", type=pathlib.Path, required=True)
    parser.add_argument("--atlas", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--cells", type=int, required=True)
    parser.add_argument("--time-course", type=pathlib.Path, required=True, help="what hsmm.py wrote")
    parser.add_argument("--whole", action="store_true", help="let the model read all genes of a cell, not the first 999")
    arguments = parser.parse_args()
    if arguments.cells < CELLS_MIN:
        parser.error(f"found --cells {arguments.cells}, wanted {CELLS_MIN} or more")
    # So that the service is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    began = time.monotonic()
    Demo(arguments).run()
    time_course(arguments.eduba, arguments.time_course, arguments.work, arguments.whole)
    print(f"\nDone in {time.monotonic() - began:.0f} s. The tables of calls are in {arguments.work}")


if __name__ == "__main__":
    main()
