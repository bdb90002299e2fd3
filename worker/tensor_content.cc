#include "worker/tensor_content.h"

#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "base/wire_array.h"
#include "google/protobuf/util/message_differencer.h"
#include "rpc/placement.h"
#include "rpc/spec.h"
#include "worker/append_replay.h"

namespace eduba {
namespace {

// `spec` is completed.
absl::StatusOr<SequenceSpec> SequenceSpecOf(const v1::SessionSpec& spec) {
  SequenceSpec result;
  result.shape.query_heads = spec.query_heads();
  result.shape.kv_heads = spec.kv_heads();
  result.shape.head_dim = spec.head_dim();
  result.shape.value_dim = spec.value_dim();
  EDUBA_ASSIGN_OR_RETURN(result.shape.key_dtype, DTypeFromProto(spec.dtype()));
  result.shape.value_dtype = result.shape.key_dtype;
  result.shape.scale = spec.scale();
  result.shape.softcap = spec.softcap();
  result.layers = spec.layers();
  result.sink_tokens = spec.sink_tokens();
  result.window = spec.window();
  result.sink_logits.assign(spec.sink_logits().begin(), spec.sink_logits().end());
  return result;
}

absl::Status EndedWithItsGroup(uint64_t append_id) {
  return absl::UnavailableError(
      absl::StrCat("append ", append_id, " ended with its group of workers; plan it again"));
}

// The bytes of one position of one layer.
RowBytes RowBytesOf(const Sequence& sequence) {
  const AttentionShape& shape = sequence.spec().shape;
  return RowBytesOf(shape.key_dtype, shape.kv_heads, shape.head_dim, shape.value_dim);
}

bool Equal(const v1::SessionSpec& a, const v1::SessionSpec& b) {
  return google::protobuf::util::MessageDifferencer::Equals(a, b);
}

void SetDigest(const Digest& digest, v1::SealResult& result) {
  result.set_digest_low(digest.low);
  result.set_digest_high(digest.high);
}

}  // namespace

TensorContent::~TensorContent() {
  while (!sessions_.empty()) Drop(sessions_.begin()->first);
}

absl::Status TensorContent::Load(const v1::OpenSession& opened, ThreadPool& threads) {
  absl::Status status = Read(opened, threads);
  if (!status.ok()) Drop(opened.session_id());
  return status;
}

absl::Status TensorContent::Read(const v1::OpenSession& opened, ThreadPool& threads) {
  const uint64_t session_id = opened.session_id();
  Session& session = sessions_[session_id];
  EDUBA_ASSIGN_OR_RETURN(session.spec, CompleteSpec(opened.spec()));
  EDUBA_ASSIGN_OR_RETURN(SequenceSpec spec, SequenceSpecOf(session.spec));
  EDUBA_ASSIGN_OR_RETURN(session.placement, PlacementFromProto(opened.placement()));
  session.sequence = std::make_unique<Sequence>(std::move(spec));
  AppendReplay replay(backend_, store_, session.sequence.get(), &threads);
  EDUBA_ASSIGN_OR_RETURN(
      session.log, SessionLog::Open(storage_->FolderOf(session_id), RowBytesOf(*session.sequence), replay));
  if (!session.log->damage().empty()) {
    // Rows that nobody acknowledged end like this when the process did. Whether more is missing, the
    // coordinator knows.
    LogInfo(absl::StrCat("session ", session_id, " is read up to position ", session.sequence->length(), ": ",
                         session.log->damage()));
  }
  if (const std::shared_ptr<StagedAppend> sealed = replay.TakeSealed()) {
    sealed->ContinueIn(session.log.get());
    const MutexLock lock(mutex_);
    appends_.emplace(std::numeric_limits<uint64_t>::max() - loaded_++, sealed);
  }
  return absl::OkStatus();
}

absl::Status TensorContent::MakeLog(uint64_t session_id, Session& session) {
  if (storage_ == nullptr || session.log != nullptr) return absl::OkStatus();
  v1::OpenSession descriptor;
  descriptor.set_session_id(session_id);
  *descriptor.mutable_spec() = session.spec;
  *descriptor.mutable_placement() = PlacementToProto(session.placement);
  EDUBA_RETURN_IF_ERROR(storage_->Create(session_id, descriptor.SerializeAsString()));
  ThreadPool self(1);
  AppendReplay nothing(backend_, store_, session.sequence.get(), &self);
  EDUBA_ASSIGN_OR_RETURN(
      session.log, SessionLog::Open(storage_->FolderOf(session_id), RowBytesOf(*session.sequence), nothing));
  return absl::OkStatus();
}

void TensorContent::Retain(const std::set<uint64_t>& session_ids) {
  std::vector<uint64_t> doomed;
  for (const auto& [id, session] : sessions_) {
    if (session_ids.count(id) == 0) doomed.push_back(id);
  }
  for (const uint64_t id : doomed) Close(id);
}

absl::StatusOr<v1::SessionContent> TensorContent::Open(const v1::OpenSession& request,
                                                       const Placement& placement) {
  EDUBA_ASSIGN_OR_RETURN(const v1::SessionSpec spec, CompleteSpec(request.spec()));
  EDUBA_ASSIGN_OR_RETURN(SequenceSpec sequence_spec, SequenceSpecOf(spec));
  const auto held = sessions_.find(request.session_id());
  if (held != sessions_.end() && held->second.placement == placement && Equal(held->second.spec, spec)) {
    return ContentOf(*held->second.sequence);
  }
  Close(request.session_id());
  Session& session = sessions_[request.session_id()];
  session.spec = spec;
  session.placement = placement;
  session.sequence = std::make_unique<Sequence>(std::move(sequence_spec));
  return ContentOf(*session.sequence);
}

v1::SessionContent TensorContent::ContentOf(const Sequence& sequence) const {
  v1::SessionContent content;
  content.set_length(sequence.length());
  content.set_digest_low(sequence.digest().low);
  content.set_digest_high(sequence.digest().high);
  v1::SealResult& sealed = *content.mutable_sealed();
  const std::shared_ptr<StagedAppend> append = SealedAppendTo(sequence);
  if (append == nullptr) {
    SetDigest(sequence.digest(), sealed);
    sealed.set_exponents(BytesOf(sequence.owned_exponents()));
    return content;
  }
  const AppendSeal seal = append->seal();
  Digest all = sequence.digest();
  all += seal.digest;
  content.set_sealed_count(append->share().count);
  SetDigest(all, sealed);
  sealed.set_exponents(BytesOf(seal.exponents));
  return content;
}

absl::Status TensorContent::Settle(const v1::SettleSession& request) {
  const auto session = sessions_.find(request.session_id());
  if (session == sessions_.end()) {
    return absl::NotFoundError(absl::StrCat("session ", request.session_id(), " is not open on this worker"));
  }
  const Sequence& sequence = *session->second.sequence;
  const std::shared_ptr<StagedAppend> append = SealedAppendTo(sequence);
  absl::Status status;
  if (append != nullptr && append->share().at + append->share().count == request.length()) {
    EDUBA_ASSIGN_OR_RETURN(std::vector<int16_t> exponents,
                           NumbersOf<int16_t>(request.exponents(), "exponents"));
    status = append->Publish(std::move(exponents));
  }
  DropAppends([&sequence](const StagedAppend& other) { return &other.sequence() == &sequence; });
  if (status.ok() && sequence.length() != request.length()) {
    status = absl::FailedPreconditionError(absl::StrCat("this worker holds ", sequence.length(),
                                                        " positions of session ", request.session_id(),
                                                        ", wanted ", request.length()));
  }
  // What the log has after that belongs to an append that came to nothing.
  if (status.ok() && session->second.log != nullptr) status = session->second.log->Cut();
  return status;
}

void TensorContent::Close(uint64_t session_id) {
  const auto session = sessions_.find(session_id);
  const bool kept = session != sessions_.end() && session->second.log != nullptr;
  Drop(session_id);
  if (kept) storage_->Erase(session_id);
}

void TensorContent::Drop(uint64_t session_id) {
  const auto session = sessions_.find(session_id);
  if (session == sessions_.end()) return;
  // Its appends end first: uploads under way still look at the sequence.
  const Sequence* const sequence = session->second.sequence.get();
  TakeAppends([sequence](const StagedAppend& append) { return &append.sequence() == sequence; });
  sessions_.erase(session);
}

absl::Status TensorContent::BeginAppend(const v1::BeginAppend& request) {
  const auto session = sessions_.find(request.session_id());
  if (session == sessions_.end()) {
    return absl::NotFoundError(absl::StrCat("session ", request.session_id(), " is not open on this worker"));
  }
  AppendShare share;
  share.at = request.at();
  share.count = request.count();
  share.compare_only = request.compare_only();
  for (const v1::Extent& extent : request.owned()) {
    share.owned.push_back({extent.first_position(), extent.first_position() + extent.count()});
  }
  if (FindAppend(request.append_id()).ok()) {
    return absl::AlreadyExistsError(absl::StrCat("append ", request.append_id(), " has begun already"));
  }
  if (!share.compare_only) EDUBA_RETURN_IF_ERROR(MakeLog(request.session_id(), session->second));
  EDUBA_ASSIGN_OR_RETURN(std::shared_ptr<StagedAppend> append,
                         StagedAppend::Begin(backend_, store_, session->second.sequence.get(),
                                             std::move(share), session->second.log.get()));
  const MutexLock lock(mutex_);
  appends_.emplace(request.append_id(), std::move(append));
  return absl::OkStatus();
}

absl::StatusOr<TensorContent::Sealed> TensorContent::SealAppend(const v1::SealAppend& request) {
  EDUBA_ASSIGN_OR_RETURN(const std::shared_ptr<StagedAppend> append, FindAppend(request.append_id()));
  EDUBA_ASSIGN_OR_RETURN(const AppendSeal seal, append->Seal());
  Sealed sealed;
  SetDigest(seal.digest, sealed.result);
  sealed.result.set_exponents(BytesOf(seal.exponents));
  const std::shared_ptr<SessionLog> log = LogOf(append->sequence());
  if (log != nullptr && !append->share().compare_only) sealed.frames = log->frames();
  return sealed;
}

absl::Status TensorContent::CommitAppend(const v1::CommitAppend& request) {
  EDUBA_ASSIGN_OR_RETURN(const std::shared_ptr<StagedAppend> append, FindAppend(request.append_id()));
  EDUBA_ASSIGN_OR_RETURN(std::vector<int16_t> exponents,
                         NumbersOf<int16_t>(request.exponents(), "exponents"));
  EDUBA_RETURN_IF_ERROR(append->Publish(std::move(exponents)));
  AbortAppend(request.append_id());
  return absl::OkStatus();
}

void TensorContent::AbortAppend(uint64_t append_id) {
  const auto append = FindAppend(append_id);
  if (!append.ok()) return;
  DropAppends([&append](const StagedAppend& other) { return &other == append->get(); });
}

void TensorContent::DropUnsealed() {
  {
    const MutexLock lock(mutex_);
    std::set<uint64_t> ended;
    for (const auto& [id, append] : appends_) {
      if (!append->sealed()) ended.insert(id);
    }
    // A group that took none with it does not make the ones before forgotten.
    if (!ended.empty()) ended_ = std::move(ended);
  }
  DropAppends([](const StagedAppend& append) { return !append.sealed() || append.share().compare_only; });
}

const Sequence* TensorContent::Find(uint64_t session_id) const {
  const auto session = sessions_.find(session_id);
  return session == sessions_.end() ? nullptr : session->second.sequence.get();
}

absl::Status TensorContent::Upload(const v1::UploadRequest& request) {
  EDUBA_ASSIGN_OR_RETURN(const std::shared_ptr<StagedAppend> append, FindAppend(request.append_id()));
  EDUBA_ASSIGN_OR_RETURN(const DType dtype, DTypeFromProto(request.dtype()));
  const absl::Status status = append->AddRows(request.layer(), request.first_position(), request.count(),
                                              dtype, request.keys(), request.values());
  const MutexLock lock(mutex_);
  if (absl::IsAborted(status) && ended_.count(request.append_id()) > 0) {
    return EndedWithItsGroup(request.append_id());
  }
  EDUBA_RETURN_IF_ERROR(status);
  touched_.insert(request.append_id());
  return absl::OkStatus();
}

std::vector<uint64_t> TensorContent::TakeTouchedAppends() {
  const MutexLock lock(mutex_);
  std::vector<uint64_t> touched(touched_.begin(), touched_.end());
  touched_.clear();
  return touched;
}

absl::StatusOr<std::shared_ptr<StagedAppend>> TensorContent::FindAppend(uint64_t append_id) const {
  const MutexLock lock(mutex_);
  const auto found = appends_.find(append_id);
  if (found != appends_.end()) return found->second;
  if (ended_.count(append_id) > 0) return EndedWithItsGroup(append_id);
  return absl::NotFoundError(absl::StrCat("append ", append_id,
                                          " is not under way on this worker: it was committed, aborted, idle "
                                          "for too long, or lost with its group; plan it again"));
}

std::shared_ptr<StagedAppend> TensorContent::SealedAppendTo(const Sequence& sequence) const {
  const MutexLock lock(mutex_);
  for (const auto& [id, append] : appends_) {
    const AppendShare& share = append->share();
    if (&append->sequence() == &sequence && !share.compare_only && share.at == sequence.length() &&
        append->sealed()) {
      return append;
    }
  }
  return nullptr;
}

std::shared_ptr<SessionLog> TensorContent::LogOf(const Sequence& sequence) const {
  for (const auto& [id, session] : sessions_) {
    if (session.sequence.get() == &sequence) return session.log;
  }
  return nullptr;
}

template <typename Predicate>
std::vector<std::shared_ptr<StagedAppend>> TensorContent::TakeAppends(Predicate doomed) {
  std::vector<std::shared_ptr<StagedAppend>> taken;
  {
    const MutexLock lock(mutex_);
    for (auto append = appends_.begin(); append != appends_.end();) {
      if (!doomed(*append->second)) {
        ++append;
        continue;
      }
      taken.push_back(std::move(append->second));
      append = appends_.erase(append);
    }
  }
  // Waits for uploads under way, which must not hold up others meanwhile.
  for (const auto& append : taken) append->Abort();
  return taken;
}

template <typename Predicate>
void TensorContent::DropAppends(Predicate doomed) {
  for (const auto& append : TakeAppends(doomed)) {
    if (append->share().compare_only) continue;
    const std::shared_ptr<SessionLog> log = LogOf(append->sequence());
    if (log == nullptr) continue;
    const absl::Status status = log->Cut();
    if (!status.ok()) LogWarning(std::string(status.message()));
  }
}

}  // namespace eduba
