#include "coordinator/coordinator.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/pages.h"
#include "base/status_macros.h"
#include "coordinator/store.h"

namespace eduba {
namespace {

// For the last replies to leave once everything has been ended.
constexpr absl::Duration kFlush = absl::Milliseconds(500);

}  // namespace

absl::StatusOr<std::unique_ptr<Coordinator>> Coordinator::Start(const Options& options) {
  if (options.group_size < 1 || options.group_size > kMaxGroupSize) {
    return absl::InvalidArgumentError(
        absl::StrCat("group size is ", options.group_size, ", wanted 1 to ", kMaxGroupSize));
  }
  EDUBA_ASSIGN_OR_RETURN(std::unique_ptr<Store> store, Store::Open(options.data_dir));
  EDUBA_RETURN_IF_ERROR(store->BeginTerm());
  EDUBA_ASSIGN_OR_RETURN(StoredState stored, store->Load());
  ClusterState::Options state;
  state.group_size = options.group_size;
  state.transport = options.transport;
  state.version = options.version;
  state.lasting = !options.data_dir.empty();
  state.form_timeout_ms = absl::ToInt64Milliseconds(options.form_timeout);
  state.operation_timeout_ms = absl::ToInt64Milliseconds(options.operation_timeout);

  auto coordinator = std::unique_ptr<Coordinator>(new Coordinator());
  Coordinator* const self = coordinator.get();
  self->runtime_ = std::make_unique<Runtime>(std::move(state), std::move(store), std::move(stored),
                                             [self](bool serving) { self->SetServing(serving); });
  self->eduba_ = std::make_unique<EdubaService>(self->runtime_.get());
  self->group_ = std::make_unique<GroupService>(self->runtime_.get());
  EDUBA_ASSIGN_OR_RETURN(self->server_,
                         RpcServer::Start(options.listen, {self->eduba_.get(), self->group_.get()}));
  self->address_ = self->server_->address();
  const MutexLock lock(self->health_mutex_);
  self->health_ = self->server_.get();
  self->health_->SetServing(self->serving_);
  return coordinator;
}

Coordinator::~Coordinator() { Shutdown(absl::ZeroDuration()); }

void Coordinator::SetServing(bool serving) {
  const MutexLock lock(health_mutex_);
  serving_ = serving;
  if (health_ != nullptr) health_->SetServing(serving);
}

void Coordinator::Shutdown(absl::Duration grace) {
  if (server_ == nullptr) return;
  SetServing(false);
  runtime_->Drain(absl::Now() + grace);
  runtime_->Stop();
  {
    const MutexLock lock(health_mutex_);
    health_ = nullptr;
  }
  server_->Shutdown(kFlush);
  server_.reset();
}

}  // namespace eduba
