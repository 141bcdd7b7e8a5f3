# ptkernels._introspect, the one part that is tied to a Python: left out where pybind11 or Python's headers are missing.
execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
                OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
set(PYBIND11_FINDPYTHON ON)
if(Python_Development.Module_FOUND AND pybind11_DIR)
  find_package(pybind11 2.13 CONFIG)
endif()
if(NOT pybind11_FOUND)
  message(STATUS "ptkernels._introspect is left out: pybind11 or Python's headers are missing")
  return()
endif()

find_package(Git QUIET)
set(commit unknown)
if(GIT_FOUND AND EXISTS ${CMAKE_SOURCE_DIR}/.git)
  execute_process(COMMAND ${GIT_EXECUTABLE} rev-parse --short HEAD WORKING_DIRECTORY ${CMAKE_SOURCE_DIR}
                  OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  # Grows with every commit and checkout, so that the next build configures anew and the name stays true.
  if(EXISTS ${CMAKE_SOURCE_DIR}/.git/logs/HEAD)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/.git/logs/HEAD)
  endif()
endif()

pybind11_add_module(_introspect MODULE csrc/introspect/module.cpp)
target_link_libraries(_introspect PRIVATE ptk::common ptkernels)
string(TOUPPER ${CMAKE_BUILD_TYPE} build_type)
string(STRIP "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type}}" flags)
string(REPLACE ";" "," cuda_architectures "${PTK_CUDA_ARCHITECTURES}")
target_compile_definitions(_introspect PRIVATE
  PTK_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}" PTK_FLAGS="${flags}"
  PTK_TORCH="${PTK_TORCH_VERSION}" PTK_COMMIT="${commit}" PTK_CUDA_ARCHITECTURES="${cuda_architectures}")
add_dependencies(cpu _introspect)
install(TARGETS _introspect LIBRARY DESTINATION ptkernels)
