# Compile settings shared by every room, and the function that makes one.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

# ccache where there is one. With a precompiled header it needs to be told what may be ignored.
option(KALMANET_CCACHE "Compile through ccache if it is installed" ON)
find_program(KALMANET_CCACHE_PROGRAM ccache)
if(KALMANET_CCACHE AND KALMANET_CCACHE_PROGRAM AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env
    CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
    ${KALMANET_CCACHE_PROGRAM})
endif()

add_library(kalmanet_options INTERFACE)
target_compile_options(kalmanet_options INTERFACE -Wall -Wextra -Wshadow)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # gcc 12 sees overlapping copies in std::string's operator+ where there are none (its bug 105651).
  target_compile_options(kalmanet_options INTERFACE -Wno-restrict)
endif()
if(KALMANET_WERROR)
  target_compile_options(kalmanet_options INTERFACE -Werror)
endif()
if(KALMANET_SANITIZE)
  # Without recovery: a finding ends the test that made it.
  target_compile_options(kalmanet_options INTERFACE
    -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(kalmanet_options INTERFACE -fsanitize=address,undefined)
  # For what is all templates and takes minutes to compile otherwise. Left out are
  # UndefinedBehaviorSanitizer's checks of every pointer; AddressSanitizer sees what comes of a wrong
  # one.
  set(KALMANET_FEWER_CHECKS -fno-sanitize=null,alignment,object-size,vptr)
endif()

# A test's own code is run a few times and compiled once: what it calls is optimised, in its room.
# (The emulations of src/cuda are a test's own code, and long: hence -O1.)
set(KALMANET_TEST_OPTIONS $<$<CONFIG:Release>:-O1>)
if(KALMANET_SANITIZE)
  set(KALMANET_TEST_OPTIONS -O0 ${KALMANET_FEWER_CHECKS})
endif()

if(KALMANET_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    message(FATAL_ERROR "KALMANET_FUZZ needs clang (libFuzzer); this is ${CMAKE_CXX_COMPILER}. "
      "Use the preset: cmake --preset fuzz")
  endif()
  target_compile_options(kalmanet_options INTERFACE
    -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(kalmanet_options INTERFACE -fsanitize=address,undefined)
endif()

# kalmanet_room(name SOURCES... [DEPENDS targets...]): one static library a room. Headers are
# included by their path under src/ ("core/problem.hpp"), public ones as "kalmanet/...".
function(kalmanet_room name)
  cmake_parse_arguments(ROOM "" "" "SOURCES;DEPENDS" ${ARGN})
  add_library(kalmanet_${name} STATIC ${ROOM_SOURCES})
  add_library(kalmanet::${name} ALIAS kalmanet_${name})
  target_include_directories(kalmanet_${name} PUBLIC
    ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_link_libraries(kalmanet_${name} PRIVATE kalmanet_options PUBLIC ${ROOM_DEPENDS})
endfunction()

# kalmanet_test(name SOURCES... DEPENDS targets... [LABELS labels...]): one GoogleTest program.
function(kalmanet_test name)
  cmake_parse_arguments(TEST "SHARES_TORCH_PCH" "" "SOURCES;DEPENDS;LABELS" ${ARGN})
  add_executable(${name} ${TEST_SOURCES})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
  if(NOT TEST_SHARES_TORCH_PCH)  # (which was compiled with options that its users must have)
    target_compile_options(${name} PRIVATE ${KALMANET_TEST_OPTIONS})
  endif()
  target_link_libraries(${name} PRIVATE kalmanet_options ${TEST_DEPENDS} GTest::gtest_main GTest::gmock)
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 120 PROPERTIES LABELS "${TEST_LABELS}")
endfunction()

# kalmanet_fuzzer(name SOURCES... DEPENDS targets... CORPUS folder): one libFuzzer program, under
# fuzzers/ in the build folder, with its seeds beside it as name.seeds (tools/fuzz runs them all).
function(kalmanet_fuzzer name)
  cmake_parse_arguments(FUZZ "" "CORPUS" "SOURCES;DEPENDS" ${ARGN})
  add_executable(${name} ${FUZZ_SOURCES})
  target_link_libraries(${name} PRIVATE kalmanet_options ${FUZZ_DEPENDS})
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  set_target_properties(${name} PROPERTIES
    RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/fuzzers)
  file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/fuzzers)
  file(CREATE_LINK ${FUZZ_CORPUS} ${PROJECT_BINARY_DIR}/fuzzers/${name}.seeds SYMBOLIC)
endfunction()
