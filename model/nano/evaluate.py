"""What eduba-nano knows about cells that it was not trained on, and what its hidden states show of the time course.

    python evaluate.py --data DATA --model weights --out report.json [perplexity] [time-course] [time-course-whole]

perplexity         over every EVERY-th token of every test cell, exact softmax, beside baselines counted on the training cells.
time-course        how well a vector a cell separates 0, 24, 48 and 72 hours: the mean of the hidden states over the cell's FIRST
                   genes, in ONE context of all cells, beside PCA of the log counts.
time-course-whole  the same over all the genes of a cell.
"""

import argparse
import json
import pathlib
import time

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.model_selection import LeaveOneOut, cross_val_predict

import atlas_split
from cell_sentences import CELL
from nano_model import WINDOW, Nano

SMOOTHINGS, SHARES = (2, 4, 8), (0.02, 0.05, 0.1)  # The rank baseline's, chosen on the dev cells.
RANKS = (0, 10, 100, 1000, 4000, 16384)  # Edges by which the report is split.
NEIGHBOURS = 10
FIRST = 1000  # Most expressed genes of a cell that are pooled.
EVERY = 8


def without_seen(log_p, sentence, ranks):
    """Log probabilities [ranks, tokens] renormalised over what is left at these ranks: a gene occurs once in a cell."""
    place = torch.full((log_p.shape[1],), len(sentence))
    place[torch.from_numpy(sentence[:-1])] = torch.arange(len(sentence) - 1)
    return torch.log_softmax(log_p.masked_fill(place[None, :] < torch.from_numpy(ranks)[:, None], -torch.inf), dim=1)


def perplexity(model, sentences, split):
    train, dev, test = split
    tokens = model.config["vocab_size"]
    known = [sentences[c] for c in train]
    unigram = atlas_split.unigram(known, tokens)

    def rank_loss(table, cells):
        picked = [-np.log(table[sentences[c], atlas_split.rank_bins(len(sentences[c]))]) for c in cells]
        return float(np.concatenate(picked).mean())

    best = None
    for smoothing in SMOOTHINGS:
        plain = atlas_split.rank_table(known, tokens, smoothing, 0.0)
        for share in SHARES:
            table = (1 - share) * plain + share * unigram[:, None]
            loss = rank_loss(table, dev)
            if best is None or loss < best[0]:
                best = (loss, smoothing, share, table)
    _, smoothing, share, table = best
    log_table = torch.from_numpy(np.log(table).T.astype(np.float32))

    losses = {name: [] for name in ("unigram", "rank", "rank_unseen", "model", "model_unseen")}
    ranks = []
    with torch.no_grad():
        for index, cell in enumerate(test):
            sentence = sentences[cell]
            hidden = model(torch.from_numpy(np.concatenate([[CELL], sentence[:-1]]))[None])[0]
            bins = atlas_split.rank_bins(len(sentence))
            chosen = np.arange(index % EVERY, len(sentence), EVERY)
            for part in np.array_split(chosen, len(chosen) // 256):
                y = torch.from_numpy(sentence[part])[:, None]
                losses["unigram"].append(-np.log(unigram[sentence[part]]))
                for name, log_p in (("rank", log_table[bins[part]]),
                                    ("model", torch.log_softmax(hidden[part] @ model.embed_tokens.weight.T, dim=1))):
                    losses[name].append(-log_p.gather(1, y)[:, 0].numpy())
                    losses[name + "_unseen"].append(-without_seen(log_p, sentence, part).gather(1, y)[:, 0].numpy())
            ranks.append(chosen)
    ranks = np.concatenate(ranks)
    report = {"cells": len(test), "tokens": len(ranks), "rank_smoothing": smoothing, "rank_share": share}
    for name, pieces in losses.items():
        loss = np.concatenate(pieces)
        report[name] = {"loss": round(float(loss.mean()), 4), "perplexity": round(float(np.exp(loss.mean())), 1)}
        for a, b in zip(RANKS, RANKS[1:]):
            inside = loss[(ranks >= a) & (ranks < b)]
            report[name][f"perplexity_ranks_{a}_to_{b - 1}"] = round(float(np.exp(inside.mean())), 1)
    return report


def pooled(model, ids, ranges):
    """The mean hidden state of every range [cells, hidden_size]. The cells are ONE context: each is computed after as many
    of the tokens before it as can reach it through the layers' windows."""
    reach = model.config["num_hidden_layers"] * (WINDOW - 1)
    out = []
    with torch.no_grad():
        for begin, end in ranges:
            start = max(0, begin - reach)
            out.append(model(torch.from_numpy(ids[start:end])[None])[0, begin - start:].mean(0).numpy())
    return np.stack(out)


def separation(x, hours, test):
    """x [cells, features] as it is; standardised first, so that no feature's scale decides."""
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    guess = cross_val_predict(KNeighborsClassifier(NEIGHBOURS), x, hours, cv=LeaveOneOut())
    return {"silhouette": round(float(silhouette_score(x, hours)), 3),
            "neighbours_accuracy": round(float((guess == hours).mean()), 3),
            "neighbours_accuracy_test_cells": round(float((guess == hours)[test].mean()), 3)}


def time_course(model, atlas, ids, ranges, hours, test, first):
    if first:
        ranges = np.stack([ranges[:, 0], np.minimum(ranges[:, 1], ranges[:, 0] + first)], axis=1)
    table = model.embed_tokens.weight.detach().numpy()
    vectors = {
        "hidden_mean": pooled(model, ids, ranges),
        "embedding_mean": np.stack([table[ids[a:b]].mean(0) for a, b in ranges]),  # What the layers add nothing to.
        "log_counts": np.log1p(atlas.X.toarray()),
    }
    report = {"cells": len(hours), "first_genes": first, "neighbours": NEIGHBOURS,
              "chance": round(float(np.unique(hours, return_counts=True)[1].max() / len(hours)), 3)}
    for name, x in vectors.items():
        # The same number of dimensions for all, so that distances are of one kind.
        report[name] = {f"{d}_components": separation(PCA(d, random_state=0).fit_transform(x), hours, test) for d in (2, 10)}
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("parts", nargs="*", default=["perplexity", "time-course", "time-course-whole"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    atlas, ids, ranges, _ = atlas_split.load(args.data)
    hours = atlas.obs["hours"].to_numpy().astype(int)
    sentences = [np.concatenate([ids[a + 1:b], [CELL]]) for a, b in ranges]
    split = atlas_split.split(hours)
    model = Nano.load(args.model)
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in args.parts:
        began = time.process_time()
        if part == "perplexity":
            report[part] = perplexity(model, sentences, split)
        elif part in ("time-course", "time-course-whole"):
            first = FIRST if part == "time-course" else None
            report[part] = time_course(model, atlas, ids, ranges, hours, split[2], first)
        else:
            parser.error(f"no such part: {part}")
        print(part, f"{time.process_time() - began:.0f} s of CPU", json.dumps(report[part], indent=1), flush=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
