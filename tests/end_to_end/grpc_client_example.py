"""A client of Eduba in plain grpcio. docs/grpc.md explains it piece by piece; a test runs it and checks that the guide quotes it.

usage: grpc_client_example.py HOST:PORT     (with the generated stubs on PYTHONPATH)"""

# [connect]
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from eduba.v1 import eduba_pb2 as pb
from eduba.v1 import eduba_pb2_grpc as rpc

PIECE_BYTES = 768 << 10  # No message may be larger than 1 MiB; this leaves room for its other fields.


def connect(server):
    channel = grpc.insecure_channel(server)
    return channel, rpc.EdubaStub(channel)
# [end]


# [create]
def create(eduba, name):
    spec = pb.SessionSpec(query_heads=4, kv_heads=2, head_dim=32, value_dim=16, dtype=pb.DTYPE_F32, sink_tokens=4, window=512)
    return eduba.CreateSession(pb.CreateSessionRequest(name=name, spec=spec), timeout=30)
# [end]


# [pieces]
def pieces(append_id, at, begin, end, keys, values):
    """Upload messages for positions [begin, end) of an append that starts at `at`. keys [tokens, kv_heads, head_dim] and
    values [tokens, kv_heads, value_dim] are little-endian float32 arrays in C order."""
    rows = max(1, PIECE_BYTES // (keys[0].nbytes + values[0].nbytes))
    for first in range(begin, end, rows):
        count = min(rows, end - first)
        part = slice(first - at, first - at + count)
        yield pb.UploadRequest(append_id=append_id, layer=0, first_position=first, count=count, dtype=pb.DTYPE_F32,
                               keys=keys[part].tobytes(), values=values[part].tobytes())
# [end]


# [proxied]
def append_proxied(eduba, session, at, keys, values):
    """Everything through the coordinator: for small appends, and where the workers cannot be reached."""
    def messages():
        yield pb.AppendRequest(plan=pb.PlanAppendRequest(session=session, at=at, count=len(keys)))
        for piece in pieces(0, at, at, at + len(keys), keys, values):
            yield pb.AppendRequest(piece=piece)
    return eduba.Append(messages(), timeout=600)
# [end]


# [bulk]
def append_bulk(eduba, session, at, keys, values):
    """Plan, upload straight to the owners, commit. All or nothing."""
    plan = eduba.PlanAppend(pb.PlanAppendRequest(session=session, at=at, count=len(keys)), timeout=60)

    def upload(worker):
        sent = 0

        def messages():
            nonlocal sent
            for extent in plan.extents:
                begin, end = extent.first_position, extent.first_position + extent.count
                if extent.worker != worker:  # Token sinks go to every worker, all else to its owner only.
                    end = min(end, plan.replicate_below)
                for piece in pieces(plan.append_id, plan.at, begin, end, keys, values):
                    sent += piece.count
                    yield piece
        with grpc.insecure_channel(plan.workers[worker]) as channel:
            received = rpc.PagesStub(channel).Upload(messages(), timeout=600).positions
        if received != sent:
            raise RuntimeError(f"the worker received {received} of {sent} positions")

    try:
        with ThreadPoolExecutor(len(plan.workers)) as pool:
            list(pool.map(upload, range(len(plan.workers))))
    except (grpc.RpcError, RuntimeError):
        eduba.AbortAppend(pb.AbortAppendRequest(append_id=plan.append_id), timeout=30)
        raise
    return eduba.CommitAppend(pb.CommitAppendRequest(append_id=plan.append_id), timeout=600)
# [end]


# [attend]
def attend(eduba, session, queries, positions=None, policy=pb.POLICY_GLOBAL):
    """queries [rows, query_heads, head_dim] float32; positions [rows] or None. Returns outputs, lse, sink mass and the summary."""
    spec = session.spec
    rows = max(1, PIECE_BYTES // (queries[0].nbytes + 10))

    def messages():
        header = pb.AttendRequest.Header(session=session.name, policy=policy, positions=positions is not None)
        yield pb.AttendRequest(header=header)
        for first in range(0, len(queries), rows):
            part = slice(first, first + rows)
            yield pb.AttendRequest(rows=pb.AttendRequest.Rows(queries=queries[part].tobytes(),
                                                              positions=[] if positions is None else positions[part]))

    outputs, lse, sink_mass, summary = [], [], [], None
    for response in eduba.Attend(messages(), timeout=600):
        if response.HasField("summary"):
            summary = response.summary
        else:
            outputs.append(response.rows.outputs)
            lse.append(response.rows.lse)
            sink_mass.append(response.rows.sink_mass)
    if summary is None or summary.rows != len(queries):
        raise RuntimeError("the call ended without all rows: the answer is incomplete")

    def array(parts, *shape):
        return np.frombuffer(b"".join(parts), "<f4").reshape(shape)
    heads = spec.query_heads
    return (array(outputs, -1, heads, spec.value_dim), array(lse, -1, heads), array(sink_mass, -1, heads), summary)
# [end]


# [errors]
def show_error(eduba):
    try:
        eduba.GetSession(pb.GetSessionRequest(name="no-such-session"), timeout=30)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            print("as it should be:", error.details())
        else:
            raise
# [end]


# [health]
def is_serving(channel):
    """grpc.health.v1 without its generated code: an empty request, and field 1 of the answer is 1 when serving."""
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    return check(b"", timeout=10) == b"\x08\x01"


def services(channel):
    """Names from server reflection: field 7 of the request asks for the list; the names stand as text in the answer."""
    info = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    answer = next(iter(info(iter([b"\x3a\x01*"]), timeout=10)))
    return [name for name in ("eduba.v1.Eduba", "grpc.health.v1.Health") if name.encode() in answer]
# [end]


# [model]
def create_model_session(eduba, name):
    """A session of the workers' model, as its folder says (GetModel's session_defaults), and the model."""
    model = eduba.GetModel(pb.GetModelRequest(), timeout=30)
    spec = pb.SessionSpec(model=pb.ModelSpec())
    return eduba.CreateSession(pb.CreateSessionRequest(name=name, spec=spec), timeout=30), model
# [end]


# [tokens]
def append_tokens(eduba, session, ids, at=None):
    """ids: token ids. Returns the receipt: its `at` is the position of the first."""
    ids = np.asarray(ids, "<i4")
    rows = PIECE_BYTES // 4

    def messages():
        for first in range(0, max(1, len(ids)), rows):
            request = pb.AppendTokensRequest(ids=ids[first:first + rows].tobytes())
            if first == 0:
                request.session = session
                if at is not None:
                    request.at = at
            yield request
    return eduba.AppendTokens(messages(), timeout=600)
# [end]


# [generate]
def generate(eduba, session, count, **options):
    """Returns token ids, their log-probabilities, the text that they make, and the summary. Each message is there as soon as its
    tokens are chosen: print its text as it comes, or cancel the call."""
    ids, log_probs, text, summary = [], [], "", None
    request = pb.GenerateRequest(session=session, max_tokens=count, **options)
    for response in eduba.Generate(request, timeout=600):
        if response.HasField("summary"):
            summary = response.summary
        else:
            ids.extend(np.frombuffer(response.tokens.ids, "<i4"))
            log_probs.extend(np.frombuffer(response.tokens.log_probs, "<f4"))
            text += response.tokens.text
    return ids, log_probs, text, summary
# [end]


# [score]
def score(eduba, session, ids):
    """ln P(ids[i] | session, ids before i) [ids], and the sinks' share of the weights [layers * query_heads]."""
    request = pb.ScoreRequest(session=session, ids=np.asarray(ids, "<i4").tobytes(), sink_mass=True)
    response = eduba.Score(request, timeout=600)
    return np.frombuffer(response.log_probs, "<f4"), np.frombuffer(response.sink_mass, "<f4")
# [end]


# [embed]
def embed(eduba, session, ranges):
    """ranges [n, 2]: positions [begin, end), ascending. Returns their mean hidden states [n, hidden_size]."""
    request = pb.EmbedRequest(session=session, ranges=np.asarray(ranges, "<i8").tobytes(), pool=pb.POOL_MEAN)
    vectors = b"".join(response.vectors for response in eduba.Embed(request, timeout=600))
    return np.frombuffer(vectors, "<f4").reshape(len(ranges), -1)
# [end]


# [fork]
def fork(eduba, session, name):
    return eduba.ForkSession(pb.ForkSessionRequest(session=session, name=name), timeout=30)
# [end]


def oracle(keys, values, queries, limit, spec):
    """What attend must answer, in float64. limit [rows]: keys at positions <= limit are seen."""
    group = spec.query_heads // spec.kv_heads
    k = np.repeat(keys.astype(np.float64), group, axis=1)
    v = np.repeat(values.astype(np.float64), group, axis=1)
    logits = np.einsum("rhd,thd->rht", queries.astype(np.float64), k) * spec.scale
    logits = np.where(np.arange(len(keys)) > np.asarray(limit)[:, None, None], -np.inf, logits)
    top = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    return (np.einsum("rht,thv->rhv", weights / total, v), (top + np.log(total))[..., 0],
            (weights[..., :spec.sink_tokens].sum(axis=-1) / total[..., 0]))


def ask_model(eduba):
    """Where the workers have a model: everything that a session of it answers, and what must hold."""
    session, model = create_model_session(eduba, "grpc-model")
    sinks = session.spec.model.sink_tokens if session.spec.model.sink_token >= 0 else 0
    random = np.random.default_rng(2)
    ids = random.integers(0, model.vocab_size, 300)
    receipt = append_tokens(eduba, session.name, ids)
    assert (receipt.at, receipt.count, receipt.length) == (sinks, 300, sinks + 300), receipt
    assert append_tokens(eduba, session.name, ids, at=sinks).already_stored == 300

    fork(eduba, session.name, "grpc-fork")
    said, log_probs, text, summary = generate(eduba, "grpc-fork", 5, temperature=1.0, seed=3)
    assert len(said) == summary.tokens == 5 and summary.length == sinks + 305, summary
    # The session itself has not changed: it gives what was said the probabilities that it was said with.
    scored, mass = score(eduba, session.name, said)
    assert scored.tolist() == log_probs, (scored, log_probs)
    assert len(mass) == len(model.layer_windows) * model.query_heads and (mass > 0).all() and (mass <= 1).all()
    vectors = embed(eduba, session.name, [[sinks, sinks + 100], [sinks + 100, sinks + 300]])
    assert vectors.shape == (2, model.hidden_size) and np.isfinite(vectors).all()
    for name in (session.name, "grpc-fork"):
        eduba.DeleteSession(pb.DeleteSessionRequest(name=name), timeout=30)
    print(f"ok: model {model.name} goes on with{text!r}")


def main():
    server = sys.argv[1]
    channel, eduba = connect(server)
    assert is_serving(channel)
    assert services(channel) == ["eduba.v1.Eduba", "grpc.health.v1.Health"]

    session = create(eduba, "grpc-example")
    random = np.random.default_rng(1)
    keys = random.standard_normal((30000, 2, 32), dtype=np.float32)
    values = random.standard_normal((30000, 2, 16), dtype=np.float32)
    receipt = append_proxied(eduba, session.name, 0, keys[:100], values[:100])
    assert receipt.length == 100, receipt
    receipt = append_bulk(eduba, session.name, 100, keys[100:], values[100:])
    assert receipt.length == 30000, receipt
    again = append_bulk(eduba, session.name, 100, keys[100:], values[100:])
    assert again.already_stored and (again.digest_low, again.digest_high) == (receipt.digest_low, receipt.digest_high)

    queries = random.standard_normal((50, 4, 32), dtype=np.float32)
    positions = [int(p) for p in random.integers(0, 30000, 50)]
    outputs, lse, sink_mass, summary = attend(eduba, session, queries, positions)
    want_outputs, want_lse, want_mass = oracle(keys, values, queries, positions, session.spec)
    assert summary.rows == 50 and summary.length == 30000, summary
    error = np.linalg.norm(outputs - want_outputs) / np.linalg.norm(want_outputs)
    assert error < 3e-6, error
    assert np.abs(lse - want_lse).max() < 1e-5
    assert np.abs(sink_mass - want_mass).max() < 1e-5

    show_error(eduba)
    try:
        ask_model(eduba)
    except grpc.RpcError as refusal:
        if refusal.code() != grpc.StatusCode.FAILED_PRECONDITION:
            raise
        print("no model here:", refusal.details())
    eduba.DeleteSession(pb.DeleteSessionRequest(name=session.name), timeout=30)
    print("ok: relative error %.1e over %d workers" % (error, summary.workers))


if __name__ == "__main__":
    main()
