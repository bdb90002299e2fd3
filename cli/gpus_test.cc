#include "cli/gpus.h"

#include <gtest/gtest.h>

#include "cli/device.h"

namespace eduba {
namespace {

class WorkerGpusTest : public ::testing::Test {
 protected:
  void TearDown() override { SetWorkerGpus(Gpus()); }
};

TEST_F(WorkerGpusTest, WorkersTakeGpusInTurnAndShareTheirFreeMemory) {
  Gpus gpus;
  gpus.describe = [] {
    cuda::CudaMachine machine;
    machine.gpus.resize(2);
    return machine;
  };
  gpus.free_bytes = [](int index) { return int64_t{1000} * (index + 1); };
  SetWorkerGpus(gpus);
  const auto devices = DevicesOfWorkers("cuda", 3);
  ASSERT_TRUE(devices.ok()) << devices.status();
  EXPECT_EQ(*devices, (std::vector<std::string>{"cuda:0", "cuda:1", "cuda:0"}));
  EXPECT_FALSE(EachHasItsGpu(*devices));
  EXPECT_EQ(*DefaultMemoryBytes(*devices, ""), 600 + 1200);
}

TEST_F(WorkerGpusTest, OnlyWorkersOnGpusAreEquipped) {
  Gpus gpus;
  int equipped = -1;
  gpus.equip = [&equipped](int index, Worker::Options& options) {
    equipped = index;
    return absl::UnavailableError("no kernels");
  };
  SetWorkerGpus(gpus);
  Worker::Options options;
  options.backend = "reference";
  EXPECT_TRUE(EquipWorker(options).ok());
  options.backend = "cpu";
  EXPECT_TRUE(EquipWorker(options).ok());
  EXPECT_EQ(equipped, -1);
  options.backend = "cuda:3";
  EXPECT_EQ(EquipWorker(options).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(equipped, 3);
}

}  // namespace
}  // namespace eduba
