# libkvloom: the rooms base, segment, exchange (its local half) and client as one library, static and
# shared. The shared one exports what src/client/kvloom.map says.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(parts ${KVLOOM_CLIENT_SOURCES} ${KVLOOM_BASE_SOURCES} ${KVLOOM_SEGMENT_SOURCES}
  ${CMAKE_SOURCE_DIR}/src/exchange/local.c)
add_library(kvloom_objects OBJECT ${parts})
target_link_libraries(kvloom_objects PRIVATE kvl_flags kvl_proto_kvloom kvl_proto_local
  PkgConfig::SODIUM PkgConfig::XXHASH PkgConfig::JANSSON)

add_library(kvloom_shared SHARED $<TARGET_OBJECTS:kvloom_objects>)
target_link_libraries(kvloom_shared PRIVATE kvl_flags kvl_proto_kvloom kvl_proto_local
  PkgConfig::SODIUM PkgConfig::XXHASH PkgConfig::JANSSON Threads::Threads)
target_link_options(kvloom_shared PRIVATE
  -Wl,--version-script=${CMAKE_SOURCE_DIR}/src/client/kvloom.map -Wl,--as-needed)
set_target_properties(kvloom_shared PROPERTIES OUTPUT_NAME kvloom EXPORT_NAME kvloom
  VERSION ${PROJECT_VERSION} SOVERSION 0 LINK_DEPENDS ${CMAKE_SOURCE_DIR}/src/client/kvloom.map)
target_include_directories(kvloom_shared INTERFACE
  $<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}/src> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
add_library(KVLoom::kvloom ALIAS kvloom_shared)

add_library(kvloom_static STATIC $<TARGET_OBJECTS:kvloom_objects>)
target_sources(kvloom_static PRIVATE ${CMAKE_BINARY_DIR}/generated/kvloom.pb-c.c
  ${CMAKE_BINARY_DIR}/generated/local.pb-c.c)
set_source_files_properties(${CMAKE_BINARY_DIR}/generated/kvloom.pb-c.c
  ${CMAKE_BINARY_DIR}/generated/local.pb-c.c PROPERTIES GENERATED TRUE)
add_dependencies(kvloom_static kvl_proto_kvloom kvl_proto_local)
set_target_properties(kvloom_static PROPERTIES OUTPUT_NAME kvloom)

configure_file(${CMAKE_SOURCE_DIR}/cmake/kvloom.pc.in ${CMAKE_BINARY_DIR}/kvloom.pc @ONLY)
configure_package_config_file(${CMAKE_SOURCE_DIR}/cmake/KVLoomConfig.cmake.in
  ${CMAKE_BINARY_DIR}/KVLoomConfig.cmake INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/KVLoom)
write_basic_package_version_file(${CMAKE_BINARY_DIR}/KVLoomConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)

# cmake --install build/release --component library
install(TARGETS kvloom_shared EXPORT KVLoomTargets COMPONENT library
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT library)
install(TARGETS kvloom_static ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT library)
install(FILES ${CMAKE_SOURCE_DIR}/src/kvloom.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  COMPONENT library)
install(FILES ${CMAKE_BINARY_DIR}/kvloom.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig
  COMPONENT library)
install(EXPORT KVLoomTargets NAMESPACE KVLoom:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/KVLoom
  COMPONENT library)
install(FILES ${CMAKE_BINARY_DIR}/KVLoomConfig.cmake ${CMAKE_BINARY_DIR}/KVLoomConfigVersion.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/KVLoom COMPONENT library)
