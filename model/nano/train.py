"""Trains eduba-nano on a CPU.

    python fetch_hsmm.py --out DATA && python train.py --data DATA --work WORK --minutes 50 --out weights

WORK keeps the checkpoint, and the same command goes on from it. The time already spent counts. Training ends after
EPOCHS or the time given, whichever is first, and the learning rate falls to zero towards it.
"""

import argparse
import json
import pathlib
import time

import numpy as np
import torch

import atlas_split
from cell_sentences import CELL, SPECIAL, expressed
from first_weights import set_first_weights
from nano_model import Nano

EPOCHS = 6
BATCH, STRETCH = 2, 1024  # Stretches of the epoch's stream of cells, each after the sinks.
RATE, EMBEDDING_RATE, WARM_UP = 1e-3, 3e-4, 20
CANDIDATES = 2500  # Expected number of tokens in a step's sampled softmax.
NOISE = 0.1  # Of log expression, before every epoch's sort: how neighbours in a sentence are ordered is chance.
MINUTES_BETWEEN_CHECKPOINTS = 5.0


def epoch_stream(x, cells, rng):
    """All cells in a new order, each sorted anew."""
    stream = []
    for cell in rng.permutation(cells):
        row = slice(x.indptr[cell], x.indptr[cell + 1])
        level = np.log(x.data[row]) + NOISE * rng.standard_normal(row.stop - row.start)
        stream += [[CELL], x.indices[row][np.argsort(-level)] + len(SPECIAL)]
    return np.concatenate(stream).astype(np.int64)


def batches(stream, rng):
    """(inputs, targets) int64 [BATCH, STRETCH], all of the stream but its ends, in random order."""
    starts = np.arange(rng.integers(STRETCH), len(stream) - STRETCH, STRETCH)
    for group in np.array_split(rng.permutation(starts), len(starts) // BATCH):
        rows = np.stack([stream[s:s + STRETCH + 1] for s in group])
        yield torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])


def sampled_loss(hidden, targets, table, inclusion, generator):
    """Cross entropy whose denominator is estimated without bias: every token enters with its own probability `inclusion`,
    independently of the batch, and weighs its inverse; the target is always there. 26,535 tokens' logits for each
    position would be three quarters of the work."""
    tokens = table.shape[0]
    candidates = torch.nonzero(torch.rand(tokens, generator=generator) < inclusion).squeeze(1)
    place = torch.full((tokens,), -1)
    place[candidates] = torch.arange(len(candidates))
    logits = hidden @ table[candidates].T - inclusion[candidates].log()
    own = place[targets]
    hit = own >= 0
    logits = logits.index_put((torch.nonzero(hit).squeeze(1), own[hit]), torch.tensor(-torch.inf))
    score = (hidden * table[targets]).sum(-1, keepdim=True)
    return (torch.logsumexp(torch.cat([logits, score], dim=1), dim=1) - score[:, 0]).mean()


def exact_loss(model, sentences):
    """Mean loss over whole sentences, each alone after the sinks."""
    total, count = 0.0, 0
    with torch.no_grad():
        for sentence in sentences:
            stream = torch.from_numpy(np.concatenate([[CELL], sentence]))
            hidden = model(stream[None, :-1])[0]
            for h, y in zip(hidden.split(512), stream[1:].split(512)):
                total += float(torch.nn.functional.cross_entropy(h @ model.embed_tokens.weight.T, y, reduction="sum"))
                count += len(y)
    return total / count


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True, help="what fetch_hsmm.py wrote")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="checkpoints")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the model's folder")
    parser.add_argument("--minutes", type=float, default=50.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)

    atlas, ids, ranges, tokens = atlas_split.load(args.data)
    train, dev, _ = atlas_split.split(atlas.obs["hours"].to_numpy())
    columns = expressed(atlas)
    sentences = [np.concatenate([ids[a + 1:b], [CELL]]) for a, b in ranges]  # What is predicted after [CELL].
    dev_sentences = [sentences[c][:512 * (i + 1)] for i, c in enumerate(dev)]
    known = [sentences[c] for c in train]
    x = atlas.X[:, columns].tocsr()
    x.sort_indices()

    torch.manual_seed(atlas_split.SEED)
    model = Nano(tokens)
    model.norm.weight.data.fill_(2.0)
    checkpoint = args.work / "checkpoint.pt"
    if not checkpoint.exists():
        set_first_weights(model, atlas.X[train][:, columns].toarray(), known)
    frequency = torch.from_numpy(atlas_split.unigram(known, tokens)).float().sqrt()
    scale = CANDIDATES / float(frequency.sum())
    for _ in range(20):  # Those held at 1 leave more to the others.
        scale *= CANDIDATES / float((scale * frequency).clamp(max=1).sum())
    inclusion = (scale * frequency).clamp(max=1)
    embedding = [model.embed_tokens.weight]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n != "embed_tokens.weight"]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([
        {"params": embedding, "lr": EMBEDDING_RATE, "weight_decay": 0.0},
        {"params": matrices, "lr": RATE, "weight_decay": 0.1},
        {"params": norms, "lr": RATE, "weight_decay": 0.0}], betas=(0.9, 0.98), fused=True)
    rates = [g["lr"] for g in optimizer.param_groups]
    steps_per_epoch = sum(len(s) for s in known) // STRETCH // BATCH
    state = {"step": 0, "seconds": 0.0, "log": []}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        print(f"goes on at step {state['step']}, {state['seconds'] / 60:.1f} minutes spent", flush=True)

    def spent():
        return state["seconds"] + time.monotonic() - began

    def report():
        """Mean loss of the steps since the last report, and the exact loss on the dev cells."""
        entry = {"step": state["step"], "minutes": round(spent() / 60, 1), "dev_loss": round(exact_loss(model, dev_sentences), 4)}
        if losses:
            entry["train_loss"] = round(float(np.mean(losses)), 4)
            losses.clear()
        state["log"].append(entry)
        print(json.dumps(entry), flush=True)

    def keep():
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": {**state, "seconds": spent()}}
        torch.save(saved, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").rename(checkpoint)

    began = kept = time.monotonic()
    losses, done = [], False
    if state["step"] == 0:
        report()
    while not done:
        # Seeded by the step, so that a resumed run draws nothing twice; a resumed epoch begins anew.
        rng = np.random.default_rng([atlas_split.SEED, state["step"]])
        generator = torch.Generator().manual_seed(atlas_split.SEED + state["step"])
        for inputs, targets in batches(epoch_stream(x, train, rng), rng):
            progress = max(state["step"] / (EPOCHS * steps_per_epoch), spent() / 60 / args.minutes)
            if progress >= 1:
                done = True
                break
            factor = min(1, (state["step"] + 1) / WARM_UP) * 0.5 * (1 + np.cos(np.pi * progress))
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
            hidden = model(inputs)
            loss = sampled_loss(hidden.flatten(0, 1), targets.flatten(), model.embed_tokens.weight, inclusion, generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            state["step"] += 1
            if time.monotonic() - kept > 60 * MINUTES_BETWEEN_CHECKPOINTS:
                report()
                keep()
                kept = time.monotonic()
    report()
    keep()
    model.save(args.out)
    (args.out / "genes.txt").write_bytes((args.data / "genes.txt").read_bytes())
    (args.work / "log.json").write_text(json.dumps(state["log"], indent=1) + "\n")


if __name__ == "__main__":
    main()
