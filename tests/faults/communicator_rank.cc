// One rank of a group, as a process for communicator_kill_test.cc to hurt.
//   communicator_rank DIRECTORY RANK SIZE WORDS CALL_SECONDS [nccl] [FAULT]
//   communicator_rank DIRECTORY RANK SIZE cases PATIENCE_SECONDS [nccl]
// DIRECTORY is the rendezvous store, a new one for each group. The group is over Gloo, or over NCCL where all
// ranks share cuda:0; for that each rank needs an NCCL_HOSTID of its own.
//
// The rank sums WORDS words again and again until a call fails. Every second call is a reduce-scatter. FAULT
// is what the rank does to itself: `kill` or `stop` while the group forms, when it has used the rendezvous
// store and the others may be connecting to it; `kill-call` or `stop-call` when the others make a call that
// it does not make. The rank prints "round N" after every call that succeeded. At the end it prints the code
// and text of the first failed call as "end CODE TEXT" and exits with 0. It exits with 3 after a wrong sum.
//
// With `cases` the rank goes through tests/contract/communicator_cases.h. It prints "case NAME" before each
// case, "broken TEXT" for each promise that was not kept, and "done" at the end. It exits with 0.
#include <signal.h>
#include <sys/prctl.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "collective/gloo/gloo_communicator.h"
#include "collective/nccl/nccl_communicator.h"
#include "tests/contract/communicator_cases.h"

namespace eduba {
namespace {

class FileRendezvous final : public Rendezvous {
 public:
  // Raises `signal_to_self` at the end of the first call, unless it is 0.
  FileRendezvous(const std::string& directory, int signal_to_self)
      : directory_(directory), signal_to_self_(signal_to_self) {}

  absl::Status Set(const std::string& key, const std::string& value, absl::Time /*deadline*/) override {
    std::ofstream(Path(key) + ".new", std::ios::binary) << value;
    std::filesystem::rename(Path(key) + ".new", Path(key));
    if (signal_to_self_ != 0) raise(signal_to_self_);
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Get(const std::string& key, absl::Time deadline) override {
    while (!std::filesystem::exists(Path(key))) {
      if (absl::Now() >= deadline) return absl::DeadlineExceededError(absl::StrCat("no file ", Path(key)));
      absl::SleepFor(absl::Milliseconds(1));
    }
    std::stringstream value;
    value << std::ifstream(Path(key), std::ios::binary).rdbuf();
    if (signal_to_self_ != 0) raise(signal_to_self_);
    return value.str();
  }

 private:
  std::string Path(const std::string& key) const {
    return absl::StrCat(directory_, "/", absl::StrReplaceAll(key, {{"/", "_"}}));
  }

  const std::string directory_;
  const int signal_to_self_;
};

int End(const absl::Status& status) {
  std::printf("end %d %s\n", static_cast<int>(status.code()), std::string(status.message()).c_str());
  std::fflush(stdout);
  return 0;
}

struct Rank {
  std::string directory;
  int rank;
  int size;
  bool nccl;

  absl::StatusOr<std::unique_ptr<Communicator>> Join(FileRendezvous& rendezvous, absl::Time deadline) const {
    if (nccl) return ConnectNccl(rank, size, rendezvous, NcclOptions(), deadline);
    return ConnectGloo(rank, size, rendezvous, GlooOptions(), deadline);
  }
};

constexpr int64_t kFaultyRound = 20;

int Sums(const Rank& own, int64_t words, absl::Duration limit, const std::string& fault) {
  const int signal = absl::StartsWith(fault, "kill")   ? SIGKILL
                     : absl::StartsWith(fault, "stop") ? SIGSTOP
                                                       : 0;
  const bool in_call = absl::EndsWith(fault, "-call");
  const auto [rank, size] = std::pair(own.rank, own.size);
  FileRendezvous rendezvous(own.directory, in_call ? 0 : signal);
  auto group = own.Join(rendezvous, absl::Now() + limit);
  if (!group.ok()) return End(group.status());
  const int64_t begin = words * rank / size;
  std::vector<int64_t> counts;
  counts.reserve(size);
  for (int r = 0; r < size; ++r) counts.push_back(words * (r + 1) / size - words * r / size);
  for (int64_t round = 0;; ++round) {
    if (in_call && round == kFaultyRound) {
      absl::SleepFor(
          absl::Milliseconds(100));  // Usually the others are in the call then. The end is the same if not.
      raise(signal);
    }
    std::vector<int64_t> data(words, rank + round);
    const absl::Time deadline = absl::Now() + limit;
    const bool scatters = round % 2 == 1;
    const absl::Status status = scatters ? (*group)->ReduceScatterI64(absl::MakeSpan(data), counts, deadline)
                                         : (*group)->SumI64(absl::MakeSpan(data), deadline);
    if (!status.ok()) return End(status);
    for (const int64_t word :
         scatters ? absl::MakeSpan(data).subspan(begin, counts[rank]) : absl::MakeSpan(data)) {
      if (word != size * (size - 1) / 2 + size * round) return 3;
    }
    std::printf("round %ld\n", round);
    std::fflush(stdout);
  }
}

int Cases(const Rank& own, absl::Duration patience) {
  CaseOptions options;
  options.rank = own.rank;
  options.size = own.size;
  options.patience = patience;
  options.join = [&own](const std::string& name, absl::Time deadline) {
    const std::string directory = absl::StrCat(own.directory, "/", name);
    std::filesystem::create_directory(directory);  // Whoever comes first creates it.
    FileRendezvous rendezvous(directory, /*signal_to_self=*/0);
    return own.Join(rendezvous, deadline);
  };
  options.begins = [](const std::string& name) {
    std::printf("case %s\n", name.c_str());
    std::fflush(stdout);
  };
  for (const std::string& text : BrokenPromises(options)) std::printf("broken %s\n", text.c_str());
  std::printf("done\n");
  return 0;
}

}  // namespace
}  // namespace eduba

int main(int argc, char** argv) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // A stopped rank must not outlive a test that failed.
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (words.size() < 5) return 2;
  const bool nccl = words.size() > 5 && words[5] == "nccl";
  const size_t fault = nccl ? 6 : 5;
  const eduba::Rank own = {words[0], std::stoi(words[1]), std::stoi(words[2]), nccl};
  const absl::Duration seconds = absl::Seconds(std::stod(words[4]));
  if (words[3] == "cases") return eduba::Cases(own, seconds);
  return eduba::Sums(own, std::stoll(words[3]), seconds, words.size() > fault ? words[fault] : "");
}
