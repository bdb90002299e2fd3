# What tests/gpu/run.sh runs, and tests/gpu/pack.sh packs; sourced by both, in the root of the repository.
programs=(eduba backend_test layer_kernels_test gpu_layers_test communicator_contract_test nccl_communicator_test communicator_rank
  communicator_kill_test eduba_faulty)

build_programs() {
  cmake --preset release -DEDUBA_CUDA=ON && cmake --build --preset release -j "$(nproc)" --target "${programs[@]}"
}
