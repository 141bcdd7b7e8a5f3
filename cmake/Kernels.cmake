# ptk_add_cpu_kernel(<file>.inl): compiles the kernel file once per ISA level, each with that level's flags and in that
# level's namespace. The objects form the target ptk_kernels, which knows nothing of torch.

# gcc warns about its own intrinsics headers (undefined pass-through operands) and about 512-bit vectors on AVX2.
set(PTK_KERNEL_FLAGS -ffp-contract=fast -fno-math-errno -fno-trapping-math
    -Wno-uninitialized -Wno-maybe-uninitialized -Wno-stringop-overflow -Wno-stringop-overread -Wno-restrict -Wno-array-bounds -Wno-psabi)
if(PTKERNELS_EMULATE_ISA)
  # Their logic is what matters; -O3 spends minutes on 512-bit vectors that the target does not have.
  list(APPEND PTK_KERNEL_FLAGS -O1)
else()
  list(APPEND PTK_KERNEL_FLAGS -O3)
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(PTK_LEVELS baseline avx2 avx512 avx512_vnni avx512_bf16 amx)
else()
  set(PTK_LEVELS baseline)
endif()

set(PTK_FLAGS_baseline)
set(PTK_FLAGS_avx2 -mavx2 -mfma -mf16c)
if(PTKERNELS_EMULATE_ISA)
  foreach(level IN ITEMS avx512 avx512_vnni avx512_bf16 amx)
    set(PTK_FLAGS_${level} ${PTK_FLAGS_avx2})
  endforeach()
else()
  set(PTK_FLAGS_avx512 ${PTK_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  set(PTK_FLAGS_avx512_vnni ${PTK_FLAGS_avx512} -mavx512vnni)
  set(PTK_FLAGS_avx512_bf16 ${PTK_FLAGS_avx512_vnni} -mavx512bf16)
  set(PTK_FLAGS_amx ${PTK_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16 -mamx-int8)
endif()

add_library(ptk_kernels OBJECT)
target_link_libraries(ptk_kernels PRIVATE ptk::common)

function(ptk_add_cpu_kernel PTK_KERNEL)
  get_filename_component(name ${PTK_KERNEL} NAME_WE)
  set(PTK_LEVEL_INDEX 0)
  foreach(PTK_LEVEL IN LISTS PTK_LEVELS)
    set(source ${CMAKE_CURRENT_BINARY_DIR}/kernels/${PTK_LEVEL}/${name}.cpp)
    configure_file(cmake/kernel.cpp.in ${source} @ONLY)
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${PTK_KERNEL_FLAGS};${PTK_FLAGS_${PTK_LEVEL}}")
    target_sources(ptk_kernels PRIVATE ${source})
    math(EXPR PTK_LEVEL_INDEX "${PTK_LEVEL_INDEX} + 1")
  endforeach()
endfunction()
