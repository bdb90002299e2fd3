#include "tests/contract/communicator_cases.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "tests/contract/communicator_checks.h"

namespace eduba {
namespace {

constexpr auto kOk = absl::StatusCode::kOk;
constexpr auto kAborted = absl::StatusCode::kAborted;
constexpr auto kDeadlineExceeded = absl::StatusCode::kDeadlineExceeded;
constexpr auto kInternal = absl::StatusCode::kInternal;
constexpr auto kUnavailable = absl::StatusCode::kUnavailable;

absl::Status Expect(bool holds, const std::string& what) {
  return holds ? absl::OkStatus() : absl::DataLossError(what);
}

// Checks that `status` is one of `codes`.
absl::Status ExpectCode(const std::vector<absl::StatusCode>& codes, const absl::Status& status,
                        const std::string& what) {
  return Expect(std::find(codes.begin(), codes.end(), status.code()) != codes.end(),
                absl::StrCat(what, ": ", status.ToString()));
}

// Checks that the next call returns the first error's text as ABORTED.
absl::Status ExpectDead(Communicator& c, const absl::Status& first) {
  const absl::Status status = c.Barrier(Far());
  return Expect(status.code() == kAborted && status.message() == first.message(),
                absl::StrCat("a call after '", first.ToString(), "': ", status.ToString()));
}

bool IsLast(const CaseOptions& options) { return options.rank == options.size - 1; }

// The same time on all ranks, `patience` from now.
absl::StatusOr<absl::Time> AgreeOnDeadline(Communicator& c, absl::Duration patience) {
  std::vector<int64_t> nanos(1);
  if (c.rank() == 0) nanos[0] = absl::ToUnixNanos(absl::Now() + patience);
  EDUBA_RETURN_IF_ERROR(c.SumI64(absl::MakeSpan(nanos), Far()));
  return absl::FromUnixNanos(nanos[0]);
}

absl::Status Reductions(const CaseOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const auto c, options.join("reductions", Far()));
  int64_t call = 0;
  for (const int64_t count : {0, 1, 1009, 65537, 1'500'001}) {
    EDUBA_RETURN_IF_ERROR(SumAndCheck(*c, count, ++call, Far()));
    EDUBA_RETURN_IF_ERROR(MaxAndCheck(*c, count, ++call, Far()));
    for (const auto& parts :
         {UnevenParts(options.size, count), std::vector<int64_t>(options.size, count / options.size)}) {
      EDUBA_RETURN_IF_ERROR(ScatterAndCheck(*c, parts, ++call, Far()));
    }
  }
  return absl::OkStatus();
}

absl::Status Messages(const CaseOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const auto c, options.join("messages", Far()));
  int64_t call = 0;
  for (const int64_t count : {0, 1, 1009, 9'000'001}) {
    for (int shift = 1; shift < options.size; ++shift) {
      EDUBA_RETURN_IF_ERROR(SendAndCheck(*c, Ring(options.size, shift, count), ++call, Far()));
    }
  }
  return absl::OkStatus();
}

absl::Status ManyCalls(const CaseOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const auto c, options.join("many calls", Far()));
  std::mt19937 random(20240607);  // The same sequence on every rank.
  for (int call = 0; call < 100; ++call) {
    const uint32_t kind = random() % 5;
    const int64_t count = random() % 8 == 0 ? random() % 20'000 : random() % 200;
    const absl::Status status = kind == 0   ? SumAndCheck(*c, count, call, Far())
                                : kind == 1 ? MaxAndCheck(*c, count, call, Far())
                                : kind == 2 ? SendAndCheck(*c, Ring(options.size, 1, count), call, Far())
                                : kind == 3
                                    ? ScatterAndCheck(*c, UnevenParts(options.size, count), call, Far())
                                    : c->Barrier(Far());
    EDUBA_RETURN_IF_ERROR(Annotate(status, absl::StrCat("call ", call, ", kind ", kind)));
  }
  return absl::OkStatus();
}

// The last rank calls something else. At least one rank is told so, and none gets an answer.
absl::Status OtherCalls(const CaseOptions& options) {
  const std::vector<Mismatch> mismatches = Mismatches();
  std::vector<int64_t> told(mismatches.size());
  for (size_t i = 0; i < mismatches.size(); ++i) {
    EDUBA_ASSIGN_OR_RETURN(const auto c, options.join(absl::StrCat("other calls ", i), Far()));
    const absl::Status status = IsLast(options) ? mismatches[i].odd(*c) : mismatches[i].most(*c);
    EDUBA_RETURN_IF_ERROR(ExpectCode({kInternal, kUnavailable}, status, mismatches[i].what));
    told[i] = status.code() == kInternal ? 1 : 0;
  }
  EDUBA_ASSIGN_OR_RETURN(const auto c, options.join("who was told", Far()));
  EDUBA_RETURN_IF_ERROR(c->SumI64(absl::MakeSpan(told), Far()));
  for (size_t i = 0; i < told.size(); ++i) {
    EDUBA_RETURN_IF_ERROR(Expect(told[i] > 0, absl::StrCat("nobody was told: ", mismatches[i].what)));
  }
  return absl::OkStatus();
}

absl::Status LeavingAfterTheLastCall(const CaseOptions& options) {
  for (const int64_t count : {0, 100, 70'000}) {
    EDUBA_ASSIGN_OR_RETURN(auto c, options.join(absl::StrCat("leaving after ", count), Far()));
    EDUBA_RETURN_IF_ERROR(SumAndCheck(*c, count, 1, Far()));
    EDUBA_RETURN_IF_ERROR(ScatterAndCheck(*c, UnevenParts(options.size, count), 2, Far()));
  }
  return absl::OkStatus();
}

absl::Status LeavingEarly(const CaseOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(auto c, options.join("leaving early", Far()));
  EDUBA_RETURN_IF_ERROR(SumAndCheck(*c, 100, 1, Far()));
  if (IsLast(options)) return absl::OkStatus();
  const absl::Status status = SumAndCheck(*c, 100, 2, Far());
  EDUBA_RETURN_IF_ERROR(ExpectCode({kUnavailable}, status, "a call that a rank has left"));
  return ExpectDead(*c, status);
}

absl::Status Aborting(const CaseOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const auto c, options.join("aborting", Far()));
  EDUBA_RETURN_IF_ERROR(c->Barrier(Far()));
  if (options.rank == 0) c->Abort(absl::CancelledError("draining"));
  const absl::Status status = SumAndCheck(*c, 5, 1, Far());
  return ExpectCode({options.rank == 0 ? kAborted : kUnavailable}, status, "a call after an abort");
}

absl::Status ComingLate(const CaseOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const auto c, options.join("coming late", Far()));
  EDUBA_ASSIGN_OR_RETURN(const absl::Time deadline, AgreeOnDeadline(*c, options.patience));
  if (!IsLast(options)) {
    const absl::Status status = SumAndCheck(*c, 100, 1, deadline);
    EDUBA_RETURN_IF_ERROR(ExpectCode({kDeadlineExceeded}, status, "a call that a rank does not make"));
    EDUBA_RETURN_IF_ERROR(Expect(absl::Now() >= deadline, "it gave up before its deadline"));
    return ExpectDead(*c, status);
  }
  absl::SleepFor(deadline - absl::Now() + options.patience);
  // The others may have sent it all it needs, but then they left.
  EDUBA_RETURN_IF_ERROR(ExpectCode({kOk, kUnavailable}, SumAndCheck(*c, 100, 1, Far()), "a late call"));
  return ExpectCode({kAborted, kUnavailable}, SumAndCheck(*c, 100, 2, Far()), "the call after it");
}

absl::Status NotJoining(const CaseOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const auto c, options.join("before one that does not form", Far()));
  EDUBA_ASSIGN_OR_RETURN(const absl::Time deadline, AgreeOnDeadline(*c, options.patience));
  if (IsLast(options)) return absl::OkStatus();
  EDUBA_RETURN_IF_ERROR(ExpectCode({kDeadlineExceeded}, options.join("does not form", deadline).status(),
                                   "joining a group that a rank does not join"));
  return Expect(absl::Now() >= deadline, "it gave up before its deadline");
}

absl::Status ANewGroup(const CaseOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const auto c, options.join("a new group", Far()));
  return SumAndCheck(*c, 500, 1, Far());
}

}  // namespace

std::vector<std::string> BrokenPromises(const CaseOptions& options) {
  struct Case {
    const char* name;
    absl::Status (*run)(const CaseOptions&);
  };
  std::vector<std::string> broken;
  for (const Case& one :
       {Case{"reductions", Reductions}, Case{"messages", Messages}, Case{"many calls", ManyCalls},
        Case{"other calls", OtherCalls}, Case{"leaving after the last call", LeavingAfterTheLastCall},
        Case{"leaving early", LeavingEarly}, Case{"aborting", Aborting}, Case{"coming late", ComingLate},
        Case{"not joining", NotJoining}, Case{"a new group", ANewGroup}}) {
    options.begins(one.name);
    const absl::Status status = one.run(options);
    if (!status.ok()) {
      broken.push_back(absl::StrCat(one.name, ": rank ", options.rank, ": ", status.ToString()));
    }
  }
  return broken;
}

}  // namespace eduba
