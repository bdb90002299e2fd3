// A library that claims to be an NCCL too old to be used, for nccl_communicator_test.cc.
extern "C" int ncclGetVersion(int* version) {  // NOLINT: NCCL's name.
  *version = 21304;
  return 0;
}
