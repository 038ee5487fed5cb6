# The PyTorch that is installed for KALMANET_PYTHON, as two targets, and the function that makes a
# room on top of it. No find_package(Torch): that needs a CUDA toolkit for a CUDA build of PyTorch,
# and we compile host code only. Python is asked where the package lies, without importing it.
#
#   torch_stable  the stable ABI: headers torch/csrc/stable and torch/headeronly, target 2.11.
#   torch_full    all of LibTorch's C++ API (torch/torch.h).
#
# Both work with CPU and CUDA builds, from 2.11 on.

set(KALMANET_TORCH_MINIMUM 2.11)
execute_process(
  COMMAND ${KALMANET_PYTHON} -c [=[
import importlib.util, os, runpy, sys
spec = importlib.util.find_spec("torch")
if spec is None or not spec.submodule_search_locations:
    sys.exit("it has no package named torch")
folder = os.path.realpath(list(spec.submodule_search_locations)[0])
version = runpy.run_path(os.path.join(folder, "version.py"))
print(folder, str(version["__version__"]), version.get("cuda") or "none", sep=";", end="")
]=]
  RESULT_VARIABLE _torch_failed OUTPUT_VARIABLE _torch_found ERROR_VARIABLE _torch_error)
set(_torch_help "Run tools/setup, which makes .venv with the PyTorch that this project pins; or \
pass -DKALMANET_PYTHON=/path/to/python of an environment with torch >= ${KALMANET_TORCH_MINIMUM}; \
or build the torch-free rooms alone with -DKALMANET_TORCH=OFF (preset core-only).")
if(_torch_failed)
  message(FATAL_ERROR "No PyTorch for KALMANET_PYTHON=${KALMANET_PYTHON}: ${_torch_failed} "
    "${_torch_error}\n${_torch_help}")
endif()
list(GET _torch_found 0 KALMANET_TORCH_DIR)
list(GET _torch_found 1 KALMANET_TORCH_VERSION)
list(GET _torch_found 2 KALMANET_TORCH_CUDA)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" _torch_release "${KALMANET_TORCH_VERSION}")
if(_torch_release VERSION_LESS KALMANET_TORCH_MINIMUM)
  message(FATAL_ERROR "KALMANET_PYTHON=${KALMANET_PYTHON} has PyTorch ${KALMANET_TORCH_VERSION}; "
    "at least ${KALMANET_TORCH_MINIMUM} is needed (its stable ABI).\n${_torch_help}")
endif()
message(STATUS "PyTorch ${KALMANET_TORCH_VERSION} (CUDA: ${KALMANET_TORCH_CUDA}) "
  "in ${KALMANET_TORCH_DIR}")

foreach(_library c10 torch_cpu torch)
  set(_file ${KALMANET_TORCH_DIR}/lib/lib${_library}.so)
  if(NOT EXISTS ${_file})
    message(FATAL_ERROR "${_file} is missing: this PyTorch is incomplete.\n${_torch_help}")
  endif()
  add_library(torch_package_${_library} SHARED IMPORTED GLOBAL)
  set_target_properties(torch_package_${_library} PROPERTIES IMPORTED_LOCATION ${_file})
endforeach()

# Both libraries are recorded as needed by name alone: in another process the operators bind to
# whichever PyTorch is loaded already.
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${KALMANET_TORCH_DIR}/include)
target_compile_definitions(torch_stable INTERFACE
  TORCH_TARGET_VERSION=0x020b000000000000)  # major, minor, patch, tag: torch/headeronly/version.h
target_link_libraries(torch_stable INTERFACE torch_package_torch_cpu torch_package_c10)

# Two libraries are there for what they register when they are loaded, and no symbol of theirs is
# ever named: libtorch.so (the device libraries of a CUDA build) and our own operators. Hence
# --no-as-needed.
add_library(torch_full INTERFACE)
target_include_directories(torch_full SYSTEM INTERFACE
  ${KALMANET_TORCH_DIR}/include ${KALMANET_TORCH_DIR}/include/torch/csrc/api/include)
target_link_libraries(torch_full INTERFACE
  torch_package_torch torch_package_torch_cpu torch_package_c10)
target_link_options(torch_full INTERFACE LINKER:--no-as-needed)
if(NOT KALMANET_TORCH_CUDA STREQUAL "none")
  # libcuda.so.1 comes with the driver, which the machine that builds may lack.
  target_link_options(torch_full INTERFACE LINKER:--allow-shlib-undefined
    LINKER:--unresolved-symbols=ignore-in-shared-libs)
endif()

# torch/torch.h takes seconds to read: it is compiled once, and every room, test and program on
# full LibTorch shares the result. Programs are compiled -fPIC like libraries (not -fPIE) because
# gcc takes a precompiled header only with the flags it was made with.
set(_torch_options -fPIC -fpch-preprocess)
if(KALMANET_SANITIZE)
  # Their templates make these the slow files of a sanitizer build. They run small models there:
  # nothing is gained by optimising.
  list(APPEND _torch_options -O0 ${KALMANET_FEWER_CHECKS})
endif()
add_library(kalmanet_torch_pch OBJECT ${PROJECT_SOURCE_DIR}/cmake/torch_pch.cpp)
target_link_libraries(kalmanet_torch_pch PRIVATE kalmanet_options torch_full)
target_precompile_headers(kalmanet_torch_pch PRIVATE <torch/torch.h>)
target_compile_options(kalmanet_torch_pch PRIVATE ${_torch_options})
set_property(GLOBAL PROPERTY KALMANET_TORCH_OPTIONS ${_torch_options})

# A compiler that reads it holds about 2 GB: no more of them at a time than there is memory for.
cmake_host_system_information(RESULT _megabytes QUERY TOTAL_PHYSICAL_MEMORY)
math(EXPR _torch_jobs "${_megabytes} / 2500")
if(_torch_jobs LESS 1)
  set(_torch_jobs 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS torch_jobs=${_torch_jobs})

# gcc instantiates the header's templates anew at the end of every file, six seconds each
# (-ftime-report: phase lang. deferred): a few files of a target are compiled as one.
option(KALMANET_UNITY "Compile files on full LibTorch together, six at a time" ON)

function(kalmanet_share_torch_pch target)
  target_precompile_headers(${target} REUSE_FROM kalmanet_torch_pch)
  set_target_properties(${target} PROPERTIES UNITY_BUILD ${KALMANET_UNITY} UNITY_BUILD_BATCH_SIZE 6)
  get_property(_options GLOBAL PROPERTY KALMANET_TORCH_OPTIONS)
  target_compile_options(${target} PRIVATE ${_options})
  set_target_properties(${target} PROPERTIES JOB_POOL_COMPILE torch_jobs)
endfunction()

# kalmanet_use_torch(target): full LibTorch with the shared precompiled header, for a target that
# exists already (a program in apps/ or examples/).
function(kalmanet_use_torch target)
  target_link_libraries(${target} PUBLIC torch_full)
  kalmanet_share_torch_pch(${target})
endfunction()

# kalmanet_torch_room(name SOURCES... [DEPENDS targets...]): kalmanet_room on full LibTorch.
function(kalmanet_torch_room name)
  kalmanet_room(${name} ${ARGN})
  kalmanet_use_torch(kalmanet_${name})
endfunction()

# kalmanet_torch_test(name SOURCES... DEPENDS targets... [LABELS ...]): kalmanet_test likewise.
function(kalmanet_torch_test name)
  kalmanet_test(${name} SHARES_TORCH_PCH ${ARGN})
  target_link_libraries(${name} PRIVATE torch_full)
  kalmanet_share_torch_pch(${name})
endfunction()
