# Headers and libtorch_cpu of the torch that Python imports, as the target ptk::torch.
# torch's own TorchConfig.cmake is not used: it adds global flags, needs CUDA where torch has it, and links every
# libtorch library, where the stable ABI needs one.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter OPTIONAL_COMPONENTS Development.Module)

execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
  OUTPUT_VARIABLE PTK_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_VARIABLE torch_error RESULT_VARIABLE torch_missing)
if(torch_missing)
  message(FATAL_ERROR "ptkernels builds against an installed torch >= 2.10, and ${Python_EXECUTABLE} has none:\n${torch_error}")
endif()
file(READ ${PTK_TORCH_DIR}/version.py torch_version_py)
string(REGEX MATCH "__version__ = '([^']+)'" _ "${torch_version_py}")
set(PTK_TORCH_VERSION ${CMAKE_MATCH_1})

add_library(ptk_torch INTERFACE)
add_library(ptk::torch ALIAS ptk_torch)
target_include_directories(ptk_torch SYSTEM INTERFACE ${PTK_TORCH_DIR}/include)
target_compile_definitions(ptk_torch INTERFACE TORCH_TARGET_VERSION=${PTK_TORCH_TARGET})
if(APPLE)
  target_link_options(ptk_torch INTERFACE -undefined dynamic_lookup)
else()
  # By its path, so that DT_NEEDED names libtorch_cpu.so. No RPATH: at run time it is the copy torch has loaded.
  target_link_libraries(ptk_torch INTERFACE ${PTK_TORCH_DIR}/lib/libtorch_cpu.so)
  target_link_options(ptk_torch INTERFACE LINKER:--allow-shlib-undefined)
endif()
message(STATUS "torch ${PTK_TORCH_VERSION} at ${PTK_TORCH_DIR}")
