// Ranks that are processes: they keep the contract; and really killed: whatever happens to one rank, every
// other returns an error in time and none crashes. Over NCCL, where there is a GPU, the ranks share it.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "collective/nccl/gpu_stream.h"
#include "collective/nccl/nccl_api.h"

namespace eduba {
namespace {

using ::testing::Contains;
using ::testing::IsEmpty;

constexpr int kSize = 4;
constexpr int kUnavailable = static_cast<int>(absl::StatusCode::kUnavailable);
constexpr int kDeadlineExceeded = static_cast<int>(absl::StatusCode::kDeadlineExceeded);

// Lets several ranks share one GPU, which NCCL refuses within a host. Each rank is another host in NCCL's
// eyes, and is connected to the others by sockets only. The ranks take turns on the GPU.
constexpr std::pair<const char*, const char*> kSharedGpu[] = {
    {"NCCL_P2P_DISABLE", "1"},       {"NCCL_SHM_DISABLE", "1"},
    {"NCCL_IB_DISABLE", "1"},        {"NCCL_NET", "Socket"},
    {"NCCL_SOCKET_IFNAME", "lo"},    {"NCCL_MAX_CTAS", "1"},
    {"NCCL_CUMEM_ENABLE", "0"},      {"NCCL_RAS_ENABLE", "0"},
    {"NCCL_SOCKET_RETRY_CNT", "10"}, {"NCCL_SOCKET_RETRY_SLEEP_MSEC", "50"}};
// The exit code of a worker when NCCL does not let go of a broken group (docs/adr/0005-gpu.md).
constexpr int kExitStuck = 137;

struct Transport {
  const char* name;
  // The time limit of a call that has to wait until its deadline. A group must be able to form within it.
  const char* seconds;
};

struct Ending {
  int code = -1;
  std::string text;
};

class RankProcess {
 public:
  // `task`: what it does, for how many seconds at most, and a fault.
  RankProcess(const Transport& transport, const std::string& directory, int rank, int size,
              std::vector<std::string> task) {
    int ends[2];
    EXPECT_EQ(pipe2(ends, O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    if (transport.name == std::string("nccl")) task.insert(task.begin() + 2, "nccl");
    // Beside this program, where it was built or packed to.
    const std::string program =
        std::filesystem::read_symlink("/proc/self/exe").replace_filename("communicator_rank");
    std::vector<std::string> command = {program, directory, std::to_string(rank), std::to_string(size)};
    command.insert(command.end(), task.begin(), task.end());
    std::vector<std::string> environment;
    for (char** word = environ; *word != nullptr; ++word) environment.emplace_back(*word);
    environment.push_back(absl::StrCat("NCCL_HOSTID=eduba-rank-", rank));
    for (const auto& [name, value] : kSharedGpu) environment.push_back(absl::StrCat(name, "=", value));
    EXPECT_EQ(posix_spawn(&pid_, program.c_str(), &actions, nullptr, Pointers(command).data(),
                          Pointers(environment).data()),
              0);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    output_ = fdopen(ends[0], "r");
  }
  ~RankProcess() {
    if (!waited_) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    fclose(output_);
  }
  RankProcess(const RankProcess&) = delete;
  RankProcess& operator=(const RankProcess&) = delete;

  void Send(int signal) const { EXPECT_EQ(kill(pid_, signal), 0); }

  // Reads on to the end; the promises of its cases that were not kept, and whether it came to their end.
  std::vector<std::string> AwaitBrokenPromises() {
    std::vector<std::string> broken;
    std::string last = "nothing";
    for (std::string line = Line(); !line.empty(); line = Line()) {
      last = std::string(absl::StripSuffix(line, "\n"));
      if (absl::StartsWith(last, "broken ")) broken.push_back(last);
    }
    if (last != "done") broken.push_back(absl::StrCat("the rank ended after '", last, "'"));
    return broken;
  }

  // Reads on until the rank has finished `round`.
  void AwaitRound(int round) {
    const std::string want = absl::StrCat("round ", round, "\n");
    for (std::string line = Line(); line != want; line = Line()) {
      if (line.empty()) {
        ADD_FAILURE() << "the rank ended before round " << round;
        return;
      }
    }
  }

  Ending AwaitEnd() {
    for (std::string line = Line(); !line.empty(); line = Line()) {
      Ending ending;
      char text[1000] = "";
      if (std::sscanf(line.c_str(), "end %d %999[^\n]", &ending.code, text) < 1) {
        continue;
      }
      ending.text = text;
      return ending;
    }
    return {};
  }

  // What waitpid says of it. Only once.
  int Wait() {
    int status = 0;
    EXPECT_EQ(waitpid(pid_, &status, 0), pid_);
    waited_ = true;
    return status;
  }

 private:
  static std::vector<char*> Pointers(std::vector<std::string>& words) {
    std::vector<char*> pointers;
    pointers.reserve(words.size() + 1);
    for (std::string& word : words) pointers.push_back(word.data());
    pointers.push_back(nullptr);
    return pointers;
  }

  std::string Line() {
    char line[2000];
    return std::fgets(line, sizeof(line), output_) == nullptr ? "" : line;
  }

  pid_t pid_ = -1;
  FILE* output_ = nullptr;
  bool waited_ = false;
};

class CommunicatorProcesses : public testing::TestWithParam<Transport> {
 protected:
  void SetUp() override {
    if (IsNccl()) {
      absl::Status missing = LoadNccl().status();
      if (missing.ok()) missing = OpenCudaStream(0).status();
      if (!missing.ok()) GTEST_SKIP() << "SKIPPED, NOT TESTED: nccl: " << missing;
    }
    std::string name = testing::TempDir() + "eduba_ranks_XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override {
    if (!directory_.empty()) std::filesystem::remove_all(directory_);
  }
  static bool IsNccl() { return GetParam().name == std::string("nccl"); }

  std::string NewRendezvous() {
    std::string rendezvous = absl::StrCat(directory_, "/", groups_++);
    std::filesystem::create_directory(rendezvous);
    return rendezvous;
  }

  // `victim` does `fault` to itself; empty: nobody does.
  void StartGroup(int64_t words, const std::string& seconds, int victim = -1, const std::string& fault = "") {
    ranks_.clear();
    const std::string rendezvous = NewRendezvous();
    for (int r = 0; r < kSize; ++r) {
      std::vector<std::string> task = {std::to_string(words), seconds};
      if (r == victim) task.push_back(fault);
      ranks_.push_back(std::make_unique<RankProcess>(GetParam(), rendezvous, r, kSize, task));
    }
  }

  void ExpectGoodEnd(int rank, const std::vector<int>& codes) {
    const Ending ending = ranks_[rank]->AwaitEnd();
    const int status = ranks_[rank]->Wait();
    if (IsNccl() && WIFEXITED(status) && WEXITSTATUS(status) == kExitStuck) {
      // Allowed, and to be seen.
      std::cout << "NCCL's abort was stuck: rank " << rank << " ended with " << kExitStuck << "\n";
      return;
    }
    EXPECT_THAT(codes, Contains(ending.code)) << "rank " << rank << ": " << ending.text;
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0)
        << "rank " << rank << ": wait status " << status;
  }

  std::string directory_;
  int groups_ = 0;
  std::vector<std::unique_ptr<RankProcess>> ranks_;
};

TEST_P(CommunicatorProcesses, KeepTheContract) {
  for (const int size : {2, 4}) {
    const std::string rendezvous = NewRendezvous();
    ranks_.clear();
    for (int r = 0; r < size; ++r) {
      ranks_.push_back(std::make_unique<RankProcess>(GetParam(), rendezvous, r, size,
                                                     std::vector<std::string>{"cases", "1.5"}));
    }
    for (int r = 0; r < size; ++r) {
      EXPECT_THAT(ranks_[r]->AwaitBrokenPromises(), IsEmpty()) << "rank " << r << " of " << size;
      EXPECT_EQ(ranks_[r]->Wait(), 0) << "rank " << r << " of " << size;
    }
  }
}

TEST_P(CommunicatorProcesses, ASurvivorOfASigkillReturnsUnavailableAndNeverAWrongSum) {
  const uint32_t seed = 4711;
  std::mt19937 random(seed);
  for (const int64_t words :
       {1, 4160, 200'000}) {  // One frame with little in it, one well filled, and two steps of them.
    for (int repeat = 0; repeat < (IsNccl() ? 1 : 3); ++repeat) {
      const int victim = static_cast<int>(random() % kSize);
      const int round = static_cast<int>(random() % 40);
      SCOPED_TRACE(absl::StrCat("seed=", seed, " words=", words, " victim=", victim, " round=", round));
      StartGroup(words, "30");
      ranks_[victim]->AwaitRound(round);
      ranks_[victim]->Send(SIGKILL);
      for (int r = 0; r < kSize; ++r) {
        if (r != victim) ExpectGoodEnd(r, {kUnavailable});
      }
    }
  }
}

TEST_P(CommunicatorProcesses, ARankThatDiesBeforeACallOfTheOthersEndsIt) {
  for (const int victim : {0, 2}) {
    SCOPED_TRACE(absl::StrCat("victim=", victim));
    StartGroup(4160, "30", victim, "kill-call");
    for (int r = 0; r < kSize; ++r) {
      if (r != victim) ExpectGoodEnd(r, {kUnavailable});
    }
  }
}

TEST_P(CommunicatorProcesses, ARankThatStopsBeforeACallOfTheOthersCostsThemNoMoreThanTheirDeadline) {
  StartGroup(4160, GetParam().seconds, /*victim=*/1, "stop-call");
  for (int r = 0; r < kSize; ++r) {
    if (r != 1) ExpectGoodEnd(r, {kDeadlineExceeded, kUnavailable});
  }
}

TEST_P(CommunicatorProcesses, WhenARankIsStoppedTheOthersReturnInTimeAndItLearnsWhenItWakes) {
  for (const int64_t words : {1, 200'000}) {
    const int victim = words == 1 ? 0 : 2;
    SCOPED_TRACE(absl::StrCat("words=", words, " victim=", victim));
    StartGroup(words, GetParam().seconds);
    ranks_[victim]->AwaitRound(10);
    ranks_[victim]->Send(SIGSTOP);
    for (int r = 0; r < kSize; ++r) {
      // The first to run out of time ends the group; for those that are a little later the connections break.
      if (r != victim) ExpectGoodEnd(r, {kDeadlineExceeded, kUnavailable});
    }
    ranks_[victim]->Send(SIGCONT);
    const Ending woken = ranks_[victim]->AwaitEnd();
    EXPECT_TRUE(woken.code == kDeadlineExceeded || woken.code == kUnavailable) << woken.text;
    EXPECT_EQ(ranks_[victim]->Wait(), 0);
  }
}

TEST_P(CommunicatorProcesses, ARankThatDiesWhileTheGroupFormsCostsTheOthersNoMoreThanTheirDeadline) {
  for (const int victim : {0, 1, 3}) {
    SCOPED_TRACE(absl::StrCat("victim=", victim));
    StartGroup(1, GetParam().seconds, victim, "kill");
    for (int r = 0; r < kSize; ++r) {
      if (r != victim) ExpectGoodEnd(r, {kDeadlineExceeded, kUnavailable});
    }
  }
}

TEST_P(CommunicatorProcesses, ARankThatStopsWhileTheGroupFormsCostsTheOthersNoMoreThanTheirDeadline) {
  for (const int victim : {0, 3}) {
    SCOPED_TRACE(absl::StrCat("victim=", victim));
    StartGroup(1, GetParam().seconds, victim, "stop");
    for (int r = 0; r < kSize; ++r) {
      if (r != victim) ExpectGoodEnd(r, {kDeadlineExceeded, kUnavailable});
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, CommunicatorProcesses,
                         testing::Values(Transport{"gloo", "1.5"}, Transport{"nccl", "10"}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace eduba
