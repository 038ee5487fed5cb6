# The torch-free rooms as one product: libkalmanet.so and libkalmanet.a, and how they are installed
# for find_package(kalmanet) and pkg-config. Included by src/CMakeLists.txt.
find_package(Threads REQUIRED)
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(_rooms core reference cpu api)
if(KALMANET_WITH_CUDA)
  list(APPEND _rooms cuda)
endif()
list(TRANSFORM _rooms REPLACE "(.+)" "$<TARGET_OBJECTS:kalmanet_\\1>" OUTPUT_VARIABLE _objects)
if(KALMANET_WITH_CUDA)  # the ones that nvcc made are files to CMake
  get_property(_cuda_objects GLOBAL PROPERTY KALMANET_CUDA_OBJECTS)
  set_source_files_properties(${_cuda_objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  list(APPEND _objects ${_cuda_objects})
endif()
set(_exports ${PROJECT_SOURCE_DIR}/src/api/exports.map)

foreach(_kind shared static)
  string(TOUPPER ${_kind} _type)
  add_library(kalmanet_${_kind} ${_type} ${_objects})
  target_include_directories(kalmanet_${_kind} INTERFACE
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
    $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  target_link_libraries(kalmanet_${_kind} PRIVATE Threads::Threads $<BUILD_INTERFACE:kalmanet_options>)
  if(KALMANET_WITH_CUDA)
    add_dependencies(kalmanet_${_kind} kalmanet_cuda)
    # The static runtime, which itself looks for the driver at run time
    target_link_libraries(kalmanet_${_kind} PRIVATE ${KALMANET_CUDART} dl rt)
  endif()
  # (The target `kalmanet` is the command, in apps/.)
  set_target_properties(kalmanet_${_kind} PROPERTIES OUTPUT_NAME kalmanet LINKER_LANGUAGE CXX)
endforeach()

# Before 1.0 a minor version may change the C++ names (CHANGELOG.md says so): it is part of the soname.
set_target_properties(kalmanet_shared PROPERTIES
  EXPORT_NAME kalmanet
  VERSION ${PROJECT_VERSION}
  SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
  LINK_DEPENDS ${_exports})
target_link_options(kalmanet_shared PRIVATE LINKER:--version-script=${_exports})
if(NOT KALMANET_SANITIZE AND NOT KALMANET_FUZZ)  # their run-time libraries come with the program
  target_link_options(kalmanet_shared PRIVATE LINKER:-z,defs)
endif()
add_library(kalmanet::kalmanet ALIAS kalmanet_shared)
add_library(kalmanet::kalmanet_static ALIAS kalmanet_static)

install(TARGETS kalmanet_shared kalmanet_static EXPORT kalmanet-targets)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/kalmanet DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

set(_package ${CMAKE_INSTALL_LIBDIR}/cmake/kalmanet)
install(EXPORT kalmanet-targets NAMESPACE kalmanet:: DESTINATION ${_package})
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/kalmanet-config.cmake.in
  ${PROJECT_BINARY_DIR}/kalmanet-config.cmake INSTALL_DESTINATION ${_package}
  NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/kalmanet-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/kalmanet-config.cmake
  ${PROJECT_BINARY_DIR}/kalmanet-config-version.cmake DESTINATION ${_package})

set(KALMANET_PC_CUDA "")
if(KALMANET_WITH_CUDA)
  set(KALMANET_PC_CUDA "${KALMANET_CUDART} -ldl -lrt ")
endif()
# The way from kalmanet.pc to the prefix, so that an installed tree can be moved.
file(RELATIVE_PATH _to_prefix /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
string(REGEX REPLACE "/$" "" KALMANET_PC_PREFIX "\${pcfiledir}/${_to_prefix}")
configure_file(${CMAKE_CURRENT_LIST_DIR}/kalmanet.pc.in ${PROJECT_BINARY_DIR}/kalmanet.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/kalmanet.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
