# Installs the library to a folder of its own, moves that folder, and builds and runs programs against
# it: through find_package (in C alone, and with C++), and through pkg-config (in C99).
#
#   cmake -D BUILD=... -D WORK=... -D VERSION=... -D LIBDIR=... -D CC=... -D CXX=... -P test.cmake

set(source ${CMAKE_CURRENT_LIST_DIR})

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_VARIABLE output
    ERROR_VARIABLE errors OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT status EQUAL 0)
    string(REPLACE ";" " " command "${ARGN}")
    message(FATAL_ERROR "${command}\nfailed (${status}):\n${output}\n${errors}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK})
# What is being tested here is the folder that was installed, and nothing that the machine has.
foreach(name CMAKE_PREFIX_PATH kalmanet_DIR kalmanet_ROOT LD_LIBRARY_PATH PKG_CONFIG_PATH CFLAGS CXXFLAGS
    LDFLAGS)
  unset(ENV{${name}})
endforeach()

run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/installed)
file(RENAME ${WORK}/installed ${WORK}/moved)
set(prefix ${WORK}/moved)

foreach(with_cxx OFF ON)
  set(folder ${WORK}/with_cxx_${with_cxx})
  run(${CMAKE_COMMAND} -G Ninja -S ${source} -B ${folder} -DCMAKE_PREFIX_PATH=${prefix}
    -DWITH_CXX=${with_cxx} -DEXPECTED_VERSION=${VERSION} -DCMAKE_C_COMPILER=${CC}
    -DCMAKE_CXX_COMPILER=${CXX})
  run(${CMAKE_COMMAND} --build ${folder} --parallel 1)
  run(${CMAKE_CTEST_COMMAND} --test-dir ${folder} --output-on-failure --no-tests=error)
  message(STATUS "find_package, C++ ${with_cxx}: ${output}")
endforeach()

find_program(pkg_config NAMES pkgconf pkg-config REQUIRED)
set(ENV{PKG_CONFIG_PATH} ${prefix}/${LIBDIR}/pkgconfig)
run(${pkg_config} --modversion kalmanet)
if(NOT output STREQUAL VERSION)
  message(FATAL_ERROR "pkg-config says version ${output}, not ${VERSION}")
endif()
run(${pkg_config} --cflags --libs kalmanet)
separate_arguments(flags UNIX_COMMAND "${output}")
run(${CC} -std=c99 -Wall -Wextra -pedantic -Werror ${source}/consumer.c ${flags} -lm
  -o ${WORK}/with_pkg_config)
run(${CMAKE_COMMAND} -E env LD_LIBRARY_PATH=${prefix}/${LIBDIR} ${WORK}/with_pkg_config)
message(STATUS "pkg-config: ${output}")
