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
  add_custom_target(man ALL DEPENDS ${pages})
  install(FILES ${pages} DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
endfunction()
