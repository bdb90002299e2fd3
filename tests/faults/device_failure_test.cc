// Real processes of the real program, whose GPU fails or is another's: the call under way gets one clear
// error, the worker leaves its group and ends, and the next group gives the same bytes. The GPUs are emulated
// (faulty_main.cc).
#include <signal.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/emulated_device.h"
#include "tests/cluster/session_problem.h"
#include "tests/faults/await_epoch.h"
#include "tests/faults/process.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

constexpr absl::Duration kCallTimeout = absl::Seconds(60);

// A problem whose pages every worker has some of.
Problem SharedProblem(uint64_t seed) {
  Problem problem = MakeProblem(seed);
  problem.content.spec.set_stripe_pages(1);
  EXPECT_GT(problem.content.length, 2 * 256);
  return problem;
}

class DeviceFailure : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
    folder_ = absl::StrCat(::testing::TempDir(), "/eduba_device_failure_", getpid());
    std::filesystem::create_directory(folder_);
    ASSERT_EQ(setenv("EDUBA_EMULATED_GPUS", folder_.c_str(), /*overwrite=*/1), 0);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  void EmulateGpus(int count) const {
    for (int i = 0; i < count; ++i) std::ofstream(absl::StrCat(folder_, "/cuda:", i)).close();
  }
  std::string errors_file() const { return folder_ + "/errors"; }
  std::string Errors() const {
    std::stringstream text;
    text << std::ifstream(errors_file()).rdbuf();
    return text.str();
  }

  // Serves with everything that the tests below ask of `address`.
  void Connect(const std::string& address) {
    ClientOptions options;
    options.server = address;
    options.timeout = kCallTimeout;
    client_ = std::make_unique<Client>(options);
  }

  // A coordinator, a worker on the CPU, and one on a GPU.
  void StartGroup() {
    EmulateGpus(1);
    coordinator_ = std::make_unique<Process>(
        EDUBA_PROGRAM,
        std::vector<std::string>{"coordinator", "--listen", "127.0.0.1:0", "--group-size", "2"});
    address_ = coordinator_->AwaitReady();
    Connect(address_);
    on_cpu_ = std::make_unique<Process>(EDUBA_PROGRAM, WorkerOn("cpu"));
    on_cpu_->AwaitReady();
    StartGpuWorker();
  }
  std::vector<std::string> WorkerOn(const std::string& device) const {
    return {"worker",         "--coordinator", address_,    "--listen", "127.0.0.1:0",
            "--memory-bytes", "32MiB",         "--threads", "1",        "--device",
            device,           "--transport",   "gloo"};
  }
  void StartGpuWorker() {
    on_gpu_ = std::make_unique<Process>(EDUBA_FAULTY_PROGRAM, WorkerOn("cuda:0"), errors_file());
    on_gpu_->AwaitReady();
    epoch_ = AwaitEpochAfter(*client_, epoch_);
  }

  // The worker on the GPU must have ended, with one line that says why, and nobody else.
  void ExpectGpuWorkerLeft() {
    EXPECT_EQ(on_gpu_->AwaitEnd(), 1);
    const std::string errors = Errors();
    EXPECT_EQ(std::count(errors.begin(), errors.end(), '\n'), 1) << errors;
    EXPECT_THAT(errors, HasSubstr("this worker has left its group, and ends: cuda:emulated failed while"));
    EXPECT_THAT(errors, HasSubstr("start the worker again"));
    EXPECT_TRUE(on_cpu_->Runs());
    EXPECT_TRUE(coordinator_->Runs());
  }

  std::string folder_;
  std::string address_;
  int64_t epoch_ = 0;
  std::unique_ptr<Process> coordinator_;
  std::unique_ptr<Process> on_cpu_;
  std::unique_ptr<Process> on_gpu_;
  std::unique_ptr<Client> client_;
};

// Wherever in a call the device fails.
TEST_F(DeviceFailure, EndsTheCallAndTheWorkerAndTheNextGroupGivesTheSameBytes) {
  StartGroup();
  const Problem problem = SharedProblem(41);
  const Call& call = problem.calls[0];
  std::optional<Answers> wanted;
  for (const int calls : {1, 2, 3, 4, 7, 30}) {
    SCOPED_TRACE(absl::StrCat("calls=", calls, " ", problem.Text()));
    const auto session = StoreSession(*client_, "s", problem.content);
    ASSERT_TRUE(session.ok()) << session.status();
    const auto before = Ask(*client_, *session, call);
    ASSERT_TRUE(before.ok()) << before.status();
    if (!wanted.has_value()) {
      ASSERT_NO_FATAL_FAILURE(ExpectOracle(problem.content, call, *before));
      wanted = *before;
    }
    ASSERT_TRUE(*before == *wanted);

    on_gpu_->Send(SIGUSR1, calls);
    absl::StatusOr<Answers> answers = *before;
    while (answers.ok()) {
      ASSERT_TRUE(*answers == *wanted);
      answers = Ask(*client_, *session, call);
    }
    EXPECT_EQ(answers.status().code(), absl::StatusCode::kUnavailable) << answers.status();
    EXPECT_THAT(std::string(answers.status().message()), HasSubstr("cuda:emulated failed while"));
    EXPECT_EQ(answers.status().message().find('\n'), std::string::npos);
    ExpectGpuWorkerLeft();

    StartGpuWorker();
    EXPECT_EQ(Ask(*client_, *session, call).status().code(), absl::StatusCode::kDataLoss);
    EXPECT_EQ(client_->DeleteSession("s"), absl::OkStatus());
  }
}

TEST_F(DeviceFailure, InAnUploadStoresNothing) {
  StartGroup();
  const Problem problem = SharedProblem(42);
  const auto wanted_session = StoreSession(*client_, "before", problem.content);
  ASSERT_TRUE(wanted_session.ok()) << wanted_session.status();
  const auto wanted = Ask(*client_, *wanted_session, problem.calls[0]);
  ASSERT_TRUE(wanted.ok()) << wanted.status();
  on_gpu_->Send(SIGUSR1, 2);
  absl::Status status;
  for (int i = 0; status.ok(); ++i) {
    ASSERT_LT(i, 100);
    status = StoreSession(*client_, absl::StrCat("s", i), problem.content).status();
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(status.message().find('\n'), std::string::npos);
  ExpectGpuWorkerLeft();

  StartGpuWorker();
  const auto session = StoreSession(*client_, "after", problem.content);
  ASSERT_TRUE(session.ok()) << session.status();
  const auto after = Ask(*client_, *session, problem.calls[0]);
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_TRUE(*after == *wanted);
}

TEST_F(DeviceFailure, AGpuThatAnotherProcessHasIsAClearError) {
  StartGroup();
  Process second(EDUBA_FAULTY_PROGRAM, WorkerOn("cuda:0"), errors_file() + "_of_second");
  EXPECT_EQ(second.AwaitEnd(), 1);
  std::stringstream text;
  text << std::ifstream(errors_file() + "_of_second").rdbuf();
  EXPECT_THAT(text.str(), HasSubstr("eduba: worker: cuda:0 cannot be used"));
  EXPECT_THAT(text.str(), HasSubstr("nvidia-smi shows whether another process has it"));
}

// Whoever starts the workers keeps no GPU from them, and asks for no NCCL where nobody needs it.
TEST_F(DeviceFailure, ProcessesFindTheirGpusFree) {
  EmulateGpus(2);
  const Problem problem = SharedProblem(43);
  std::optional<Answers> wanted;
  for (const int workers : {1, 2}) {
    std::vector<std::string> words = {"up",       "--processes", "--workers", absl::StrCat(workers),
                                      "--device", "cuda",        "--listen",  "127.0.0.1:0"};
    if (workers > 1) words.insert(words.end(), {"--transport", "gloo"});
    Process up(EDUBA_FAULTY_PROGRAM, words);
    Connect(up.AwaitReady());
    const auto group = client_->ListWorkers();
    ASSERT_TRUE(group.ok()) << group.status();
    EXPECT_EQ(group->transport(), "gloo");
    ASSERT_EQ(group->workers_size(), workers);
    for (const v1::Worker& worker : group->workers()) {
      EXPECT_EQ(worker.backend(), "cuda:emulated");
      EXPECT_EQ(worker.memory_bytes(), (int64_t{64} << 20) / 5 * 3);
    }
    const auto session = StoreSession(*client_, "s", problem.content);
    ASSERT_TRUE(session.ok()) << session.status();
    const auto answers = Ask(*client_, *session, problem.calls[0]);
    ASSERT_TRUE(answers.ok()) << answers.status();
    if (!wanted.has_value()) wanted = *answers;
    EXPECT_TRUE(*answers == *wanted);
    up.Send(SIGTERM);
    EXPECT_EQ(up.AwaitEnd(), 0);
  }
}

}  // namespace
}  // namespace eduba
