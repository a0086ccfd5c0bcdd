# kvl_manual_written(SOURCE NAME SECTION SUMMARY): man/NAME.SECTION of a header or a page of docs/.
macro(kvl_manual_written source name section summary)
  find_package(Python3 QUIET COMPONENTS Interpreter)
  if(Python3_FOUND)
    set(page ${CMAKE_BINARY_DIR}/man/${name}.${section})
    add_custom_command(OUTPUT ${page}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/man
      COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/cmake/man_page.py ${source} ${page} ${name}
        ${section} ${summary}
      DEPENDS ${source} ${CMAKE_SOURCE_DIR}/cmake/man_page.py VERBATIM)
    list(APPEND written ${page})
    install(FILES ${page} DESTINATION ${CMAKE_INSTALL_MANDIR}/man${section})
  endif()
endmacro()

# Manual pages: help2man asks the program itself, so that they cannot say anything else than --help.
# kvl_manual(kvloom demo serve ...): man/kvloom.1 and man/kvloom-<command>.1 of the target.
function(kvl_manual program)
  if(KVLOOM_SANITIZE) # a program that is slow, and may not start without setarch
    return()
  endif()
  find_program(HELP2MAN help2man)
  if(NOT HELP2MAN)
    message(STATUS "help2man is not there: no manual pages")
    return()
  endif()
  set(pages)
  foreach(command "" ${ARGN})
    set(page ${CMAKE_BINARY_DIR}/man/${program}.1)
    if(command)
      set(page ${CMAKE_BINARY_DIR}/man/${program}-${command}.1)
    endif()
    add_custom_command(OUTPUT ${page}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/man
      COMMAND ${HELP2MAN} --no-info --version-string=${PROJECT_VERSION}
        --name=${PROJECT_DESCRIPTION} --output=${page} "./${program} ${command}"
      WORKING_DIRECTORY ${CMAKE_BINARY_DIR}
      DEPENDS ${program} VERBATIM)
    list(APPEND pages ${page})
  endforeach()
  set(written)
  kvl_manual_written(${CMAKE_SOURCE_DIR}/src/kvloom.h kvloom 3
    "exchange KV cache segments with any process on this machine")
  kvl_manual_written(${CMAKE_SOURCE_DIR}/docs/segment-format.md kvseg 5
    "container of the KV cache of a run of tokens")
  add_custom_target(man ALL DEPENDS ${pages} ${written})
  install(FILES ${pages} DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
endfunction()
