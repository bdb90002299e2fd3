# eduba_library(NAME n SRCS ... [HDRS ...] DEPS ...): a static library with the alias eduba::n. The missing DEPS line is the
# point: a target that does not name a module cannot link it.
function(eduba_library)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS" ${ARGN})
  add_library(eduba_${ARG_NAME} STATIC ${ARG_SRCS})
  add_library(eduba::${ARG_NAME} ALIAS eduba_${ARG_NAME})
  target_include_directories(eduba_${ARG_NAME} PUBLIC ${PROJECT_SOURCE_DIR})
  target_link_libraries(eduba_${ARG_NAME} PUBLIC ${ARG_DEPS})
endfunction()

set(EDUBA_TEST_TIMEOUT_S 1800)

# eduba_test(NAME n SRCS ... DEPS ... [LABELS unit|contract|multiprocess|...]): one GoogleTest program, one ctest entry. Its
# time limit only ends a test that hangs: the machine may be ten times too busy.
function(eduba_test)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS;LABELS" ${ARGN})
  if(EDUBA_FUZZ)
    return()
  endif()
  add_executable(${ARG_NAME} ${ARG_SRCS})
  target_include_directories(${ARG_NAME} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${ARG_NAME} PRIVATE ${ARG_DEPS} GTest::gmock GTest::gtest GTest::gtest_main)
  add_test(NAME ${ARG_NAME} COMMAND ${ARG_NAME})
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  set_tests_properties(${ARG_NAME} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${EDUBA_TEST_TIMEOUT_S})
endfunction()
