# Flags for every target of ours.
#
# -ffp-contract=off: the compiler must not fuse a*b+c by itself. Where the arithmetic is part of the promise
# (docs/numerics.md) the fused operation is written out, so every optimisation level gives the same bits. -fmad=false is nvcc's word
# for it; its divisions and square roots round correctly, and keep subnormals, unless it is told otherwise.
add_compile_options("$<$<NOT:$<COMPILE_LANGUAGE:CUDA>>:-Wall;-Wextra;-Wno-unused-parameter;-ffp-contract=off;-fno-omit-frame-pointer>")
add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;-lineinfo;-Xcompiler=-Wall,-ffp-contract=off,-fno-omit-frame-pointer>")
add_compile_options("$<$<AND:$<CONFIG:RelWithDebInfo>,$<NOT:$<COMPILE_LANGUAGE:CUDA>>>:-g1>")
string(REPLACE "-O2" "-O3" CMAKE_CXX_FLAGS_RELWITHDEBINFO "${CMAKE_CXX_FLAGS_RELWITHDEBINFO}")
string(REPLACE "-DNDEBUG" "" CMAKE_CXX_FLAGS_RELWITHDEBINFO "${CMAKE_CXX_FLAGS_RELWITHDEBINFO}")

option(EDUBA_WERROR "Treat the compiler's warnings as errors (CI does; other compilers may warn of other things)" OFF)
if(EDUBA_WERROR)
  add_compile_options("$<$<NOT:$<COMPILE_LANGUAGE:CUDA>>:-Werror>")
endif()
# clang proves that what is guarded by a lock (base/mutex.h) is only touched while the lock is held.
add_compile_options("$<$<COMPILE_LANG_AND_ID:CXX,Clang>:-Wthread-safety;-Werror=thread-safety>")

if(EDUBA_SANITIZE)
  # Sanitized kernels at -O0 take minutes; -O1 keeps the stacks readable.
  add_compile_options(-fsanitize=${EDUBA_SANITIZE} -O1)
  add_link_options(-fsanitize=${EDUBA_SANITIZE})
  if(EDUBA_SANITIZE MATCHES "undefined")
    add_compile_options(-fno-sanitize-recover=undefined)
  endif()
endif()
if(EDUBA_FUZZ)
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()

find_program(CCACHE ccache)
if(CCACHE)
  # base_dir and hash_dir let checkouts in different folders share the cache.
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} CCACHE_NOHASHDIR=1
                                  ${CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
endif()
