# Whether the CUDA room is built (KALMANET_CUDA), and how its .cu files are compiled.
#
# nvcc is called by rules of our own instead of through CMake's CUDA language: that keeps the C++
# compiler the linker of everything, asks for no GPU and no test program at configuration, and costs
# a build without CUDA nothing.
set(KALMANET_CUDA auto CACHE STRING "CUDA kernels: ON, OFF, or auto (where nvcc 13 is found)")
set_property(CACHE KALMANET_CUDA PROPERTY STRINGS auto ON OFF)
find_program(KALMANET_NVCC nvcc
  HINTS ${PROJECT_SOURCE_DIR}/.venv/cuda/bin ENV CUDA_HOME ENV CUDA_PATH
  PATHS /usr/local/cuda/bin PATH_SUFFIXES bin
  DOC "The CUDA compiler")

set(KALMANET_WITH_CUDA OFF)
if(KALMANET_CUDA STREQUAL "auto")
  if(KALMANET_NVCC)
    set(KALMANET_WITH_CUDA ON)
  endif()
elseif(KALMANET_CUDA)
  if(NOT KALMANET_NVCC)
    message(FATAL_ERROR "KALMANET_CUDA=ON, but there is no nvcc: install the CUDA toolkit 13 and set "
      "-DKALMANET_NVCC=/path/to/nvcc, or configure with -DKALMANET_CUDA=OFF")
  endif()
  set(KALMANET_WITH_CUDA ON)
endif()

if(KALMANET_WITH_CUDA)
  # nvcc may be a script that starts another one: its own answer says where its toolkit lies.
  execute_process(COMMAND ${KALMANET_NVCC} --dryrun -x cu -c /dev/null -o /dev/null
    OUTPUT_VARIABLE _dryrun ERROR_VARIABLE _dryrun RESULT_VARIABLE _status)
  if(NOT _status EQUAL 0 OR NOT _dryrun MATCHES "#\\$ TOP=([^\n]+)")
    message(FATAL_ERROR "${KALMANET_NVCC} does not work (${_dryrun}); configure with -DKALMANET_CUDA=OFF")
  endif()
  get_filename_component(KALMANET_CUDA_TOOLKIT ${CMAKE_MATCH_1} REALPATH)
  execute_process(COMMAND ${KALMANET_NVCC} --version OUTPUT_VARIABLE _version)
  string(REGEX MATCH "release ([0-9]+)\\.[0-9]+" _release "${_version}")
  if(CMAKE_MATCH_1 VERSION_LESS 12)
    message(FATAL_ERROR "${KALMANET_NVCC} is CUDA ${CMAKE_MATCH_1}; needed: 12 or later (tested: 13.0)")
  endif()
  find_library(KALMANET_CUDART cudart_static REQUIRED NO_CACHE
    PATHS ${KALMANET_CUDA_TOOLKIT} PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib NO_DEFAULT_PATH)
  message(STATUS "CUDA kernels: ${_release}, ${KALMANET_CUDA_TOOLKIT}")
  # Machine code for Ampere and later, for Hopper, and PTX that a driver translates elsewhere. (One
  # alone, for who works on a kernel: -DKALMANET_CUDA_TARGETS=-gencode=arch=compute_90a,code=sm_90a.)
  set(KALMANET_CUDA_TARGETS
    -gencode=arch=compute_80,code=[sm_80,compute_80];-gencode=arch=compute_90a,code=sm_90a
    CACHE STRING "What nvcc makes code for")
  # Lines for profilers: more than half of an object file, and of no use inside a wheel.
  set(KALMANET_CUDA_LINES -lineinfo)
  if(KALMANET_PACKAGE)
    set(KALMANET_CUDA_LINES)
  endif()
else()
  message(STATUS "CUDA kernels: none (KALMANET_CUDA=${KALMANET_CUDA}, nvcc: ${KALMANET_NVCC})")
endif()

# kalmanet_cuda_objects(variable files...): object files of .cu files in the current folder. What
# ptxas says of each kernel's registers and spills lies beside each as name.ptxas.
function(kalmanet_cuda_objects variable)
  set(_objects)
  set(_warnings -Wall,-Wextra)
  if(KALMANET_WERROR)
    set(_warnings ${_warnings},-Werror)
  endif()
  foreach(_file ${ARGN})
    set(_object ${CMAKE_CURRENT_BINARY_DIR}/${_file}.o)
    add_custom_command(OUTPUT ${_object}
      COMMAND sh -c "\"$@\" 2>'${_object}.ptxas' || { cat '${_object}.ptxas' >&2; exit 1; }" sh
        ${KALMANET_NVCC} -c ${CMAKE_CURRENT_SOURCE_DIR}/${_file} -o ${_object}
        -MD -MF ${_object}.d -ccbin ${CMAKE_CXX_COMPILER} -std=c++20 -O3 ${KALMANET_CUDA_LINES}
        ${KALMANET_CUDA_TARGETS} -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden,${_warnings}
        -I${PROJECT_SOURCE_DIR}/src -I${PROJECT_SOURCE_DIR}/include
      DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${_file} DEPFILE ${_object}.d
      COMMENT "nvcc ${_file}" VERBATIM)
    set_source_files_properties(${_object} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
    list(APPEND _objects ${_object})
  endforeach()
  set(${variable} ${_objects} PARENT_SCOPE)
endfunction()
